"""From many rollouts a question to one training sample: short, correct, well-formed, searching well
(SimpleDeepSearcher, arXiv 2505.16834 section 2.4, with the thresholds of its released code).

    metadata -> format -> reasoning path -> correct? -> question difficulty -> search effectiveness -> rewrite -> check

Every rollout and every question that does not come out is counted under the first reason that applies.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from jaxrec.data.qa import Question, check_ids
from jaxrec.evaluate.answers import last_boxed
from jaxrec.tools.rollouts import Rollout
from jaxrec.tools.samples import Sample, rewrite_answer, to_sample
from rl.envs.tags import SIMPLE_DEEP_SEARCHER, TagStyle

REFLECTIONS = ("alternatively", "hmm", "wait")
_NO_CORRECT = 100  # fewest searches of a question without a correct rollout, in the released code
_PORTS = {"http": 80, "https": 443}
_CJK = re.compile("[\u4e00-\u9fff]")


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """Filters and thresholds; the defaults are the paper's, or its code's.

    format, path, difficulty, search: the four filters, each off for a row of the ablation (table 2). Format: tags,
    turns, an early box, CJK, an answer that is right but not exact. Path: lengths, reflections, repetition. Difficulty:
    questions that are always answered, and the order of questions. Search: distinct pages per search, and the choice
    of the rollout with the fewest searches (off: the first valid one).

    max_first, max_turn: words of the first and of any turn must be fewer. max_reflections: of each of ``REFLECTIONS``
    a turn, and of "alternatively" in all. max_share: of one three-word sequence among all, in texts of at least
    ``min_words`` words (ours; 0 as released). min_urls: distinct pages per search must be more; with k pages a search
    it is meant to be just under k. easy_ratio, easy_drop: questions with that share of correct rollouts or more are
    dropped with that probability. keep: questions, 0 for all. max_thinks: most ``think_close`` in a rollout.
    max_pieces: of the whole output, split at blanks. rollouts: how many each question must have, 0 for any number.

    official_counts: count "Alternatively", "hmm", "wait" as substrings with that case, as released, instead of whole
    words in any case. official_check: look for "alternatively" and CJK in what tools wrote too. reject_cjk: off for
    questions in such languages. think_close: "" for policies that have none.
    """

    format: bool = True
    path: bool = True
    difficulty: bool = True
    search: bool = True
    max_first: int = 300
    max_turn: int = 300
    max_reflections: int = 3
    max_share: float = 0.3
    min_words: int = 30
    min_urls: float = 9.5
    easy_ratio: float = 1.0
    easy_drop: float = 0.8
    keep: int = 0
    max_thinks: int = 2
    max_pieces: int = 3000
    rollouts: int = 10
    official_counts: bool = False
    official_check: bool = False
    reject_cjk: bool = True
    think_close: str = "</think>"
    tags: TagStyle = SIMPLE_DEEP_SEARCHER
    seed: int = 42

    def __post_init__(self):
        for name in ("easy_ratio", "easy_drop", "max_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("max_first", "max_turn", "max_reflections", "min_words", "keep", "max_pieces", "rollouts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the filters look at. first_len, max_len: words. reflections: most of each word in a turn."""

    bad_marker: bool
    valid_history: bool
    first_len: int
    max_len: int
    reflections: Mapping[str, int]
    repeat: bool
    url_per_search: float
    search_count: int
    correct: bool


def count_reflections(text: str, official: bool = False) -> dict[str, int]:
    """How often each of ``REFLECTIONS`` stands in a text: whole words in any case, or as the released code counts."""
    if official:
        return {"alternatively": text.count("Alternatively"), "hmm": text.count("hmm"), "wait": text.count("wait")}
    counts = Counter(re.findall(r"\w+", text.lower()))
    return {word: counts[word] for word in REFLECTIONS}


def has_bad_marker(text: str, tags: TagStyle, think_close: str = "</think>", max_thinks: int = 2) -> bool:
    """Whether a tag's name stands without its brackets, or ``think_close`` too often. A name that is an ordinary word,
    as in <external>, counts only where a bracket touches it."""
    if think_close and text.count(think_close) > max_thinks:
        return True
    for tag in tags.exchange:
        text = text.replace(tag, "\0")
    names = {tag.strip("<|>/") for tag in tags.exchange}
    return any(
        name in text if "_" in name else re.search(rf"<\s*/?\s*{re.escape(name)}\b|\b{re.escape(name)}\|?>", text)
        for name in names
    )


