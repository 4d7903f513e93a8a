"""Files of records, written whole or not at all, a record at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from io import BufferedWriter
from pathlib import Path

import orjson

from nanothink.data.records import Record
from nanothink.disk import shown, whole_file
from nanothink.disk.write import RawFile
from nanothink.errors import StorageError


class RecordWriter:
    """Writes records into an open file, and can take back the last ones."""

    def __init__(self, file: BufferedWriter[RawFile]) -> None:
        self._file = file
        self.n_records = 0

    def write(self, record: Record) -> None:
        self._file.write(_record_line(record))
        self.n_records += 1

    def mark(self) -> tuple[int, int]:
        return self._file.tell(), self.n_records

    def take_back(self, mark: tuple[int, int]) -> None:
        """Remove what was written since ``mark``."""
        place, self.n_records = mark
        self._file.seek(place)
        self._file.truncate()


@contextlib.contextmanager
def record_file(path: Path, *, overwrite: bool = False) -> Iterator[RecordWriter]:
    """Write a JSON Lines file whole or not at all. Any error of the block leaves the folder as it was.

    Raises:
        StorageError: ``path`` exists and ``overwrite`` is not set, or the disk refuses.
    """
    _refuse_existing(path, overwrite)
    with whole_file(path, before_replace=lambda: _refuse_existing(path, overwrite)) as file:
        yield RecordWriter(file)


def write_records(path: Path, records: Iterable[Record], *, overwrite: bool = False) -> int:
    """Write records with ``record_file``; return their number."""
    with record_file(path, overwrite=overwrite) as writer:
        for record in records:
            writer.write(record)
    return writer.n_records


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise StorageError(
            f"{shown(path)} exists already. Add --overwrite to replace it, or choose another domain."
        )


def record_fields(record: Record) -> dict[str, object]:
    """The object of a record's line."""
    fields = record.model_dump(exclude_none=True, exclude={"turns"})
    if record.messages:
        messages = {"messages": [message._asdict() for message in record.messages]}
        fields = messages | {name: value for name, value in fields.items() if name != "text"}
    return fields


def _record_line(record: Record) -> bytes:
    fields = record_fields(record)
    try:
        return orjson.dumps(fields) + b"\n"
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
