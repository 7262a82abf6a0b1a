"""Text of web pages, and the window around what a search engine showed of them (SimpleDeepSearcher, arXiv 2505.16834).

The window follows the released code: the sentence that shares most words with the snippet, 3,000 characters to either
side; where no sentence comes near, the first 6,000 of the page.
"""

import codecs
import dataclasses
import json
import re
import string
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser

PAGE_CHARS = 8_000  # of a page without a snippet
WINDOW_PAGE_CHARS = 50_000  # of a page in which the window is looked for
WINDOW = 3_000  # to either side of the sentence
FALLBACK = 6_000

PAGE_KINDS = ("timeout", "status", "redirects", "private_address", "bad_url", "content_type", "unsupported", "robots",
              "truncated", "unavailable")  # fmt: skip

_HIDDEN = {"script", "style", "noscript", "template", "svg", "iframe", "title"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TAG = re.compile(r"</?(?:b|strong|em|i)\b[^>]*>", re.IGNORECASE)  # with these, engines mark words of the query
_SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'”’)\]]*(?=\s)|(?=\n)|\Z)", re.DOTALL)


class PageError(Exception):
    """A page that could not be read: one of :data:`PAGE_KINDS` and a message."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class WebPage:
    """One entry of a search engine with what was read behind it. ``context`` is the snippet where the page failed, and
    ``error`` says why (kind: message)."""

    id: str
    title: str
    url: str
    site_name: str = ""
    date: str = ""
    snippet: str = ""
    context: str = ""
    error: str = ""


def format_pages(pages: Sequence[WebPage]) -> str:
    """Pages as the summariser reads them: under a heading each, its fields as indented JSON (released code)."""
    fields = ("id", "title", "url", "site_name", "date", "snippet", "context")
    blocks = []
    for number, page in enumerate(pages, start=1):
        shown = {name: getattr(page, name) for name in fields}
        blocks.append(f"**Web Page {number}:**\n{json.dumps(shown, ensure_ascii=False, indent=2)}\n")
    return "".join(blocks)


class _Visible(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden: list[str] = []  # open elements whose text nobody sees

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:  # with the last one of this name ends what was left open inside it
            while self._hidden.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def html_text(html: str) -> str:
    """The visible text of a page, its pieces one space apart. Broken HTML is read as far as it goes."""
    parser = _Visible()
    parser.feed(html)
    parser.close()
    return " ".join(" ".join(parser.pieces).split())


def decode_page(body: bytes, charset: str | None) -> str:
    """The text of a page's bytes: by the charset of its header, or the one it names itself, or UTF-8, or Windows-1252,
    which is what browsers take. What does not decode is replaced."""
    named = re.search(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([\w-]{1,40})""", body[:2048], re.IGNORECASE)
    for name in (charset, named[1].decode("ascii", "replace") if named else None):
        if name and (known := _codec(name)):
            return body.decode(known, "replace")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(body)  # a last character may be cut in two
    except UnicodeDecodeError:
        return body.decode("windows-1252", "replace")


def _codec(name: str) -> str | None:
    """A text encoding by its name in the web, or None: rot13, hex and zip are codecs too."""
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    return info.name if info._is_text_encoding and info.name not in ("idna", "punycode", "undefined") else None


def _words(text: str) -> set[str]:
    return set(text.lower().translate(_NO_PUNCTUATION).split())


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Places (start, end) of sentences: up to a full stop, question or exclamation mark before whitespace, or the end
    of a line."""
    return (match.span() for match in _SENTENCE.finditer(text))


def plain_snippet(snippet: str) -> str:
    """A snippet without the marks of bold words."""
    return _TAG.sub("", snippet)


def page_context(text: str, snippet: str, page_chars: int = PAGE_CHARS) -> str:
    """What is kept of a page's text: the window around its snippet, or without one the first ``page_chars``.

    With W(x) the set of words of x, lower case, without punctuation: the first sentence with the largest F1 of
    W(sentence) and W(snippet) is taken if that is above 0.2, and 3,000 characters to either side of it are kept;
    otherwise the first 6,000. Sentences are looked for in the first 50,000 characters.
    """
    wanted = _words(plain_snippet(snippet))
    if not wanted:
        return text[:page_chars]
    text = text[:WINDOW_PAGE_CHARS]
    best, span = (0, 1), None
    for start, end in sentences(text):
        words = _words(text[start:end])
        # F = 2 |shared| / (|a| + |b|), compared as fractions: 0.2 itself must not pass.
        shared, both = 2 * len(words & wanted), len(words) + len(wanted)
        if shared * best[1] > best[0] * both:
            best, span = (shared, both), (start, end)
    if span is None or 5 * best[0] <= best[1]:
        return text[:FALLBACK]
    return text[max(0, span[0] - WINDOW) : min(len(text), span[1] + WINDOW)]
