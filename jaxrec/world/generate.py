"""Generate the embedded world: entities with attributes, users with tastes and intents, events with times.

An event is one of three kinds. An *intent* event follows the user's rule, which combines attributes of two or more
earlier events. A *taste* event comes from the user's favourite genre and mood, or from a circle of items that belong
together for no reason words could give. A *noise* event follows popularity. An intent that no unseen item meets becomes
a taste event, a taste that none meets a noise event, and they are labelled as such.
"""

import dataclasses
import functools

import numpy as np

from jaxrec.world import names
from jaxrec.world.config import WorldConfig

TASTE, INTENT, NOISE = 0, 1, 2
KINDS = ("taste", "intent", "noise")  # their names, by number
_START = 946_684_800  # seconds; the first day of the year 2000


@dataclasses.dataclass(frozen=True)
class World:
    """Arrays over items have a row 0 for PAD. ``attributes``: name -> int32 [N+1] (0-based values, row 0 is 0);
    ``values``: name -> the words of its values. Events are user by user, in time order; ``kind`` int8 [M] says why
    each happened and ``rule`` int8 [M] which rule the user had then. ``maker_place``, ``place_region``: the chain
    item -> maker -> place -> region."""

    config: WorldConfig
    titles: tuple[str, ...]
    attributes: dict[str, np.ndarray]
    values: dict[str, tuple[str, ...]]
    maker_place: np.ndarray
    place_region: np.ndarray
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    kind: np.ndarray
    rule: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.titles) - 1

    def word(self, attribute: str, item: int) -> str:
        """The word for one attribute of one item."""
        return self.values[attribute][self.attributes[attribute][item]]

    @functools.cached_property
    def categories(self) -> tuple[str, ...]:
        """What a catalogue shows of an item: maker, era, genre and mood. Its region is known only by the chain."""
        shown = [np.array(self.values[a])[self.attributes[a]] for a in ("maker", "era", "genre", "mood")]
        return ("", *(" ".join(row) for row in zip(*(column[1:] for column in shown), strict=True)))


