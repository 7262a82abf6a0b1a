"""Conversations in which items are recommended, from the field's files.

=========  ====================================================================================================
inspired   INSPIRED's tables (Hayati et al., EMNLP 2020), an utterance a line
redial     ReDial's release (Li et al., 2018), a dialogue a line, films as ``@12345``
ievalm     iEvaLM-CRS's turns of ReDial and OpenDialKG (EMNLP 2023): a line is a history and what was recommended next
grsu       what GRSU's code reads (arXiv 2504.20458): a dialogue a line, with roles and items
jsonl      our own: ``{"id": ..., "turns": [{"role": "user" | "system", "text": ..., "items": [titles]}]}``
=========  ====================================================================================================

Titles become numbers of a catalogue (:mod:`jaxrec.data.catalogue_files`). What cannot be used is counted by reason;
what is not as its format says is an error that names file and line. Turns stay as they are, one speaker's in a row too.
"""

import ast
import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.data.catalogue_files import catalogue_of, checked, merge_titles, read_catalogue, read_text, tidy
from jaxrec.data.dialogues import REPEATED, ROLES, SYSTEM, USER, Dialogue, Instance, Turn, instances
from jaxrec.data.item_catalogue import ATTRIBUTES, ItemCatalogue
from jaxrec.data.lines import json_lines

EMPTY_TEXT = "turns without text or item, left out"
NO_TURN = "dialogues without a turn, left out"


@dataclasses.dataclass(frozen=True)
class DialogueData:
    """A file that was read. dialogues: whole ones; rows: instances, of files that hold these instead (``ievalm``).
    counts: sizes, and what was left out or looked odd, by reason."""

    path: str
    form: str
    catalogue: ItemCatalogue
    dialogues: tuple[Dialogue, ...]
    rows: tuple[Instance, ...]
    counts: Mapping[str, int]

    def instances(
        self, *, only_new: bool = True, drop_skipped_turns: bool = False
    ) -> tuple[list[Instance], dict[str, int]]:
        """As :func:`jaxrec.data.dialogues.instances`. Raises ValueError where turns shall be dropped from histories
        that the file holds whole."""
        if not self.rows:
            return instances(self.dialogues, only_new=only_new, drop_skipped_turns=drop_skipped_turns)
        if drop_skipped_turns:
            raise ValueError(f"{self.path}: format {self.form} holds whole histories; drop_skipped_turns must be off")
        kept = [row for row in self.rows if not (only_new and set(row.labels) & set(row.dialogue.items))]
        skipped = len(self.rows) - len(kept)
        return kept, {REPEATED: skipped} if skipped else {}


def read_dialogues(
    path: str | Path, form: str = "", *, catalogue_path: str | Path = "", order: Sequence[str] = ATTRIBUTES
) -> DialogueData:
    """The dialogues of one file: :func:`read_parts` of a single part."""
    return read_parts({"": path}, form, catalogue_path=catalogue_path, order=order)[""]


def read_parts(
    paths: Mapping[str, str | Path], form: str = "", *, catalogue_path: str | Path = "",
    order: Sequence[str] = ATTRIBUTES,
) -> dict[str, DialogueData]:  # fmt: skip
    """Parts of a data set, such as training and test, whose items have the same numbers.

    form: one of :data:`FORMATS`, or "" to go by each file's first line. catalogue_path: a file of
    :func:`jaxrec.data.catalogue_files.read_catalogue`; without one the catalogue is made of the titles that the
    dialogues name, with no attributes. order: the attributes that an item's text shows. Raises ValueError naming file
    and line for what the format does not allow, for an unknown format, and for a file without any dialogue;
    FileNotFoundError.
    """
    if form and form not in FORMATS:
        raise ValueError(f"no format {form!r} of dialogues; formats: {', '.join(FORMATS)}")
    if not paths:
        raise ValueError("no file of dialogues was named")
    forms = {part: form or detect_format(path) for part, path in paths.items()}
    read = {part: _PARSERS[forms[part]](Path(path)) for part, path in paths.items()}
    for path, (talks, _) in zip(paths.values(), read.values(), strict=True):
        if not talks:
            raise ValueError(f"{path}: no dialogues")
    if catalogue_path:
        catalogue, about = read_catalogue(catalogue_path, order)
    elif "ievalm" in forms.values():
        raise ValueError("format ievalm needs catalogue_path, a file id2info.json: its turns name more than items")
    else:
        catalogue, about = _made(read, order, ", ".join(map(str, paths.values())))
    return {part: _numbered(str(path), forms[part], *read[part], catalogue, about) for part, path in paths.items()}


