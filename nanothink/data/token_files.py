"""Tokenised files on disk: one folder for each content, whole or not there.

    tokens/<tokenizer>/<content>/
        tokens.npy        ids of all documents, each with its EOS; smallest unsigned type that fits
        documents.npy     one DOCUMENT row a document
        summary.json      counts and checksums, and the bad lines passed over

A folder is filled under another name and renamed when everything in it is on disk, so what a killed process
leaves is never read. Every byte is held against its checksum when a folder is opened: a flipped bit would be
trained on, or make an id that no embedding has. Names are fingerprints, so that nothing in a folder is ever
out of date.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from nanothink.data.encoding import TextLostError, Tokenizer
from nanothink.data.lines import shown
from nanothink.data.split import text_key
from nanothink.disk import put_folder, scratch_folder, storage_error, sweep, write_whole
from nanothink.errors import StorageError

DOCUMENT = np.dtype([("end", "<i8"), ("n_bytes", "<i8"), ("key", "<u8"), ("group", "<u8"), ("line", "<i8")])
"""Of one document: where its tokens end in tokens.npy (they begin where the one before ends), its size
in UTF-8 bytes, the hashes of its text and group (split.text_key, split.group_key), and its line."""

NAMED_PROBLEMS = 5
"""Bad lines of a file whose place and reason are kept; the others are counted."""

_FORMAT = 4
_HEADER_BYTES = 256
_CHUNK_CHARS = 1 << 20
_CHUNK_DOCUMENTS = 1 << 14


@dataclass(frozen=True)
class TokenFile:
    """One tokenised file, memory-mapped."""

    tokens: NDArray[Any]
    """(number of tokens,) unsigned"""
    documents: NDArray[Any]
    """(number of documents,) DOCUMENT"""
    n_bad: int
    """Lines that were no records."""
    problems: tuple[tuple[int, int, str], ...]
    """The first of them: line, column, reason."""
    path: str = ""
    """The text file these are the tokens of, from the data root; empty where nobody has said."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def open_token_file(folder: Path) -> TokenFile | None:
    """The tokenised file in ``folder``; None when there is none, or one that is damaged."""
    try:
        summary = orjson.loads((folder / "summary.json").read_bytes())
        tokens = _map(folder / "tokens.npy", np.dtype(summary["dtype"]), summary["tokens"])
        documents = _map(folder / "documents.npy", DOCUMENT, summary["documents"])
        whole = (
            summary["format"] == _FORMAT
            and summary["checksums"] == [_checksum(tokens), _checksum(documents)]
            and (int(documents["end"][-1]) if len(documents) else 0) == len(tokens)
        )
        problems = tuple((int(line), int(column), str(why)) for line, column, why in summary["problems"])
        return TokenFile(tokens, documents, int(summary["bad"]), problems) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(array: NDArray[Any], of_before: int = 0) -> int:
    """CRC-32 of the bytes, which may follow others; more than two gigabytes a second."""
    return zlib.crc32(array.view(np.uint8).data, of_before) if len(array) else of_before


