"""What a search system works on: questions, a retriever over passages, a teacher, and the model to start from.

Of the embedded world, or of the user's files: questions in a field's format, passages, and an endpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrec.config import UsageError, write_atomic
from jaxrec.data import qa
from jaxrec.tools.search import Passage, ResultCache, SearchTool, build_store, read_passages
from jaxrec.tools.search.corpus import FORMATS, PassageStore
from jaxrec.tools.teacher import Sampling, ScriptedTeacher, StoredTeacher, Teacher
from jaxrec.world.encyclopaedia import Fact
from jaxrec.world.oracle import Oracle, OracleConfig
from jaxrec.world.oracle_searcher import SearcherConfig, SearcherOracle, roles
from jaxrec.world.questions import SPLITS, ChainQuestion, encyclopaedia, questions
from rl.envs.search import Question, SearchEnv, SearchOptions, State
from rl.envs.tags import TagStyle

if TYPE_CHECKING:
    from jaxrec.tools.search.web import WebSearch
    from jaxrec.tools.teacher import EndpointTeacher

SOURCES = ("world", "files")
SEARCHES = ("bm25", "web")  # of files: passages under BM25, or the live web


@dataclasses.dataclass(frozen=True, eq=False)
class SearchTask:
    """cold, train, test: questions for the supervised start, for what follows it, and for evaluation. backend: the
    retriever. Of the world: facts, all of them; chains, the questions' facts by id; write, how results are worded."""

    cold: list[qa.Question]
    train: list[qa.Question]
    test: list[qa.Question]
    backend: Any
    facts: tuple[Fact, ...] = ()
    chains: dict[str, ChainQuestion] = dataclasses.field(default_factory=dict)
    write: Any = None

    def env(self, style: TagStyle, options: SearchOptions, chat: Any = None, reserved: Sequence[str] = ()) -> SearchEnv:
        """An environment around the retriever."""
        return SearchEnv(self.backend.search, style, options, write=self.write, chat=chat, reserved=reserved)


def asked(question: qa.Question) -> Question:
    """A question as the environment takes it."""
    return Question(question.id, question.text, question.answers)


def kind_of(question: ChainQuestion) -> str:
    """Whether the base model's text states all of a question's facts, none, or some."""
    return {0: "unknown", question.hops: "known"}.get(question.known, "mixed")


def plain_results(_: Sequence[State], queries: Sequence[str], passages: Sequence[Sequence[Any]]) -> list[str]:
    """Results as the world's model reads them: texts of passages, each on a line with a blank before it."""
    return ["\n".join(f" {passage.text}" for passage in hits) for hits in passages]


def world_task(
    facts: Sequence[Fact], seed: int, counts: Mapping[str, int], hops: Sequence[int], folder: Path
) -> SearchTask:
    """The embedded world's task: passages of all its subjects under BM25, questions over chains of facts. counts: of
    questions by split."""
    rng = np.random.Generator(np.random.PCG64([seed, 43]))
    parts = {name: questions(facts, name, rng, counts.get(name, 0), hops) for name in SPLITS}
    passages = (Passage(str(i), title, text) for i, (title, text) in enumerate(encyclopaedia(facts, seed)))
    made = {
        name: [qa.Question(q.id, q.text, (q.answer,), "world", kind=kind_of(q), hops=q.hops) for q in part]
        for name, part in parts.items()
    }
    chains = {q.id: q for part in parts.values() for q in part}
    return SearchTask(*(made[n] for n in SPLITS), _bm25(folder, passages), tuple(facts), chains, plain_results)


def file_task(data: Any, seed: int, folder: Path) -> SearchTask:
    """A task of files: data.train, data.test (questions), data.corpus (passages), or the live web where data.search is
    "web". Raises UsageError for what is missing.

    A number of questions below that of the file is drawn at random. The cold start's are drawn from data.train first.
    """
    parts: dict[str, list[qa.Question]] = {"cold": []}
    for name in ("train", "test"):
        path, count = data[name], data[f"{name}_questions"]
        if not path:
            raise UsageError(f"data.source=files needs data.{name}, a file of questions")
        found = qa.read_questions(path)
        if name == "train" and (cold := data.get("cold_questions", 0)):
            if not 0 < cold < len(found):
                raise UsageError(f"data.cold_questions={cold} must leave some of the {len(found)} of {path}")
            parts["cold"] = qa.sample_questions(found, cold, seed)
            taken = {q.id for q in parts["cold"]}
            found = [q for q in found if q.id not in taken]
        parts[name] = qa.sample_questions(found, count, seed) if 0 < count < len(found) else found
    if data.get("search", "bm25") == "web":
        return SearchTask(*(parts[n] for n in SPLITS), web_tool(data, folder / "web.jsonl"))
    if not data.corpus:
        raise UsageError("data.source=files needs data.corpus, a file of passages")
    form = data.get("corpus_format", "jsonl")
    return SearchTask(*(parts[n] for n in SPLITS), _file_bm25(folder, Path(data.corpus), form))


def _file_bm25(folder: Path, corpus: Path, form: str) -> Any:
    """The BM25 index of a file. Its path may change between runs, its passages may not: raises UsageError where the
    folder's index was built of a file of another format or number of bytes."""
    facts, kept = {"format": form, "bytes": corpus.stat().st_size}, folder / "corpus.json"
    if kept.exists() and (built := json.loads(kept.read_text(encoding="utf-8"))) != facts:
        raise UsageError(
            f"{folder} was built of passages in the form {built['format']}, {built['bytes']} bytes; {corpus} is "
            f"{form}, {facts['bytes']} bytes: remove that folder, or choose another --workdir"
        )
    found = _bm25(folder, lambda: read_passages(corpus, form))
    write_atomic(kept, json.dumps(facts) + "\n")
    return found


