"""What the simulated user of GRSU (arXiv 2504.20458) is trained on: decisions about items, and critiques of lists.

Decisions need nobody: what was really recommended next is accepted, other items are not. Critiques are written by a
teacher, who sees what the student shall never see: the items that were really recommended, as the user's hidden wish.
The paper publishes neither prompts nor filters of this; both are ours.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Instance, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.data.packing import pack
from jaxrec.tools.conversation import seed_of
from jaxrec.tools.teacher import Answer, Failure, Sampling, Teacher, ask_text
from jaxrec.tools.user_prompts import UserPrompts
from rl.rows import encode_pairs, stack_rows

TOO_LONG = ("drop", "error")
WEIGHTS = ("token", "row")
LENGTH, EMPTY, LABEL, OTHER, TWICE = (
    "cut by length", "empty", "names what is wished for", "names another title", "duplicate",
)  # fmt: skip
NO_NEGATIVE = "no item to refuse"
_SAME = 90.0  # of RapidFuzz's ratio, from which on words are a title
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")
_BEGIN = re.compile(r"(^|[.!?:])[\s\"'“”‘’*(]*$")  # what stands before the first word of a sentence
_NUMBERED = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_TASK = (
    "You are the {user} of the conversation. Under Hidden Wish stands what would please you most; the {system} does "
    "not know it and must not hear its name. Tell the {system} in your own voice, in one to four sentences, why its "
    "list is not what you want: name attributes ({attributes}) that do not suit you, and those that you would rather "
    "have, so that the next list comes closer to your wish. Name no title but those of the list and the conversation."
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One row: pieces of the prompt, as :class:`UserPrompts` cuts them, and pieces of the reply that is learned."""

    prompt: tuple[str, ...]
    completion: tuple[str, ...]

    @property
    def text(self) -> tuple[str, str]:
        """(prompt, completion) as whole texts."""
        return "".join(self.prompt), "".join(self.completion)


@dataclasses.dataclass(frozen=True)
class Instructions:
    """rows, and how many of those that were wanted are missing, by reason."""

    rows: list[Instruction]
    dropped: dict[str, int]


def scoring_rows(
    instances: Sequence[Instance], recommended: Sequence[Sequence[int]], prompts: UserPrompts,
    rng: np.random.Generator, hard: float = 0.5, closest: int = 0,
) -> Instructions:  # fmt: skip
    """A decision for each label, and one against another item for each: as many of the one as of the other.

    recommended: for each instance, items that a recommender gave for its dialogue; with probability ``hard`` the other
    item is one of these, else (and where none is left) any of the catalogue. closest: it is then one of so many that
    share most attribute values with the label, which is what a search has to tell apart at last; 0: any. It is never a
    label, nor an item that the dialogue names, nor the same twice for one instance. A label without such an item is
    left out and counted twice, for its two rows.
    """
    rows: list[Instruction] = []
    missing = 0
    for instance, given in zip(instances, recommended, strict=True):
        refused: list[int] = []
        for label in instance.labels:
            taken = {*instance.labels, *instance.dialogue.items, *refused}
            near = [item for item in dict.fromkeys(given) if item not in taken]
            other = _other(taken, nearest(near, label, prompts.catalogue, closest), len(prompts.catalogue), rng, hard)
            if other is None:
                missing += 2
                continue
            refused.append(other)
            for item, decision in zip((label, other), prompts.decisions, strict=True):
                prefix, rest, reply = prompts.score_prompt(instance.dialogue, item)
                rows.append(Instruction((prefix, rest), (reply, decision)))
    return Instructions(rows, {NO_NEGATIVE: missing} if missing else {})


def nearest(items: Sequence[int], label: int, catalogue: ItemCatalogue, count: int) -> list[int]:
    """The ``count`` items that share most attribute values with another, in the order given where they share as many;
    all with 0."""
    if not count:
        return list(items)
    values = [{(name, v) for name, own in catalogue.attributes[i].items() for v in own} for i in (label, *items)]
    shared = [len(values[0] & own) for own in values[1:]]
    return [items[at] for at in sorted(range(len(items)), key=shared.__getitem__, reverse=True)[:count]]


def _other(taken: set[int], near: Sequence[int], count: int, rng: np.random.Generator, hard: float) -> int | None:
    if near and rng.random() < hard:
        return near[rng.integers(len(near))]
    return _any(taken, count, rng)


def _any(taken: set[int], count: int, rng: np.random.Generator) -> int | None:
    """A random item that is not taken."""
    if len(taken) < count // 2:  # drawing again takes two draws at most on average
        while (item := int(rng.integers(count))) in taken:
            pass
        return item
    free = [item for item in range(count) if item not in taken]
    return free[rng.integers(len(free))] if free else None


