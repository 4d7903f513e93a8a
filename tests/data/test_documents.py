"""HTML, Word, EPUB and PDF become plain text; what cannot is named with what to do."""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from nanothink.data.document_process import DocumentReader
from nanothink.data.documents import DOCUMENT_SUFFIXES, document_text
from nanothink.data.html_text import html_text
from nanothink.data.importing import import_source
from nanothink.errors import DataError

pytest.importorskip("lxml")
pytest.importorskip("mammoth")
pytest.importorskip("pypdfium2")

WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
TYPES = """<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Override PartName="/word/document.xml"
 ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>"""
RELATIONS = """<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="r" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
 Target="word/document.xml"/></Relationships>"""


def packed(path: Path, parts: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def docx(path: Path, body: str, **more: Any) -> Path:
    document = f"<w:document {WORD}><w:body>{body}</w:body></w:document>"
    parts = {"[Content_Types].xml": TYPES, "_rels/.rels": RELATIONS, "word/document.xml": document}
    return packed(path, parts | more)


def paragraph(text: str, style: str = "") -> str:
    look = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{look}<w:r><w:t>{text}</w:t></w:r></w:p>"


def epub(path: Path, chapters: dict[str, str], **more: Any) -> Path:
    items = "".join(
        f'<item id="c{i}" href="{name}" media-type="application/xhtml+xml"/>'
        for i, name in enumerate(chapters)
    )
    order = "".join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(chapters))))
    return packed(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
            '<rootfiles><rootfile full-path="OEBPS/b.opf"/></rootfiles></container>',
            "OEBPS/b.opf": '<package xmlns="http://www.idpf.org/2007/opf">'
            f"<manifest>{items}</manifest><spine>{order}</spine></package>",
            **{f"OEBPS/{name.replace('%20', ' ')}": text for name, text in chapters.items()},
            **more,
        },
    )


def pdf(path: Path, *pages: str | bytes, trailer: str = "") -> Path:
    """A PDF file of pages, each as its drawing commands."""
    n = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(n))
    objects: list[bytes] = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {n}/Kids[{kids}]>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, page in enumerate(pages):
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>"
            + f"/Contents {5 + 2 * i} 0 R>>".encode()
        )
        data = zlib.compress(page.encode() if isinstance(page, str) else page)
        head = f"<</Length {len(data)}/Filter/FlateDecode>>stream\n".encode()
        objects.append(head + data + b"\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer<</Root 1 0 R"
    path.write_bytes(out + end.encode() + f"{trailer}>>\nstartxref\n{len(out)}\n%%EOF".encode())
    return path


def lines(*texts: str, top: int = 700, left: int = 50) -> str:
    """Commands that draw lines of text one below the other."""
    return "".join(
        f"BT /F 12 Tf {left} {top - 14 * i} Td ({text}) Tj ET\n" for i, text in enumerate(texts) if text
    )


def text_of(path: Path, encoding: str | None = None) -> str:
    kind = next(kind for kind, suffixes in DOCUMENT_SUFFIXES.items() if path.suffix.lower() in suffixes)
    return document_text(kind, path, encoding, lambda part: None)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "<h2>A&amp;B</h2><p>One\n two<br>three</p><div>four <b>five</b></div>",
            "## A&B\n\nOne two\nthree\n\nfour five",
        ),
        ("<p>x<ul><li>a<ol><li>b<li>c</ol><li>d</ul>y", "x\n\n- a\n  1. b\n  2. c\n- d\n\ny"),
        ("<table><tr><th>n<th>v<tr><td>a<td><p>1<p>2</table>", "n | v\na | 1 2"),
        ("<table><tr><td><h1>T</h1><p>p<td>side</table>", "# T\n\np\n\nside"),
        ("<nav>menu</nav><header>site</header><script>x()</script><p>text<footer>(c)</footer>", "text"),
        ("<p>a<p hidden>b<p style='display: none'>c<div role=navigation>d</div>", "a"),
        ("<pre>if x:\n    y</pre><p>z<a href='#f1'>[1]</a><a href='#up'>part</a>", "if x:\n    y\n\nzpart"),
        ("<?xml version='1.0' encoding='utf-8'?><html><body><p>é&nbsp;x", "é x"),
        ("", ""),
    ],
)
def test_html_is_text_without_boilerplate(page, text):
    assert html_text(page) == text


def test_html_of_any_declared_encoding(tmp_path):
    for head, encoding in [("<meta charset=iso-8859-1>", "cp1252"), ("", "utf-8"), ("", "utf-16")]:
        page = tmp_path / "a.HTM"
        page.write_bytes(f"<html><head>{head}</head><p>“Größe”".encode(encoding))
        assert text_of(page) == "“Größe”"
    page.write_bytes("<p>Größe über alles".encode("cp1252"))
    with pytest.raises(DataError, match="`--encoding cp1252`"):
        text_of(page)
    for encoding in ("cp1252", "auto"):
        assert text_of(page, encoding=encoding) == "Größe über alles"


def test_word_and_epub_keep_their_structure(tmp_path):
    row = "<w:tr><w:tc>" + paragraph("a") + "</w:tc><w:tc>" + paragraph("1") + "</w:tc></w:tr>"
    body = paragraph("Chapter", "Heading1") + paragraph("Some é words.") + f"<w:tbl>{row}</w:tbl>"
    assert text_of(docx(tmp_path / "a.docx", body)) == "# Chapter\n\nSome é words.\n\na | 1"
    chapters = {"b%20b.xhtml": "<html><body><p>Last é.</p></body></html>", "a.xhtml": "<h1>First</h1>"}
    assert text_of(epub(tmp_path / "b.epub", chapters)) == "# First\n\nLast é."


