"""The bytes of a file, decompressed by its extension (gzip or zstd) and as UTF-8, in bounded memory.

Two things can go wrong, and they are never mixed up. What the bytes say (damaged or cut-off compression) is
``DamagedDataError``: the file is what it is, and everything before the damage has been given out. What the
machine says (no descriptor left, an I/O error, a file that has gone) is ``UnreadableError``: nothing is known
of the content, so nothing may be concluded from it.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

from nanothink.disk import shown
from nanothink.errors import UnreadableError

CHUNK_BYTES = 2**18  # fits the cache of a core; a megabyte was a fifth slower

_READ_BYTES = 2**17  # of a compressed file at a time
_MAX_ZSTD_WINDOW = 2**31
"""Largest window of zstd data: ``zstd --long=31``, the most that the tool writes."""

_ZLIB_NO_MEMORY = "Error -4 "  # Z_MEM_ERROR, which the module gives no name of its own


class DamagedDataError(Exception):
    """The rest of the file cannot be decompressed; the message says why."""


class WrongEncodingError(DamagedDataError):
    """The rest of the file is not text of the encoding that it is read in."""


class Digest(Protocol):
    """The part of hashlib's interface that is used."""

    def update(self, data: bytes, /) -> None: ...


_CHECK = "Check the disk, or the connection to it, and run the command again"
_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "See who may read it (chmod, chown)"),
    errno.EMFILE: "Raise the limit (ulimit -n) and run the command again",
    errno.ENOMEM: "Free some memory and run the command again",
}


def unreadable(path: str | os.PathLike[str], error: OSError | MemoryError, line: int = 0) -> UnreadableError:
    """Make the error for a file or folder that the machine could not read, with a remedy."""
    file = shown(path)
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            what = "the link points to a file that does not exist"
            return UnreadableError(file, what, "Fix or remove the link", line)
        return UnreadableError(file, "the file is gone", "Run the command again", line)
    code = errno.ENOMEM if isinstance(error, MemoryError) else error.errno or 0
    what = os.strerror(code) if code else str(error) or "reading failed"
    return UnreadableError(file, what, _REMEDIES.get(code, _CHECK), line)


class SourceFile:
    """An open file that counts and optionally hashes the bytes read.

    Args:
        path: a regular file.
        on_bytes: called with the number of bytes read since the last call, once they have been used.
        digest: updated with every byte read; ``drain`` reads the rest of the file.
        encoding: of the text, for Python's codecs; ``chunks`` converts it to UTF-8. Empty: as it is.

    Raises:
        UnreadableError: on opening and on reading; also if the file ends before its size.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_bytes: Callable[[int], None] | None = None,
        digest: Digest | None = None,
        encoding: str = "",
    ) -> None:
        self._path, self._on_bytes, self._digest, self._encoding = path, on_bytes, digest, encoding
        self._n_bytes = self._n_told = 0
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise UnreadableError(shown(path), "it is a folder, not a file", "Rename or move it")
            if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
                raise UnreadableError(shown(path), "it is not a regular file", "Rename or move it")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed on leaving
        except (OSError, MemoryError) as error:
            raise unreadable(path, error) from error

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tell()

    def _tell(self) -> None:
        if self._on_bytes and self._n_bytes > self._n_told:
            self._on_bytes(self._n_bytes - self._n_told)
        self._n_told = self._n_bytes

    def read(self, n_bytes: int) -> bytes:
        """Read at most that many bytes; none at the end of the file."""
        self._tell()
        try:
            # At an end that comes before the file's size a read is tried once more: the file may be growing.
            data = self._file.read(n_bytes)
            if not data and self._ends_early():
                data = self._file.read(n_bytes)
            if not data and self._ends_early():
                size = os.fstat(self._file.fileno()).st_size
                what = f"only {self._n_bytes:,} of {size:,} bytes could be read"
                raise UnreadableError(shown(self._path), what, _CHECK)
        except (OSError, MemoryError) as error:
            raise unreadable(self._path, error) from error
        self._n_bytes += len(data)
        if self._digest is not None:
            self._digest.update(data)
        return data

    def _ends_early(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > self._n_bytes

    def drain(self) -> None:
        """Read the rest, so that the digest covers the whole file."""
        while self.read(CHUNK_BYTES):
            pass

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, decompressed if the name ends in .gz or .zst, about CHUNK_BYTES at a time.

        Raises:
            DamagedDataError: the rest cannot be decompressed, or is not of the encoding.
        """
        name = self._path.name.lower()
        if name.endswith(".gz"):
            chunks = _gathered(_gunzip(self))
        elif name.endswith(".zst"):
            chunks = _gathered(_unzstd(self))
        else:
            chunks = iter(lambda: self.read(CHUNK_BYTES), b"")
        return _as_utf8(chunks, self._encoding) if self._encoding else chunks