def critique_lists(
    instances: Sequence[Instance], recommended: Sequence[Sequence[int]], catalogue: ItemCatalogue, k: int,
    rng: np.random.Generator,
) -> list[tuple[int, ...]]:  # fmt: skip
    """A list of ``k`` items to criticise for each instance: those recommended without the labels, then random items
    that the dialogue does not name. Raises ValueError where the catalogue does not hold so many."""
    out = []
    for instance, given in zip(instances, recommended, strict=True):
        chosen = [item for item in dict.fromkeys(given) if item not in instance.labels][:k]
        while len(chosen) < k:
            item = _any({*chosen, *instance.labels, *instance.dialogue.items}, len(catalogue), rng)
            if item is None:
                raise ValueError(
                    f"instance {instance.dialogue.id}: lists of k={k} items without its labels and what its dialogue "
                    f"names cannot be made of a catalogue of {len(catalogue)}"
                )
            chosen.append(item)
        out.append(tuple(chosen))
    return out


def annotation_prompt(prompts: UserPrompts, instance: Instance, items: Sequence[int]) -> str:
    """What the teacher is asked: the dialogue, the list, the labels as a hidden wish, and to criticise as the user.

    prompts: of style "full" and without a tokenizer.
    """
    user, system = prompts.roles
    words = {"user": user, "system": system, "attributes": ", ".join(prompts.catalogue.order)}
    return (
        f"{prompts.critique_prompt(instance.dialogue, items)[0]}## Recommendation By {system}\n{prompts.listing(items)}"
        f"\n\n## Hidden Wish\n{prompts.listing(instance.labels)}\n\n## Instruction\n{_TASK.format(**words)}"
    )


def read_annotation(text: str, prompts: UserPrompts) -> tuple[Dialogue, list[int], list[int]]:
    """(dialogue, list, labels) of a text by :func:`annotation_prompt`, for a scripted teacher; prompts: the same.

    Raises ValueError for another text.
    """
    sections = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    parts = {title.split(" ")[0]: body for title, _, body in sections}
    try:
        talk, shown, wish = (parts[name].strip() for name in ("Conversation", "Recommendation", "Hidden"))
    except KeyError as error:
        raise ValueError(f"no teacher was asked so: the section {error} is missing") from error
    roles = dict(zip(prompts.roles, (USER, SYSTEM), strict=True))
    said = (line.partition(": ") for line in talk.split("\n"))
    turns = tuple(Turn(roles[role], words) for role, _, words in said)
    shown, wish = ([prompts.catalogue.find(title) for title in _NUMBERED.findall(part)] for part in (shown, wish))
    return Dialogue("", turns), shown, wish


def critique_rows(
    instances: Sequence[Instance], lists: Sequence[Sequence[int]], prompts: UserPrompts, teacher: Teacher,
    sampling: Sampling | None = None, copies: int = 1,
) -> Instructions:  # fmt: skip
    """Critiques of one list for each instance by a teacher (role "annotator"), ``copies`` of them.

    sampling: its seed is the first of the copies' seeds. Left out and counted: what the teacher failed in (by the kind
    of failure), what is cut by its length or empty, what names a label or another title that stands neither in the
    list nor in the dialogue, and what was said of the same list before. Rows and those left out are ``copies`` times
    the instances. Raises ValueError for a list that holds a label, which the student would then see.
    """
    for instance, items in zip(instances, lists, strict=True):
        if shared := set(instance.labels) & set(items):
            titles = ", ".join(repr(prompts.catalogue.titles[item]) for item in sorted(shared))
            raise ValueError(f"instance {instance.dialogue.id}: its list to criticise holds its own label {titles}")
    asking = prompts.messages()
    sampling = sampling or Sampling(temperature=1.0, max_tokens=1024)
    requests = [
        ask_text("annotator", annotation_prompt(asking, instance, items), sampling=sampling)
        for instance, items in zip(instances, lists, strict=True)
    ]
    base = sampling.seed or 0
    wanted = [(i, copy) for i in range(len(instances)) for copy in range(copies)]
    answers = teacher.ask([requests[i].replace(seed=seed_of(base, copy) if copy else base) for i, copy in wanted])
    find = TitleFinder(prompts.catalogue)
    rows: dict[Instruction, None] = {}
    dropped: collections.Counter[str] = collections.Counter()
    for (i, _), answer in zip(wanted, answers, strict=True):
        if reason := _unusable(answer, instances[i], lists[i], find):
            dropped[reason] += 1
            continue
        row = Instruction(
            prompts.critique_prompt(instances[i].dialogue, lists[i]), (prompts.critique_reply(answer.text),)
        )
        dropped[TWICE] += row in rows
        rows[row] = None
    return Instructions(list(rows), {reason: count for reason, count in dropped.items() if count})


def _unusable(answer: Answer, instance: Instance, items: Sequence[int], find: "TitleFinder") -> str:
    if isinstance(answer, Failure):
        return answer.kind
    if answer.finish[0] == "length":
        return LENGTH
    if not answer.text.strip():
        return EMPTY
    allowed = {*items, *instance.dialogue.items}
    for named in find(answer.text, set(instance.labels)):
        if named & set(instance.labels):
            return LABEL
        if not named & allowed:
            return OTHER
    return ""


