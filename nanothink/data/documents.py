"""Text of documents: HTML, Word (docx), EPUB and PDF, each as one string of bounded length.

    .html .htm .xhtml   html_text.py, by lxml
    .docx               mammoth makes HTML of it
    .epub               the HTML of its chapters, in reading order
    .pdf                pdf_text.py, by PDFium

    pip install 'nanothink[documents]'

All of this runs in the process of a ``DocumentReader``, which bounds its memory. An archive that unpacks to
much is refused before it is unpacked.
"""

from __future__ import annotations

import codecs
import contextlib
import posixpath
import re
import resource
import sys
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from nanothink.data.decoding import decoded, reading
from nanothink.data.html_text import html_text
from nanothink.data.lines import shown
from nanothink.data.text_files import file_size
from nanothink.errors import DataError

DOCUMENT_SUFFIXES = {
    "HTML": (".html", ".htm", ".xhtml"),
    "Word": (".docx",),
    "EPUB": (".epub",),
    "PDF": (".pdf",),
}

MAX_MARKUP_BYTES = 64 * 2**20
"""Largest HTML file, and most that the text of an archive may unpack to: its tree takes ten times as much."""


def document_text(kind: str, path: Path, encoding: str | None, on_part: Callable[[float], None]) -> str:
    """Return the text of a document. ``on_part`` may be called with the part that has been read.

    Raises:
        DataError: it cannot be read, with what to do.
    """
    with reading(path):
        if kind == "PDF":
            from nanothink.data.pdf_text import pdf_text

            return pdf_text(path, on_part)
        try:
            return {"HTML": _html, "Word": _word, "EPUB": _epub}[kind](path, encoding)
        except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
            if "password" in str(error):
                raise DataError(f"{shown(path)} is encrypted. Save a copy without a password.") from None
            raise DataError(f"{shown(path)} is damaged, or no {kind} file ({_plain(error)}).") from None
        except ValueError as error:
            raise DataError(f"{shown(path)} cannot be read: {error}.") from None


def serve() -> None:
    """Answer the requests of a ``DocumentReader``, a line each: parts of the work, then a text or a fault."""
    for line in sys.stdin.buffer:
        request = orjson.loads(line)
        with contextlib.suppress(ValueError, OSError):  # not every system has such a bound
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        try:
            text = document_text(
                request["kind"],
                Path(request["path"]),
                request["encoding"],
                lambda part: _answer({"part": part}),
            )
            _answer({"text": text.encode("utf-8", "replace").decode()})
        except DataError as error:
            _answer({"fault": str(error)})


def _answer(found: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
    sys.stdout.buffer.flush()


def _plain(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def _html(path: Path, encoding: str | None) -> str:
    if file_size(path) > MAX_MARKUP_BYTES:
        raise ValueError(f"it takes more than {MAX_MARKUP_BYTES // 2**20} MiB, and a page is held in memory")
    return html_text(decoded(path, encoding, _declared))


def _declared(start: bytes) -> str:
    """Encoding that a page declares; empty if it declares none that there is."""
    found = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", start[:4096], re.IGNORECASE)
    try:
        return codecs.lookup(found.group(1).decode()).name if found else ""
    except LookupError:
        return ""


def _archive(path: Path) -> zipfile.ZipFile:
    """Open a zip archive whose parts are of bounded size."""
    archive = zipfile.ZipFile(path)
    # The reader gives out no more than this, whatever the data hold.
    total = sum(
        part.file_size for part in archive.infolist() if not part.filename.lower().endswith(_PICTURES)
    )
    if total > MAX_MARKUP_BYTES:
        raise ValueError(
            f"its text unpacks to {total:,} bytes, more than {MAX_MARKUP_BYTES // 2**20} MiB. Split it, or "
            "save it as plain text"
        )
    return archive


_ENCRYPTED = "META-INF/encryption.xml"
_PICTURES = tuple(".png .jpg .jpeg .gif .svg .webp .emf .wmf .ttf .otf .woff .woff2 .mp3".split())


def _word(path: Path, encoding: str | None) -> str:
    import mammoth

    with _archive(path) as archive:
        if "word/document.xml" not in archive.namelist() and "[Content_Types].xml" not in archive.namelist():
            raise zipfile.BadZipFile("there is no Word document in it")
    with path.open("rb") as file:
        try:
            page = mammoth.convert_to_html(
                file, convert_image=mammoth.images.img_element(lambda image: {}), external_file_access=False
            )
        except (OSError, MemoryError, zipfile.BadZipFile):
            raise
        except Exception as error:  # of its own parsers, of many kinds
            raise zipfile.BadZipFile(f"{type(error).__name__}: {error}") from None
    return html_text(page.value)


def _epub(path: Path, encoding: str | None) -> str:
    import lxml.etree

    with _archive(path) as archive:
        encrypted = (
            archive.read(_ENCRYPTED).decode("utf-8", "replace") if _ENCRYPTED in archive.namelist() else ""
        )
        try:
            package, base = _package(archive)
        except lxml.etree.XMLSyntaxError as error:
            raise zipfile.BadZipFile(str(error)) from None
        items = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
        chapters = []
        for reference in package.iterfind(".//{*}spine/{*}itemref"):
            item = items.get(reference.get("idref"))
            if item is None or "nav" in (item.get("properties") or "").split():
                continue
            if "html" not in (item.get("media-type") or ""):
                continue
            name = posixpath.normpath(posixpath.join(base, urllib.parse.unquote(item.get("href") or "")))
            if f'"{name}"' in encrypted:
                raise ValueError("it is protected against copying")
            chapters.append(html_text(_page(archive.read(name))))
    return "\n\n".join(chapter for chapter in chapters if chapter)


def _page(data: bytes) -> str:
    """Decode a chapter: UTF-8 unless it declares another encoding."""
    try:
        return data.decode(_declared(data) or "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")


def _package(archive: zipfile.ZipFile) -> tuple[Any, str]:
    """The description of a book, and the folder that its names are relative to."""
    import lxml.etree

    parser = lxml.etree.XMLParser(resolve_entities=False, no_network=True)
    container = lxml.etree.fromstring(archive.read("META-INF/container.xml"), parser)
    root = container.find(".//{*}rootfile")
    name = "" if root is None else root.get("full-path") or ""
    return lxml.etree.fromstring(archive.read(name), parser), posixpath.dirname(name)