def is_valid_history(segments: Sequence[tuple[str, str]], tags: TagStyle, think_close: str = "</think>") -> bool:
    """Whether every turn is one of: the policy's query at the end of a turn, the tool's result, the policy's last turn
    with one ``think_close``. A result that the policy wrote is none of them."""
    marks = [mark for mark in (*tags.exchange, think_close) if mark]
    clean = lambda text: not any(mark in text for mark in marks)  # noqa: E731
    for number, (author, text) in enumerate(segments, 1):
        text = text.strip()
        if author == "tool":
            inside = text.removeprefix(tags.result_open).removesuffix(tags.result_close)
            fine = text == tags.result_open + inside + tags.result_close and clean(inside)
        elif text.endswith(tags.query_close):
            parts = text.removesuffix(tags.query_close).split(tags.query_open)
            fine = len(parts) == 2 and all(map(clean, parts))
        else:
            parts = text.split(think_close) if think_close else [text, ""]
            fine = number == len(segments) and len(parts) == 2 and all(map(clean, parts))
        if not fine:
            return False
    return True


def top_trigram_share(text: str) -> float:
    """The share of the most frequent sequence of three words among all; 0 for fewer words."""
    words = text.split()
    counts = Counter(zip(words, words[1:], words[2:]))
    return max(counts.values()) / (len(words) - 2) if counts else 0.0


def canonical_url(url: str) -> str:
    """One spelling for one page: scheme and host in lower case, no port that goes without saying, no fragment, no
    closing stroke. What is no address, as an id of a passage, stays as it is."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return url.strip()
    if not parts.scheme or not parts.hostname:
        return url.strip()
    host = parts.hostname if port in (None, _PORTS.get(parts.scheme)) else f"{parts.hostname}:{port}"
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), parts.query, ""))


def describe(rollout: Rollout, config: CurationConfig) -> Metadata:
    """Metadata of a rollout that was scored. Raises ValueError for one that was not."""
    if not {"em", "cover"} <= rollout.metrics.keys():
        raise ValueError(f"rollout of question {rollout.id!r} has no em and cover; see jaxrec.tools.rollouts.scored")
    text, turns = rollout.text, rollout.policy
    counts = [count_reflections(turn, config.official_counts) for turn in turns]
    pages = {canonical_url(url) for search in rollout.searches for url in search.urls}
    return Metadata(
        bad_marker=has_bad_marker(text, config.tags, config.think_close, config.max_thinks),
        valid_history=is_valid_history(rollout.segments, config.tags, config.think_close),
        first_len=len(turns[0].split(" ")) if turns else 0,
        max_len=max((len(turn.split()) for turn in turns), default=0),
        reflections={word: max((c[word] for c in counts), default=0) for word in REFLECTIONS},
        repeat=len(text.split()) >= config.min_words and top_trigram_share(text) > config.max_share,
        url_per_search=len(pages) / rollout.search_count if rollout.search_count else 0.0,
        search_count=rollout.search_count,
        correct=rollout.metrics["cover"] == 1,
    )


def faults(meta: Metadata, config: CurationConfig) -> list[str]:
    """Why a rollout is not valid, in the order of the filters; empty for a valid one."""
    broken = {
        "bad marker": config.format and meta.bad_marker,
        "broken turns": config.format and not meta.valid_history,
        "first turn too long": config.path and meta.first_len >= config.max_first,
        "turn too long": config.path and meta.max_len >= config.max_turn,
        **{f"too many {w!r}": config.path and n > config.max_reflections for w, n in meta.reflections.items()},
        "repeats itself": config.path and meta.repeat,
        "wrong answer": not meta.correct,
        "too few distinct pages": config.search and meta.url_per_search <= config.min_urls,
    }
    return [reason for reason, is_so in broken.items() if is_so]


def final_faults(sample: Sample, config: CurationConfig) -> list[str]:
    """What is wrong with a rewritten sample, in the order of the paper's code."""
    whole = sample.text
    looked = whole if config.official_check else "".join(text for author, text in sample.segments if author == "policy")
    early = bool(config.think_close) and "boxed{" in whole.split(config.think_close)[0]
    said = whole.lower().count("alternatively") if config.official_check else count_reflections(looked)["alternatively"]
    broken = {
        "box before the end of thinking": config.format and early,
        "too many 'alternatively' in all": config.path and said > config.max_reflections,
        "CJK characters": config.format and config.reject_cjk and bool(_CJK.search(looked)),
        "right but not exact": config.format and sample.metrics["cover"] == 1 and sample.metrics["em"] == 0,
        "too long in all": config.path and len(whole.split(" ")) > config.max_pieces,
    }
    return [reason for reason, is_so in broken.items() if is_so]


