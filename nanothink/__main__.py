"""The ``nanothink`` command, and ``python -m nanothink``, which torchrun wants."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Hand over to the command line. A Ctrl-C before that is there ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # PyTorch's large tensors in large pages where Linux has them: weights are read a sixth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from nanothink.cli.output import hold_descriptors

    hold_descriptors()
    from nanothink.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
