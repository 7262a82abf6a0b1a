"""Conversations of the embedded world: a seeker with an item in mind, and a recommender with a short memory.

The seeker names some of the attributes of a hidden item, one or two in a turn, and sometimes one that it shall not
have. All it says is true of the item. The scripted recommender understands every such word, but goes by the last turns
alone and likes what is popular: what was said before them is forgotten unless somebody says it again. Of a list and a
critique it keeps what most of the list has in common and what the critique asks for. It may begin with a hunch of its
own, and may not let go of what a list has in common: such a conversation leads nowhere, whatever is said in it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Instance, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask, Reply, seed_of
from jaxrec.world.generate import World

SAID = ("era", "genre", "mood", "theme", "maker")  # attributes of an item, in the order in which a catalogue shows them
SPLITS = ("train", "valid", "test")
NAMES = {USER: "Seeker", SYSTEM: "Recommender"}  # how prompts call the two sides
_WANTED = {
    "era": "something from the {}", "genre": "a {}", "mood": "something {}", "theme": "something about {}",
    "maker": "something by {}",
}  # fmt: skip
_UNWANTED = {
    "era": "nothing from the {}", "genre": "no {}", "mood": "nothing {}", "theme": "nothing about {}",
    "maker": "nothing by {}",
}  # fmt: skip
_ASKING = ("I want {}.", "I would like {}.", "Please find {}.")
_OPENING = ("Hello, what do you look for?", "Hello, what would you like?")
_MORE = ("What else matters?", "And what else?", "What more?")
_NOT = re.compile(r"\b(no|nothing|not|too)\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.,;?!]")


@dataclasses.dataclass(frozen=True)
class Wish:
    """An attribute's value that an item shall have, or shall not."""

    attribute: str
    value: str
    wanted: bool = True

    @property
    def words(self) -> str:
        """As the seeker puts it, e.g. "something from the 1950s", "no comedy"."""
        return (_WANTED if self.wanted else _UNWANTED)[self.attribute].format(self.value)


