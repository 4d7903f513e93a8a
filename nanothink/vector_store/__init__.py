"""The vector store: states of one expert over the training text, in which NanoThink searches neighbours."""
