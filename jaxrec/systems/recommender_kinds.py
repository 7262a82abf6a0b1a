"""Who can recommend in GRSU's conversations (arXiv 2504.20458, section 3): one table of kinds, what each wants of a
config, and how it is made of a seed's run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import models
from jaxrec.config import UsageError
from jaxrec.systems.recommender_rl import TRAINED, query_prompts, query_room, searched_lists
from jaxrec.tools import search_task, talk_task
from jaxrec.tools.conversation import Recommender
from jaxrec.tools.crs.prompted import PromptedConfig, PromptedRecommender
from jaxrec.tools.crs.prompts import RecommenderPrompts
from jaxrec.tools.crs.query import QueryRecommender, writer
from jaxrec.tools.crs.retrieval import Queries, RetrievalRecommender, WrittenQueries, latest_turns
from jaxrec.tools.crs.sequential import SequentialRecommender, fit_sequential, mention_counts, stored_sequential
from jaxrec.tools.teacher import StoredTeacher
from jaxrec.tools.teacher.base import Sampling, Teacher
from jaxrec.world.conversations import RecommenderConfig, WorldRecommender
from models.recsys import SASRecConfig
from rl.recommender import RecommenderConfig as FitConfig

QUERIES = ("turns", "written")


@dataclasses.dataclass(frozen=True)
class Kind:
    """check(config) raises UsageError or ValueError for settings that ``make`` would stumble over, and uses no device.
    make(run) gives the recommender of one seed. sources: of data that it can recommend in; why: what keeps it from the
    others. room(run, base model) raises UsageError, before anything is trained, where its prompts might not fit.
    proposer: the kind that gives stage ``synthesize`` its lists; "" for this one."""

    check: Callable[[Any], object]
    make: Callable[[Any], Recommender]
    sources: tuple[str, ...] = talk_task.SOURCES
    why: str = ""
    room: Callable[[Any, models.Model], None] = lambda this, model: None
    proposer: str = ""


def check_recommender(config: Any) -> None:
    """Raise UsageError for a recommender that cannot be made, or not for this data. No device is used."""
    name = config.recommender.kind
    if name not in KINDS:
        raise UsageError(f"recommender.kind={name!r} must be one of {', '.join(KINDS)}")
    source, known = config.data.source, KINDS[name]
    if source not in known.sources:
        others = ", ".join(other for other, kind in KINDS.items() if source in kind.sources)
        raise UsageError(f"recommender.kind={name}: {known.why}; with data.source={source} take one of {others}")
    for own in dict.fromkeys((name, known.proposer or name)):
        try:
            KINDS[own].check(config)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"recommender.{own}: {error}") from error


def make_recommender(this: Any, kind: str) -> Recommender:
    """The recommender of a seed's run. Raises UsageError where its data does not allow for one."""
    try:
        return KINDS[kind].make(this)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"recommender: {error}") from error


def check_index(config: Any) -> None:
    """Raise UsageError for settings of the search over items."""
    i = config.recommender.index
    _check_folder("recommender.index.encoder", i.encoder)
    for name in ("max_length", "pool"):
        if i[name] < 1:
            raise UsageError(f"recommender.index.{name}={i[name]} must be at least 1")


def _check_folder(field: str, path: str) -> None:
    if path and not (Path(path) / "config.json").is_file():
        raise UsageError(f"{field}={path}: there is no config.json; name a model's folder in Hugging Face's layout")


def _not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        group, _, name = field.partition(".")
        if config.recommender[group][name] < 0:
            raise UsageError(f"recommender.{field}={config.recommender[group][name]} must not be negative")


# --- world ------------------------------------------------------------------------------------------------------------


def _world_config(config: Any) -> RecommenderConfig:
    return RecommenderConfig(k=config.recommender.k, **config.recommender.world)


def _world(this: Any) -> Recommender:
    return WorldRecommender(this.task.talks, _world_config(this.config))