class TitleFinder:
    """Finds the titles of a catalogue in running text, without their years.

    Windows of as many words as a title has are compared by RapidFuzz's ratio, 90 of 100 or more being a match; longer
    titles take their words from shorter ones. A title of one word counts only where it is spelled exactly so and does
    not begin a sentence, where any word may have a capital.
    """

    def __init__(self, catalogue: ItemCatalogue):
        self._names: dict[int, dict[str, set[int]]] = {}
        for item, title in enumerate(catalogue.titles):
            words = _WORD.findall(_YEAR.sub("", title)) or _WORD.findall(title)
            if words:
                names = self._names.setdefault(len(words), {})
                names.setdefault(_name(words), set()).add(item)

    def __call__(self, text: str, strict: Set[int] = frozenset()) -> list[set[int]]:
        """For each title that is named, the items that may be meant. strict: items whose titles of one word count at
        the beginning of a sentence too."""
        found = list(_WORD.finditer(text))
        words, free = [match[0] for match in found], [True] * len(found)
        out = []
        for size in sorted(self._names, reverse=True):
            for start, items in self._matches(words, size):
                if size == 1 and _BEGIN.search(text[: found[start].start()]):
                    items = items & strict
                if items and all(free[start : start + size]):
                    free[start : start + size] = [False] * size
                    out.append(set(items))
        return out

    def _matches(self, words: Sequence[str], size: int) -> Iterator[tuple[int, Set[int]]]:
        """(first word, items of the closest name) of windows of ``size`` words that are near a name."""
        names = self._names[size]
        windows = [_name(words[start : start + size]) for start in range(len(words) - size + 1)]
        if size == 1:
            yield from ((start, names[word]) for start, word in enumerate(windows) if word in names)
        elif windows:
            choices = list(names)
            ratios = process.cdist(windows, choices, scorer=fuzz.ratio, score_cutoff=_SAME)
            best = ratios.argmax(axis=1)
            for start in np.flatnonzero(ratios.max(axis=1)).tolist():
                yield start, names[choices[best[start]]]


def _name(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else " ".join(words).lower()


def encode_instructions(
    rows: Sequence[Instruction], tokenizer: Any, eos_id: int, max_len: int, too_long: str = "drop", packed: int = 0,
    seed: int = 0, weigh: str = "token",
) -> tuple[dict[str, np.ndarray], int]:  # fmt: skip
    """Arrays for ``rl.finetune`` ("tokens", "mask", "lengths"), and how many rows are left out, having more than
    ``max_len`` tokens. The completion and the end token behind it are learned, nothing else.

    Pieces are turned into tokens apart, as in the search. too_long: "error" raises ValueError for such rows instead.
    packed: in an order drawn from ``seed``, several rows are put into one of so many tokens, apart in its segments
    (:func:`jaxrec.data.packing.pack`, "segment_ids" and "positions" in place of "lengths"); 0: a row each. weigh:
    "token" lets every learned token count 1, so that a critique counts many times a decision; "row" lets those of a row
    count 1 together ("mask" is float32). Raises ValueError for another word, for ``packed`` below ``max_len``, and
    where no row fits.
    """
    if weigh not in WEIGHTS:
        raise ValueError(f"weigh={weigh!r} must be one of {', '.join(WEIGHTS)}")
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long={too_long!r} must be one of {', '.join(TOO_LONG)}")
    if 0 < packed < max_len:
        raise ValueError(f"rows of up to max_len={max_len} tokens do not fit into rows of packed={packed}")
    texts = []
    for row in rows:
        context = [("prompt", piece) for piece in row.prompt[1:]]
        texts.append((row.prompt[0], [*context, *(("policy", piece) for piece in row.completion)]))
    pairs, dropped = encode_pairs(texts, tokenizer, eos_id, max_len)
    if dropped and too_long == "error":
        raise ValueError(
            f"{dropped} of {len(rows)} rows have more than max_len={max_len} tokens; raise it or drop them"
        )
    if packed:
        order = np.random.Generator(np.random.PCG64([seed, 35])).permutation(len(pairs))
        arrays = pack([pairs[i] for i in order], packed)
    else:
        arrays = stack_rows(pairs)
    return arrays if weigh == "token" else {**arrays, "mask": _shared(arrays)}, dropped


def _shared(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, T]: 1 over the learned tokens of each row, or of each segment of a packed one, else 0."""
    learned = arrays["mask"] > 0
    segments = arrays.get("segment_ids", np.zeros(learned.shape, np.int32))
    key = segments + (segments.max() + 1) * np.arange(len(learned))[:, None]
    count = np.bincount(key.ravel(), weights=learned.ravel())
    return np.where(learned, 1 / np.maximum(count[key], 1), 0).astype(np.float32)
