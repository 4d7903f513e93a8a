"""HTML as text: headings, paragraphs, lists and tables, without scripts, menus and other boilerplate.

Headings and list items are marked as in Markdown, cells of a row stand between vertical bars, a blank line is
between blocks. Of a page that has one ``<main>`` (or one ``<article>``) only that is read.
"""

from __future__ import annotations

import re
from typing import Any

_DROPPED = frozenset(
    (
        "script style noscript template head nav aside form button select dialog iframe object svg math "
        "canvas audio video map textarea input rt rp"
    ).split()
)
_DROPPED_ROLES = frozenset(
    ("navigation", "banner", "contentinfo", "search", "menu", "menubar", "dialog", "alert")
)
_FOOTNOTE_MARK = re.compile(r"\[?[\d*†‡§]{1,3}\]?|[↑↩^]\N{VARIATION SELECTOR-15}?")
"""Text of a link to a footnote, or back from it."""
_BLOCKS = frozenset(
    (
        "p div section article main blockquote figure figcaption address details summary dl dt dd ul ol li "
        "table tr caption pre hr body header footer h1 h2 h3 h4 h5 h6 fieldset center title hgroup section"
    ).split()
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_TIGHT = frozenset(("li", "tr", "dt", "dd", "caption"))
_SPACE = re.compile(r"[ \t\r\n\f\v\xa0]+")


def html_text(markup: str) -> str:
    """Return the text of a page.

    Raises:
        ValueError: it is no HTML, or nested too deeply.
    """
    import lxml.etree
    import lxml.html

    parser = lxml.html.HTMLParser(remove_comments=True, remove_pis=True, huge_tree=True)
    # A declaration of an encoding is about bytes; lxml refuses it in text.
    markup = re.sub(r"\A\s*<\?xml[^>]*\?>", "", markup)
    if not markup.strip():
        return ""
    try:
        root = lxml.html.document_fromstring(markup, parser=parser)
    except (lxml.etree.LxmlError, ValueError) as error:
        raise ValueError(f"no HTML that can be read ({error})") from None
    if any("RESOURCE" in entry.type_name for entry in parser.error_log):
        raise ValueError("its elements are nested too deeply")
    return _Writer().write(_main_part(root))


def _main_part(root: Any) -> Any:
    for path in ("//main", "//*[@role='main']", "//article"):
        found = root.xpath(path)
        if len(found) == 1 and len("".join(found[0].itertext()).split()) > 20:
            return found[0]
    return root


def _is_layout(row: Any) -> bool:
    """True for a row that arranges a page, as pages once were, and holds no data."""
    return len(row) == 1 or any(True for _ in row.iter("table", "h1", "h2", "h3", "h4"))


class _Writer:
    """Walks a tree without recursion and collects blocks of text."""

    def __init__(self) -> None:
        self._blocks: list[str] = []  # what joins each to the one before it, and the block
        self._inline: list[str] = []
        self._prefix = ""
        self._lists: list[list[int]] = []  # number of the last item, and 1 if items are numbered
        self._in_pre = self._in_article = 0
        self._cells: list[str] | None = None
        self._join = "\n\n"

    def write(self, root: Any) -> str:
        stack: list[tuple[Any, bool]] = [(root, False)]
        while stack:
            element, is_end = stack.pop()
            if is_end:
                self._close(element)
                if element is not root:
                    self._add(element.tail)
            elif self._is_dropped(element):
                self._add(element.tail)
            else:
                stack.append((element, True))
                self._open(element)
                stack.extend((child, False) for child in reversed(element))
        self._end_block()
        return "".join(self._blocks[1:])

    def _is_dropped(self, element: Any) -> bool:
        tag = element.tag
        if not isinstance(tag, str):  # an entity or the like
            return True
        if tag in _DROPPED or element.get("hidden") is not None or element.get("aria-hidden") == "true":
            return True
        if tag in ("header", "footer") and not self._in_article and element.find(".//h1") is None:
            return True
        if tag == "a" and "#" in (element.get("href") or ""):
            return bool(_FOOTNOTE_MARK.fullmatch("".join(element.itertext()).strip()))
        style = (element.get("style") or "").replace(" ", "").lower()
        return element.get("role") in _DROPPED_ROLES or "display:none" in style

    def _open(self, element: Any) -> None:
        tag = element.tag
        if tag == "br":
            self._inline.append("\n")
        elif tag in ("td", "th"):
            self._end_block() if self._cells is None else self._flush_into_cell()
        elif tag in _BLOCKS and self._cells is None:
            self._end_block()
            if tag in _HEADINGS:
                self._prefix = _HEADINGS[tag]
            elif tag in ("ul", "ol"):
                self._lists.append([0, tag == "ol"])
            elif tag == "li" and self._lists:
                self._lists[-1][0] += 1
                number, is_numbered = self._lists[-1]
                indent = "  " * (len(self._lists) - 1)
                self._prefix = f"{indent}{number}. " if is_numbered else f"{indent}- "
            elif tag == "tr" and not _is_layout(element):
                self._cells = []
        elif tag in _BLOCKS:
            self._inline.append(" ")
        self._in_pre += tag == "pre"
        self._in_article += tag in ("article", "main", "section")
        self._add(element.text)

    def _close(self, element: Any) -> None:
        tag = element.tag
        self._in_pre -= tag == "pre"
        self._in_article -= tag in ("article", "main", "section")
        if tag in ("td", "th"):
            self._end_block() if self._cells is None else self._flush_into_cell(ended=True)
        elif tag == "tr" and self._cells is not None:
            cells, self._cells = self._cells, None
            while cells and not cells[-1]:
                cells.pop()
            self._inline = [" | ".join(cells)]
            self._end_block(tight=True)
        elif tag in _BLOCKS and self._cells is None:
            self._end_block(pre=tag == "pre", tight=tag in _TIGHT)
            if tag in ("ul", "ol") and self._lists:
                self._lists.pop()
            if tag in ("ul", "ol", "table", "dl") and not self._lists:
                self._join = "\n\n"
        elif tag in _BLOCKS:
            self._inline.append(" ")

    def _add(self, text: str | None) -> None:
        if text:
            self._inline.append(text if self._in_pre else _SPACE.sub(" ", text))

    def _flush_into_cell(self, *, ended: bool = False) -> None:
        if ended and self._cells is not None:
            self._cells.append(" ".join("".join(self._inline).split()))
        self._inline = []

    def _end_block(self, *, pre: bool = False, tight: bool = False) -> None:
        raw = "".join(self._inline)
        self._inline = []
        if pre:
            text = raw.strip("\n")
        else:
            text = "\n".join(
                " ".join(line.split(" ")).strip() for line in re.sub(r" +", " ", raw).split("\n")
            )
            text = text.strip()
        if not text or text.isspace():
            return
        self._blocks += [self._join, self._prefix + text]
        self._prefix = ""
        self._join = "\n" if tight or self._lists else "\n\n"
