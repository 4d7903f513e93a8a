"""The container of a checkpoint: the zip that ``torch.save`` writes, sealed with a digest.

``torch.load`` checks no CRC, so a flipped bit in a weight would be trained on in silence. And CRCs cover
the members only, not headers and padding. So the SHA-256 of all that ``torch.save`` wrote goes into the
comment at the end of the zip, where every zip reader, ``torch.load`` included, passes it over:

    [ zip, as torch.save wrote it, up to the comment length ][ 81 ][ nanothink-sha256:<64 hex digits> ]

A zip without the comment (saved again by a tool of somebody's own) is held to its CRCs instead.

Nothing here unpickles. contents.py follows the pickle's instructions and refuses all but what a dict of
tensors needs, so that hostile files are turned away before ``torch.load(weights_only=True)``, which is the
second wall, sees them. And what is checked is what will be loaded: files that two readers of zip could
read differently (another directory in front, names that differ in case alone) are refused too.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from nanothink.checkpoints.contents import MAX_PICKLE_BYTES, check_pickle
from nanothink.errors import CheckpointDamagedError

_MARK = b"nanothink-sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_COMMENT = re.compile(re.escape(_MARK) + b"[0-9a-f]{64}")
_NOT_TORCH = "is a zip file, but not one that torch.save wrote"
_END_RECORD = 22
"""Bytes of the zip's end-of-central-directory record; its last two are the length of the comment."""

_MAX_DIRECTORY_BYTES = 16 * 2**20
"""Of the zip's directory: some hundred thousand tensors."""

_NAME = re.compile(r"(data\.pkl|version|byteorder|data/[0-9]+|\.[a-z_]+|\.data/serialization_id)")
"""What ``torch.save`` calls its parts, inside their folder."""

_CHUNK = 1 << 22


class DigestingWriter:
    """What ``torch.save`` writes into: every byte reaches the file or an exception says why not.

    PyTorch's own writer turns a failed write into a RuntimeError about positions. Therefore the first
    failure is kept, for the caller to raise, and later writes do nothing.
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

    def seal(self) -> None:
        """Append the digest as the zip's comment. Call once ``torch.save`` has returned."""
        self._file.seek(-2, os.SEEK_END)
        digest = self._digest.hexdigest().encode()
        self._write_all(memoryview(struct.pack("<H", _COMMENT_BYTES) + _MARK + digest))

    def _write_all(self, view: memoryview) -> None:
        while view:
            written = self._file.write(view[:_CHUNK])
            self._digest.update(view[:written])
            view = view[written:]


def damaged(path: Path, reason: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"{path}: {reason}. Nothing was loaded from it. Use another checkpoint "
        f"(`nanothink checkpoints ls` lists them) and delete this one"
    )


