"""The command line: one file a command group; ``render/`` is the only part that knows rich."""