def _map(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    if path.stat().st_size != _HEADER_BYTES + length * dtype.itemsize:
        raise ValueError(f"{path} is cut off")
    with open(path, "rb") as file:  # compared, not parsed: numpy ends a damaged one in errors of all sorts
        if dtype.hasobject or file.read(_HEADER_BYTES) != _header(dtype, length):
            raise ValueError(f"{path} holds something else")
    if length == 0:  # an empty stretch cannot be mapped
        return np.empty(0, dtype)
    array: NDArray[Any] = np.memmap(path, dtype, "r", _HEADER_BYTES, (length,))
    return array


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """Of a .npy file of one dimension, in version 1.0: magic, two bytes of version, two of header length, a
    Python literal, a newline."""
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    literal = repr(described).encode("latin-1").ljust(_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(literal).to_bytes(2, "little") + literal


class TokenFileWriter:
    """Tokenises documents into a folder, in chunks; ``commit`` makes it appear, leaving without drops it.

    Use it under the lock of the cache. Memory depends on the chunk, not on the number of documents.
    ``source`` is the file that the documents stand in, for messages. Raises StorageError when the disk
    refuses, TextLostError for a document that its tokens do not give back.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, source: Path) -> None:
        self._folder, self._tokenizer, self._source = folder, tokenizer, source
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._n_tokens = 0
        self._texts: list[str] = []
        self._lines: list[int] = []
        self._groups: list[int] = []
        self._n_chars = 0

    def __enter__(self) -> TokenFileWriter:
        self._scratch = scratch_folder(self._folder)
        self._work = self._scratch.__enter__()
        try:
            self._tokens = _ArrayFile(self._work / "tokens.npy", self._dtype)
            self._documents = _ArrayFile(self._work / "documents.npy", DOCUMENT)
        except OSError as error:
            self._scratch.__exit__(None, None, None)
            raise storage_error(self._folder, error, False) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._documents):
            with contextlib.suppress(OSError):
                file.abandon()
        self._scratch.__exit__(kind, error, trace)

    def add(self, line: int, text: str, group: int = 0) -> None:
        self._texts.append(text)
        self._lines.append(line)
        self._groups.append(group)
        self._n_chars += len(text)
        if self._n_chars >= _CHUNK_CHARS or len(self._texts) >= _CHUNK_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        eos = np.array([self._tokenizer.eos_id], dtype=self._dtype)
        try:
            encoded = self._tokenizer.encode_batch(self._texts)
        except TextLostError as error:
            raise error.at(f"{shown(self._source)}:{self._lines[error.index]}") from None
        rows = np.empty(len(encoded), DOCUMENT)
        rows["end"] = self._n_tokens + np.cumsum([len(ids) + 1 for ids in encoded])
        rows["n_bytes"] = [len(text.encode()) for text in self._texts]
        rows["key"] = [text_key(text) for text in self._texts]
        rows["group"] = self._groups
        rows["line"] = self._lines
        self._n_tokens = int(rows["end"][-1])
        try:
            self._tokens.append(np.concatenate([part for ids in encoded for part in (ids, eos)]))
            self._documents.append(rows)
        except OSError as error:
            raise storage_error(self._folder, error, False) from error
        self._texts, self._lines, self._groups, self._n_chars = [], [], [], 0

    def commit(self, n_bad: int = 0, problems: Iterable[tuple[int, int, str]] = ()) -> None:
        self._flush()
        summary = {
            "format": _FORMAT,
            "dtype": self._dtype.str,
            "tokens": self._n_tokens,
            "documents": self._documents.length,
            "checksums": [self._tokens.checksum, self._documents.checksum],
            "bad": n_bad,
            "problems": list(problems),
        }
        try:
            self._tokens.finish()
            self._documents.finish()
            (self._work / "summary.json").write_bytes(orjson.dumps(summary))
        except OSError as error:
            raise storage_error(self._folder, error, False) from error
        put_folder(self._work, self._folder)


class _ArrayFile:
    """A .npy file of one dimension whose length is known only at the end: its header is written last."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype, self.length, self.checksum = dtype, 0, 0
        self._file = open(path, "wb")  # noqa: SIM115  closed by finish or abandon
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, array: NDArray[Any]) -> None:
        array = array.astype(self._dtype, copy=False)
        self._file.write(array.tobytes())
        self.length += len(array)
        self.checksum = _checksum(array, self.checksum)

    def finish(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self._dtype, self.length))
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


class Manifest:
    """Digests of files by what the file system says about them, so that unchanged files are not read.

    A file touched within the clock's tick of its digest may change again without a trace, so a
    digest is only remembered for files left alone for two seconds (FAT's resolution).
    """

    _SETTLED_NS = 2 * 10**9

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()
        self._fresh: dict[str, list[Any]] = {}

    def _load(self) -> dict[str, list[Any]]:
        try:
            content = orjson.loads(self._path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return content if isinstance(content, dict) else {}

    def digest(self, path: Path, root: Path, now_ns: int) -> str:
        """BLAKE2b of the file's bytes, 32 hex digits. OSErrors are the caller's to explain."""
        name = os.path.relpath(path, root)
        status = stamp(path)
        known = self._fresh.get(name) or self._known.get(name)
        if isinstance(known, list) and known[:-1] == status:
            return str(known[-1])
        hashed = hashlib.blake2b(digest_size=16)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
        digest = hashed.hexdigest()
        if now_ns - max(status[1], status[2]) > self._SETTLED_NS:
            self._fresh[name] = [*status, digest]
        return digest

    @property
    def has_news(self) -> bool:
        return bool(self._fresh)

    def save(self) -> None:
        """Adds what is new to the file on disk. Only for the holder of the cache's lock."""
        with contextlib.suppress(OSError):
            sweep(self._path)
        if self._fresh:
            with contextlib.suppress(StorageError):  # costs the next run a second reading, nothing else
                write_whole(self._path, orjson.dumps({**self._load(), **self._fresh}))
                self._fresh = {}


def stamp(path: Path) -> list[int]:
    """Changes whenever the file's content does, as far as the file system can tell."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
