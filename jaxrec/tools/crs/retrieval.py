"""Recommenders that turn a dialogue into a query and answer it by search over names and attributes of all items."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrec.data.dialogues import USER
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask, Reply, seed_of
from jaxrec.tools.crs.prompts import RecommenderPrompts, check_k, written_query
from jaxrec.tools.crs.retry import name_of, until_usable
from jaxrec.tools.search.base import Backend, Passage
from jaxrec.tools.search.corpus import PassageStore, build_store
from jaxrec.tools.teacher.base import Answer, Failure, Sampling, Teacher, ask_text
from rl.envs.user import ListRequest

Queries = Callable[[Sequence[Ask]], list[str]]


# --- an index of the catalogue ----------------------------------------------------------------------------------------


def item_passages(catalogue: ItemCatalogue) -> list[Passage]:
    """Items as passages: title, and attributes on one line. Ids sort as the items' numbers do."""
    width = len(str(len(catalogue)))
    return [
        Passage(f"{item:0{width}d}", title, _attributes(catalogue, item)) for item, title in enumerate(catalogue.titles)
    ]


def _attributes(catalogue: ItemCatalogue, item: int) -> str:
    known = catalogue.attributes[item]
    texts = (f"{name}: {', '.join(known[name])}" for name in catalogue.order if known.get(name))
    return " ".join("; ".join(texts).split())


def item_store(catalogue: ItemCatalogue, folder: str | Path) -> PassageStore:
    """The store of :func:`item_passages`, built where the folder is not there. Raises ValueError for the store of
    another catalogue."""
    passages = item_passages(catalogue)
    if not Path(folder).exists():
        return build_store(passages, folder)
    store = PassageStore(folder)
    if len(store) != len(passages) or any(a != b for a, b in zip(store, passages)):
        raise ValueError(f"{folder} holds the items of another catalogue; name another folder")
    return store