def web_tool(data: Any, path: Path | None) -> SearchTool | WebSearch:
    """Live web search at data.endpoint, results kept in a file and never asked for twice; path None: the search alone.
    Raises UsageError without an endpoint, for one that is none, and where the variable data.search_key holds no key."""
    from jaxrec.tools.search.web import WebSearch, WebSettings

    if not data.endpoint:
        raise UsageError("data.search=web needs data.endpoint, the address of a search service (Serper's form)")
    try:
        search = WebSearch(WebSettings(data.endpoint, key_env=data.search_key, exclude=tuple(data.exclude)))
    except ValueError as error:
        raise UsageError(f"data.search=web: {error}") from error
    return search if path is None else SearchTool(search, ResultCache(path))


def check_files(data: Any, teacher: Any) -> None:
    """Raise UsageError for files, addresses and keys that a task of files would miss later. teacher: its settings, None
    where none is asked."""
    if data.get("search", "bm25") not in SEARCHES:
        raise UsageError(f"data.search={data.search!r} must be one of {', '.join(SEARCHES)}")
    if (form := data.get("corpus_format", "jsonl")) not in FORMATS:
        raise UsageError(f"data.corpus_format={form!r} must be one of {', '.join(FORMATS)}")
    web = data.get("search", "bm25") == "web"
    for name in ("train", "test", *(() if web else ("corpus",))):
        if not data[name]:
            raise UsageError(
                f"data.source=files needs data.{name}" + ("" if name != "corpus" else " or data.search=web")
            )
        if not Path(data[name]).exists():
            raise UsageError(f"data.{name}={data[name]}: there is no such file")
    if web:
        web_tool(data, None)
    if teacher is not None:
        endpoint(teacher)


def _bm25(folder: Path, passages: Any) -> Any:
    """The BM25 index in a folder, built of ``passages`` (or of what they return) where it is not there yet."""
    from jaxrec.tools.search.bm25 import BM25Search, build_bm25

    store = folder / "passages"
    kept = PassageStore(store) if store.exists() else build_store(passages() if callable(passages) else passages, store)
    index = folder / "bm25"
    return BM25Search(kept, index) if index.exists() else build_bm25(kept, index)


def world_teacher(task: SearchTask, style: TagStyle, recall: float, error: float, path: Path) -> Teacher:
    """The world's scripted teacher, replies kept in a file."""
    oracle = Oracle(list(task.chains.values()), style, OracleConfig(recall, error))

    def rng(request: Any, choice: int) -> np.random.Generator:
        text = request.messages[-1].content.encode()
        return np.random.Generator(np.random.PCG64([*text[-64:], len(text), request.sampling.seed or 0, choice]))

    def author(request: Any, choice: int) -> str:
        return oracle.author(request.messages[-1].content, rng(request, choice))

    def rewriter(request: Any, choice: int) -> str:
        _, _, told = request.messages[-1].content.rpartition("Question: ")
        asked, _, documents = told.partition("\nDocuments:\n")
        return oracle.rewrite(asked, documents.split("\n"), rng(request, choice))

    path.parent.mkdir(parents=True, exist_ok=True)
    script = ScriptedTeacher({"author": author, "rewriter": rewriter}, id=f"world's oracle, recall {recall:g}")
    return StoredTeacher(script, path)


def world_searcher_teacher(task: SearchTask, config: SearcherConfig, path: Path) -> Teacher:
    """The world's scripted author, annotator and summariser of SimpleDeepSearcher, replies kept in a file."""
    oracle = SearcherOracle(task.facts, list(task.chains.values()), config)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"world's searcher, error {config.error:g}, {' '.join(config.faults)}"
    return StoredTeacher(ScriptedTeacher(roles(oracle), id=name), path)


def endpoint(settings: Any, name: str = "teacher") -> EndpointTeacher:
    """The teacher behind an OpenAI-compatible address. name: of the settings in a config. Raises UsageError without an
    address, a model or a key."""
    from jaxrec.tools.teacher import EndpointTeacher

    if not (settings.url and settings.model):
        who = name.rpartition(".")[2]
        raise UsageError(f"{name}.url and {name}.model name the {who}: an OpenAI-compatible address and its model")
    try:
        return EndpointTeacher(settings.url, settings.model, key_env=settings.key_variable or None)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def judge_endpoint(evaluate: Any, teacher: Any) -> EndpointTeacher:
    """The model ``evaluate.judge``, at ``evaluate.judge_url`` or else where the teacher is. Raises UsageError without
    an address or a key."""
    from jaxrec.tools.teacher import EndpointTeacher

    own = bool(evaluate.judge_url)
    url = evaluate.judge_url if own else teacher.url
    if not url:
        raise UsageError(
            f"evaluate.judge={evaluate.judge!r} is a model at an OpenAI-compatible address: set evaluate.judge_url"
        )
    try:
        key = evaluate.judge_key_variable if own else teacher.key_variable
        return EndpointTeacher(url, evaluate.judge, key_env=key or None)
    except ValueError as error:
        raise UsageError(f"evaluate.judge: {error}") from error


def endpoint_teacher(settings: Any, path: Path, name: str = "teacher") -> Teacher:
    """:func:`endpoint` with its replies kept in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return StoredTeacher(endpoint(settings, name), path)


def teacher_sampling(settings: Any, seed: int) -> Sampling:
    """How the teacher draws."""
    return Sampling(
        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.get("top_k", 0),
        max_tokens=settings.max_tokens, seed=seed,
    )  # fmt: skip