def _as_utf8(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    n_before, ended = 0, False
    while not ended:
        chunk = next(chunks, b"")
        ended = not chunk
        n_held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, ended)
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode(encoding, "ignore")
            yield good.encode("utf-8", "replace")
            what = "the text ends in the middle of a character"
            if error.start < len(error.object) and not (ended and error.end == len(error.object)):
                what = f"byte 0x{error.object[error.start]:02x} at offset {n_before - n_held + error.start:,}"
                what += f" does not fit the encoding {encoding}"
            raise WrongEncodingError(what) from None
        except UnicodeError:  # of the codecs of UTF-16 and UTF-32
            what = f"the text has no byte-order mark; name {encoding}-le or {encoding}-be"
            raise WrongEncodingError(what) from None
        n_before += len(chunk)
        if text:
            yield text.encode("utf-8", "replace")


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces into chunks. The data before damage is yielded before the error is raised."""
    held: list[bytes] = []
    n_held = 0
    failure: DamagedDataError | None = None
    try:
        for piece in pieces:
            held.append(piece)
            n_held += len(piece)
            if n_held >= CHUNK_BYTES:
                yield b"".join(held)
                held, n_held = [], 0
    except DamagedDataError as error:
        failure = error
    if held:
        yield b"".join(held)
    if failure:
        raise failure


def _gunzip(file: SourceFile) -> Iterator[bytes]:
    # Not gzip.GzipFile: it drops the good data in front of damage, and this is half as much again faster.
    engine = None
    rest = b""
    n_members = 0
    try:
        while data := rest or file.read(_READ_BYTES):
            if engine is None:
                if n_members:  # zeros may follow a member, tape drives and some tools pad with them
                    data = data.lstrip(b"\0")
                    rest = b""
                    if not data:
                        continue
                engine = zlib.decompressobj(wbits=31)
            piece = engine.decompress(data, CHUNK_BYTES)
            rest = engine.unconsumed_tail
            if piece:
                yield piece
            if engine.eof:
                rest = engine.unused_data
                engine = None
                n_members += 1
    except zlib.error as error:
        if _ZLIB_NO_MEMORY in str(error):
            raise MemoryError from error
        raise DamagedDataError(f"damaged gzip data from here on ({error})") from None
    if engine is not None:
        raise DamagedDataError("the gzip data ends too early; the file was cut off")


def _unzstd(file: SourceFile) -> Iterator[bytes]:
    # Fed by the kilobyte, because one call gives out all its input holds: 32 MiB at the most this way.
    # (The library's stream reader is bounded too, but takes a cut file for a complete one.)
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    engine = None
    try:
        while block := file.read(_READ_BYTES):
            view = memoryview(block)
            for at in range(0, len(block), 1024):
                data: bytes | memoryview = view[at : at + 1024]
                while data:
                    if engine is None:
                        engine = context.decompressobj()
                    piece = engine.decompress(data)
                    data = engine.unused_data
                    if piece:
                        yield piece
                    if engine.eof:
                        engine = None
    except zstandard.ZstdError as error:
        if "not enough memory" in str(error):
            raise MemoryError from error
        raise DamagedDataError(f"damaged zstd data from here on ({error})") from None
    if engine is not None:
        raise DamagedDataError("the zstd data ends too early; the file was cut off")
