"""Text of files in any encoding: the one asked for, what the file's first bytes declare, or UTF-8.

Nothing is guessed in silence. A file that is not UTF-8 is refused with the place, the encoding that it seems
to have, a passage as that encoding reads it, and the option to type. ``AUTO`` takes the guess.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nanothink.config.text_encoding import conversion, wide_encoding
from nanothink.data.lines import shown
from nanothink.data.source_file import DamagedDataError, SourceFile, WrongEncodingError, unreadable
from nanothink.errors import DataError, UsageError
from nanothink.suggestions import again, did_you_mean

AUTO = "auto"
"""Asks for the encoding that each file seems to have."""

_SAMPLE_BYTES = 2**16
_LEAST_CONFIDENCE = 0.03
"""Confidence of chardet below which a text of bytes above 127 is taken for Western European."""

_NO_TEXT = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")
_COMMON = tuple(
    (
        "utf-8 utf-16 utf-16-le utf-16-be utf-32 latin-1 cp1252 cp1250 cp1251 cp437 cp850 shift_jis euc-jp "
        "gb18030 gbk big5 euc-kr koi8-r iso8859-15 mac-roman"
    ).split()
)
_OTHER_KINDS = (
    (b"%PDF-", "a PDF file", ".pdf"),
    (b"PK\x03\x04", "a zip archive (.docx, .epub, .xlsx, .zip)", ""),
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "Parquet", ".parquet"),
    (b"\xd0\xcf\x11\xe0", "a document of an old office program (.doc, .xls)", ""),
    (b"{\\rtf", "rich text (RTF)", ""),
)


def known_encoding(name: str) -> str:
    """Return Python's name of a text encoding, or ``AUTO``. Raises UsageError for any other name."""
    if name.strip().lower() == AUTO:
        return AUTO
    try:
        found = codecs.lookup(name).name
        "a".encode(found)
        codecs.getincrementaldecoder(found)
        if found in _NO_TEXT:
            raise LookupError
    except (LookupError, ValueError):
        likely = did_you_mean(name.strip().lower(), (*_COMMON, AUTO))
        raise UsageError(
            f"There is no encoding {name!r}.{likely} Some that there are: {', '.join(_COMMON)}; "
            f"{AUTO} takes the one that each file seems to have."
        ) from None
    return found


def encoding_of(path: Path, asked: str | None) -> str:
    """Return the encoding to read a file in; empty for UTF-8.

    Raises:
        DataError: the file is no text, or AUTO does not recognise its encoding.
    """
    with reading(path):
        with SourceFile(path) as file:
            start = next(file.chunks(), b"")[:4096]
        for magic, kind, suffix in _OTHER_KINDS:
            if start.startswith(magic):
                rename = f" Rename it to {path.stem}{suffix}." if suffix else ""
                raise DataError(f"{shown(path)} is no text but {kind}, whatever its name says.{rename}")
        if asked and asked != AUTO:
            return "" if codecs.lookup(asked).name == "utf-8" else asked
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"\0\0\xfe\xff")):
            return wide_encoding(start).lower()
        # Without a mark such text may be valid UTF-8 all the same, every second character of it a NUL.
        if 0 in start[:2] and start.count(0) * 4 >= len(start) and (wide := wide_encoding(start)):
            name = codecs.lookup(wide).name
            if asked == AUTO:
                return name
            raise DataError(
                _advice(path, "every second byte or so is a NUL", name, start.decode(name, "ignore"))
            )
        if asked == AUTO and not (found := _scan(path)).fits:
            name, _ = _guess(found.sample)
            if found.is_mixed or not name:
                raise DataError(where_not_utf8(path))
            return name
    return ""


def decoded(path: Path, asked: str | None, declared: Callable[[bytes], str]) -> str:
    """Return the text of a whole file that may declare its encoding itself.

    Raises:
        DataError: it is not of the encoding that was asked for or declared, nor UTF-8.
    """
    data = path.read_bytes()
    names = [asked] if asked and asked != AUTO else [encoding_of(path, None), declared(data), "utf-8-sig"]
    for name in names:
        if not name:
            continue
        try:
            # What calls itself Latin-1 or ASCII is cp1252, as browsers know.
            codec = "cp1252" if name in ("iso8859-1", "ascii") and not asked else name
            return data.decode(codec).lstrip("\ufeff")
        except UnicodeDecodeError as error:
            if asked and asked != AUTO:
                raise WrongEncodingError(
                    f"byte 0x{data[error.start]:02x} at offset {error.start:,} does not fit {name}"
                ) from None
    if asked == AUTO and (guessed := encoding_of(path, AUTO)):
        return data.decode(guessed)
    raise DataError(where_not_utf8(path))


