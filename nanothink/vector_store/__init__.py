"""The vector store: a vector store of the training text that a NanoThink can look things up in."""
