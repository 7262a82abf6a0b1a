"""A catalogue of titled items with attributes in words, and the way from a name that a model wrote to an item.

Titles are matched as the released code of GRSU (arXiv 2504.20458) does: exactly, else the closest title by RapidFuzz's
QRatio over lower-cased text without punctuation.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz import fuzz, process, utils

ATTRIBUTES = ("genre", "star", "director", "writer", "plot")  # in the order in which an item's text shows them
UNSURE = 60.0  # a match of a lower ratio is likely no match; it is counted


def title_key(title: str) -> str:
    """What decides that two titles are one: lower case, no punctuation; of a title of nothing else, itself."""
    return " ".join((utils.default_process(title) or title).split())


@dataclasses.dataclass(frozen=True)
class Match:
    """ratio: of the title, 0 to 100, 100 where the name is one. repeated: whether the name is close to a title that a
    name before it has taken, so that this is the closest of the others."""

    item: int
    ratio: float
    repeated: bool = False


class ItemCatalogue:
    """titles: one for each item. attributes: per item, name -> values, in words; missing or empty where nothing is
    known. order: the attributes that an item's text shows, in that order.

    Raises ValueError for no title at all, an empty one, and titles that differ in case, punctuation or blanks alone;
    TypeError for an attribute that is neither a text nor a list of texts.
    """

    def __init__(
        self,
        titles: Sequence[str],
        attributes: Sequence[Mapping[str, str | Sequence[str]]],
        order: Sequence[str] = ATTRIBUTES,
    ):
        if len(titles) != len(attributes):
            raise ValueError(f"{len(titles)} titles but attributes of {len(attributes)} items")
        if not titles:
            raise ValueError("the catalogue is empty: there is nothing to recommend")
        self.titles, self.order = tuple(titles), tuple(order)
        self.attributes = tuple(
            {name: _values(title, name, value) for name, value in known.items()}
            for title, known in zip(titles, attributes, strict=True)
        )
        self._keys = [title_key(title) for title in self.titles]
        groups = collections.defaultdict(list)
        for title, key in zip(self.titles, self._keys, strict=True):
            if not key:
                raise ValueError("an item has an empty title; give it a name")
            groups[key].append(title)
        if clashes := [same for same in groups.values() if len(same) > 1]:
            shown = "; ".join(" = ".join(map(repr, same)) for same in clashes[:5])
            more = f"; and {len(clashes) - 5} more" if len(clashes) > 5 else ""
            raise ValueError(f"{len(clashes)} titles name several items: {shown}{more}; add a year to them")
        self._exact = {title: i for i, title in enumerate(self.titles)}
        self._folded = {key: i for i, key in enumerate(self._keys)}

    def __len__(self) -> int:
        return len(self.titles)

    def find(self, title: str) -> int | None:
        """The item of a title, but for case, punctuation and blanks; None where there is none."""
        found = self._exact.get(title)
        return self._folded.get(title_key(title)) if found is None else found

    def match(self, names: Sequence[str], min_ratio: float = 0.0) -> list[Match]:
        """One item for each name, no item twice: its own, else the closest that is still free. Names that come nowhere
        near ``min_ratio`` are left out."""
        used: set[int] = set()
        out = []
        for name in names:
            found = self._closest(name, used)
            if found is not None and found.ratio >= min_ratio:
                used.add(found.item)
                out.append(found)
        return out

    def _closest(self, name: str, used: set[int]) -> Match | None:
        exact = self.find(name)
        if exact is not None and exact not in used:
            return Match(exact, 100.0)
        if len(used) == len(self):
            return None
        key = title_key(name)
        # The best of all is mostly free; only where it is not are the others gone through again.
        found = process.extractOne(key, self._keys, scorer=fuzz.QRatio)
        repeated = found[2] in used and found[1] >= UNSURE
        if found[2] in used:
            free = {i: title for i, title in enumerate(self._keys) if i not in used}
            found = process.extractOne(key, free, scorer=fuzz.QRatio)
        return Match(found[2], found[1], repeated)

    def text(self, item: int, most: int = 0, clean: Callable[[str], str] = str) -> str:
        """The item as a prompt shows it: its title, then a line for each attribute that is known. most: characters of
        each (:func:`shown_values`). clean: what is done to title and values before they are shown."""
        known = self.attributes[item]
        lines = [f"  - {name}: {clean(shown_values(known[name], most))}" for name in self.order if known.get(name)]
        return "\n".join([clean(self.titles[item]), *lines])

    def listing(self, items: Sequence[int]) -> str:
        """Items numbered from 1, each as :meth:`text` gives it."""
        return "\n".join(f"{number}. {self.text(item)}" for number, item in enumerate(items, start=1))


def shown_values(values: Sequence[str], most: int = 0, between: str = ", ") -> str:
    """Values as one text. most: its characters, 0 for any number: the values that fit from the first one on, of a first
    one that is longer its first words, and "..." for the rest.

    >>> shown_values(["Al Pacino", "Val Kilmer", "Jon Voight"], 26)
    'Al Pacino, Val Kilmer, ...'
    >>> shown_values(["A thief and his hunter."], 15)
    'A thief and...'
    """
    text, end = "", "..."
    for number, value in enumerate(values):
        longer = f"{text}{between}{value}" if number else value
        if most and len(longer) > most - (number + 1 < len(values)) * len(between + end):
            if number:
                return f"{text}{between}{end}"
            cut = value[: max(0, most - len(end))]
            return (cut.rpartition(" ")[0] or cut).rstrip(" ,;.") + end
        text = longer
    return text


def _values(title: str, name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{title!r}: attribute {name!r} must be a text or a list of texts, not {value!r}")
    return tuple(v for v in value if v.strip())