class _Chunks(io.RawIOBase):
    """A SourceFile's chunks as a file of Python's."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._chunks, self._rest = file, file.chunks(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        target = memoryview(buffer)
        n_bytes = min(len(target), len(self._rest))
        target[:n_bytes] = self._rest[:n_bytes]
        self._rest = self._rest[n_bytes:]
        return n_bytes

    def close(self) -> None:
        if not self.closed:
            self._file.__exit__(None, None, None)
        super().close()


def open_text(
    path: Path,
    encoding: str = "",
    *,
    newline: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> TextIO:
    """Open a file, decompressed by its extension, as text after a byte-order mark. Read it in ``reading``."""
    source = SourceFile(path, encoding=encoding, on_bytes=on_bytes)
    return io.TextIOWrapper(io.BufferedReader(_Chunks(source), 2**17), encoding="utf-8-sig", newline=newline)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a DataError with the place and a remedy."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(where_not_utf8(path)) from None
    except WrongEncodingError as error:
        raise DataError(
            f"{shown(path)}: {error}. Name another one, or --encoding {AUTO} for what it seems to have."
        ) from None
    except DamagedDataError as error:
        raise DataError(f"{shown(path)}: {error}.") from None
    except OSError as error:
        raise unreadable(path, error) from None


def is_also_utf8(path: Path) -> bool:
    """Return whether a file is UTF-8 with characters beyond ASCII, which no other encoding is by chance."""
    with reading(path):
        found = _scan(path)
    return found.fits and found.is_mixed


@dataclass(frozen=True)
class _Scan:
    """A file read as UTF-8, up to the first byte that does not fit."""

    is_mixed: bool
    """There are characters beyond ASCII, in UTF-8."""
    fits: bool = True
    offset: int = 0
    byte: int = 0
    """The byte that does not fit, and where it is."""
    sample: bytes = b""
    """The lines around it."""


def _scan(path: Path) -> _Scan:
    offset, rest, is_mixed = 0, b"", False
    with SourceFile(path) as file:
        chunks = file.chunks()
        while True:
            chunk = next(chunks, b"")
            block, fits = rest + chunk, True
            try:
                block.decode()
                taken = len(block)
            except UnicodeDecodeError as error:
                taken, fits = error.start, bool(chunk) and error.reason == "unexpected end of data"
            is_mixed = is_mixed or not block[:taken].removeprefix(codecs.BOM_UTF8).isascii()
            if not fits:
                while len(block) - taken < _SAMPLE_BYTES and (chunk := next(chunks, b"")):
                    block += chunk
                first = max(0, taken - 4096)
                begin = block.rfind(b"\n", first, taken) + 1 or first
                sample = block[begin : taken + _SAMPLE_BYTES]
                return _Scan(is_mixed, False, offset + taken, block[taken], sample)
            if not chunk:
                return _Scan(is_mixed)
            offset += taken
            rest = block[taken:]


def _guess(sample: bytes) -> tuple[str, str]:
    """Likely encoding of some bytes, and the text that they are then; empty if there is none."""
    import chardet

    found = chardet.detect(sample)
    likely = found["encoding"] or ""
    names = [likely, "cp1252"] if found["confidence"] >= _LEAST_CONFIDENCE else ["cp1252", likely]
    for name in names:
        try:
            # The sample may end in the middle of a character.
            text = codecs.getincrementaldecoder(name)().decode(sample) if name else ""
        except (LookupError, UnicodeDecodeError):
            continue
        if text:
            if text == sample.decode("cp1252", "ignore"):  # that of most files, where others read the same
                name = "cp1252"
            return codecs.lookup(name).name, text
    return "", ""


def where_not_utf8(path: Path) -> str:
    """Message for a file that is not UTF-8: the place, the encoding that it seems to have, what to type."""
    found = _scan(path)
    if found.fits:
        return f"{shown(path)} has changed while it was read. Run the command again."
    place = f"byte 0x{found.byte:02x} at offset {found.offset:,} does not fit"
    if found.is_mixed:
        clean = conversion("UTF-8", str(path), f"{path.stem}-utf8{path.suffix}").replace(
            "iconv", "iconv -c", 1
        )
        return (
            f"{shown(path)} is not UTF-8 text: {place}, though UTF-8 stands before it. Fix the file, or drop "
            f"such bytes: {clean}"
        )
    return _advice(path, place, *_guess(found.sample))


def _advice(path: Path, why: str, name: str, text: str) -> str:
    start = f"{shown(path)} is not UTF-8 text: {why}."
    if not name:
        return f"{start} Name its encoding, for example: {again('--encoding', 'shift_jis')}"
    first = next((i for i, char in enumerate(text) if ord(char) > 127), 0)
    passage = " ".join(text[max(0, first - 20) : first + 20].split())
    return f"{start} It looks like {name} ({shown(passage)!r}): {again('--encoding', name)}"
