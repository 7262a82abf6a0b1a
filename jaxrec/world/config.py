"""The knobs of the embedded world."""

import dataclasses

from jaxrec.world import names

ATTRIBUTES = ("maker", "era", "genre", "mood", "theme", "region")

# A rule is what an intent asks for: each part copies an attribute from the k-th last event, possibly shifted.
# ("maker", 2, 0) = by the maker of the last but one; ("era", 1, -1) = one era older than the last one's.
Rule = tuple[tuple[str, int, int], ...]

RULES: tuple[Rule, ...] = (
    (("maker", 2, 0), ("era", 1, -1)),
    (("maker", 1, 0), ("genre", 2, 0)),
    (("genre", 1, 0), ("mood", 2, 0), ("era", 2, 0)),
    (("region", 1, 0), ("genre", 1, 0), ("mood", 2, 0)),
)


# The largest value of each count: as many names as there are, titles and users as many as fit into int32.
_MOST = {
    "items": 2**31 - 2,
    "users": 2**31 - 2,
    "makers": len(names.ONSETS) * len(names.VOWELS) * len(names.CODAS),
    "places": len(names.ONSETS) * len(names.VOWELS) * len(names.PLACE_ENDS),
    "eras": 100,
    "genres": len(names.GENRES),
    "moods": len(names.MOODS),
    "themes": len(names.THEMES),
    "circles": 2**31 - 2,
    "title_words": len(names.ADJECTIVES),
}


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """One world. Same values, same bytes: only integer draws from NumPy's PCG64 decide anything.

    items, users: counts. events: (fewest, most) per user. makers, places, eras, genres, moods, themes: attribute sizes.
    intent_share: probability that an event follows the user's rule. rules: what intents there are; each user has one.
    drift: probability per event that a user changes rule. noise: probability that an event is drawn by popularity
    alone. circle_share: among taste events, those drawn from the user's circle of items, which no word describes.
    title_words: adjectives that titles are made of, and as many nouns; with few, a word says little about an item.
    """

    seed: int = 0
    items: int = 800
    users: int = 2500
    events: tuple[int, int] = (10, 14)
    makers: int = 48
    places: int = 16
    eras: int = 6
    genres: int = 8
    moods: int = 8
    themes: int = 8
    circles: int = 24
    intent_share: float = 0.6
    rules: tuple[Rule, ...] = RULES
    drift: float = 0.03
    noise: float = 0.1
    circle_share: float = 0.5
    title_words: int = len(names.ADJECTIVES)

    def __post_init__(self):
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"world.{name}={getattr(self, name)} must lie between 1 and {most}")
        if self.seed < 0:
            raise ValueError(f"world.seed={self.seed} must not be negative")
        for name in ("intent_share", "drift", "noise", "circle_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"world.{name}={getattr(self, name)} must lie between 0 and 1")
        low, high = self.events
        if not 3 <= low <= high:
            raise ValueError(
                f"world.events={self.events}: want 3 <= fewest <= most, a user needs train, valid and test"
            )
        if self.items < 4 * high:
            raise ValueError(
                f"world.items={self.items} is too few for histories of {high} different items; use {4 * high}"
            )
        for rule in self.rules:
            for attribute, offset, _ in rule:
                if attribute not in ATTRIBUTES or offset < 1:
                    raise ValueError(
                        f"world.rules: bad part {(attribute, offset)}; attributes: {', '.join(ATTRIBUTES)}"
                    )
            if not rule or max(offset for _, offset, _ in rule) >= high:
                raise ValueError(f"world.rules: {rule} looks back at events that no user of {high} events has")


SCALES: dict[str, dict] = {
    "tiny": {
        "items": 64,
        "users": 160,
        "makers": 8,
        "places": 4,
        "eras": 4,
        "genres": 4,
        "moods": 4,
        "themes": 4,
        "circles": 4,
    },
    "demo": {"items": 600, "users": 2000, "makers": 36},
    "full": {"items": 1000, "users": 4000},
    "talk": {"items": 20_000, "users": 4000, "genres": 12, "moods": 12, "themes": 12},  # of which few meet four wishes
    "huge": {
        "items": 1_000_000,
        "users": 200_000,
        "makers": 4000,
        "places": 200,
        "eras": 9,
        "genres": 12,
        "moods": 12,
        "circles": 2000,
    },
}


def world_config(scale: str = "demo", **knobs) -> WorldConfig:
    """The config of a named scale with some knobs changed. Raises ValueError for an unknown scale."""
    if scale not in SCALES:
        raise ValueError(f"unknown world scale {scale!r}; scales: {', '.join(SCALES)}")
    return WorldConfig(**{**SCALES[scale], **knobs})
