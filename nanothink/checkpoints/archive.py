"""The container of a checkpoint: the zip that ``torch.save`` writes, sealed with a digest and a summary.

``torch.load`` checks no CRC, so it would load a flipped bit in a weight in silence, and CRCs do not cover
headers and padding. The comment at the end of the zip, which every zip reader ignores, therefore holds the
SHA-256 of everything else, and a summary that makes a listing possible without torch or unpickling:

    [ zip, up to the comment's length ][ length ][ nanothink-sha256:<64 hex digits> <summary as JSON> ]

A zip without a comment (saved again by another program) is checked by its CRCs instead.

A digest finds accidents, not malice. ``torch.load(weights_only=True)`` alone keeps a pickle from running
code, so models from strangers come as exports (export.py, docs/decisions/0030-models-of-others.md).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from nanothink.errors import CheckpointDamagedError
from nanothink.reporter import SILENT, Reporter
from nanothink.suggestions import suggest

_COMMENT = re.compile(rb"nanothink-sha256:([0-9a-f]{64})( \{.*\})?")
_END_RECORD = struct.Struct("<4s4H2LH")
"""The zip's end-of-central-directory record; its last field is the length of the comment."""

_CHUNK = 1 << 22


class DigestingWriter:
    """File object for ``torch.save`` that computes the digest; every byte is written, or an exception raised.

    PyTorch's own writer turns a failed write into a RuntimeError about positions. The first failure is
    therefore kept in ``failure`` for the caller to raise, and later writes do nothing.
    """

    def __init__(self, file: FileIO) -> None:
        self.failure: BaseException | None = None
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        n_bytes = len(view)
        if self.failure is not None:
            return n_bytes
        try:
            self._write_all(view)
        except BaseException as error:  # KeyboardInterrupt too: C++ would not pass it on
            self.failure = error
            raise
        return n_bytes

    def flush(self) -> None:
        """Nothing is buffered here."""

    def seal(self, summary: Mapping[str, Any]) -> None:
        """Append digest and summary as the zip's comment. Call once ``torch.save`` has returned."""
        added = b" " + json.dumps(summary).encode()
        self._digest.update(added)
        comment = b"nanothink-sha256:" + self._digest.hexdigest().encode() + added
        self._file.seek(-2, os.SEEK_END)
        self._write_all(memoryview(struct.pack("<H", len(comment)) + comment))

    def _write_all(self, view: memoryview) -> None:
        while view:
            written = self._file.write(view[:_CHUNK])
            self._digest.update(view[:written])
            view = view[written:]


def damaged(path: Path, reason: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{path}: {reason}. Nothing was loaded from it. Use another checkpoint "
        f"({suggest('checkpoints ls')} lists them) and delete this one"
    )


def check_archive(file: BinaryIO, path: Path, reporter: Reporter = SILENT) -> None:
    """Read every byte and compare it with the digest, or with the CRCs of a zip that has no digest.

    Raises CheckpointDamagedError; OSError when reading fails.
    """
    n_zip, digest, summary = _read_comment(file, path)
    if digest is not None:
        if _digest_of(file, path, n_zip, summary, reporter) != digest:
            raise damaged(path, "its content is not what was written (the SHA-256 digest differs)")
    else:
        _check_crcs(file, path)
    file.seek(0)


def read_sealed_summary(file: BinaryIO, path: Path) -> dict[str, Any] | None:
    """The summary at the end of the file; None if another program saved it. Raises CheckpointDamagedError."""
    _, _, summary = _read_comment(file, path)
    file.seek(0)
    if not summary:
        return None
    try:
        found: dict[str, Any] = json.loads(summary)
    except ValueError:
        raise damaged(path, "its summary is damaged") from None
    return found


def _read_comment(file: BinaryIO, path: Path) -> tuple[int, bytes | None, bytes]:
    """Bytes of the zip without its comment, the digest as hex, and the summary.

    A zip without a comment has neither.
    """
    file.seek(0)
    head = file.read(4)
    if not head:
        raise damaged(path, "it is empty (0 bytes)")
    if head[:1] == b"\x80":
        raise damaged(
            path, "it is a bare pickle, which can run code when it is loaded; NanoThink never loads those"
        )
    if head != b"PK\3\4":
        raise damaged(
            path, "it is not a checkpoint (not a file that torch.save wrote), or its start is damaged"
        )
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, n_bytes - _END_RECORD.size - 0xFFFF))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    comment = tail[at + _END_RECORD.size :]
    if at >= 0 and tail[at:][20:22] == struct.pack("<H", len(comment)):
        if not comment:
            return n_bytes, None, b""
        if sealed := _COMMENT.fullmatch(comment):
            return n_bytes - len(comment), sealed[1], sealed[2] or b""
    raise damaged(path, f"it was cut short or overwritten (its end is missing; it has {n_bytes:,} bytes)")


def _digest_of(file: BinaryIO, path: Path, n_zip: int, summary: bytes, reporter: Reporter) -> bytes:
    """SHA-256 of the zip as it was before it got its comment, and of the summary, as hex."""
    digest = hashlib.sha256()
    file.seek(0)
    remaining = total = n_zip - 2
    while remaining and (chunk := file.read(min(_CHUNK, remaining))):
        digest.update(chunk)
        remaining -= len(chunk)
        reporter.progress(f"verifying {path.name}", total - remaining, total)
    digest.update(b"\0\0" + summary)
    return digest.hexdigest().encode()


def _check_crcs(file: BinaryIO, path: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise damaged(path, f"its part {wrong!r} is damaged (the CRC differs)")
    except CheckpointDamagedError:
        raise
    except Exception as error:  # zipfile raises ValueError, LookupError, struct.error, ... by the damage
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: an offset before the start
            raise
        raise damaged(path, f"its zip structure is damaged ({error})") from None
