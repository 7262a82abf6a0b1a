"""The world's events as :class:`jaxrec.data.Interactions`, and the labels of held-out events."""

import numpy as np

from jaxrec.data.interactions import PAD, Interactions
from jaxrec.data.splits import Split
from jaxrec.world.generate import World


def to_interactions(world: World) -> Interactions:
    """Events user by user in time order; titles and categories as a catalogue would show them."""
    names = lambda prefix, count: np.array([PAD, *(f"{prefix}{i}" for i in range(1, count + 1))])  # noqa: E731
    return Interactions(
        users=world.users,
        items=world.items,
        times=world.times,
        ratings=None,
        user_tokens=names("user", int(world.users.max())),
        item_tokens=names("item", world.num_items),
        titles=world.titles,
        categories=world.categories,
        report={},
    )


def event_kinds(world: World, split: Split, part: str) -> np.ndarray:
    """Why each target of ``split.samples(part)`` happened: int8 [n] of TASTE, INTENT, NOISE, in that order."""
    # A world's events are already in the order a split puts them in: user by user, times strictly increasing.
    if len(split.items) != len(world.items):
        raise ValueError("the split does not hold the world's events: filters must leave a labelled world whole")
    position, _ = split.target_events(part)
    return world.kind[position]
