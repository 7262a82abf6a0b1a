"""Passages as a language model reads them: hard caps, and no control tag that the policy's parser could take for real.

What a corpus or a web page says is untrusted. Tags are broken in the finished text, after every cut and every joining,
so that none can arise later.
"""

import dataclasses
from collections.abc import Sequence

from jaxrec.tools.search.base import Passage, one_line
from rl.envs.search import NOTHING, passage_line
from rl.envs.tags import neutralize

STYLES = ("r1_searcher", "numbered")


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
        return passage_line(number, title, text)
    return f"{number}. {title}{f' ({url})' if url else ''}\n{text}"