def write_dialogues(path: str | Path, dialogues: Sequence[Dialogue], catalogue: ItemCatalogue) -> None:
    """Dialogues in our own form, ``jsonl``, which :func:`read_dialogues` reads as the same ones, turns without text or
    item left out."""
    lines = [
        {
            "id": dialogue.id,
            "turns": [
                {"role": turn.role, "text": turn.text, "items": [catalogue.titles[item] for item in turn.items]}
                for turn in dialogue.turns
            ],
        }
        for dialogue in dialogues
    ]
    Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def detect_format(path: str | Path) -> str:
    """The format of a file, by its first line. Raises ValueError for a line that no format has."""
    path = Path(path)
    first = read_text(path).lstrip().split("\n", 1)[0]
    if set(_INSPIRED) <= set(first.rstrip("\r").split("\t")):
        return "inspired"
    if first[0] != "{":
        raise ValueError(
            f"{path}:1: no known format of dialogues begins with {first:.60}; formats: {', '.join(FORMATS)}"
        )
    entry = json_lines(path)[0][1]
    if "turns" in entry:
        return "jsonl"
    if {"context", "rec"} <= entry.keys():
        return "ievalm"
    if "messages" in entry:
        messages = entry["messages"] if isinstance(entry["messages"], list) else []
        roles = any(isinstance(message, dict) and "role" in message for message in messages)
        return "redial" if "initiatorWorkerId" in entry and not roles else "grsu"
    fields = ", ".join(map(str, entry))
    raise ValueError(f"{path}:1: no known format of dialogues has these fields: {fields:.200}; {', '.join(FORMATS)}")


