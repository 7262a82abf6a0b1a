"""A trained recommender that goes by the items which a dialogue mentions, and hears no words."""

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxrec.data.dialogues import Dialogue
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask, Reply
from jaxrec.tools.crs.prompts import check_k
from jaxrec.tools.crs.retrieval import choose
from jaxrec.tools.crs.retry import name_of
from models.recsys import Popularity, Recommender, SASRec, SASRecConfig, SequenceModel, pad_histories
from models.recsys.base import get_params, set_params
from rl.recommender import RecommenderConfig, fit


def mention_samples(dialogues: Sequence[Dialogue], max_len: int) -> dict[str, np.ndarray]:
    """Each item that a dialogue mentions behind another one as a target, with those before it: "history" int32
    [n, max_len] right-padded, "lengths" and "targets" int32 [n]. Ids are the catalogue's numbers plus 1, 0 is padding.

    Raises ValueError where no dialogue mentions two items.
    """
    pairs = [(d.items[:at], d.items[at]) for d in dialogues for at in range(1, len(d.items))]
    if not pairs:
        raise ValueError(f"none of {len(dialogues)} dialogues mentions two items: there is no sequence to learn from")
    history, lengths = pad_histories([[item + 1 for item in items] for items, _ in pairs], max_len)
    return {"history": history, "lengths": lengths, "targets": np.array([item + 1 for _, item in pairs], np.int32)}


def mention_counts(dialogues: Sequence[Dialogue], items: int) -> np.ndarray:
    """In how many dialogues each item is mentioned, float64 [items]."""
    mentioned = np.array([item + 1 for d in dialogues for item in d.items], np.int64)
    return Popularity.fit(mentioned, items).counts[1:]


def fit_sequential(
    train: Sequence[Dialogue], valid: Sequence[Dialogue], items: int, training: RecommenderConfig,
    settings: Mapping[str, Any] | None = None,
) -> SequenceModel:  # fmt: skip
    """A SASRec on mentions of the training dialogues, stopped by NDCG@10 on those of the validation dialogues.

    items: of the catalogue. settings: fields of ``SASRecConfig``. Raises ValueError as :func:`mention_samples` does.
    """
    module = SASRec(SASRecConfig(num_items=items, **dict(settings or {})), rngs=nnx.Rngs(training.seed))
    held = mention_samples(valid, module.max_len)
    first = min(10, items)

    def evaluate(candidate: SequenceModel) -> dict[str, float]:
        found, _ = Recommender(candidate).recommend(held["history"], held["lengths"], k=first)
        rows, places = np.nonzero(found == held["targets"][:, None])
        return {training.select: float((1 / np.log2(places + 2)).sum() / len(found))}

    return fit(module, mention_samples(train, module.max_len), training, evaluate=evaluate).module


def stored_sequential(
    path: Path, items: int, settings: Mapping[str, Any], fit_it: Callable[[], SequenceModel]
) -> SequenceModel:
    """The module that :func:`fit_sequential` has once left in ``path`` with these settings; else what ``fit_it`` gives,
    which is then kept there. Raises ValueError for a file of other sizes."""
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            blank = SASRec(SASRecConfig(num_items=items, **settings), rngs=nnx.Rngs(0))
            return set_params(blank, {name: kept[name] for name in kept.files})
    module = fit_it()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    np.savez(temporary, **{name: np.asarray(value) for name, value in get_params(module).items()})
    os.replace(temporary, path)
    return module


class SequentialRecommender:
    """module: of :func:`fit_sequential`. counts: float64 [items], of :func:`mention_counts`: where a dialogue mentions
    no item, the most popular ones are recommended (``self.counts["no mention"]``). temperature: as
    ``retrieval.ItemSearch``'s; popular items are drawn in proportion to (1 + count) ** (1 / temperature).
    exclude_mentioned: leave out the items of the dialogue. A critique is not heard, the next list is the next page.

    Raises ValueError for a catalogue of fewer than k items, or another size than the module's.
    """

    def __init__(
        self, module: SequenceModel, counts: np.ndarray, catalogue: ItemCatalogue, k: int, *, temperature: float = 0.0,
        exclude_mentioned: bool = True,
    ):  # fmt: skip
        check_k(k, catalogue)
        if not module.num_items == len(counts) == len(catalogue):
            raise ValueError(
                f"the recommender knows {module.num_items} items and {len(counts)} counts, the catalogue has "
                f"{len(catalogue)}"
            )
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be at least 0")
        self.k, self.temperature, self.exclude_mentioned = k, temperature, exclude_mentioned
        self._server, self._popular = Recommender(module), np.log1p(np.asarray(counts, np.float64))
        self._max_len = module.max_len
        self.counts: collections.Counter[str] = collections.Counter()

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list each, in order; dialogues that mention the same are scored once, in one call.

        Raises RuntimeError for an ask that leaves fewer than k items.
        """
        mentions = [ask.dialogue.items for ask in asks]
        scored = self._scores([items for items in dict.fromkeys(mentions) if items])
        replies = []
        for ask, items in zip(asks, mentions, strict=True):
            self.counts["no mention"] += not items
            left_out = {*ask.past, *(items if self.exclude_mentioned else ())}
            free = np.array([i for i in range(len(self._popular)) if i not in left_out], np.int64)
            if len(free) < self.k:
                raise RuntimeError(
                    f"{name_of(ask)}: {len(left_out)} of {len(self._popular)} items are "
                    f"left out, so that k={self.k} cannot be had"
                )
            scores = scored[items] if items else self._popular
            replies.append(Reply(choose(free, scores[free], self.k, self.temperature, ask.seed)))
        return replies

    def _scores(self, mentions: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
        """Of all items, float64, for each tuple of mentioned ones."""
        if not mentions:
            return {}
        history, lengths = pad_histories([[item + 1 for item in items] for items in mentions], self._max_len)
        scores = np.asarray(self._server.scores(history, lengths), np.float64)[:, 1:]
        return dict(zip(mentions, scores, strict=True))
