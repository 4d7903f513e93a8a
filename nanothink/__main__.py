"""``python -m nanothink`` is the ``nanothink`` command; torchrun wants it this way."""

from nanothink.cli.app import main

if __name__ == "__main__":
    main()