@dataclasses.dataclass(frozen=True)
class _Said:
    """A turn whose items are still titles."""

    role: str
    text: str
    titles: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A dialogue before its items are numbered. labels: titles that come next, of a line that is an instance."""

    where: str
    id: str
    turns: tuple[_Said, ...]
    labels: tuple[str, ...] | None = None


_Read = tuple[list[_Talk], Counter[str]]


def _made(read: Mapping[str, _Read], order: Sequence[str], where: str) -> tuple[ItemCatalogue, dict[str, int]]:
    named = dict.fromkeys(t for talks, _ in read.values() for talk in talks for turn in talk.turns for t in turn.titles)
    counts: Counter[str] = Counter()
    titles, facts = merge_titles(((title, {}) for title in named), counts)
    return catalogue_of(titles, facts, order, where), {"items": len(titles), **counts}


def _numbered(
    path: str,
    form: str,
    talks: Sequence[_Talk],
    counts: Counter[str],
    catalogue: ItemCatalogue,
    about: Mapping[str, int],
) -> DialogueData:
    """Titles as numbers, with counts of those that the catalogue has not."""
    whole: list[Dialogue] = []
    rows: list[Instance] = []
    seen: dict[str, str] = {}
    counts = counts.copy()
    for talk in talks:
        if talk.id in seen:
            raise ValueError(f"{talk.where}: id {talk.id!r} was there before, at {seen[talk.id]}; ids must be unique")
        seen[talk.id] = talk.where
        turns = []
        for said in talk.turns:
            items = _items(said.titles, catalogue)
            counts["mentions of items"] += len(items)
            counts["mentions of what is no item of the catalogue"] += len(said.titles) - len(items)
            counts["turns that name an item"] += bool(items)
            if said.text.strip() or items:
                turns.append(Turn(said.role, said.text, items))
            else:
                counts[EMPTY_TEXT] += 1
        counts["turns"] += len(turns)
        dialogue = Dialogue(talk.id, tuple(turns))
        if talk.labels is not None:
            labels = _items(talk.labels, catalogue)
            counts["labels"] += len(talk.labels)
            counts["labels that are no item of the catalogue"] += len(talk.labels) - len(labels)
        if not turns:
            counts[NO_TURN] += 1
        elif talk.labels is None:
            whole.append(dialogue)
        elif labels:
            rows.append(Instance(dialogue, tuple(dict.fromkeys(labels))))
        else:
            counts["rows without a label in the catalogue, left out"] += 1
    found = {**counts, **{f"catalogue: {what}": number for what, number in about.items()}}
    return DialogueData(path, form, catalogue, tuple(whole), tuple(rows), {k: v for k, v in found.items() if v})


def _items(titles: Sequence[str], catalogue: ItemCatalogue) -> tuple[int, ...]:
    return tuple(item for item in map(catalogue.find, titles) if item is not None)


_INSPIRED = ("dialog_id", "speaker", "text", "movies")
_SPEAKERS = {"SEEKER": USER, "RECOMMENDER": SYSTEM}


def _inspired(path: Path) -> _Read:
    """Lines of cells between tabs, without quoting. Quotation marks are written out there, as ``QUOTATION_MARK``."""
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    header = lines[0].split("\t")
    if missing := [name for name in _INSPIRED if name not in header]:
        raise ValueError(f"{path}:1: the header has no column {', '.join(missing)}")
    counts: Counter[str] = Counter()
    talks: dict[str, list[_Said]] = {}
    first: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        where, cells = f"{path}:{number}", line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells where the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        role = _SPEAKERS.get(row["speaker"].strip().upper())
        if role is None:
            raise ValueError(f"{where}: speaker {row['speaker']!r} must be one of {', '.join(_SPEAKERS)}")
        titles = tuple(tidy(title, where) for title in row["movies"].split(";") if title.strip())
        indexed = _literal_keys(row.get("movie_dict", "{}"))
        if indexed is None:
            counts["movie_dict texts that cannot be read"] += 1
        else:
            counts["mentions that movie_dict does not have"] += len(set(titles) - indexed)
        counts["lines whose outcome is nan"] += row.get("coarse_label") == "nan"
        first.setdefault(row["dialog_id"], where)
        text = tidy(row["text"].replace("QUOTATION_MARK", '"'), where)
        talks.setdefault(row["dialog_id"], []).append(_Said(role, text, titles))
    counts["dialogues"] = len(talks)
    return [_Talk(first[id], id, tuple(turns)) for id, turns in talks.items()], counts


@functools.lru_cache(maxsize=16)  # every line of a dialogue repeats the text
def _literal_keys(text: str) -> frozenset[str] | None:
    """The keys of a dict in Python's notation; None for a text that is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return frozenset(" ".join(str(key).split()) for key in value) if isinstance(value, dict) else None


def _redial(path: Path) -> _Read:
    talks, counts = [], Counter()
    for where, entry in json_lines(path):
        counts["dialogues"] += 1
        user, system = (_field(entry, f"{who}WorkerId", (int, str), where) for who in ("initiator", "respondent"))
        if user == system:
            counts["dialogues of one worker with itself, left out"] += 1
            continue
        mentions = _field(entry, "movieMentions", (dict, list), where) or {}  # a list where no film is mentioned
        if isinstance(mentions, list):
            raise ValueError(f"{where}: field 'movieMentions' must be an object, or an empty list")
        names = {mark: tidy(name or "", f"{where}: film {mark}") for mark, name in mentions.items()}
        names = {mark: name for mark, name in names.items() if name}
        turns = []
        for at, message in _parts(entry, "messages", where):
            sender = _field(message, "senderWorkerId", (int, str), at)
            if sender not in (user, system):
                raise ValueError(f"{at}: field 'senderWorkerId' is {sender!r}, neither {user!r} nor {system!r}")
            text = tidy(_field(message, "text", (str,), at), f"{at}: field 'text'")
            marks = re.findall(r"@(\d+)", text)
            titles = tuple(names[mark] for mark in marks if mark in names)
            counts["film marks without a title"] += len(marks) - len(titles)
            turns.append(_Said(USER if sender == user else SYSTEM, _with_titles(text, names), titles))
        talks.append(_Talk(where, _id(entry, "conversationId", where), tuple(turns)))
    return talks, counts


def _with_titles(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"@(\d+)", lambda mark: names.get(mark[1], mark[0]), text)