def check_archive(
    file: BinaryIO, path: Path, *, thorough: bool, on_progress: Callable[[int, int], None] | None = None
) -> Any:
    """Refuse anything but a sound checkpoint container, without running or unpacking any of it.

    Returns a sketch of what is in it, as ``check_pickle`` makes one.

    ``thorough`` reads every byte and compares digest or CRCs; otherwise only structure and pickle are
    looked at. ``on_progress`` hears of the bytes that have gone into the digest, and of all that will.
    Raises CheckpointDamagedError; OSError when reading fails.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    digest = _read_digest(file, path, n_bytes)
    if thorough and digest is not None and _digest_of(file, n_bytes, on_progress) != digest:
        raise damaged(path, "its content is not what was written (the SHA-256 digest differs)")
    _check_directory(file, path, n_bytes, 0 if digest is None else _COMMENT_BYTES)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            sizes = _check_members(members, path, n_bytes)
            if sizes.get("data.pkl", MAX_PICKLE_BYTES + 1) > MAX_PICKLE_BYTES:
                what = "has a list of contents beyond all measure" if "data.pkl" in sizes else _NOT_TORCH
                raise damaged(path, f"it {what}")
            if thorough and digest is None:
                _check_crcs(archive, path)
            root = members[0].filename.partition("/")[0]
            sketch = check_pickle(
                archive.read(f"{root}/data.pkl"),
                {name.removeprefix("data/"): size for name, size in sizes.items()},
                lambda reason: damaged(path, reason),
            )
    except (zipfile.BadZipFile, struct.error, ValueError, LookupError, EOFError, ArithmeticError) as error:
        raise damaged(path, f"its zip structure is damaged ({error})") from None
    except (RuntimeError, NotImplementedError) as error:  # zip features that torch.save never uses
        raise damaged(path, f"it is a zip file, but not one that torch.save wrote ({error})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position before the start of the file: an invented offset
            raise
        raise damaged(path, "its zip structure is damaged (an offset outside of the file)") from None
    file.seek(0)
    return sketch


def _read_digest(file: BinaryIO, path: Path, n_bytes: int) -> bytes | None:
    """The digest from the end of the file, as hex; None for a zip without a comment."""
    file.seek(0)
    head = file.read(4)
    if not head:
        raise damaged(path, "it is empty (0 bytes)")
    if head[:1] == b"\x80":
        raise damaged(
            path, "it is a bare pickle, which can run code when it is loaded; NanoThink never loads those"
        )
    if head[:2] != b"PK":
        raise damaged(
            path, "it is not a checkpoint (not a file that torch.save wrote), or its start is damaged"
        )
    file.seek(max(0, n_bytes - _END_RECORD - _COMMENT_BYTES))
    tail = file.read()
    end, comment = tail[:_END_RECORD], tail[_END_RECORD:]
    if end[:4] == b"PK\5\6" and end[20:] == struct.pack("<H", _COMMENT_BYTES) and _COMMENT.fullmatch(comment):
        return comment.removeprefix(_MARK)
    if tail[-_END_RECORD:][:4] == b"PK\5\6" and tail[-2:] == b"\0\0":
        return None
    raise damaged(path, f"it was cut short or overwritten (its end is missing; it has {n_bytes:,} bytes)")


def _digest_of(file: BinaryIO, n_bytes: int, on_progress: Callable[[int, int], None] | None) -> bytes:
    """SHA-256 of the zip as it was before it got its comment, as hex."""
    digest = hashlib.sha256()
    file.seek(0)
    remaining = total = n_bytes - _COMMENT_BYTES - 2
    while remaining and (chunk := file.read(min(_CHUNK, remaining))):
        digest.update(chunk)
        remaining -= len(chunk)
        if on_progress is not None:
            on_progress(total - remaining, total)
    digest.update(b"\0\0")
    return digest.hexdigest().encode()


def _check_directory(file: BinaryIO, path: Path, n_bytes: int, comment_bytes: int) -> None:
    """Refuse a directory that is elsewhere than right before the end, or too large to be read.

    Python's reader looks for it before the end, PyTorch's where the end record says: both must agree.
    """
    end = n_bytes - _END_RECORD - comment_bytes
    file.seek(end)
    record = struct.unpack("<4s4H2LH", file.read(_END_RECORD))
    size, start = record[5], record[6]
    if end >= 20 + 56:
        file.seek(end - 20)
        mark, _, end_64, _ = struct.unpack("<4sLQL", file.read(20))
        if mark == b"PK\6\7":  # a file of more than 4 GB has a second end record, and its place after it
            end -= 20 + 56
            file.seek(end)
            record = struct.unpack("<4sQ2H2L4Q", file.read(56))
            if record[0] != b"PK\6\6" or end_64 != end:
                raise damaged(path, "its zip structure is damaged (the end records do not agree)")
            size, start = record[8], record[9]
    if start + size != end:
        raise damaged(path, "its zip structure is damaged (the directory is not where it should be)")
    if size > _MAX_DIRECTORY_BYTES:
        raise damaged(path, f"its zip directory takes {size:,} bytes, which no checkpoint's does")


def _check_members(members: list[zipfile.ZipInfo], path: Path, n_bytes: int) -> dict[str, int]:
    """Sizes of the parts by their names inside the folder that ``torch.save`` puts them in."""
    sizes: dict[str, int] = {}
    for member in members:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise damaged(path, f"its part {name!r} is compressed, which no checkpoint is (a zip bomb?)")
        if member.flag_bits & 1:
            raise damaged(path, f"its part {name!r} is encrypted, which no checkpoint is")
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise damaged(path, f"its part {name!r} has a name that leads out of the file")
        _, _, inside = name.partition("/")
        if inside == "constants.pkl" or inside.startswith("code/"):
            raise damaged(path, "it is a TorchScript program, not a checkpoint")
        if inside in sizes:
            raise damaged(path, f"its part {name!r} is there twice")
        sizes[inside] = member.file_size
    total = sum(member.file_size for member in members)
    if total > n_bytes:
        raise damaged(path, f"its parts claim {total:,} bytes, but the file has {n_bytes:,} (a zip bomb?)")
    for name in (member.filename for member in members):
        root, _, inside = name.partition("/")
        if root != members[0].filename.partition("/")[0] or not _NAME.fullmatch(inside):
            raise damaged(path, f"it {_NOT_TORCH}: it has a part {name!r}")
    return sizes


def _check_crcs(archive: zipfile.ZipFile, path: Path) -> None:
    for member in archive.infolist():
        try:
            with archive.open(member) as part:
                while part.read(_CHUNK):
                    pass
        except zipfile.BadZipFile as error:
            raise damaged(path, f"its part {member.filename!r} is damaged ({error})") from None