@dataclasses.dataclass(frozen=True)
class TalkConfig:
    """wishes: how many of the hidden item's attributes the seeker names. avoid: probability that it also names one that
    the item does not have. test, valid: shares of the items that no training conversation is about."""

    wishes: int = 4
    avoid: float = 0.5
    valid: float = 0.1
    test: float = 0.2

    def __post_init__(self):
        if not 1 <= self.wishes <= len(SAID):
            raise ValueError(f"wishes={self.wishes} must lie between 1 and {len(SAID)}")
        for name in ("avoid", "valid", "test"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.valid + self.test >= 1:
            raise ValueError(f"valid={self.valid} and test={self.test} leave no item for training")


def talk_phrases() -> list[str]:
    """What the tokenizer of a model that converses knows beside the world's words."""
    sentences = [*_ASKING, *_OPENING, *_MORE, *_WANTED.values(), *_UNWANTED.values(), "But no not too So you want"]
    words = {word.strip(".,?"): None for text in sentences for word in text.replace("{}", "").split()}
    marks = [f"{end}{name}:" for name in NAMES.values() for end in ("", "\n")]
    marks += ["Item:", "\nItem:", "Accept?", "\nAccept?", " -", " Yes", " No", "Query:", "\nQuery:"]
    return [*marks, *(f" {word}" for word in words if word)]


def world_catalogue(world: World) -> ItemCatalogue:
    """The world's items with what can be said of them; item i here is item i + 1 of the world."""
    known = [{name: world.word(name, item) for name in SAID} for item in range(1, world.num_items + 1)]
    return ItemCatalogue(world.titles[1:], known, SAID)


class Conversations:
    """Conversations of one world. Items are split, so that no item is wished for in two splits."""

    def __init__(self, world: World, seed: int = 0, config: TalkConfig = TalkConfig()):
        self.world, self.seed, self.config = world, seed, config
        self.catalogue = world_catalogue(world)
        order = np.random.Generator(np.random.PCG64([world.config.seed, seed, 21])).permutation(world.num_items)
        valid, test = (round(share * world.num_items) for share in (config.valid, config.test))
        parts = order[valid + test :], order[:valid], order[valid : valid + test]
        self.items = dict(zip(SPLITS, parts, strict=True))

    def sample(self, split: str, count: int) -> list[Instance]:
        """``count`` conversations up to the turn that recommends the hidden item, its label. The first ones of a larger
        count are those of a smaller one. Raises ValueError for an unknown split or one without items."""
        if split not in self.items or not len(self.items[split]):
            raise ValueError(f"no split {split!r} with items; splits: {', '.join(SPLITS)}")
        out = []
        for number in range(count):
            key = [self.world.config.seed, self.seed, 22, SPLITS.index(split), number]
            rng = np.random.Generator(np.random.PCG64(key))
            item = self.draw(split, rng)
            out.append(Instance(Dialogue(f"{split}-{number}", self.turns(item, rng)), (item,)))
        return out

    def draw(self, split: str, rng: np.random.Generator) -> int:
        """An item of a split."""
        return int(self.items[split][rng.integers(len(self.items[split]))])

    def value(self, attribute: str, item: int) -> str:
        """What the catalogue says of an item."""
        return self.catalogue.attributes[item][attribute][0]

    def wishes(self, item: int, rng: np.random.Generator) -> list[Wish]:
        """What the seeker will say of an item, in order."""
        names = [SAID[i] for i in rng.permutation(len(SAID))]
        out = [Wish(name, self.value(name, item)) for name in names[: self.config.wishes]]
        if rng.integers(0, 10_000) < round(10_000 * self.config.avoid):
            name = SAID[rng.integers(len(SAID))]
            others = [v for v in self.world.values[name] if v != self.value(name, item)]
            if others:
                out.insert(int(rng.integers(1, len(out) + 1)), Wish(name, others[rng.integers(len(others))], False))
        return out

    def turns(self, item: int, rng: np.random.Generator) -> tuple[Turn, ...]:
        """What both sides say before the item is recommended, the recommender first."""
        turns = [Turn(SYSTEM, _OPENING[rng.integers(len(_OPENING))])]
        wishes = self.wishes(item, rng)
        while wishes:
            together = 2 if len(wishes) > 1 and not wishes[1].wanted else 1
            said, wishes = wishes[:together], wishes[together:]
            wanted = _ASKING[rng.integers(len(_ASKING))].format(said[0].words)
            turns.append(Turn(USER, wanted if together == 1 else f"{wanted} But {said[1].words}."))
            if wishes:
                turns.append(Turn(SYSTEM, _MORE[rng.integers(len(_MORE))]))
        return tuple(turns)

    # --- what is understood ---

    @functools.cached_property
    def _values(self) -> dict[str, str]:
        """Value -> its attribute."""
        return {value: name for name in SAID for value in self.world.values[name]}

    @functools.cached_property
    def _value(self) -> re.Pattern:
        longest = sorted(self._values, key=len, reverse=True)
        return re.compile(r"\b(" + "|".join(map(re.escape, longest)) + r")\b")

    def understand(self, text: str) -> list[Wish]:
        """Every attribute's value that a text names, in order; one that stands behind a negation, within a clause, is
        not wanted."""
        out = []
        for clause in _CLAUSE.split(text):
            no = _NOT.search(clause)
            for found in self._value.finditer(clause):
                out.append(Wish(self._values[found[0]], found[0], no is None or no.start() > found.start()))
        return list(dict.fromkeys(out))

    def stated(self, dialogue: Dialogue, turns: int = 0) -> list[Wish]:
        """What the seeker said in the last ``turns`` of its turns (0: all)."""
        said = [turn.text for turn in dialogue.turns if turn.role == USER][-turns:]
        return [wish for text in said for wish in self.understand(text)]

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """float64 [items]: the logarithm of one more than how often an item was chosen, of mean 0."""
        counts = np.bincount(self.world.items - 1, minlength=self.world.num_items)
        return np.log1p(counts) - np.log1p(counts).mean()

    @functools.cached_property
    def _numbers(self) -> dict[str, dict[str, int]]:
        return {name: {value: i for i, value in enumerate(self.world.values[name])} for name in SAID}

    def fits(self, wish: Wish) -> np.ndarray:
        """bool [items]: which have the value that a wish is about."""
        return self.world.attributes[wish.attribute][1:] == self._numbers[wish.attribute][wish.value]

    def common(self, items: Sequence[int], share: float) -> list[Wish]:
        """Values that at least ``share`` of some items have."""
        out = []
        for name in SAID:
            values, counts = np.unique(self.world.attributes[name][1:][list(items)], return_counts=True)
            if counts.max() >= share * len(items):
                out.append(Wish(name, self.world.values[name][values[counts.argmax()]]))
        return out


@dataclasses.dataclass(frozen=True)
class RecommenderConfig:
    """k: items of a list. memory: of the seeker's turns, the last ones that are read (0: all). strength: of a wish,
    in units of the logarithm of popularity. heard: probability that a wish is heeded. temperature: of the draw. keep:
    share of a list that must have a value in common for it to be asked of the next one too. kept: probability that it
    then is. hunch: probability that a first list is about a value of the recommender's own choice, of an attribute that
    it has read nothing about. stubborn: share of values, drawn anew for each dialogue, that it does not let go of once
    a list has them in common: they are asked of the next list whatever else is wanted of that attribute."""

    k: int = 10
    memory: int = 1
    strength: float = 6.0
    heard: float = 0.5
    temperature: float = 0.4
    keep: float = 0.6
    kept: float = 0.5
    hunch: float = 0.0
    stubborn: float = 0.0

    def __post_init__(self):
        if self.k < 1 or self.memory < 0 or self.strength < 0 or self.temperature < 0:
            raise ValueError(f"k must be at least 1; memory, strength and temperature must not be negative: {self}")
        for name in ("heard", "keep", "kept", "hunch", "stubborn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")


class WorldRecommender:
    """The scripted recommender (:class:`jaxrec.tools.conversation.Recommender`). Raises ValueError for a catalogue with
    fewer than ``k`` items."""

    def __init__(self, talks: Conversations, config: RecommenderConfig = RecommenderConfig()):
        if len(talks.catalogue) < config.k:
            raise ValueError(f"lists of {config.k} items are wanted of a catalogue of {len(talks.catalogue)}")
        self.talks, self.config, self.k = talks, config, config.k

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """Lists without items of the list that is revised."""
        return [self._list(ask) for ask in asks]

    def _list(self, ask: Ask) -> Reply:
        c, talks = self.config, self.talks
        rng = np.random.Generator(np.random.PCG64([ask.seed, 23]))
        heeded = dict.fromkeys(talks.stated(ask.dialogue, c.memory), c.heard)
        if ask.shown:
            heeded = self._revised(ask, heeded | dict.fromkeys(talks.understand(ask.critique), c.heard))
        elif rng.integers(0, 10_000) < round(10_000 * c.hunch):
            heeded |= dict.fromkeys(self._hunch(heeded, rng), 1.0)
        score = talks.popularity + c.temperature * rng.gumbel(size=len(talks.catalogue))
        for (wish, share), draw in zip(heeded.items(), rng.random(len(heeded)), strict=True):
            if draw < share:
                score += np.where(talks.fits(wish), c.strength if wish.wanted else -c.strength, 0.0)
        score[list(ask.shown)] = -np.inf
        best = np.argpartition(-score, c.k - 1)[: c.k] if c.k < len(score) else np.arange(len(score))
        items = tuple(int(i) for i in best[np.argsort(-score[best], kind="stable")])
        return Reply(items, talks.catalogue.listing(items))

    def _revised(self, ask: Ask, heeded: dict[Wish, float]) -> dict[Wish, float]:
        """What the next list goes by, with probabilities: what is said, and what the last list has in common."""
        c, talks = self.config, self.talks
        common = talks.common(ask.shown, c.keep)
        fixed = [w for w in common if seed_of("stubborn", ask.dialogue.id, w.attribute, w.value) < c.stubborn * 2**31]
        closed = {wish.attribute for wish in fixed}
        out = {wish: share for wish, share in heeded.items() if wish.attribute not in closed}
        taken = closed | {wish.attribute for wish in out if wish.wanted}
        out |= dict.fromkeys((wish for wish in common if wish.attribute not in taken), c.kept)
        return out | dict.fromkeys(fixed, 1.0)

    def _hunch(self, heeded: Iterable[Wish], rng: np.random.Generator) -> list[Wish]:
        """A wish of the recommender's own about an attribute that it has read nothing about, if there is one."""
        free = [name for name in SAID if name not in {wish.attribute for wish in heeded}]
        if not free:
            return []
        name = free[rng.integers(len(free))]
        values = self.talks.world.values[name]
        return [Wish(name, values[rng.integers(len(values))])]
