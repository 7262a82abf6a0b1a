"""Which questions to synthesise search trajectories for: diverse domains and key points, complex ones first
(SimpleDeepSearcher, arXiv 2505.16834 section 2.3 and algorithm 1)."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

INTERROGATIVES = ("who", "whom", "whose", "where", "what", "when", "how", "why", "which", "whether")
AUXILIARIES = ("is", "are", "do", "does", "was", "were")
SCORES = ("special", "total", "none")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A question with its annotation. score: how complex it is; higher comes first."""

    id: str
    text: str
    domain: str
    key_points: tuple[str, ...]
    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """total: questions to take. min_domain: smaller domains are merged into ``other``. score: "special" counts
    interrogatives alone (the paper's words), "total" the auxiliaries too (its code), "none" keeps the given order.
    by_domain, diverse, score="none": off for the paper's ablations of domains, key points, complexity. redistribute:
    give what a domain falls short of to the others (ours)."""

    total: int
    min_domain: int = 500
    other: str = "other"
    score: str = "special"
    by_domain: bool = True
    diverse: bool = True
    redistribute: bool = False

    def __post_init__(self):
        if self.total < 1 or self.min_domain < 0:
            raise ValueError(f"total={self.total} must be at least 1 and min_domain={self.min_domain} at least 0")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, not {self.score!r}")


@dataclasses.dataclass(frozen=True)
class Sampled:
    """chosen: in the order in which they were taken, domain by domain. quotas and shortfall: per domain, by name;
    a domain falls short when all its questions are taken or repeat the text of one that is."""

    chosen: tuple[Candidate, ...]
    quotas: Mapping[str, int]
    shortfall: Mapping[str, int]


def interrogatives(text: str) -> dict[str, int]:
    """How often each of the sixteen words occurs in a question, as a whole word in any case; the interrogatives first.

    >>> sum(interrogatives("What is the birthdate of the person who plays X and who broke the record?").values())
    4
    """
    counts = Counter(re.findall(r"\w+", text.lower()))
    return {word: counts[word] for word in INTERROGATIVES + AUXILIARIES}


def complexity(text: str, score: str = "special") -> int:
    """The number of interrogatives, with "total" of auxiliaries too, with "none" 0."""
    words = {"special": INTERROGATIVES, "total": INTERROGATIVES + AUXILIARIES, "none": ()}[score]
    counts = interrogatives(text)
    return sum(counts[word] for word in words)


def parse_annotation(reply: str, think_close: str = "</think>") -> tuple[str, tuple[str, ...]] | None:
    """(domain, key points) of an annotator's reply, lower case; None for one that holds no such JSON, which the caller
    counts as discarded. Reasoning before the last ``think_close`` is skipped; what follows the first blank line is
    left out where the whole is no JSON."""
    text = reply.rpartition(think_close)[2].strip()
    for part in (text, text.partition("\n\n")[0]):
        try:
            fields = json.loads(part)
        except (ValueError, RecursionError):
            continue
        domain, points = (fields.get("domain"), fields.get("key_points")) if isinstance(fields, dict) else (None, None)
        if not isinstance(domain, str) or not domain.strip() or not isinstance(points, list):
            return None
        if not points or not all(isinstance(point, str) and point.strip() for point in points):
            return None
        return domain.strip().lower(), tuple(dict.fromkeys(point.strip().lower() for point in points))
    return None


def merge_domains(candidates: Sequence[Candidate], min_domain: int, other: str = "other") -> list[Candidate]:
    """Candidates of domains with fewer than ``min_domain`` ones are moved to the domain ``other``."""
    sizes = Counter(c.domain for c in candidates)
    return [c if sizes[c.domain] >= min_domain else dataclasses.replace(c, domain=other) for c in candidates]


def domain_quotas(domains: Sequence[str], total: int) -> dict[str, int]:
    """Equal shares, by name; the first ``total % len(domains)`` get one more."""
    names = sorted(set(domains))
    share, more = divmod(total, len(names))
    return {name: share + (i < more) for i, name in enumerate(names)}


def take_diverse(
    items: Sequence[Candidate], quota: int, seen: set[str], diverse: bool = True
) -> tuple[list[Candidate], list[Candidate]]:
    """Up to ``quota`` items, and those that are left.

    Items stand in the order of their scores, high ones first, equal ones as given. Each pass over them begins with no
    key points and takes an item if its text is not in ``seen`` (which grows) and it shares no key point with those the
    pass took before. Ends when the quota is full or a pass takes nothing.
    """
    left = sorted(items, key=lambda c: -c.score)
    taken: list[Candidate] = []
    while len(taken) < quota:
        before, rest, points = len(taken), [], set()
        for item in left:
            if item.text in seen:
                continue
            if len(taken) == quota or (diverse and not points.isdisjoint(item.key_points)):
                rest.append(item)
                continue
            taken.append(item)
            seen.add(item.text)
            points.update(item.key_points)
        left = rest
        if len(taken) == before:
            break
    return taken, left


def sample_queries(candidates: Sequence[Candidate], config: SamplingConfig) -> Sampled:
    """Questions by domain, diverse and complex; scores are computed from the texts.

    Deterministic: domains go by name, questions by score and given order. Raises ValueError for ids that occur twice,
    questions without text, and a total above the number of candidates.
    """
    _check(candidates, config)
    scored = [dataclasses.replace(c, score=complexity(c.text, config.score)) for c in candidates]
    if not config.by_domain:
        scored = [dataclasses.replace(c, domain="all") for c in scored]
    else:
        scored = merge_domains(scored, config.min_domain, config.other)
    quotas = domain_quotas([c.domain for c in scored], config.total)
    left = {name: [c for c in scored if c.domain == name] for name in quotas}
    taken: dict[str, list[Candidate]] = {name: [] for name in quotas}
    seen: set[str] = set()
    wanted = dict(quotas)
    while any(wanted.values()):
        for name, quota in wanted.items():
            got, left[name] = take_diverse(left[name], quota, seen, config.diverse)
            taken[name] += got
        missing = config.total - sum(map(len, taken.values()))
        open_domains = [name for name in quotas if any(c.text not in seen for c in left[name])]
        if not config.redistribute or not missing or not open_domains:
            break
        wanted = domain_quotas(open_domains, missing)
    chosen = tuple(c for name in quotas for c in taken[name])
    shortfall = {name: max(0, quota - len(taken[name])) for name, quota in quotas.items()}
    return Sampled(chosen, quotas, shortfall)


def _check(candidates: Sequence[Candidate], config: SamplingConfig) -> None:
    if config.total > len(candidates):
        raise ValueError(f"total={config.total} questions were asked for; the pool has {len(candidates)}")
    ids = Counter(c.id for c in candidates)
    for candidate in candidates:
        if ids[candidate.id] > 1:
            raise ValueError(f"id {candidate.id!r} of a question occurs twice")
        if not candidate.text.strip() or not candidate.domain.strip():
            raise ValueError(f"question {candidate.id!r} has no text or no domain")
