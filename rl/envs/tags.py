"""Control tags of language models that search: three styles, how to read what a policy wrote, how to disarm other text.

Everything here works on text whose author is known. A tag counts only where the policy wrote it; text that a tool
returns is disarmed by :func:`neutralize` before the policy sees it.
"""

import dataclasses
import functools
import re
import string
import unicodedata
from collections.abc import Sequence

TOOL = "\x00"  # stands for a tool's segment in ``marked`` texts; no tokenizer makes it of ordinary text
BOX = "\\boxed"
_MARKUP = ("<|", "|>", "</", "<!", *(f"<{letter}" for letter in string.ascii_lowercase))
_LOOKALIKES = {"<": "\u2039", "\\": "\u2216"}  # NFKC leaves these as they are
_OTHER = "\u00b7"


@dataclasses.dataclass(frozen=True)
class TagStyle:
    """A set of tags; "" where a style has none. Only the environment writes the result tags.

    An answer stands in ``\\boxed{}`` unless ``answer_open`` names a tag. think_open ends the prompt. lines: results
    stand on lines of their own. keep_quotes: quotation marks stay in a query (web search reads them as "exactly").
    """

    name: str
    query_open: str
    query_close: str
    result_open: str
    result_close: str
    internal_open: str = ""
    internal_close: str = ""
    think_open: str = ""
    think_close: str = ""
    answer_open: str = ""
    answer_close: str = ""
    lines: bool = True
    keep_quotes: bool = False

    def __post_init__(self):
        for name in ("query_open", "query_close", "result_open", "result_close"):
            if not getattr(self, name):
                raise ValueError(f"tag style {self.name!r} needs {name}")
        for kind in ("internal", "answer"):
            if bool(getattr(self, f"{kind}_open")) != bool(getattr(self, f"{kind}_close")):
                raise ValueError(f"tag style {self.name!r}: {kind}_open and {kind}_close come as a pair")
        if len(set(self.tags)) != len(self.tags):
            raise ValueError(f"tag style {self.name!r} uses one tag for two purposes: {self.tags}")

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of the style, without the box."""
        fields = (
            "query_open", "query_close", "result_open", "result_close", "internal_open", "internal_close", "think_open",
            "think_close", "answer_open", "answer_close",
        )  # fmt: skip
        return tuple(tag for tag in (getattr(self, name) for name in fields) if tag)

    @property
    def exchange(self) -> tuple[str, ...]:
        """The four tags of a search: a query's, which the policy writes, and a result's, which only a tool may."""
        return (self.query_open, self.query_close, self.result_open, self.result_close)

    @property
    def answer_form(self) -> str:
        """How an answer is shown in a prompt, around "..."."""
        return f"{self.answer_open}...{self.answer_close}" if self.answer_open else f"{BOX}{{...}}"


SIMPLE_DEEP_SEARCHER = TagStyle(  # arXiv 2505.16834, appendix E
    "simple_deep_searcher", "<|begin_search_query|>", "<|end_search_query|>", "<|begin_search_result|>",
    "<|end_search_result|>", think_close="</think>", lines=False, keep_quotes=True,
)  # fmt: skip
R1_SEARCHER_PP = TagStyle(  # arXiv 2505.17005
    "r1_searcher_pp", "<external>", "</external>", "<document>", "</document>", "<internal>", "</internal>"
)
R1_SEARCHER = TagStyle(  # arXiv 2503.05592
    "r1_searcher", "<|begin_of_query|>", "<|end_of_query|>", "<|begin_of_documents|>", "<|end_of_documents|>",
    think_open="<think>", think_close="</think>", answer_open="<answer>", answer_close="</answer>",
)  # fmt: skip
STYLES = {style.name: style for style in (SIMPLE_DEEP_SEARCHER, R1_SEARCHER_PP, R1_SEARCHER)}


def find_style(name: str) -> TagStyle:
    """A style by its name. Raises ValueError, naming those that exist."""
    if name not in STYLES:
        raise ValueError(f"unknown tag style {name!r}; styles: {', '.join(STYLES)}")
    return STYLES[name]


def check_round_trip(style: TagStyle, tokenizer) -> None:
    """Raise ValueError when the tokenizer does not give a tag back as it took it: no stop string would be found."""
    for tag in (*style.tags, f"{BOX}{{x}}"):
        back = tokenizer.decode(tokenizer.encode(tag))
        if back.strip() != tag:
            raise ValueError(f"the tokenizer turns the tag {tag!r} of style {style.name!r} into {back!r}")


# --- what the policy wrote --------------------------------------------------------------------------------------------


def parse_query(text: str, style: TagStyle) -> str | None:
    """Query of the last complete pair in one segment of policy text.

    None where no pair is complete; "" where the pair holds nothing, or another tag (a query inside a query is none).
    What stands behind the close tag does not matter: the token that ends the tag may hold more text.
    """
    before, closed, _ = text.rpartition(style.query_close)
    if not closed:
        return None
    start = before.rpartition(style.query_close)[2]  # since the pair before
    if style.query_open not in start:
        return None
    lead, _, body = start.rpartition(style.query_open)
    if style.query_open in lead or any(tag in body for tag in style.tags):
        return ""
    return clean_query(body, style)


def clean_query(body: str, style: TagStyle) -> str:
    """White space as single blanks, and without quotation marks unless the style keeps them."""
    bare = body if style.keep_quotes else re.sub('["\u201c\u201d]', "", body)
    return " ".join(bare.split()) if bare.strip("\"'\u201c\u201d \t\r\n") else ""


def command_spans(text: str, command: str) -> list[tuple[int, int]]:
    r"""Where ``command{...}`` with matching braces stands, e.g. of ``\text``: (first character, one past the last), in
    the order of their beginnings. A brace after a backslash is none; what is never closed does not count, nor does what
    goes on past a ``TOOL``."""
    spans, opened = [], []
    for found in re.finditer(rf"\\.|[{{}}{TOOL}]", text, re.DOTALL):
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == TOOL:
            opened.clear()
        elif found[0] == "}" and opened:
            start = opened.pop() - len(command)
            if text.startswith(command, max(start, 0)) and start >= 0:
                spans.append((start, found.end()))
    return sorted(spans)


def boxes(text: str) -> list[tuple[int, str]]:
    """Start and content of every ``\\boxed{...}``, see :func:`command_spans`; inner boxes are left out."""
    found, reached = [], 0
    for start, end in command_spans(text, BOX):
        if start >= reached:
            found.append((start, text[start + len(BOX) + 1 : end - 1].strip()))
            reached = end
    return found


def answers(text: str, style: TagStyle) -> list[tuple[int, str]]:
    """Start and content of every complete answer in marked policy text, in order; contents may be empty."""
    if not style.answer_open:
        return boxes(text)
    pattern = f"{re.escape(style.answer_open)}((?:(?!{re.escape(style.answer_open)})[^{TOOL}])*?)"
    return [(m.start(), m[1].strip()) for m in re.finditer(pattern + re.escape(style.answer_close), text, re.DOTALL)]


def marked(segments: Sequence[tuple[str, str]]) -> str:
    """Policy text with one ``TOOL`` character where a tool wrote, so that nothing is read across a tool's text."""
    return "".join(text.replace(TOOL, " ") if author == "policy" else TOOL for author, text in segments)


