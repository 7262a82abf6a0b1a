"""A recommendation task: catalogue, split, texts and examples, from files or from the embedded world."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrec.data.interactions import Interactions, disambiguate_titles, filter_rating, k_core, require_titles
from jaxrec.data.sources import load_interactions
from jaxrec.data.splits import Split, leave_one_out
from rl.envs.recommend import Catalogue, Example


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a recommendation system works on.

    phrases: per item id the words that describe it. encode: texts -> unit vectors [n, D]. item_text: [N+1, D].
    kinds: per part ("valid", "test") int8 [n] why each target happened (``jaxrec.world``), None for real data.
    max_len: items of history shown to anyone.
    """

    name: str
    split: Split
    catalogue: Catalogue
    phrases: tuple[tuple[str, ...], ...]
    encode: Callable[[Sequence[str]], np.ndarray]
    item_text: np.ndarray
    kinds: dict[str, np.ndarray] | None
    max_len: int
    report: dict[str, int]

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All different descriptive words, sorted."""
        return tuple(sorted({word for words in self.phrases for word in words}))

    def prompt_rows(self, holdout: int) -> np.ndarray:
        """Rows of ``split.samples("train")`` that hold each user's last ``holdout`` training targets; 0 = all rows."""
        users = self.split.samples("train", 1).users
        if not holdout:
            return np.arange(len(users))
        after = np.searchsorted(users, users, "right") - np.arange(len(users))  # 1 for a user's last training target
        return np.flatnonzero(after <= holdout)

    def examples(self, part: str, limit: int | None = None, seed: int = 0) -> list[Example]:
        """Examples of a part in the order of ``split.samples``, or ``limit`` of them drawn with ``seed`` (kept in
        order). ``Example.index`` is the position in ``split.samples(part)``."""
        samples = self.split.samples(part, self.max_len)
        rows = np.arange(len(samples))
        if limit is not None and limit < len(rows):
            rows = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:limit])
        return [
            Example(int(i), tuple(samples.history[i, : samples.lengths[i]].tolist()), int(samples.targets[i]))
            for i in rows
        ]


def _words(categories: str) -> tuple[str, ...]:
    """ "Action, Drama" and "Drouvan 1970s calm" -> their phrases: at commas if there are any, else at blanks."""
    parts = re.split(r"\s*[,;|]\s*" if re.search("[,;|]", categories) else r"\s+", categories.strip())
    return tuple(dict.fromkeys(part for part in parts if part))


def prepare(
    inter: Interactions, *, min_rating: float = 0.0, k_user: int = 0, k_item: int = 0, decades: bool = False
) -> Interactions:
    """Filter (rating, then k-core), drop items without title, make titles unique. ``decades`` adds "1990s" to the
    categories of titles that end in a year, so that a description can name the time. Everything left out is counted in
    ``report``."""
    if min_rating > 0:
        inter = filter_rating(inter, min_rating)
    inter = require_titles(inter)
    if k_user > 1 or k_item > 1:
        inter = k_core(inter, k_user, k_item)
    inter = disambiguate_titles(inter)
    if decades:
        years = [re.search(r"\((\d{3})\d\)", title) for title in inter.titles]
        texts = [f"{y[1]}0s, {c}" if y and c else c for y, c in zip(years, inter.categories, strict=True)]
        inter = dataclasses.replace(inter, categories=tuple(texts))
    return inter


def text_encoder(
    inter: Interactions, folder: str, dim: int
) -> tuple[Callable[[Sequence[str]], np.ndarray], np.ndarray]:
    """(encode, item vectors [N+1, D]): a BERT-family encoder from a folder, or the offline features of ``dim``."""
    texts = [f"{t}\n{c}" for t, c in zip(inter.titles, inter.categories, strict=True)]
    if folder:
        from models.encoder import load_encoder

        encoder = load_encoder(folder)
        prefix = "Represent this sentence for searching relevant passages: " if "bge" in folder else ""
        encode, vectors = functools.partial(encoder.encode, prefix=prefix), encoder.encode(texts[1:])
    else:
        from models.text_features import TextFeatures

        features = TextFeatures.fit(texts[1:], dim=dim)
        encode, vectors = features.encode, features.encode(texts[1:])
    return encode, np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), np.asarray(vectors, np.float32)])


def make_task(
    name: str, inter: Interactions, *, max_len: int, encoder: str = "", text_dim: int = 256, kinds=None
) -> Task:  # fmt: skip
    """A task from prepared interactions. ``kinds(split)`` labels the held-out targets of a generated world."""
    split = leave_one_out(inter)
    encode, item_text = text_encoder(inter, encoder, text_dim)
    phrases = ((), *(_words(c) or _words(t) for t, c in zip(inter.titles[1:], inter.categories[1:], strict=True)))
    # Descriptions read the same in a history and in a query: words with blanks between them.
    catalogue = Catalogue(inter.titles, [" ".join(p) for p in phrases])
    return Task(
        name, split, catalogue, phrases, encode, item_text, kinds(split) if kinds else None, max_len,
        {**inter.report, **split.report},
    )  # fmt: skip


def config_task(data: Any, text: Any, seed: int) -> Task:
    """The task a config describes: ``data.source`` "world" (generated with ``seed``) or "files" (``data.path``).

    Raises ValueError for a source that does not exist or files without a path.
    """
    if data.source == "world":
        from jaxrec.world import RULES, generate, world_config
        from jaxrec.world.interactions import event_kinds, to_interactions

        knobs = data.world.to_dict()
        rules = RULES[: knobs.pop("num_rules")]
        world = generate(world_config(data.scale, seed=seed, rules=rules, **knobs))
        return make_task(
            f"embedded world ({data.scale})", prepare(to_interactions(world)), max_len=data.max_history,
            encoder=text.encoder, text_dim=text.dim,
            kinds=lambda split: {part: event_kinds(world, split, part) for part in ("valid", "test")},
        )  # fmt: skip
    if data.source != "files":
        raise ValueError(f"data.source={data.source!r}: choose 'world' or 'files'")
    if not data.path:
        raise ValueError("data.source='files' needs the folder of the files: --config.data.path=FOLDER")
    return files_task(
        data.path, kind=data.kind, max_len=data.max_history, encoder=text.encoder, text_dim=text.dim,
        min_rating=data.min_rating, k_user=data.k_user, k_item=data.k_item, decades=data.decades,
    )  # fmt: skip


def files_task(path: str, *, kind: str = "auto", name: str = "", max_len: int = 20, encoder: str = "",
               text_dim: int = 256, **filters) -> Task:  # fmt: skip
    """A task from files: RecBole atomic files, MovieLens' own, Amazon 2023. ``filters`` as :func:`prepare`."""
    inter = prepare(load_interactions(path, kind), **filters)
    return make_task(name or str(path), inter, max_len=max_len, encoder=encoder, text_dim=text_dim)
