"""Scores of short answers against the right ones: exact match, substring match, cover match and token F1; and how an
answer is read from a response, a verdict from a judge's reply.

All scores are between 0 and 1, take the best of several right answers (aliases), and compare normalised texts. Two
normalisations are in use, see :func:`normalize_answer`. An answer with nothing left after normalisation never matches,
where the released evaluations let nothing match nothing. Multiply means by 100 for the numbers that papers print.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rl.envs.tags import BOX, command_spans

COVER_FORMS = ("tokens", "run", "substring", "overlap")
NORMALIZATIONS = ("squad", "r1_searcher")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_BOOLEANS = {"True": "yes", "False": "no"}
_CLOSED = ("yes", "no", "noanswer")


def normalize_answer(text: str, normalization: str = "squad") -> str:
    """Lower case, without punctuation and the articles a, an, the, words one space apart.

    "squad" deletes ASCII punctuation (SQuAD's evaluation, HotpotQA's, SimpleDeepSearcher's): "U.S.A." is "usa",
    "well-known" is "wellknown". "r1_searcher" (arXiv 2503.05592, 2505.17005) puts a space in its place, in that of
    ‘ ’ ´ too, so that "well-known" is "well known", and reads the texts True and False as yes and no. Punctuation goes
    before articles in both: "a-b" is "ab" or "b".
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {normalization!r}")
    if normalization == "squad":
        bare = text.lower().translate(_NO_PUNCTUATION)
    else:
        bare = _BOOLEANS.get(text, text).lower().translate(_SPACED_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _best(
    prediction: str, answers: str | Sequence[str], normalization: str, score: Callable[[str, str], float]
) -> float:
    """The best score of normalised texts over the answers; 0 where either is empty."""
    aliases = [answers] if isinstance(answers, str) else list(answers)
    if not aliases:
        raise ValueError(f"no right answers were given for the prediction {prediction!r}; give at least one")
    for text in (prediction, *aliases):
        if not isinstance(text, str):
            raise ValueError(f"predictions and answers are texts, not {text!r}")
    said, *right = (normalize_answer(text, normalization) for text in (prediction, *aliases))
    return max(score(said, alias) if said and alias else 0.0 for alias in right)


def _has_run(said: str, alias: str) -> bool:
    return f" {alias} " in f" {said} "


def exact_match(prediction: str, answers: str | Sequence[str], normalization: str = "squad") -> float:
    """1 if the normalised prediction is a right answer (SQuAD, arXiv 1606.05250)."""
    return _best(prediction, answers, normalization, lambda said, alias: float(said == alias))


def sub_em(prediction: str, answers: str | Sequence[str], word_boundary: bool = False) -> float:
    """SubEM: 1 if a right answer occurs in the prediction (arXiv 2505.10063; normalising is our choice).

    The plain form looks for characters, so that "13" is found in "113"; with ``word_boundary`` (our option) the answer
    must be whole words in a row.
    """
    return cover_em(prediction, answers, "run" if word_boundary else "substring")


def cover_em(
    prediction: str, answers: str | Sequence[str], form: str = "tokens", normalization: str = "squad"
) -> float:
    """Cover exact match: 1 if the prediction covers a right answer.

    form: "tokens" (default), every word of the answer occurs among the prediction's words, in any order and however
    often (R1-Searcher, arXiv 2503.05592); "run", they stand in a row; "substring", as :func:`sub_em`; "overlap", as
    "substring", but the two share a whole word (what SimpleDeepSearcher's evaluation computes).
    """
    if form not in COVER_FORMS:
        raise ValueError(f"form must be one of {', '.join(COVER_FORMS)}, not {form!r}")
    covers = {
        "tokens": lambda said, alias: set(alias.split()) <= set(said.split()),
        "run": _has_run,
        "substring": lambda said, alias: alias in said,
        "overlap": lambda said, alias: alias in said and not set(alias.split()).isdisjoint(said.split()),
    }[form]
    return _best(prediction, answers, normalization, lambda said, alias: float(covers(said, alias)))


def _f1(said: str, alias: str) -> float:
    ours, theirs = said.split(), alias.split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def token_f1(
    prediction: str, answers: str | Sequence[str], normalization: str = "squad", yes_no: bool = False
) -> float:
    """F1 of the words of prediction and answer, each counted as often as it occurs (SQuAD, arXiv 1606.05250):
    the harmonic mean of the shares of either that the other has.

    yes_no: HotpotQA's rule (arXiv 1809.09600, also R1-Searcher's): where one of the two is exactly yes, no or
    noanswer, the other must be the same, so that "no, it is not" scores nothing against "no".
    """

    def score(said: str, alias: str) -> float:
        if yes_no and said != alias and (said in _CLOSED or alias in _CLOSED):
            return 0.0
        return _f1(said, alias)

    return _best(prediction, answers, normalization, score)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How answers are compared: the normalisation, the cover form, and whether F1 follows the rule of yes and no."""

    normalization: str = "squad"
    cover: str = "run"
    yes_no: bool = False

    def __post_init__(self):
        normalize_answer("", self.normalization)
        cover_em("", "", self.cover)


SIMPLE_DEEP_SEARCHER = Protocol()  # arXiv 2505.16834 section 9, cover on whole words
R1_SEARCHER = Protocol("r1_searcher", "run", True)  # arXiv 2505.17005 section 9; its own evaluation covers by "tokens"


def score_answer(prediction: str, answers: str | Sequence[str], protocol: Protocol) -> dict[str, float]:
    """{"em", "cover", "f1"} of a prediction, each the best over the answers."""
    return {
        "em": exact_match(prediction, answers, protocol.normalization),
        "cover": cover_em(prediction, answers, protocol.cover, protocol.normalization),
        "f1": token_f1(prediction, answers, protocol.normalization, protocol.yes_no),
    }


def short_cover_em(
    prediction: str, answers: str | Sequence[str], protocol: Protocol = R1_SEARCHER, max_words: int = 10
) -> float:
    """Cover exact match of a prediction of at most ``max_words`` words, 0 for a longer one: the answer reward of
    R1-Searcher++ (arXiv 2505.17005 section 4). Naming several answers still pays, see
    ``rl.search_rewards.reward_hacks``."""
    if len(prediction.split()) > max_words:
        return 0.0
    return cover_em(prediction, answers, protocol.cover, protocol.normalization)


def _unwrap(text: str, command: str) -> str:
    """The text with each ``command{...}`` replaced by what is inside."""
    spans = command_spans(text, command)
    cut = {at for start, end in spans for at in (*range(start, start + len(command) + 1), end - 1)}
    return "".join(character for at, character in enumerate(text) if at not in cut)


def _without_parentheses(text: str) -> str:
    """Without pairs of parentheses around the whole text; "(a) or (b)" keeps its own."""
    partner, opened = {}, []
    for at, character in enumerate(text):
        if character == "(":
            opened.append(at)
        elif character == ")" and opened:
            partner[opened.pop()] = at
    low, high = 0, len(text)
    while low < high and partner.get(low) == high - 1:
        low, high = low + 1, high - 1
        while low < high and text[low].isspace():
            low += 1
        while low < high and text[high - 1].isspace():
            high -= 1
    return text[low:high]


def last_boxed(text: str) -> str:
    r"""The content of the last ``\boxed{...}`` whose braces match, with ``\text{...}`` unwrapped and parentheses around
    the whole stripped; "" where there is none (arXiv 2505.16834 section 9; the released pattern takes everything up to
    a line's last brace)."""
    spans = command_spans(text, BOX)
    if not spans:
        return ""
    start, end = spans[-1]
    return _without_parentheses(_unwrap(text[start + len(BOX) + 1 : end - 1], r"\text").strip())


def parse_verdict(reply: str) -> bool | None:
    """A judge's verdict: True or False for exactly these replies, None for any other, which is counted as invalid and
    never as right (arXiv 2505.16834 section 9: "True." is invalid)."""
    return {"True": True, "False": False}.get(reply)
