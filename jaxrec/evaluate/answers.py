"""Scores of short answers against the right ones: exact match, substring match, cover match and token F1.

All of them are between 0 and 1, take the best of several right answers (aliases), and compare normalised texts as the
evaluation of SQuAD does (arXiv 1606.05250). An answer with nothing left after normalisation never matches. Multiply
means by 100 for the numbers that papers print.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

COVER_FORMS = ("tokens", "run", "substring")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the, words one space apart (SQuAD's evaluation).

    Punctuation goes before articles and leaves no space: "U.S.A." is "usa", "well-known" is "wellknown".
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _best(prediction: str, answers: str | Sequence[str], score: Callable[[str, str], float]) -> float:
    """The best score of normalised texts over the answers; 0 where either is empty."""
    aliases = [answers] if isinstance(answers, str) else list(answers)
    if not aliases:
        raise ValueError(f"no right answers were given for the prediction {prediction!r}; give at least one")
    for text in (prediction, *aliases):
        if not isinstance(text, str):
            raise ValueError(f"predictions and answers are texts, not {text!r}")
    said = normalize_answer(prediction)
    return max(score(said, alias) if said and alias else 0.0 for alias in map(normalize_answer, aliases))


def _has_run(said: str, alias: str) -> bool:
    return f" {alias} " in f" {said} "


def exact_match(prediction: str, answers: str | Sequence[str]) -> float:
    """1 if the normalised prediction is a right answer (SQuAD, arXiv 1606.05250)."""
    return _best(prediction, answers, lambda said, alias: float(said == alias))


def sub_em(prediction: str, answers: str | Sequence[str], word_boundary: bool = False) -> float:
    """SubEM: 1 if a right answer occurs in the prediction (arXiv 2505.10063; normalising is our choice).

    The plain form looks for characters, so that "13" is found in "113"; with ``word_boundary`` (our option) the answer
    must be whole words in a row.
    """
    found = _has_run if word_boundary else lambda said, alias: alias in said
    return _best(prediction, answers, lambda said, alias: float(found(said, alias)))


def cover_em(prediction: str, answers: str | Sequence[str], form: str = "tokens") -> float:
    """Cover exact match: 1 if the prediction covers a right answer.

    form: "tokens" (default), every word of the answer occurs among the prediction's words, in any order and however
    often (R1-Searcher, arXiv 2503.05592); "run", they stand in a row; "substring", as :func:`sub_em`.
    """
    if form not in COVER_FORMS:
        raise ValueError(f"form must be one of {', '.join(COVER_FORMS)}, not {form!r}")
    covers = {
        "tokens": lambda said, alias: set(alias.split()) <= set(said.split()),
        "run": _has_run,
        "substring": lambda said, alias: alias in said,
    }[form]
    return _best(prediction, answers, lambda said, alias: float(covers(said, alias)))


def _f1(said: str, alias: str) -> float:
    ours, theirs = said.split(), alias.split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def token_f1(prediction: str, answers: str | Sequence[str]) -> float:
    """F1 of the words of prediction and answer, each counted as often as it occurs (SQuAD, arXiv 1606.05250):
    the harmonic mean of the shares of either that the other has."""
    return _best(prediction, answers, _f1)
