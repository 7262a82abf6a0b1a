"""The embedded world's scripted seeker: what a user would say of a list, and the teacher that writes such critiques.

As a teacher it knows the hidden item, as a large model does in GRSU's data recipe (arXiv 2504.20458). As a simulated
user it goes by the conversation alone, without a fault, which is what the trained one is to come near.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrec.data.dialogues import Dialogue
from jaxrec.tools.conversation import Criticise
from jaxrec.world.conversations import SAID, Conversations, Wish

_MET = 0.5  # share of a list that must meet a wish for the seeker to say nothing of it
_CONTENT = "I want something else."


@dataclasses.dataclass(frozen=True)
class SeekerConfig:
    """error: probability that a critique asks for something wrong. most: wishes that it repeats, at most."""

    error: float = 0.0
    most: int = 1

    def __post_init__(self):
        if not 0 <= self.error <= 1 or self.most < 1:
            raise ValueError(f"error must lie between 0 and 1 and most be at least 1: {self}")


class Seeker:
    """A user (:class:`jaxrec.tools.conversation.User`) who remembers all that was said."""

    def __init__(self, talks: Conversations, config: SeekerConfig = SeekerConfig()):
        self.talks, self.config = talks, config

    def critique(self, dialogue: Dialogue, shown: Sequence[int], rng: np.random.Generator, target: int = -1) -> str:
        """Of what was wished for, what most of a list does not meet, the worst first. A list that meets all is asked
        for one thing more that the hidden item has; without one (-1), for something else."""
        wishes = self.talks.stated(dialogue)
        met = {wish: np.mean(self.talks.fits(wish)[list(shown)] == wish.wanted) for wish in wishes}
        missing = sorted((w for w in wishes if met[w] < _MET), key=met.get)
        said = missing[: int(rng.integers(1, self.config.most + 1))]
        if not said:
            open_ = [name for name in SAID if name not in {w.attribute for w in wishes}]
            if target < 0 or not open_:
                return _CONTENT
            name = open_[rng.integers(len(open_))]
            said = [Wish(name, self.talks.value(name, target))]
        if rng.integers(0, 10_000) < round(10_000 * self.config.error):
            values = self.talks.world.values[said[0].attribute]
            said[0] = dataclasses.replace(said[0], value=values[rng.integers(len(values))])
        wanted, unwanted = ([w.words for w in said if w.wanted == kind] for kind in (True, False))
        if not wanted:
            return f"I want {' and '.join(unwanted)}."
        return f"I want {' and '.join(wanted)}{''.join(f', but {words}' for words in unwanted)}."

    def score(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The share of what was said that each item meets."""
        out = []
        for dialogue, own in zip(dialogues, items, strict=True):
            wishes = self.talks.stated(dialogue)
            met = [self.talks.fits(wish)[list(own)] == wish.wanted for wish in wishes]
            out.append(np.mean(met, axis=0) if wishes else np.full(len(own), np.nan))
        return out

    def criticise(self, requests: Sequence[Criticise]) -> list[str]:
        """One text for each request, of its seed."""
        rngs = (np.random.Generator(np.random.PCG64([r.seed, 24])) for r in requests)
        return [self.critique(r.dialogue, r.shown, rng) for r, rng in zip(requests, rngs, strict=True)]