class ItemSearch:
    """The k best items for a query, none of them in ``left_out``.

    backend: over an :func:`item_store`. pool: items that the backend is asked for at least; of those found k are drawn,
    in proportion to exp(score / temperature), without putting back (a Gumbel top-k with the request's seed), best score
    first; temperature 0 takes the best. Where fewer are found (BM25 finds items that share a word), others fill up, and
    ``counts["filled"]`` says how many: by number, or drawn with the seed. Raises ValueError.
    """

    def __init__(
        self, catalogue: ItemCatalogue, backend: Backend, k: int, *, temperature: float = 0.0, pool: int = 100
    ):
        check_k(k, catalogue)
        if temperature < 0 or pool < 1:
            raise ValueError(f"temperature={temperature} must be at least 0 and pool={pool} at least 1")
        self.catalogue, self.backend, self.k, self.temperature, self.pool = catalogue, backend, k, temperature, pool
        self.counts: collections.Counter[str] = collections.Counter()

    def __call__(
        self, queries: Sequence[str], left_out: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """One list each, an empty one where the search failed; equal queries are searched once, in one call.

        Raises ValueError for a query that leaves fewer than k items.
        """
        if not queries:
            return []
        most = max(len(set(items)) for items in left_out)
        asked = list(dict.fromkeys(queries))
        size = min(len(self.catalogue), max(self.pool, self.k) + most)
        found = dict(zip(asked, self.backend.search(asked, size), strict=True))
        return [
            self._list(found[query], set(items), seed)
            for query, items, seed in zip(queries, left_out, seeds, strict=True)
        ]

    def _list(self, result, left_out: set[int], seed: int) -> tuple[int, ...]:
        if result.failed:
            self.counts[f"failed_{result.kind}"] += 1
            return ()
        if len(self.catalogue) - len(left_out) < self.k:
            raise ValueError(
                f"{len(left_out)} of {len(self.catalogue)} items are left out, so that k={self.k} cannot be had"
            )
        hits = [(int(p.id), p.score) for p in result.passages if int(p.id) not in left_out]
        pool = np.array([item for item, _ in hits], np.int64)
        chosen = choose(pool, np.array([score for _, score in hits]), self.k, self.temperature, seed)
        if len(chosen) < self.k:
            self.counts["filled"] += self.k - len(chosen)
            rest = np.array([i for i in range(len(self.catalogue)) if i not in left_out and i not in set(chosen)])
            chosen += choose(rest, np.zeros(len(rest)), self.k - len(chosen), self.temperature, seed_of(seed, "fill"))
        return chosen


def choose(items: np.ndarray, scores: np.ndarray, k: int, temperature: float, seed: int) -> tuple[int, ...]:
    """At most k of ``items`` by ``scores`` (of one length): the best, or with a temperature drawn without putting back
    in proportion to exp(score / temperature). Best score first, equal ones in the order given."""
    order = np.argsort(-scores, kind="stable")
    if temperature > 0:
        noisy = scores / temperature + np.random.default_rng(seed).gumbel(size=len(scores))
        kept = np.zeros(len(scores), bool)
        kept[np.argsort(-noisy, kind="stable")[:k]] = True
        order = order[kept[order]]
    return tuple(items[order[:k]].tolist())


# --- queries ----------------------------------------------------------------------------------------------------------


def latest_turns(turns: int = 3) -> Queries:
    """Queries of the user's last turns and the critique, as they are."""
    if turns < 1:
        raise ValueError(f"turns={turns} must be at least 1")

    def queries(asks: Sequence[Ask]) -> list[str]:
        said = [[turn.text for turn in ask.dialogue.turns if turn.role == USER][-turns:] for ask in asks]
        # A dialogue in which the user has not spoken yet: what the other side said.
        return [
            " ".join(own or [turn.text for turn in ask.dialogue.turns][-turns:])
            + (f" {ask.critique}" * bool(ask.critique))
            for ask, own in zip(asks, said, strict=True)
        ]

    return queries


class WrittenQueries:
    """Queries that a teacher writes behind an analysis. tries: replies until one holds a query. ``counts`` holds what
    :func:`until_usable` counts, failures of the teacher by kind, and replies without a query ("empty").
    """

    def __init__(
        self, teacher: Teacher, prompts: RecommenderPrompts, *, temperature: float = 1.0, top_p: float = 1.0,
        max_tokens: int = 256, tries: int = 5,
    ):  # fmt: skip
        self.teacher, self.prompts, self.tries = teacher, prompts, tries
        self._sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        self.counts: collections.Counter[str] = collections.Counter()

    def __call__(self, asks: Sequence[Ask]) -> list[str]:
        """One query each; all that are still wanted are asked for in one call of the teacher.

        Raises RuntimeError for an ask without a query after the last try, with the last reply.
        """
        texts = [self.prompts.query(ask) for ask in asks]

        def step(numbers: list[int], seeds: list[int]) -> list[tuple[str | None, str]]:
            answers = self.teacher.ask(
                [
                    ask_text("recommender", texts[i], sampling=dataclasses.replace(self._sampling, seed=seed))
                    for i, seed in zip(numbers, seeds, strict=True)
                ]
            )
            return [self._read(answer) for answer in answers]

        return [query for query, _ in until_usable(asks, step, self.tries, "holds a query", self.counts)]

    def _read(self, answer: Answer) -> tuple[str | None, str]:
        if isinstance(answer, Failure):
            self.counts[f"failed_{answer.kind}"] += 1
            return None, f"({answer.kind}: {answer.message})"
        query = written_query(answer.text)
        self.counts["empty"] += not query
        return query or None, answer.text


# --- recommenders -----------------------------------------------------------------------------------------------------


def _named(**parts: Mapping[str, int]) -> collections.Counter[str]:
    """Counts of several parts in one counter, each under the name of its part."""
    return collections.Counter({f"{name}: {what}": n for name, own in parts.items() for what, n in own.items()})


class RetrievalRecommender:
    """Queries by ``queries`` (:func:`latest_turns`, :class:`WrittenQueries`), lists by ``search``, without the items of
    earlier lists on the way. exclude_mentioned: without those of the dialogue too."""

    def __init__(self, search: ItemSearch, queries: Queries, *, exclude_mentioned: bool = False):
        self.search, self.queries, self.exclude_mentioned, self.k = search, queries, exclude_mentioned, search.k

    @property
    def counts(self) -> collections.Counter[str]:
        """What was counted of queries and of searches."""
        return _named(query=getattr(self.queries, "counts", {}), search=self.search.counts)

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list each, in order; one call for all queries and one for all searches.

        Raises RuntimeError where a search failed.
        """
        queries = self.queries(asks)
        left_out = [(*ask.past, *(ask.dialogue.items if self.exclude_mentioned else ())) for ask in asks]
        lists = self.search(queries, left_out, [ask.seed for ask in asks])
        for ask, query, items in zip(asks, queries, lists, strict=True):
            if not items:
                raise RuntimeError(f"{name_of(ask)}: the search for {query!r} failed")
        return [Reply(items, query) for items, query in zip(lists, queries, strict=True)]


class SearchedLists:
    """The ``lists`` of ``rl.envs.user.UserEnv`` for a policy that writes queries; None for a blank one.
    exclude_mentioned: as :class:`RetrievalRecommender`'s."""

    def __init__(self, search: ItemSearch, *, exclude_mentioned: bool = False):
        self.search, self.k, self.exclude_mentioned = search, search.k, exclude_mentioned
        self._blank: collections.Counter[str] = collections.Counter()

    @property
    def counts(self) -> collections.Counter[str]:
        """Blank queries ("query: empty"), and what was counted of searches."""
        return _named(query=self._blank, search=self.search.counts)

    def __call__(self, requests: Sequence[ListRequest]) -> list[tuple[int, ...] | None]:
        """Items of each query, without those of earlier lists; an empty list where the search failed."""
        queries = [" ".join(request.text.split()) for request in requests]
        asked = [i for i, query in enumerate(queries) if query]
        self._blank["empty"] += len(queries) - len(asked)
        left_out = [
            (*requests[i].past, *(requests[i].talk.dialogue.items if self.exclude_mentioned else ())) for i in asked
        ]  # fmt: skip
        lists = self.search([queries[i] for i in asked], left_out, [requests[i].seed for i in asked])
        found = dict(zip(asked, lists, strict=True))
        return [found.get(i) for i in range(len(requests))]
