"""Passages as a language model reads them: hard caps, and no control tag that the policy's parser could take for real.

What a corpus or a web page says is untrusted. Tags are broken in the finished text, after every cut and every joining,
so that none can arise later; they are found as a lenient reader would see them, without regard to case, to compatible
forms of characters (NFKC, which some tokenizers apply) and to invisible ones.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

from jaxrec.tools.search.base import Passage, one_line

STYLES = ("r1_searcher", "numbered")
NOTHING = "None"  # what stands in place of passages where nothing was found (R1-Searcher)
_LOOKALIKES = {"<": "\u2039", "\\": "\u2216"}  # NFKC leaves these as they are
_OTHER = "\u00b7"


@dataclasses.dataclass(frozen=True)
class Caps:
    """Limits of a response. Words are runs without whitespace, of titles and texts; the mark of a cut counts for none.

    The defaults are those recommended for R1-Searcher++ (150 words per passage, 750 per call). characters bounds texts
    that have no spaces.
    """

    passage_words: int = 150
    response_words: int = 750
    characters: int = 12_000

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")


def format_passages(
    passages: Sequence[Passage] | None, style: str = "r1_searcher", *, tags: Sequence[str], caps: Caps = Caps()
) -> str:
    """The text between the result tags, at most ``caps`` long.

    style: "r1_searcher" is a line ``(1)title   text`` per passage (R1-Searcher, arXiv 2503.05592, released code);
    "numbered" is ``1. title`` with its address where it has one, then the text, blocks one blank line apart
    (SimpleDeepSearcher, arXiv 2505.16834). tags: the policy's control tags, neutralised. A passage that is cut ends in
    "..."; passages past the response's cap are left out. No passages: "None".
    Raises ValueError for an unknown style, or for None, the passages of a failed search.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r} of passages; styles: {', '.join(STYLES)}")
    if passages is None:
        raise ValueError("a failed search has no passages: tell the policy that the search failed instead")
    lines, words = [], caps.response_words
    for number, passage in enumerate(passages, start=1):
        room = min(words, caps.passage_words)
        if not room:
            break
        title, text = one_line(passage.title).split()[: room - 1], one_line(passage.text).split()
        kept = text[: room - len(title)]
        body = " ".join(kept) + (" ..." if len(kept) < len(text) else "")
        words -= len(title) + len(kept)
        lines.append(_line(style, number, " ".join(title), one_line(passage.url), body))
    if not passages:
        return NOTHING
    text = ("\n" if style == "r1_searcher" else "\n\n").join(lines)
    if len(text) > caps.characters:
        text = (text[: max(caps.characters - 4, 0)].rstrip() + " ...")[: caps.characters]
    return neutralize(text, tags)


def _line(style: str, number: int, title: str, url: str, text: str) -> str:
    if style == "r1_searcher":
        return f"({number}){title}   {text}"
    return f"{number}. {title}{f' ({url})' if url else ''}\n{text}"


def neutralize(text: str, tags: Sequence[str]) -> str:
    """``text`` with the first character of every control tag replaced by one that looks like it; as long as before.

    A tag is found in any case and compatible form (``＜/DOCUMENT＞``), with invisible characters inside it, and where
    tags overlap. Raises ValueError for a tag of fewer than two visible characters, or that holds a replacement.
    """
    folded_tags = [_folded_tag(tag) for tag in tags]
    while starts := _starts(text, folded_tags):
        letters = list(text)
        for start in starts:
            letters[start] = _LOOKALIKES.get(_fold(letters[start])[:1], _OTHER)
        text = "".join(letters)
    return text


def _folded_tag(tag: str) -> str:
    if not isinstance(tag, str):
        raise ValueError(f"control tags are texts, not {tag!r}")
    folded = "".join(map(_fold, tag))
    if len(folded.strip()) < 2 or folded[0].isspace() or set(folded) & {*_LOOKALIKES.values(), _OTHER}:
        raise ValueError(
            f"control tag {tag!r} cannot be neutralised: it needs two visible characters, the first one so"
        )
    return folded


@functools.lru_cache(maxsize=65_536)
def _fold(character: str) -> str:
    """What a lenient reader makes of a character: "" where it is invisible."""
    if unicodedata.category(character) in ("Cf", "Mn") or "\ufe00" <= character <= "\ufe0f":
        return ""
    return unicodedata.normalize("NFKC", character).casefold()


def _starts(text: str, tags: Sequence[str]) -> set[int]:
    """Places in ``text`` of the characters with which folded tags begin; those of overlapping ones too."""
    if text.isascii():
        folded, places = text.lower(), range(len(text))
    else:
        pieces = [_fold(character) for character in text]
        folded, places = "".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]
    starts = set()
    for tag in tags:
        at = folded.find(tag)
        while at >= 0:
            starts.add(places[at])
            at = folded.find(tag, at + 1)
    return starts
