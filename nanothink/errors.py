"""The exceptions that NanoThink raises, as a tree.

    NanoThinkError            exit 1
    ├── UsageError            exit 2   the command or a setting is wrong
    │   └── ConfigError                a setting, its name or its value
    ├── DataError                      the corpus: missing, empty, malformed, unreadable
    │   ├── BadRecordsError            lines that are not records
    │   ├── UnreadableError            the machine cannot read a file: no permission, an I/O error, gone
    │   └── SeenTextError              text to be scored or validated on that was trained on
    ├── TokenizerError                 a tokenizer that cannot be found, read or used
    ├── CheckpointError
    │   ├── CheckpointNotFoundError
    │   ├── CheckpointDamagedError     truncated, flipped bytes, not a checkpoint at all
    │   ├── CheckpointMismatchError    a sound file that belongs to something else
    │   └── CheckpointBusyError        another run holds this name
    ├── VectorStoreError
    │   ├── VectorStoreNotFoundError
    │   ├── VectorStoreDamagedError    a file of it is missing, cut off or changed
    │   └── VectorStoreMismatchError   a sound one that belongs to another model
    ├── StorageError                   the disk refuses a write: full, read-only, not permitted
    ├── OutputError                    standard output cannot be written: closed, on a full disk
    │   └── ReaderGoneError   exit 141 a pipe whose reader has gone (head); nothing is said
    ├── TrainingDivergedError          too many non-finite losses or gradients in a row, or such weights
    ├── DistributedError               the processes of one run lost each other, or differ
    │   └── RankError                  an error of one of them alone
    └── InterruptedRun        exit 130 stopped by a signal, state saved

A message says what is wrong, where, and what to do about it. The command line prints the message
alone, without a traceback, and leaves with ``exit_code``.
"""

from __future__ import annotations


class NanoThinkError(Exception):
    """Root of the tree: catches every error that NanoThink raises itself."""

    exit_code = 1


class UsageError(NanoThinkError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(NanoThinkError):
    pass


class BadRecordsError(DataError):
    pass


class UnreadableError(DataError):
    """A file could not be read to its end. This is no bad record, so it is never skipped.

    Attributes:
        file: its path, printable.
        line: line reached, from 1; 0 if nothing was read.
        reason: what failed.
        remedy: what to do about it.
    """

    def __init__(self, file: str, reason: str, remedy: str, line: int = 0) -> None:
        at = f", from line {line:,} on" if line > 1 else ""
        super().__init__(f"Cannot read {file}{at}: {reason}. {remedy}.")
        self.file, self.reason, self.remedy, self.line = file, reason, remedy, line


class SeenTextError(DataError):
    """Text to score or to validate on was trained on."""


class TokenizerError(NanoThinkError):
    pass


class CheckpointError(NanoThinkError):
    pass


class CheckpointNotFoundError(CheckpointError):
    pass


class CheckpointDamagedError(CheckpointError):
    pass


class CheckpointMismatchError(CheckpointError):
    pass


class CheckpointBusyError(CheckpointError):
    pass


class VectorStoreError(NanoThinkError):
    pass


class VectorStoreNotFoundError(VectorStoreError):
    pass


class VectorStoreDamagedError(VectorStoreError):
    pass


class VectorStoreMismatchError(VectorStoreError):
    pass


class StorageError(NanoThinkError):
    pass


class OutputError(NanoThinkError):
    def __init__(self, reason: str, then: str = "") -> None:
        then = then or (
            "The result is lost, or cut off. Send it somewhere else, or make room, and run the command again."
        )
        super().__init__(f"Standard output cannot be written: {reason}. {then}")
        self.reason = reason


class ReaderGoneError(OutputError):
    exit_code = 141  # as a shell reports a program that SIGPIPE ended


class TrainingDivergedError(NanoThinkError):
    pass


class DistributedError(NanoThinkError):
    """An error that every process of a run raises; rank 0 prints it."""


class RankError(DistributedError):
    """An error of one process, which prints it itself."""

    @classmethod
    def of(cls, error: NanoThinkError, rank: int, size: int, host: str) -> RankError:
        """Wrap ``error`` with its rank and host, and keep its exit code."""
        named = cls(f"Process {rank} of {size}, on {host}: {error}")
        named.exit_code = error.exit_code
        return named


class InterruptedRun(NanoThinkError):
    exit_code = 130
