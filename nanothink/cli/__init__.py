"""The command line: one file a command group; ``render.py`` is the only one that knows rich."""
