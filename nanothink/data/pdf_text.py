"""Text of PDF files: lines joined to paragraphs, hyphenated words put together, running heads left out.

A PDF holds characters at places and no paragraphs. PDFium gives them in reading order. A paragraph ends where
the gap to the next line, the size of type or the indentation changes, a line where the next word had room.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanothink.data.lines import shown
from nanothink.errors import DataError

MAX_CHARS = 100_000_000
"""Longest text of one file, in characters, and what a page may hold at most is a twentieth of it."""

_HYPHENS = "-\u2010\u00ad"
_LINE_END_HYPHENS = (0x2, 0xFFFE)  # of PDFium, which joins the next line
_BULLET = re.compile(r"([•◦▪‣–—*·-]|\(?\d{1,3}[.)])(\s|$)")
_SENTENCE_END = re.compile(r"[.!?:;…。！？][\"'”’»)\]]*$")
_MIN_PAGES = 3
"""Pages on which a first or last line must recur to be a running head or foot."""


@dataclass
class _Line:
    text: str
    left: float
    right: float
    bottom: float
    size: float


def pdf_text(path: Path, on_part: Callable[[float], None]) -> str:
    """Return the text of a file. ``on_part`` is called with the part of the pages that has been read.

    Raises:
        DataError: it is encrypted, damaged, without text, or without end.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
        n_pages = len(document)
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error):
            raise DataError(
                f"{shown(path)} is encrypted. Write a copy without its password: "
                f"qpdf --password=PASSWORD --decrypt {path.name} open.pdf"
            ) from None
        raise DataError(f"{shown(path)} is damaged, or no PDF file ({error}).") from None
    pages: list[list[_Line]] = []
    n_chars = 0
    try:
        for number in range(n_pages):
            try:
                lines = _page_lines(document, number)
            except pypdfium2.PdfiumError as error:
                raise DataError(f"{shown(path)}, page {number + 1}: it is damaged ({error}).") from None
            n_chars += sum(len(line.text) for line in lines)
            if n_chars > MAX_CHARS:
                raise DataError(f"{shown(path)} holds more than {MAX_CHARS:,} characters. Split it.")
            pages.append(lines)
            on_part((number + 1) / n_pages)
    finally:
        document.close()
    if not n_chars:
        raise DataError(
            f"{shown(path)} has {n_pages} pages and no text: they are pictures, as of a scanner. Recognise "
            f"their text first: ocrmypdf {path.name} text.pdf"
        )
    _drop_running_heads(pages)
    return _joined(pages)


def _page_lines(document: Any, number: int) -> list[_Line]:
    import pypdfium2.raw as pdfium

    page = document[number]
    text_page = page.get_textpage()
    try:
        handle = text_page.raw
        n_chars = text_page.count_chars()
        if n_chars > MAX_CHARS // 20:
            raise DataError(f"Page {number + 1} holds {n_chars:,} characters: it is no page of text.")
        lines: list[_Line] = []
        chars: list[str] = []
        first = last = -1
        for i in range(n_chars + 1):
            code = pdfium.FPDFText_GetUnicode(handle, i) if i < n_chars else 10
            if code in _LINE_END_HYPHENS and chars:
                chars.append("-")
            if code in (10, 13, *_LINE_END_HYPHENS):
                if text := "".join(chars).strip():
                    lines.append(
                        _line(text, text_page, first, last, pdfium.FPDFText_GetFontSize(handle, last))
                    )
                chars, first = [], -1
                continue
            char = chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else ""
            chars.append(char)
            if char and not char.isspace():
                first, last = (i if first < 0 else first), i
        return lines
    finally:
        text_page.close()
        page.close()


def _line(text: str, text_page: Any, first: int, last: int, size: float) -> _Line:
    left = text_page.get_charbox(first, loose=True)[0]
    _, bottom, right, _ = text_page.get_charbox(last, loose=True)  # the first may be a bullet of another font
    return _Line(" ".join(text.replace("\u00a0", " ").split()), left, right, bottom, size)


def _drop_running_heads(pages: list[list[_Line]]) -> None:
    """Remove lines at the edges of pages that recur, but for numbers, and bullets that stand alone."""
    counts: Counter[str] = Counter()
    edges = []
    for lines in pages:
        by_height = sorted(range(len(lines)), key=lambda i: -lines[i].bottom)
        edge = {*by_height[:2], *by_height[-2:]} if len(lines) > 4 else set(by_height[:1] + by_height[-1:])
        edges.append(edge)
        counts.update({_shape(lines[i].text) for i in edge})
    needed = max(_MIN_PAGES, len(pages) / 3)
    for lines, edge in zip(pages, edges, strict=True):
        lines[:] = [
            line
            for i, line in enumerate(lines)
            if not (i in edge and counts[_shape(line.text)] >= needed) and not _is_bare_bullet(line.text)
        ]


def _shape(text: str) -> str:
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", text.lower())


def _is_bare_bullet(text: str) -> bool:
    found = _BULLET.match(text)
    return found is not None and found.end() == len(text)


def _joined(pages: list[list[_Line]]) -> str:
    lines = [line for page in pages for line in page]
    gaps = sorted(gap for a, b in itertools.pairwise(lines) if (gap := a.bottom - b.bottom) > 0.6 * b.size)
    pitch = gaps[len(gaps) // 4] if gaps else 0.0  # most lines of most texts are in a paragraph
    parts: list[str] = []
    before: _Line | None = None
    for page in pages:
        for line in page:
            between = _between(before, line, pitch, page) if before else ""
            if between == " " and _ends_in_hyphen(parts[-1]):
                between = ""  # "Jean-Paul" keeps its hyphen; that of "representa-tion" goes
                if line.text[0].islower():
                    parts[-1] = parts[-1][:-1]
            parts += [between, line.text]
            before = line
    return "".join(parts).replace("\u00ad", "")


def _ends_in_hyphen(text: str) -> bool:
    return text[-1] in _HYPHENS and text[-2:-1].isalnum()


def _between(before: _Line, line: _Line, pitch: float, page: Sequence[_Line]) -> str:
    """What stands between two lines: a blank, a line end, or a blank line."""
    ends = bool(_SENTENCE_END.search(before.text))
    gap = before.bottom - line.bottom
    if abs(before.size - line.size) > 0.15 * max(before.size, line.size, 0.1):
        return "\n\n"
    if gap < 0 or gap > 6 * max(pitch, line.size):  # the next column or page
        return "\n\n" if ends and not line.text[0].islower() else " "
    if gap > max(1.4 * pitch, 1.5 * line.size):
        return "\n\n"
    if _BULLET.match(line.text):
        return "\n"
    if ends and line.left - before.left > 0.8 * line.size:
        return "\n\n"
    if _ends_in_hyphen(before.text):
        return " "
    # Lines beside a column do not begin before its right edge.
    rights = sorted(other.right for other in page if other.left < before.right)
    edge = rights[int(len(rights) * 0.9)] if rights else before.right
    width_of_char = (line.right - line.left) / max(1, len(line.text))
    if edge - before.right > width_of_char * (len(line.text.split(" ")[0]) + 2):
        return "\n\n" if ends else "\n"
    return " "
