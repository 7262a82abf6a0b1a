"""What a recipe about conversations works on: instances over one catalogue, and a search over its items."""

import collections
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import UsageError
from jaxrec.data.dialogue_formats import FORMATS, DialogueData, detect_format, read_parts
from jaxrec.data.dialogues import SYSTEM, Dialogue, Instance, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import seed_of
from jaxrec.tools.crs.retrieval import ItemSearch, item_store
from jaxrec.tools.search.base import Backend
from jaxrec.tools.search.corpus import PassageStore
from jaxrec.tools.teacher import ScriptedTeacher, StoredTeacher
from jaxrec.tools.teacher.base import Request, Teacher
from jaxrec.tools.user_instructions import read_annotation
from jaxrec.tools.user_prompts import UserPrompts
from jaxrec.world import generate, world_config
from jaxrec.world.conversations import NAMES, Conversations, TalkConfig
from jaxrec.world.seeker import Seeker, SeekerConfig

SOURCES = ("world", "files")
PARTS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class TalkTask:
    """parts: instances by part. roles: how prompts call user and system. skipped: turns of files that are no instances,
    by reason, and what else reading counted. talks: of the embedded world."""

    catalogue: ItemCatalogue
    parts: Mapping[str, Sequence[Instance]]
    roles: tuple[str, str] = ("User", "System")
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    talks: Conversations | None = None


def world_task(data: Any, scale: str, seed: int) -> TalkTask:
    """Conversations of the embedded world. Raises UsageError for settings that cannot be."""
    try:
        config = TalkConfig(data.wishes, data.avoid)
        talks = Conversations(generate(world_config(scale, seed=seed)), seed, config)
        parts = {part: talks.sample(part, data[f"{part}_dialogues"]) for part in PARTS}
    except ValueError as error:
        raise UsageError(f"data: {error}") from error
    return TalkTask(talks.catalogue, parts, tuple(NAMES.values()), talks=talks)


def file_task(data: Any, seed: int) -> TalkTask:
    """Instances of files. Those for validation are taken from the training file, whole dialogues at a time, so that no
    conversation is in two parts. ``skipped`` counts what was read, and instances that were left out or not drawn, by
    part. Raises ValueError as the readers do, UsageError for a conversation that both files hold and for a part without
    instances."""
    read = read_parts({"train": data.train, "test": data.test}, data.form, catalogue_path=data.catalogue)
    check_apart(read["train"], read["test"])
    options = {"only_new": data.only_new, "drop_skipped_turns": data.drop_skipped_turns}
    parts, skipped = {}, {}
    for name, found in read.items():
        parts[name], why = found.instances(**options)
        skipped |= {f"{name}: {reason}": count for reason, count in {**found.counts, **why}.items()}
    talks = list(dict.fromkeys(_talk(i) for i in parts["train"]))
    order = np.random.Generator(np.random.PCG64([seed_of(seed, "validation")])).permutation(len(talks))
    sizes, wanted = collections.Counter(_talk(i) for i in parts["train"]), data.valid_dialogues
    before = np.cumsum([0, *(sizes[talks[number]] for number in order)])[:-1]
    held = {talks[number] for number, drawn in zip(order, before, strict=True) if drawn < wanted}
    parts["valid"] = [i for i in parts["train"] if _talk(i) in held]
    parts["train"] = [i for i in parts["train"] if _talk(i) not in held]
    whole, parts = parts, {name: _some(parts[name], data[f"{name}_dialogues"], seed) for name in PARTS}
    for name, some in parts.items():
        if not some and (name != "valid" or wanted):
            raise UsageError(
                f"data: no instance is left for {name}: {len(whole['valid'])} of {data.train} are for validation "
                f"(data.valid_dialogues={wanted}, whole conversations); what was left out: {skipped}"
            )
    skipped |= {f"{name}: instances not drawn": len(whole[name]) - len(some) for name, some in parts.items()}
    skipped = {what: count for what, count in skipped.items() if count}
    return TalkTask(read["train"].catalogue, parts, skipped=skipped)


def check_apart(train: DialogueData, test: DialogueData) -> None:
    """Raise UsageError for conversations that stand in both, with one id and one opening."""
    both = sorted(_openings(train) & _openings(test))
    if both:
        raise UsageError(
            f"{len(both)} conversations of {test.path} are in {train.path} too, e.g. {both[0][0]!r}: what is tested "
            "must not have been trained on; part the files by conversation"
        )