def test_pdf_lines_become_paragraphs(tmp_path):
    body = {
        1: (
            "A paragraph of several lines is put together, and the char-",
            "acters of a word that was hyphenated at the end of a line too.",
            "",
            "Next.",
        ),
        2: ("A second page is here, and Jean-", "Paul has his hyphen, until the end of the page and so"),
        3: (
            "beyond it. This line is as long as those of the pages before.",
            "",
            "short",
            "lines",
            "of a list",
        ),
    }
    pages = [
        lines(f"Journal, page {i}", top=780) + lines(*body[i]) + lines(str(i), top=20) for i in sorted(body)
    ]
    paragraphs = text_of(pdf(tmp_path / "a.pdf", *pages)).split("\n\n")
    assert paragraphs == [
        "A paragraph of several lines is put together, and the characters of a word that was hyphenated at "
        "the end of a line too.",
        "Next.",
        "A second page is here, and Jean-Paul has his hyphen, until the end of the page and so beyond it. "
        "This line is as long as those of the pages before.",
        "short\nlines\nof a list",
    ]


def test_documents_that_cannot_be_read_are_named_with_what_to_do(tmp_path):
    encrypt = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{'41' * 32}>/U<{'42' * 32}>>>/ID[<43><43>]"
    bomb = b" " * (65 * 2**20)
    chapter = {"a.xhtml": "<p>x"}
    drm = {"META-INF/encryption.xml": '<r><CipherReference URI="OEBPS/a.xhtml"/></r>'}
    for path, said in [
        (pdf(tmp_path / "a.pdf", lines("x"), trailer=encrypt), "encrypted.*qpdf --password"),
        (pdf(tmp_path / "b.pdf", "0 0 9 9 re f"), "1 pages? and no text.*ocrmypdf"),
        (docx(tmp_path / "d.docx", "", **{"word/x.xml": bomb}), "unpacks to 68,1.* more than 64 MiB"),
        (epub(tmp_path / "e.epub", chapter, **{"OEBPS/x.xhtml": bomb}), "unpacks to 68,1.* more than 64 MiB"),
        (epub(tmp_path / "f.epub", chapter, **drm), "protected against copying"),
        (packed(tmp_path / "g.docx", {"a.txt": "x"}), "damaged, or no Word file"),
        (packed(tmp_path / "h.epub", {"a.txt": "x"}), "damaged, or no EPUB file"),
    ]:
        with pytest.raises(DataError, match=said) as error:
            text_of(path)
        assert path.name in str(error.value)
    for name in ("z.pdf", "z.docx", "z.epub"):
        (tmp_path / name).write_bytes(b"none of the kind")
        with pytest.raises(DataError, match="damaged, or no"):
            text_of(tmp_path / name)
    with pytest.raises(ValueError, match="nested too deeply"):
        html_text("<p>before" + "<div>" * 5000 + "deep")


def test_a_reader_that_needs_too_much_or_dies_ends_one_document(tmp_path, monkeypatch):
    bomb = pdf(tmp_path / "bomb.pdf", b"BT /F 1 Tf " + b"(x) Tj " * 1_000_000)
    sound = pdf(tmp_path / "sound.pdf", lines("Still read."))
    monkeypatch.setattr("nanothink.data.document_process.MAX_MEMORY_BYTES", 2**29)
    told: list[int] = []
    with DocumentReader() as reader:
        for seconds, said in [
            (60.0, "needed more than 0 GiB of memory"),
            (0.01, "takes longer than 0 seconds"),
        ]:
            monkeypatch.setattr("nanothink.data.document_process.SECONDS", seconds)
            with pytest.raises(DataError, match=said):
                reader.text("PDF", bomb, None, told.append)
        monkeypatch.setattr("nanothink.data.document_process.SECONDS", 60.0)
        told.clear()
        assert reader.text("PDF", sound, None, told.append) == "Still read."
        assert sum(told) == sound.stat().st_size
        monkeypatch.setitem(sys.modules, "mammoth", None)
        with pytest.raises(
            DataError, match=r"sound.pdf needs mammoth: .*pip install 'nanothink\[documents\]'"
        ):
            reader.text("PDF", sound, None, told.append)


def test_a_folder_of_documents_is_one_import(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("plain")
    (folder / "b.HTML").write_text("<p>page")
    (folder / "broken.pdf").write_text("no PDF")
    docx(folder / "c.docx", paragraph("word " * 3000))
    with pytest.raises(DataError, match=r"broken.pdf is damaged"):
        import_source(folder, domain="d", data_dir=tmp_path / "out")
    report = import_source(folder, domain="d", data_dir=tmp_path / "out", skip_bad_files=True)
    records = [json.loads(line) for line in report.path.read_text("utf-8").splitlines()]
    assert [record["source"] for record in records] == ["a.txt", "b.HTML", "c.docx", "c.docx"]
    assert records[2]["group"] == records[3]["group"]
    assert [Path(bad.file).name for bad in report.findings.bad_files.named()] == ["broken.pdf"]