# --- what others wrote ------------------------------------------------------------------------------------------------


def control_tags(style: TagStyle, reserved: Sequence[str] = ()) -> tuple[str, ...]:
    """What text from outside may not hold under a style, for :func:`neutralize`: its tags, ``\\boxed``, whatever looks
    like a tag of any style or model (``<x``, ``</``, ``<|``, ``|>``), and the bare names of tags with underscores,
    which would look like half-written ones. reserved: more strings, such as a tokenizer's special tokens."""
    names = (tag.strip("</|>") for tag in style.tags)
    return (*style.tags, BOX, *_MARKUP, *(name for name in names if "_" in name), *reserved)


def neutralize(text: str, tags: Sequence[str]) -> str:
    """``text`` with the first character of every control tag replaced by one that looks like it; as long as before.

    A tag is found as a lenient reader would see it: in any case and compatible form (``＜/DOCUMENT＞``; some tokenizers
    apply NFKC), with invisible characters inside it, and where tags overlap. ``TOOL`` becomes a blank. Raises
    ValueError for a tag of fewer than two visible characters, or that holds a replacement.
    """
    folded_tags = [_folded_tag(tag) for tag in tags]
    text = text.replace(TOOL, " ")
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


def cut_words(text: str, most: int) -> str:
    """The first ``most`` words with the white space between them as it is."""
    ends = [m.end() for _, m in zip(range(most + 1), re.finditer(r"\S+", text))]
    return text if len(ends) <= most else text[: ends[most - 1]]