def _openings(read: DialogueData) -> set[tuple[str, str]]:
    """(id, first text) of conversations."""
    rows = {(_talk(row), row.dialogue.turns[0].text) for row in read.rows}
    return rows | {(dialogue.id, dialogue.turns[0].text) for dialogue in read.dialogues}


def _talk(instance: Instance) -> str:
    """The conversation that an instance is cut from."""
    return instance.dialogue.id.rpartition(":")[0]


def _some(instances: Sequence[Instance], count: int, seed: int) -> list[Instance]:
    """``count`` of them (0: all), drawn, in their order."""
    if not 0 < count < len(instances):
        return list(instances)
    rng = np.random.Generator(np.random.PCG64([seed_of(seed, "sample")]))
    return [instances[i] for i in sorted(rng.permutation(len(instances))[:count])]


def check_files(data: Any) -> None:
    """Raise UsageError for files that a task of files would miss later, ValueError for one in no known format."""
    if data.form and data.form not in FORMATS:
        raise UsageError(f"data.form={data.form!r} must be one of {', '.join(FORMATS)}, or empty to find out")
    for name in ("train", "test", "catalogue"):
        if not data[name] and name != "catalogue":
            raise UsageError(f"data.source=files needs data.{name}, a file of dialogues")
        if data[name] and not Path(data[name]).is_file():
            raise UsageError(f"data.{name}={data[name]}: there is no such file")
    if not data.catalogue and "ievalm" in {data.form or detect_format(data[name]) for name in ("train", "test")}:
        raise UsageError("data.form=ievalm needs data.catalogue, a file *id2info.json: its turns name more than items")


def told(instances: Sequence[Instance]) -> list[Dialogue]:
    """Conversations as far as their instances tell, each once: the longest history, and what was recommended next."""
    longest: dict[str, Instance] = {}
    for instance in instances:
        known = longest.setdefault(_talk(instance), instance)
        if len(instance.dialogue.turns) > len(known.dialogue.turns):
            longest[_talk(instance)] = instance
    return [
        Dialogue(talk, (*last.dialogue.turns, Turn(SYSTEM, "", last.labels))) for talk, last in longest.items()
    ]  # fmt: skip


def item_search(settings: Any, task: TalkTask, k: int, folder: Path, temperature: float = 0.0) -> ItemSearch:
    """A search over names and attributes of the items, its index built in ``folder`` where it is not there. settings:
    encoder (a folder; "" is BM25), instruction, max_length and pool. Raises ValueError for an index of other items or
    of another encoder."""
    store = item_store(task.catalogue, folder / "items")
    return ItemSearch(
        task.catalogue, _dense(settings, store, folder / "items_dense") if settings.encoder else
        _bm25(store, folder / "items_bm25"), k, temperature=temperature, pool=settings.pool,
    )  # fmt: skip


def _bm25(store: PassageStore, index: Path) -> Backend:
    from jaxrec.tools.search.bm25 import BM25Search, build_bm25

    return BM25Search(store, index) if index.exists() else build_bm25(store, index)


def _dense(settings: Any, store: PassageStore, index: Path) -> Backend:
    from jaxrec.tools.search.dense import DenseSearch, build_dense, encoder_embedder

    embedder = encoder_embedder(
        settings.encoder, instruction=settings.instruction, max_length=settings.max_length
    )  # fmt: skip
    build_dense(store, index, embedder)
    return DenseSearch(store, index, embedder)


def annotate(seeker: Seeker, prompts: UserPrompts, text: str, seed: int) -> str:
    """The critique of the list that a text asks about, by who knows its hidden wish. Raises ValueError for a text that
    :func:`jaxrec.tools.user_instructions.annotation_prompt` did not make, or with another number of labels than one."""
    dialogue, shown, labels = read_annotation(text, prompts)
    if len(labels) != 1:
        raise ValueError(f"the seeker has one item in mind, not {len(labels)}")
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(text.encode()), seed, 25]))
    return seeker.critique(dialogue, shown, rng, labels[0])


def world_teacher(task: TalkTask, error: float, path: Path) -> Teacher:
    """The embedded world's scripted teacher, who writes critiques; its replies are kept in a file."""
    seeker, prompts = Seeker(task.talks, SeekerConfig(error)), UserPrompts(task.catalogue, "full", roles=task.roles)

    def annotator(request: Request, choice: int) -> str:
        return annotate(seeker, prompts, request.messages[-1].content, (request.sampling.seed or 0) + choice)

    path.parent.mkdir(parents=True, exist_ok=True)
    return StoredTeacher(ScriptedTeacher({"annotator": annotator}, id=f"world's seeker, error {error:g}"), path)