def _ievalm(path: Path) -> _Read:
    """Roles take turns, and the reply is the system's: the last utterance of a context is the user's. Where the system
    began, the context begins with an empty one. Names of a line are those of its whole context: each belongs to the
    utterances that hold it."""
    talks, counts, ids = [], Counter(), set()
    for where, entry in json_lines(path):
        context = [tidy(text, f"{where}: field 'context'") for text in _field(entry, "context", (list,), where)]
        names = [tidy(name, f"{where}: field 'entity'") for name in _field(entry, "entity", (list,), where)]
        labels = [tidy(name, f"{where}: field 'rec'") for name in _field(entry, "rec", (list,), where)]
        if not labels:
            raise ValueError(f"{where}: field 'rec' is empty: a line must have a label")
        dialogue, turn = _id(entry, "dialog_id", where), _field(entry, "turn_id", (int, str), where)
        ids.add(dialogue)
        roles = [(USER, SYSTEM)[(len(context) - 1 - number) % 2] for number in range(len(context))]
        turns = tuple(_Said(role, text, _named(text, names)) for role, text in zip(roles, context, strict=True))
        counts["rows"] += 1
        counts["names that no turn holds"] += len(set(names) - {name for said in turns for name in said.titles})
        talks.append(_Talk(where, f"{dialogue}:{turn}", turns, tuple(labels)))
    counts["dialogues"] = len(ids)
    return talks, counts


def _named(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that a text holds as whole words, in the order in which they stand there first."""
    lower = text.lower()
    found = {name: _word(lower, name.lower()) for name in dict.fromkeys(filter(None, names))}
    return tuple(sorted((name for name, at in found.items() if at >= 0), key=found.__getitem__))


def _word(text: str, name: str) -> int:
    """Where a name first stands with no letter or digit beside it; -1 for nowhere."""
    at = text.find(name)
    while at >= 0 and (text[at - 1 : at].isalnum() or text[at + len(name) :][:1].isalnum()):
        at = text.find(name, at + 1)
    return at


def _grsu(path: Path) -> _Read:
    talks, counts = [], Counter()
    for where, entry in json_lines(path):
        counts["dialogues"] += 1
        id = _id(entry, "conv_id" if "conv_id" in entry else "conversationId", where)
        talks.append(_Talk(where, id, tuple(_turns(entry, "messages", "item", where))))
    return talks, counts


def _jsonl(path: Path) -> _Read:
    talks, counts = [], Counter()
    for where, entry in json_lines(path):
        counts["dialogues"] += 1
        turns = tuple(_turns(entry, "turns", "items", where, checked))
        if not turns:
            raise ValueError(f"{where}: field 'turns' is empty: at least one turn is needed")
        talks.append(_Talk(where, _id(entry, "id", where), turns))
    return talks, counts


def _turns(
    entry: Mapping[str, Any], field: str, items: str, where: str, clean: Callable[[Any, str], str] = tidy
) -> list[_Said]:
    turns = []
    for at, turn in _parts(entry, field, where):
        role = _field(turn, "role", (str,), at)
        if role.lower() not in ROLES:
            raise ValueError(f"{at}: role {role!r} must be one of {', '.join(ROLES)}")
        titles = tuple(clean(title, f"{at}: field {items!r}") for title in _field(turn, items, (list,), at))
        turns.append(_Said(role.lower(), clean(_field(turn, "text", (str,), at), f"{at}: field 'text'"), titles))
    return turns


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _field(entry: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    """A field of one of some kinds. Raises ValueError naming it."""
    if name not in entry:
        raise ValueError(f"{where}: field {name!r} is missing")
    value = entry[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{where}: field {name!r} must be {wanted}, not {value!s:.60}")
    return value


def _id(entry: Mapping[str, Any], name: str, where: str) -> str:
    return checked(str(_field(entry, name, (str, int), where)), f"{where}: field {name!r}")


def _parts(entry: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """("FILE:LINE, turn NUMBER", part) of a list of objects."""
    parts = [(f"{where}, turn {number}", part) for number, part in enumerate(_field(entry, name, (list,), where))]
    for at, part in parts:
        if not isinstance(part, Mapping):
            raise ValueError(f"{at}: an object was expected, not {type(part).__name__}")
    return parts


_PARSERS: dict[str, Callable[[Path], _Read]] = {
    "inspired": _inspired, "redial": _redial, "ievalm": _ievalm, "grsu": _grsu, "jsonl": _jsonl,
}  # fmt: skip
FORMATS = tuple(_PARSERS)
