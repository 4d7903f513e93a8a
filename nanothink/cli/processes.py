"""The processes that torchrun started, as a command sees them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nanothink.errors import UsageError

if TYPE_CHECKING:
    from nanothink.training.launch import Launch


def launch() -> Launch | None:
    """Settings that torchrun gave this process; None for a run of one process."""
    from nanothink.training.launch import Launch

    return Launch.of(os.environ)


def is_first_process() -> bool:
    """True for the process that prints: the only one, the first, or one that cannot tell its rank."""
    try:
        launched = launch()
    except UsageError:
        return True
    return launched is None or launched.rank == 0


def launched_with_others() -> bool:
    """True if torchrun started this process as one of several."""
    try:
        return launch() is not None
    except UsageError:  # which the command says
        return False