class _Bucket:
    """Items grouped by a tuple of attributes; draws one by popularity from the group a user wants."""

    def __init__(self, keys: np.ndarray, weight: np.ndarray):
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        self.mass = np.concatenate([[0], np.cumsum(weight[self.order])])

    def draw(self, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """0-based item per row, -1 where the group is empty."""
        low, high = np.searchsorted(self.keys, wanted, "left"), np.searchsorted(self.keys, wanted, "right")
        total = self.mass[high] - self.mass[low]
        ticket = self.mass[low] + rng.integers(0, np.maximum(total, 1))
        found = self.order[np.minimum(np.searchsorted(self.mass, ticket, "right") - 1, len(self.order) - 1)]
        return np.where(total > 0, found, -1)


def _items(config: WorldConfig, rng: np.random.Generator):
    c = config
    sizes = {"era": c.eras, "genre": c.genres, "mood": c.moods, "theme": c.themes}
    maker_place = rng.integers(0, c.places, c.makers)
    place_region = np.arange(c.places) % len(names.REGIONS)
    # Makers have a period and a field: an item's era and genre lean towards its maker's, as in any real catalogue.
    maker_era, maker_genre = rng.integers(0, c.eras, c.makers), rng.integers(0, c.genres, c.makers)
    maker = rng.permutation(np.arange(c.items) % c.makers)
    attributes = {"maker": maker} | {name: rng.integers(0, size, c.items) for name, size in sizes.items()}
    lean = rng.integers(0, 100, (2, c.items)) < 20
    attributes["era"] = np.where(lean[0], maker_era[maker], attributes["era"])
    attributes["genre"] = np.where(lean[1], maker_genre[maker], attributes["genre"])
    attributes["region"] = place_region[maker_place[maker]]
    maker_names = names.makers(rng, c.makers)
    values = {
        "maker": maker_names, "era": names.eras(c.eras), "genre": names.GENRES[: c.genres],
        "mood": names.MOODS[: c.moods], "theme": names.THEMES[: c.themes], "region": names.REGIONS,
        "place": names.places(rng, c.places),
    }  # fmt: skip
    titles = names.titles(rng, c.items, c.title_words)
    # Zipf-like popularity in whole numbers; never 0, or a large catalogue would hold items nobody can ever choose.
    weight = np.maximum(10_000 // (10 + rng.permutation(c.items)), 1)
    circle = rng.integers(0, c.circles, c.items)
    return titles, attributes, {k: tuple(v) for k, v in values.items()}, maker_place, place_region, weight, circle


def _key(attributes: dict[str, np.ndarray], sizes: dict[str, int], rule, rows=None) -> np.ndarray:
    """One integer for a rule's attribute tuple."""
    key = 0
    for attribute, _, _ in rule:
        value = attributes[attribute] if rows is None else attributes[attribute][rows]
        key = key * sizes[attribute] + value
    return key


def _wanted(rule, history: np.ndarray, attributes, sizes) -> np.ndarray:
    """The key a rule asks for given history [U, t] of 0-based items; -1 where a shift leaves the attribute's range."""
    key, possible = np.zeros(len(history), np.int64), np.ones(len(history), bool)
    for attribute, offset, shift in rule:
        value = attributes[attribute][history[:, -offset]] + shift
        possible &= (value >= 0) & (value < sizes[attribute])
        key = key * sizes[attribute] + value
    return np.where(possible, key, -1)


def _unseen(draw, history: np.ndarray, tries: int = 8) -> np.ndarray:
    """Repeat ``draw()`` -> [U] until the item is not in the user's history; -1 where it never was."""
    chosen = np.full(len(history), -1)
    for _ in range(tries):
        item = draw()
        fresh = (item >= 0) & ~(history == item[:, None]).any(1)
        chosen = np.where((chosen < 0) & fresh, item, chosen)
    return chosen


def generate(config: WorldConfig) -> World:
    """Make the world of a config. Vectorised over users; seconds at the ``full`` scale."""
    c = config
    rng = np.random.Generator(np.random.PCG64(c.seed))
    titles, attributes, values, maker_place, place_region, weight, circle = _items(c, rng)
    sizes = {name: len(values[name]) for name in attributes}
    popular = _Bucket(np.zeros(c.items, np.int64), weight)
    circles = _Bucket(circle, weight)
    tastes = _Bucket(attributes["genre"] * sizes["mood"] + attributes["mood"], weight)
    by_rule = [_Bucket(_key(attributes, sizes, rule), weight) for rule in c.rules]
    U = c.users
    like_genre, like_mood = rng.integers(0, c.genres, U), rng.integers(0, c.moods, U)
    like_circle = rng.integers(0, c.circles, U)
    rule = rng.integers(0, max(len(c.rules), 1), U)
    length = rng.integers(c.events[0], c.events[1] + 1, U)
    percent = lambda share: rng.integers(0, 10_000, U) < round(10_000 * share)  # noqa: E731

    history, kinds, rules = (np.zeros((U, 0), np.int64) for _ in range(3))
    for t in range(c.events[1]):
        from_circle, noisy, willing, changes = (
            percent(x) for x in (c.circle_share, c.noise, c.intent_share, c.drift)
        )  # fmt: skip
        rule = np.where(changes, rng.integers(0, max(len(c.rules), 1), U), rule)
        taste = like_genre * sizes["mood"] + like_mood

        def liked(from_circle=from_circle, taste=taste):
            return np.where(from_circle, circles.draw(like_circle, rng), tastes.draw(taste, rng))

        item = _unseen(liked, history)
        kind = np.full(U, TASTE)
        for r, parts in enumerate(c.rules):
            if t >= max(offset for _, offset, _ in parts):
                wanted = _wanted(parts, history, attributes, sizes)
                match = _unseen(lambda r=r, wanted=wanted: by_rule[r].draw(wanted, rng), history)
                follows = (rule == r) & willing & (match >= 0)
                item, kind = np.where(follows, match, item), np.where(follows, INTENT, kind)
        common = _unseen(lambda: popular.draw(np.zeros(U, np.int64), rng), history, tries=16)
        takes = (noisy | (item < 0)) & (common >= 0)
        item, kind = np.where(takes, common, item), np.where(takes, NOISE, kind)
        while True:  # the rare user who has seen all that was drawn takes the next item on the shelf
            stuck = (item < 0) | (history == item[:, None]).any(1)
            if not stuck.any():
                break
            item, kind = np.where(stuck, (np.maximum(item, 0) + 1) % c.items, item), np.where(stuck, NOISE, kind)
        history = np.concatenate([history, item[:, None]], axis=1)
        kinds, rules = np.concatenate([kinds, kind[:, None]], 1), np.concatenate([rules, rule[:, None]], 1)

    keep = np.arange(history.shape[1])[None, :] < length[:, None]
    first = _START + rng.integers(0, 86_400 * 1000, U)
    gaps = rng.integers(60, 86_400 * 20, history.shape)
    times = first[:, None] + np.cumsum(gaps, axis=1)
    users = np.broadcast_to(np.arange(1, U + 1)[:, None], history.shape)
    pad = lambda x: np.concatenate([[0], x]).astype(np.int32)  # noqa: E731
    return World(
        config=c, titles=("", *titles), attributes={k: pad(v) for k, v in attributes.items()}, values=values,
        maker_place=maker_place, place_region=place_region, users=users[keep].astype(np.int32),
        items=(history[keep] + 1).astype(np.int32), times=times[keep].astype(np.int64),
        kind=kinds[keep].astype(np.int8), rule=rules[keep].astype(np.int8),
    )  # fmt: skip