# --- retrieval --------------------------------------------------------------------------------------------------------


def _check_retrieval(config: Any) -> None:
    r = config.recommender.retrieval
    if r.queries not in QUERIES:
        raise UsageError(f"recommender.retrieval.queries={r.queries!r} must be one of {', '.join(QUERIES)}")
    _not_negative(config, "retrieval.turns", "retrieval.temperature")
    check_index(config)
    if r.queries == "written":
        _check_writer(config)


def _retrieval(this: Any) -> Recommender:
    c = this.config.recommender
    search = talk_task.item_search(c.index, this.task, c.k, this.folder / "recommender", c.retrieval.temperature)
    return RetrievalRecommender(search, _queries(this), exclude_mentioned=c.index.exclude_mentioned)


def _queries(this: Any) -> Queries:
    r, w = this.config.recommender.retrieval, this.config.recommender.writer
    if r.queries == "turns":
        return latest_turns(r.turns or max(len(i.dialogue.turns) for part in this.task.parts.values() for i in part))
    return WrittenQueries(
        _writer(this), _prompts(this), temperature=w.temperature, top_p=w.top_p, max_tokens=w.max_tokens, tries=w.tries
    )


# --- prompted ---------------------------------------------------------------------------------------------------------


def _prompted_config(config: Any) -> PromptedConfig:
    c, w = config.recommender, config.recommender.writer
    return PromptedConfig(c.k, w.temperature, w.top_p, w.max_tokens, w.tries, c.prompted.min_ratio)


def _check_prompted(config: Any) -> None:
    _prompted_config(config)
    _check_writer(config)


def _prompted(this: Any) -> Recommender:
    return PromptedRecommender(
        _writer(this), this.task.catalogue, _prompted_config(this.config), prompts=_prompts(this)
    )  # fmt: skip


def _prompts(this: Any) -> RecommenderPrompts:
    """What the writer reads."""
    return RecommenderPrompts(
        this.task.catalogue, this.config.recommender.k, roles=this.task.roles,
        attribute_chars=this.config.prompts.attribute_chars,
    )  # fmt: skip


def _check_writer(config: Any) -> None:
    w = config.recommender.writer
    Sampling(temperature=w.temperature, top_p=w.top_p, max_tokens=w.max_tokens)
    if w.tries < 1:
        raise UsageError(f"recommender.writer.tries={w.tries} must be at least 1")
    if w.path and (w.url or w.model):
        raise UsageError("recommender.writer: path names a model that is run here, url and model one that is not")
    _check_folder("recommender.writer.path", w.path)
    if w.url or w.model:
        search_task.endpoint(w, "recommender.writer")
    elif not w.path and config.data.source == "world":
        raise UsageError(
            "recommender.writer: the embedded world's teacher writes critiques alone; name a path, or url and model"
        )
    elif not w.path:
        search_task.endpoint(config.teacher)


def _writer(this: Any) -> Teacher:
    """The language model that recommends, its replies kept in a file. One that is run here lies on the run's mesh."""
    w = this.config.recommender.writer
    if not (w.path or w.url or w.model):
        return this.teacher
    path = this.folder / "recommender" / "replies.jsonl"
    if not w.path:
        return search_task.endpoint_teacher(w, path, "recommender.writer")
    from jaxrec.tools.teacher.local import LocalTeacher

    path.parent.mkdir(parents=True, exist_ok=True)
    mesh = _mesh(this)
    model = models.load(w.path, mesh=mesh, dtype=this.config.model.dtype)
    return StoredTeacher(LocalTeacher(model, w.path, mesh=mesh), path)


def _mesh(this: Any) -> jax.sharding.Mesh | None:
    """The run's mesh, for a model that writes. Raises UsageError for one of several processes: what is batched hangs on
    when requests come, and all processes of a mesh must run the same programs."""
    if this.mesh is not None and this.mesh.is_multi_process:
        raise UsageError(
            f"recommender.kind={this.config.recommender.kind}: a model that is run here to write queries or titles "
            "needs a mesh of one process; name an endpoint (recommender.writer.url), or run in one process"
        )
    return this.mesh


