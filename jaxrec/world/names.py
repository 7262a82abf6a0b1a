"""Names for everything in the embedded world, from a seed and short word stocks of our own."""

import numpy as np

ONSETS = (
    "B",
    "Br",
    "C",
    "D",
    "Dr",
    "F",
    "G",
    "Gr",
    "H",
    "J",
    "K",
    "L",
    "M",
    "N",
    "P",
    "Qu",
    "R",
    "S",
    "St",
    "T",
    "V",
    "W",
    "Y",
    "Z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
CODAS = (
    "bel",
    "dan",
    "den",
    "fer",
    "gan",
    "kin",
    "lan",
    "len",
    "lor",
    "mar",
    "mir",
    "nel",
    "nor",
    "ral",
    "ren",
    "rin",
    "sk",
    "ster",
    "tan",
    "tor",
    "van",
    "vin",
    "wick",
    "zar",
)
PLACE_ENDS = ("bourne", "bridge", "dale", "ford", "gate", "ham", "holm", "mere", "mouth", "stead", "ton", "wold")
REGIONS = ("Ashmark", "Brinelands", "Coldreach", "Dunvale", "Eastfen", "Farshore", "Goldmoor", "Highsedge")
GENRES = (
    "ballad",
    "chronicle",
    "comedy",
    "farce",
    "mystery",
    "pastoral",
    "romance",
    "saga",
    "satire",
    "thriller",
    "tragedy",
    "western",
)
MOODS = ("bitter", "calm", "dark", "dreamy", "eerie", "hopeful", "lively", "tender", "tense", "wistful", "wry", "stern")
THEMES = (
    "betrayal",
    "courage",
    "exile",
    "family",
    "greed",
    "hunger",
    "memory",
    "music",
    "ocean",
    "revenge",
    "science",
    "winter",
)
ADJECTIVES = (
    "Amber", "Ancient", "Bitter", "Blind", "Brass", "Bright", "Broken", "Burning", "Carved", "Cloudy", "Copper",
    "Crimson", "Crooked", "Daring", "Distant", "Drifting", "Empty", "Faded", "Fallen", "Feral", "Final", "Frozen",
    "Gentle", "Gilded", "Golden", "Hidden", "Hollow", "Idle", "Iron", "Ivory", "Jagged", "Last", "Leaden", "Little",
    "Lonely", "Lost", "Lucky", "Marble", "Midnight", "Muted", "Narrow", "Nimble", "Northern", "Painted", "Pale",
    "Patient", "Plain", "Proud", "Quiet", "Ragged", "Restless", "Rising", "Royal", "Rusted", "Sacred", "Salted",
    "Scarlet", "Second", "Secret", "Shallow", "Silent", "Silver", "Sleeping", "Slow", "Southern", "Stolen", "Stray",
    "Sunken", "Tangled", "Thorny", "Tin", "Twisted", "Velvet", "Wandering", "Waning", "Weary", "Wild", "Winter",
    "Wooden", "Young",
)  # fmt: skip
NOUNS = (
    "Anchor", "Archer", "Ballroom", "Basket", "Beacon", "Bell", "Bridge", "Candle", "Canyon", "Castle", "Chapel",
    "Circus", "Clock", "Compass", "Corridor", "Crown", "Dagger", "Dancer", "Echo", "Falcon", "Feather", "Ferry",
    "Fiddle", "Fortune", "Fountain", "Garden", "Ghost", "Glacier", "Harbour", "Harvest", "Heron", "Horizon", "Island",
    "Jester", "Journey", "Kettle", "Kingdom", "Ladder", "Lantern", "Letter", "Library", "Lighthouse", "Locket",
    "Mask", "Meadow", "Mirror", "Monsoon", "Mountain", "Needle", "Oracle", "Orchard", "Parade", "Pilgrim", "Pillow",
    "Promise", "Quarry", "Raven", "Ribbon", "River", "Saddle", "Sailor", "Shadow", "Signal", "Sparrow", "Spindle",
    "Statue", "Stranger", "Summit", "Tailor", "Tavern", "Temple", "Thief", "Tower", "Traveller", "Trumpet", "Valley",
    "Violin", "Whistle", "Window", "Witness",
)  # fmt: skip


def _distinct(rng: np.random.Generator, count: int, *stocks: tuple[str, ...]) -> list[str]:
    """``count`` different joins of one word from each stock, in random order."""
    sizes = [len(stock) for stock in stocks]
    total = int(np.prod(sizes))
    if count > total:
        raise ValueError(f"{count} names asked for but these stocks make only {total}")
    picks = np.unravel_index(rng.choice(total, size=count, replace=False), sizes)
    return ["".join(stock[i] for stock, i in zip(stocks, row, strict=True)) for row in zip(*picks, strict=True)]


def makers(rng: np.random.Generator, count: int) -> list[str]:
    """Surnames like "Drouvan"; no two alike."""
    return _distinct(rng, count, ONSETS, VOWELS, CODAS)


def places(rng: np.random.Generator, count: int) -> list[str]:
    """Town names like "Quebridge"; no two alike, and none equal to a maker's."""
    return _distinct(rng, count, ONSETS, VOWELS, PLACE_ENDS)


def eras(count: int) -> list[str]:
    """``count`` decades up to the 1990s, oldest first."""
    return [f"{2000 - 10 * (count - i)}s" for i in range(count)]


def titles(rng: np.random.Generator, count: int, words: int = len(ADJECTIVES)) -> list[str]:
    """``count`` different titles of the first ``words`` adjectives and nouns: two words while they last, then three
    ("Amber Bell Tower"), then a numeral."""
    first, last = ADJECTIVES[:words], NOUNS[:words]
    pairs = len(first) * len(last)
    two = [a + " " + n for a in first for n in last]
    if count <= pairs:
        return [two[i] for i in rng.permutation(pairs)[:count]]
    triples = pairs * len(last)
    order = np.arange(count)
    names = [two[i % pairs] if i < pairs else f"{two[i % pairs]} {last[(i // pairs - 1) % len(last)]}" for i in order]
    return [name if i < triples else f"{name} {2 + i // triples}" for i, name in enumerate(names)]
