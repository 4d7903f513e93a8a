"""Reporting, for the whole package: notes, progress and the events of a training run.

The core never prints. A function that takes long or may meet something unusual has a parameter
``reporter: Reporter = SILENT`` and calls it::

    reporter.note("Tokens are kept in another folder.")
    reporter.progress("tokenising", done, total)
    advance = reporter.counter("verifying model.pt", total_bytes)  # for work that comes in pieces
    reporter.event(StepDone(...))                                  # training only, see training/events.py

The function that does the work names its stage. The caller passes its own reporter on, unchanged. The
command line shows what it receives (``cli/render``), the run's records keep the events
(``training/recording.py``), a test keeps what it wants to check.
"""

from __future__ import annotations

from collections.abc import Callable


class Reporter:
    """Receives reports and ignores them. A subclass overrides those that it shows or keeps.

    A method may be called from another thread than the one that does the work.
    """

    def note(self, message: str) -> None:
        """Receive one line for a person: something unusual, or a choice that was made."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Receive the amount of work done. The unit is the stage's own; a ``total`` of 0 is unknown.

        ``done == total > 0`` ends a stage; one of the same name may follow.
        """

    def event(self, event: object) -> None:
        """Receive an event of a training run: a frozen dataclass of ``training/events.py``."""

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """Report the start of ``stage``; return ``advance(n)``, which adds ``n`` to its work and reports it.

        A file that grows while it is read does not push the work done beyond ``total``.
        """
        done = 0
        if total:
            self.progress(stage, done, total)

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.progress(stage, min(done, total), total)

        return advance


SILENT = Reporter()
"""Ignores every report."""