# --- sequential -------------------------------------------------------------------------------------------------------


def _fit_config(settings: Any, seed: int) -> FitConfig:
    s = settings
    return FitConfig(lr=s.lr, batch_size=s.batch_size, epochs=s.epochs, patience=s.patience, seed=seed)


def _sizes(settings: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(SASRecConfig)}
    return {name: value for name, value in settings.items() if name in names}


def _check_sequential(config: Any) -> None:
    s = config.recommender.sequential
    if config.data.valid_dialogues < 1:
        raise UsageError("recommender.kind=sequential needs data.valid_dialogues above 0, to know when to stop")
    _not_negative(config, "sequential.temperature")
    for name in ("dim", "layers", "heads", "ffn_dim", "max_len"):
        if s[name] < 1:
            raise UsageError(f"recommender.sequential.{name}={s[name]} must be at least 1")
    if s.dim % s.heads:
        raise UsageError(f"recommender.sequential.heads={s.heads} must divide recommender.sequential.dim={s.dim}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= s[name] < 1:
            raise UsageError(f"recommender.sequential.{name}={s[name]} must be at least 0 and below 1")
    _fit_config(s, 0)


def _sequential(this: Any) -> Recommender:
    c, task = this.config.recommender, this.task
    s, items = c.sequential, len(task.catalogue)
    train, valid = (talk_task.told(task.parts[part]) for part in ("train", "valid"))

    def fit():
        return fit_sequential(train, valid, items, _fit_config(s, this.seed), _sizes(s))

    module = stored_sequential(this.folder / "recommender" / "sequential.npz", items, _sizes(s), fit)
    return SequentialRecommender(
        module, mention_counts(train, items), task.catalogue, c.k, temperature=s.temperature,
        exclude_mentioned=s.exclude_mentioned,
    )  # fmt: skip


# --- policy -----------------------------------------------------------------------------------------------------------


def _check_policy(config: Any) -> None:
    p = config.recommender.policy
    _check_folder("recommender.policy.path", p.path)
    if not p.path and config.rl.steps < 1:
        raise UsageError(
            "recommender.kind=policy: nobody has learned to write queries; set rl.steps, or name the folder that stage "
            "rl of another run has left as recommender.policy.path"
        )
    _not_negative(config, "policy.temperature")
    for name in ("max_new", "tries"):
        if p[name] < 1:
            raise UsageError(f"recommender.policy.{name}={p[name]} must be at least 1")
    check_index(config)


def _policy_room(this: Any, model: models.Model) -> None:
    if not this.config.recommender.policy.path:  # then it is trained from this model
        query_room(this, model)


def _policy(this: Any) -> Recommender:
    c = this.config.recommender
    path = Path(c.policy.path) if c.policy.path else this.finished(TRAINED)
    mesh = _mesh(this)
    model = models.load(path, mesh=mesh, dtype=this.config.model.dtype)
    if model.tokenizer is None:
        raise UsageError(f"{path} holds no tokenizer files, which prompts are made with")
    query_room(this, model)
    write = writer(model, temperature=c.policy.temperature, max_new=c.policy.max_new, mesh=mesh)
    return QueryRecommender(
        write, query_prompts(this, model.tokenizer), searched_lists(this), c.k, tries=c.policy.tries
    )  # fmt: skip


KINDS = {
    "world": Kind(_world_config, _world, ("world",), "it recommends items of the embedded world only"),
    "retrieval": Kind(_check_retrieval, _retrieval),
    "sequential": Kind(_check_sequential, _sequential, ("files",), "the world's dialogues name no items"),
    "prompted": Kind(_check_prompted, _prompted, ("files",), "no language model knows the titles of the world"),
    "policy": Kind(_check_policy, _policy, room=_policy_room, proposer="retrieval"),
}
