"""GRSU: a simulated user scores and criticises a recommender's lists, and the recommender revises (arXiv 2504.20458).

    synthesize  instruction data for both actions of the simulated user, from training dialogues
    sft         one model learns both
    rl          off by default: a recommender that writes queries is trained against the simulated user
    interact    beam search over conversations with the test dialogues, and the searches it is compared with
    evaluate    rankings of what the searches came across, paired intervals

The paper's text and a part of its code were not at hand; what they leave open is decided in the modules that do the
work and in the config. The embedded world's figures say that the machinery works; the paper's tables need its models.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import UsageError, write_atomic
from jaxrec.data.dialogues import Instance
from jaxrec.evaluate import grsu as judging
from jaxrec.evaluate.conversation import arms
from jaxrec.systems import by_seed, world_lm
from jaxrec.systems.grsu_counts import PLAYERS, stage_counts
from jaxrec.systems.model_run import ModelRun
from jaxrec.systems.recommender_kinds import KINDS, check_index, check_recommender, make_recommender
from jaxrec.systems.recommender_rl import WRITER, check_prompts, check_rl, conversations, reinforce, searched_lists
from jaxrec.tools import search_task, talk_task
from jaxrec.tools.conversation import Ask, Counts, Recommender, Tally, User, seed_of
from jaxrec.tools.conversation_search import SearchConfig, Tree
from jaxrec.tools.conversation_trees import read_counts, search_all, tree_key
from jaxrec.tools.crs.retrieval import SearchedLists
from jaxrec.tools.simulated_user import ModelUser, TeacherUser, UserConfig
from jaxrec.tools.talk_task import TalkTask
from jaxrec.tools.teacher.base import Teacher
from jaxrec.tools.user_instructions import (
    WEIGHTS,
    Instruction,
    Instructions,
    critique_lists,
    critique_rows,
    encode_instructions,
    scoring_rows,
)  # fmt: skip
from jaxrec.tools.user_prompts import UserPrompts
from models.sharding import make_mesh

STAGES = ("synthesize", "sft", "rl", "interact", "evaluate")
UNTUNED = "untuned"
ENDPOINT = "endpoint"
USERS = {"tuned": ("base", "sft"), ENDPOINT: (ENDPOINT,)}  # that are judged, by user.kind; the last one plays


class Run(ModelRun):
    """One seed of one config."""

    @functools.cached_property
    def task(self) -> TalkTask:
        c = self.config
        if c.data.source == "files":
            return talk_task.file_task(c.data, self.seed)
        return talk_task.world_task(c.data, world_lm.base_config(c.model.base, self.seed).world.scale, self.seed)

    @functools.cached_property
    def teacher(self) -> Teacher:
        path = self.folder / "teacher" / "replies.jsonl"
        if self.config.data.source == "files":
            return search_task.endpoint_teacher(self.config.teacher, path)
        return talk_task.world_teacher(self.task, self.config.teacher.error, path)

    @functools.cached_property
    def recommender(self) -> Recommender:
        return make_recommender(self, self.config.recommender.kind)

    @functools.cached_property
    def proposer(self) -> Recommender:
        """Who recommends before anything is trained, in what the simulated user learns from and is judged by."""
        kind = KINDS[self.config.recommender.kind].proposer
        return make_recommender(self, kind) if kind else self.recommender

    @functools.cached_property
    def lists(self) -> SearchedLists:
        """What answers the queries of a policy in its training and in its test conversations."""
        return searched_lists(self)

    def prompts(self, tokenizer: Any, style: str = "") -> UserPrompts:
        """What the simulated user is asked, in training and in the search."""
        p = self.config.prompts
        return UserPrompts(
            self.task.catalogue, style or p.style, roles=self.task.roles, feedback=p.feedback, tokenizer=tokenizer,
            turns=p.turns, attribute_chars=p.attribute_chars,
        )  # fmt: skip

    @property
    def player(self) -> str:
        """The name of the user that plays in searches and in reinforcement learning."""
        return USERS[self.config.user.kind][-1]

    @functools.cached_property
    def _users(self) -> dict[str, User]:
        return {}

    def user(self, name: str) -> User:
        """The simulated user that a stage left, "base", or "endpoint"; made once."""
        if name not in self._users:
            s = self.config.search
            config = UserConfig(s.score, s.temperature, max_new=s.max_new)
            if name == ENDPOINT:
                self._users[name] = TeacherUser(self._served, self.prompts(None, "full"), config)
            else:
                model = self.model(name)
                self._users[name] = ModelUser(model, self.prompts(model.tokenizer), config, self.mesh)
        return self._users[name]

    @property
    def _served(self) -> Teacher:
        """The endpoint that plays the user."""
        settings = self.config.user
        if not (settings.url or settings.model):
            return self.teacher
        return search_task.endpoint_teacher(settings, self.folder / "user" / "replies.jsonl", "user")

    def first_lists(self, instances: Sequence[Instance]) -> list[tuple[int, ...]]:
        """What the recommender proposes for each, before anybody criticised it."""
        asks = [
            Ask(i.dialogue, seed=seed_of(self.seed, "first lists", i.dialogue.id), name=i.dialogue.id)
            for i in instances
        ]
        return [reply.items for reply in self.proposer.recommend(asks)]


def check(config: Any) -> None:
    """Raise UsageError or ValueError for settings that a stage would stumble over. No device is used."""
    c = config
    if c.data.source not in talk_task.SOURCES:
        raise UsageError(f"data.source={c.data.source!r} must be one of {', '.join(talk_task.SOURCES)}")
    if c.user.kind not in USERS:
        raise UsageError(f"user.kind={c.user.kind!r} must be one of {', '.join(USERS)}")
    files, trains = c.data.source == "files", c.user.kind != ENDPOINT or c.rl.steps > 0
    if (c.model.path and not files) or (trains and files and not c.model.path):
        raise UsageError("model.path goes with data.source=files: the world's conversations need the world's own model")
    if files:
        talk_task.check_files(c.data)
    check_user(c)
    check_recommender(c)
    for name in c.evaluate.arms:
        if name not in judging.ARMS:
            raise UsageError(f"evaluate.arms: no {name!r}; known: {', '.join(judging.ARMS)}")
    if c.evaluate.ranking not in judging.STRATEGIES:
        raise UsageError(f"evaluate.ranking={c.evaluate.ranking!r} must be one of {', '.join(judging.STRATEGIES)}")
    for name in ("rounds", "scores", "critiques"):
        if c.synthesize[name] < 1:
            raise UsageError(f"synthesize.{name}={c.synthesize[name]} must be at least 1")
    for field in ("data.train_dialogues", "data.valid_dialogues", "data.test_dialogues", "prompts.turns",
                  "prompts.attribute_chars", "synthesize.closest", "rl.turns"):  # fmt: skip
        part, _, name = field.partition(".")
        if c[part][name] < 0:
            raise UsageError(f"{field}={c[part][name]} must not be negative")
    if c.synthesize.long not in ("drop", "error"):
        raise UsageError(f"synthesize.long={c.synthesize.long!r} must be drop or error")
    if c.sft.weigh not in WEIGHTS:
        raise UsageError(f"sft.weigh={c.sft.weigh!r} must be one of {', '.join(WEIGHTS)}")
    if c.sft.packed < 0 or 0 < c.sft.packed < c.sft.length:
        raise UsageError(f"sft.packed={c.sft.packed} must be 0, or at least sft.length={c.sft.length}")
    if c.rl.steps:
        check_index(c)
    search_config(c, 0)
    UserConfig(c.search.score, c.search.temperature, max_new=c.search.max_new)
    check_rl(c)


def check_user(config: Any) -> None:
    """Raise UsageError for a simulated user that cannot be asked, or not compared. No device is used."""
    u, files = config.user, config.data.source == "files"
    if u.kind == ENDPOINT and UNTUNED in config.evaluate.arms:
        raise UsageError(
            f"evaluate.arms: {UNTUNED} compares with the model before training, and user.kind={ENDPOINT} trains none; "
            "leave it out"
        )
    if u.kind == ENDPOINT and (u.url or u.model):
        search_task.endpoint(u, "user")
    elif files:
        search_task.endpoint(config.teacher)
    elif u.kind == ENDPOINT:
        raise UsageError(
            f"user.kind={ENDPOINT}: the embedded world's teacher scores nothing; set user.url and user.model"
        )


def search_config(config: Any, seed: int) -> SearchConfig:
    """The search of the method itself."""
    s = config.search
    return SearchConfig(
        s.beams, s.depth, s.expand, k=config.recommender.k, reward=s.reward, allow_shrink=s.allow_shrink, seed=seed
    )


# --- synthesize ------------------------------------------------------------------------------------------------------


def synthesize(this: Run) -> list[Instruction]:
    """Instruction data as text rows; ``instructions.json`` says how many there are, and what was left out and why. None
    for a user that is not trained."""
    if this.player == ENDPOINT:
        return []
    path = this.folder / "instructions.jsonl"
    if path.exists():
        return read_instructions(path)
    s, instances = this.config.synthesize, this.task.parts["train"]
    model = this.load(this.base)
    prompts = this.prompts(model.tokenizer)
    check_room(this, model, prompts)
    rng = np.random.Generator(np.random.PCG64([this.seed, 31]))
    tally = Tally({"recommender": this.proposer})
    rounds, critiques = propose(this, instances, prompts, rng)
    check_critiques(_total(made.dropped for made in critiques), sum(len(made.rows) for made in critiques))
    proposed = [[item for lists in rounds for item in lists[i]] for i in range(len(instances))]
    scores = [scoring_rows(instances, proposed, prompts, rng, s.hard, s.closest) for _ in range(s.scores)]
    rows = [row for made in (*scores, *critiques) for row in made.rows]
    counts = {
        "instances": {part: len(own) for part, own in this.task.parts.items()},
        "items": len(this.task.catalogue), "decisions": sum(len(made.rows) for made in scores),
        "critiques": sum(len(made.rows) for made in critiques),
        "decisions left out": _total(made.dropped for made in scores),
        "critiques left out": _total(made.dropped for made in critiques),
        "reading the files": dict(this.task.skipped), PLAYERS: tally.take(),
    }  # fmt: skip
    for what, count in counts.items():
        print(f"synthesize: {what}: {count}")
    write_atomic(this.folder / "instructions.json", json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows))
    return rows


def check_room(this: Run, model: Any, prompts: UserPrompts) -> None:
    """Raise UsageError, before anything is trained, where a prompt of the search might not fit into the model: the
    longest dialogue with the k longest items."""
    c, room = this.config, model.config.max_len

    def sizes(texts: Iterable[str]) -> list[int]:
        return [len(ids) for ids in model.tokenizer.encode_batch(list(texts))]

    if c.sft.length > room:
        raise UsageError(f"sft.length={c.sft.length} is more than the context of the model, {room}: lower it")
    items = sizes(prompts.listing([item]) for item in range(len(this.task.catalogue)))
    longest = sorted(range(len(items)), key=items.__getitem__)[-c.recommender.k :]
    parts = ("train", "valid", "test") if c.rl.steps else ("valid", "test")
    dialogues = [instance.dialogue for part in parts for instance in this.task.parts[part]]
    heads = sizes(prompts.critique_prompt(dialogue, longest)[0] for dialogue in dialogues)
    worst = int(np.argmax(heads))
    size = heads[worst] + sizes([prompts.critique_prompt(dialogues[worst], longest)[1]])[0]
    if size + c.search.max_new > room:
        raise UsageError(
            f"dialogue {dialogues[worst].id}: with the {len(longest)} longest items its prompt has {size} tokens, and "
            f"search.max_new={c.search.max_new} may follow, but the context of the model holds {room}: lower "
            "prompts.turns, prompts.attribute_chars, recommender.k or search.max_new"
        )
    if c.rl.steps:
        check_prompts(this, model)
    KINDS[c.recommender.kind].room(this, model)


def check_critiques(dropped: Mapping[str, int], kept: int) -> None:
    """Raise UsageError where the teacher was not asked for all, and where nothing that it wrote can be used."""
    if missing := dropped.get("not_asked", 0):
        raise UsageError(
            f"the teacher was not asked for {missing} critiques, since requests before them had failed ({dict(dropped)}"
            "): see that teacher.url answers and run again; what it has written is kept"
        )
    if not kept:
        raise UsageError(
            f"the simulated user has no critique to learn from; what the teacher wrote was left out: {dict(dropped)}; "
            "look at teacher/replies.jsonl, and take another teacher.model or a greater teacher.max_tokens"
        )


def propose(
    this: Run, instances: Sequence[Instance], prompts: UserPrompts, rng: np.random.Generator
) -> tuple[list[list[tuple[int, ...]]], list[Instructions]]:
    """By round: a list of every instance without its labels, and the teacher's critiques of these lists. The
    recommender revises what was criticised, so that the simulated user learns from lists as a search meets them; what
    the teacher gave no usable critique of stays as it is."""
    c, lists = this.config, this.first_lists(instances)
    past: list[tuple[int, ...]] = [()] * len(instances)
    rounds, critiques = [], []
    for number in range(c.synthesize.rounds):
        shown = critique_lists(instances, lists, this.task.catalogue, c.recommender.k, rng)
        sampling = search_task.teacher_sampling(c.teacher, this.seed)
        made = critique_rows(instances, shown, prompts, this.teacher, sampling, c.synthesize.critiques)
        rounds.append(shown)
        critiques.append(made)
        told = {row.prompt: row.text[1].strip() for row in made.rows}
        said = [told.get(prompts.critique_prompt(i.dialogue, own), "") for i, own in zip(instances, shown, strict=True)]
        past = [tuple(dict.fromkeys((*before, *own))) for before, own in zip(past, shown, strict=True)]
        asks = {
            at: Ask(i.dialogue, own, text, before, seed_of(this.seed, "revised", number, i.dialogue.id), i.dialogue.id)
            for at, (i, own, text, before) in enumerate(zip(instances, shown, said, past, strict=True)) if text
        }  # fmt: skip
        if number + 1 < c.synthesize.rounds:
            revised = dict(zip(asks, this.proposer.recommend(list(asks.values())), strict=True))
            lists = [revised[at].items if at in revised else own for at, own in enumerate(shown)]
    return rounds, critiques


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    out: collections.Counter[str] = collections.Counter()
    for part in counts:
        out.update(part)
    return dict(out)


def read_instructions(path: Path) -> list[Instruction]:
    """What :func:`synthesize` wrote. Raises UsageError without it."""
    if not path.exists():
        raise UsageError(f"{path} is not there: run --stages=synthesize first")
    fields = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Instruction(tuple(f["prompt"]), tuple(f["completion"])) for f in fields]


# --- sft -------------------------------------------------------------------------------------------------------------


def tune(this: Run) -> None:
    """One model that scores and criticises; nothing for a user that is not trained."""
    if this.player == ENDPOINT or (this.checkpoint("sft") / "model").exists():
        return
    rows, model, c = read_instructions(this.folder / "instructions.jsonl"), this.load(this.base), this.config
    end = model.config.eos_ids[0]
    arrays, long = encode_instructions(
        rows, model.tokenizer, end, c.sft.length, c.synthesize.long, c.sft.packed, this.seed, c.sft.weigh
    )
    print(f"sft: {len(rows) - long} rows, {long} left out that are longer than sft.length={c.sft.length}")
    counts = {"rows": len(rows) - long, f"longer than sft.length={c.sft.length}": long}
    write_atomic(this.folder / "sft.json", json.dumps(counts) + "\n")
    this.supervise("sft", model, arrays, c.sft)


# --- interact --------------------------------------------------------------------------------------------------------


def searches(this: Run) -> dict[str, SearchConfig]:
    """The searches of a run by name, the method first."""
    every = arms(search_config(this.config, this.seed))
    every[UNTUNED] = every["full"]
    return {name: every[name] for name in ("full", *this.config.evaluate.arms)}


def interact(this: Run) -> dict[str, list[Tree]]:
    """:func:`search_trees`, and a line about levels that came out short."""
    made = search_trees(this)
    short = {name: (sum(tree.config.depth for tree in trees), _total(t.short_levels() for t in trees))
             for name, trees in made.items()}  # fmt: skip
    if line := judging.short_levels(short):
        print(f"interact: {line}")
    return made


def search_trees(this: Run) -> dict[str, list[Tree]]:
    """Trees of every search, kept in ``trees/<name>.jsonl``. What is there is read back if the recommender and the user
    that played it had these settings, folders and addresses included, which may change when a run is resumed."""
    dialogues = [instance.dialogue for instance in this.task.parts["test"]]
    player, out = this.user(this.player), {}
    for name, config in searches(this).items():
        user = this.user("base") if name == UNTUNED else player
        out[name] = search_all(
            dialogues, this.recommender, user, config, tree_file(this, name), batch=this.config.search.batch,
            players=players(this),
        )  # fmt: skip
    return out


def tree_file(this: Run, name: str) -> Path:
    """Where trees of a search are kept."""
    return this.folder / "trees" / f"{name}.jsonl"


def players(this: Run) -> str:
    """What trees depend on beside their search: the settings of the recommender and of the user."""
    return json.dumps([this.config.recommender.to_dict(), this.config.user.to_dict()], sort_keys=True)


def tree_counts(this: Run) -> list[Counts]:
    """What the players counted in each search."""
    who, dialogues = players(this), [instance.dialogue for instance in this.task.parts["test"]]
    return [
        read_counts(tree_file(this, name), {tree_key(dialogue, config, who) for dialogue in dialogues})
        for name, config in searches(this).items()
    ]


# --- rl, evaluate ----------------------------------------------------------------------------------------------------


def rl(this: Run) -> None:
    """The recommender that writes queries; nothing with ``rl.steps=0``."""
    if this.config.rl.steps:
        reinforce(this, this.user(this.player))


def evaluate(this: Run) -> judging.SeedResult:
    """Rankings of every search, the simulated user's own scores, and the trained recommenders' conversations."""
    users = {name: this.user(name) for name in USERS[this.config.user.kind]}
    trees, names = search_trees(this), judging.POLICIES if this.config.rl.steps else ()
    playing = {"recommender": this.proposer, "simulated user": users[this.player]}
    tally = Tally({**playing, WRITER: this.lists} if names else playing)
    played = {name: conversations(this, users[this.player], name) for name in names}
    result = judging.evaluate_seed(this, trees, users, played)
    counts = stage_counts(this.folder, tree_counts(this))
    return dataclasses.replace(result, counts={**counts, **({"evaluate": own} if (own := tally.take()) else {})})


RECIPE = {"synthesize": synthesize, "sft": tune, "rl": rl, "interact": interact, "evaluate": evaluate}


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run the stages for every seed; returns the result that is also in result.json."""
    check(config)
    sizes = config.mesh.to_dict()
    mesh = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    results = by_seed(RECIPE, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder, mesh))
    return judging.pool(config, results, workdir) if results else None
