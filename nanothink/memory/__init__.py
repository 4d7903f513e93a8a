"""The vector store: a memory of the training text that a NanoThink can look things up in."""