class Drop(NamedTuple):
    """A record that did not come out. rollout: its number among those of its question, -1 for the question itself."""

    id: str
    rollout: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Records in, records out and everything between. Raises AssertionError unless that adds up."""

    taken: int
    kept: int
    drops: tuple[Drop, ...]

    def __post_init__(self):
        if self.taken != self.kept + len(self.drops):
            raise AssertionError(
                f"{self.taken} records in, {self.kept} out and {len(self.drops)} dropped do not add up"
            )

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(drop.reason for drop in self.drops))


@dataclasses.dataclass(frozen=True)
class Curated:
    samples: tuple[Sample, ...]
    rollouts: Ledger
    questions: Ledger


@dataclasses.dataclass(frozen=True)
class _Case:
    """A question with its rollouts. reasons: why each did not come out, None for the chosen one."""

    question: Question
    rollouts: Sequence[Rollout]
    ratio: float
    min_search: int
    chosen: int | None
    reasons: Mapping[int, str]
    lost: str


def is_dropped_as_easy(id: str, ratio: float, config: CurationConfig) -> bool:
    """Whether a question that is nearly always answered is dropped: drawn from its id and the seed alone."""
    digest = hashlib.sha256(f"easy\0{config.seed}\0{id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return config.difficulty and ratio >= config.easy_ratio and draw < config.easy_drop


def _case(question: Question, rollouts: Sequence[Rollout], config: CurationConfig) -> _Case:
    metas = [describe(rollout, config) for rollout in rollouts]
    correct = [meta.search_count for meta in metas if meta.correct]
    ratio = len(correct) / len(metas)
    reasons = {i: found[0] for i, meta in enumerate(metas) if (found := faults(meta, config))}
    valid = [i for i in range(len(metas)) if i not in reasons]
    easy = is_dropped_as_easy(question.id, ratio, config)
    chosen, lost = None, ""
    if not correct:
        lost = "no correct rollout"
    elif easy:
        lost = "easy question"
    elif not valid:
        lost = "no valid rollout"
    else:
        chosen = min(valid, key=lambda i: metas[i].search_count) if config.search else valid[0]
    rest = "easy question" if easy else "another rollout was chosen"
    reasons |= {i: rest for i in valid if i != chosen}
    return _Case(question, rollouts, ratio, min(correct, default=_NO_CORRECT), chosen, reasons, lost)


def _finish(case: _Case, config: CurationConfig) -> tuple[Sample | None, str]:
    """The sample of the chosen rollout, or why there is none."""
    rollout = case.rollouts[case.chosen]
    turn = rewrite_answer(rollout.policy[-1], config.think_close)
    if turn is None and config.format:
        return None, "no box after the thinking"
    if turn is not None and last_boxed(turn) != rollout.prediction:
        return None, "rewriting changes the answer"
    sample = to_sample(rollout, case.question, case.min_search, config.tags, turn or "")
    found = final_faults(sample, config)
    return (None, found[0]) if found else (sample, "")


def curate(questions: Sequence[Question], rollouts: Sequence[Rollout], config: CurationConfig) -> Curated:
    """At most one sample a question, and where everything else went. rollouts: scored, of all questions in any order.

    Samples go by (share of correct rollouts, ascending; fewest searches of a correct one, descending), with
    ``difficulty`` off as the questions go. Raises ValueError for ids that occur twice or are unknown, and for questions
    without their ``config.rollouts``.
    """
    groups = _groups(questions, rollouts, config)
    cases = [_case(q, groups[q.id], config) for q in questions]
    ordered = [case for case in cases if case.chosen is not None]
    if config.difficulty:
        ordered.sort(key=lambda case: (case.ratio, -case.min_search))
    samples, ended = [], {}
    for place, case in enumerate(ordered):
        if config.keep and place >= config.keep:
            ended[case.question.id] = f"beyond the first {config.keep}"
            continue
        sample, reason = _finish(case, config)
        if sample is None:
            ended[case.question.id] = reason
        else:
            samples.append(sample)
    drops = [Drop(c.question.id, i, reason) for c in cases for i, reason in sorted(c.reasons.items())]
    drops += [Drop(c.question.id, c.chosen, ended[c.question.id]) for c in ordered if c.question.id in ended]
    lost = [Drop(c.question.id, -1, c.lost or ended[c.question.id]) for c in cases if c.lost or c.question.id in ended]
    kept = len(samples)
    return Curated(tuple(samples), Ledger(len(rollouts), kept, tuple(drops)), Ledger(len(questions), kept, tuple(lost)))


def _groups(
    questions: Sequence[Question], rollouts: Sequence[Rollout], config: CurationConfig
) -> dict[str, list[Rollout]]:
    check_ids(questions)
    groups: dict[str, list[Rollout]] = {q.id: [] for q in questions}
    for rollout in rollouts:
        if rollout.id not in groups:
            raise ValueError(
                f"a rollout is of question {rollout.id!r}, which is none of the {len(questions)} questions"
            )
        groups[rollout.id].append(rollout)
    for id, group in groups.items():
        if not group or (config.rollouts and len(group) != config.rollouts):
            wanted = config.rollouts or "at least 1"
            raise ValueError(f"question {id!r} has {len(group)} rollouts, not {wanted} (curation's setting 'rollouts')")
    return groups
