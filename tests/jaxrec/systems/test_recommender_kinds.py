"""Every kind of recommender from the config's fields to a finished search: tiny models that say one thing, a scripted
endpoint, a random encoder."""

import collections
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

import models
from jaxrec.config import UsageError, resolve_config
from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.systems import grsu, recommender_kinds
from jaxrec.tools.conversation import Ask
from jaxrec.tools.crs.retrieval import RetrievalRecommender, item_passages
from jaxrec.tools.talk_task import item_search
from models.encoder import load_encoder
from tests.jaxrec.systems import conversing, scripted_endpoint
from tests.jaxrec.systems.conversing import GENRES, ROADS, TITLES

ENCODER = Path(__file__).resolve().parents[2] / "fixtures" / "encoder"
NAMED = "\n".join(f"{number}. **{title}**" for number, title in enumerate(TITLES[4:7], 1))
CRITIQUE = " Rather an old drama."
SIZES = {
    "data__valid_dialogues": 2, "evaluate__arms": "('crs_alone',)", "search__max_new": 4, "recommender__k": 3,
    "recommender__retrieval__temperature": 0, "search__batch": 2,
}  # fmt: skip


def answer(prompt: str, seed: int) -> tuple[str, str, str]:
    """A recommender: an analysis and a query where that is asked for, else three titles, one time in two a fourth."""
    if "You cannot see the catalogue" in prompt:
        return prompt, "Analysis: funny\nQuery: war", "stop"
    titles = TITLES[: 3 + seed % 2]
    return prompt, "\n".join(f"{n}. **{title}**" for n, title in enumerate(titles, 1)), "stop"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(files, models, server). models: one that criticises and those that recommend."""
    folder = tmp_path_factory.mktemp("kinds")
    files, texts = conversing.road_files(folder)
    says = {"user": CRITIQUE, "titles": NAMED, "query": "Analysis: funny\nQuery: war", "policy": " war\n"}
    models = {name: conversing.parrot(folder / name, [text], texts, list(says.values())) for name, text in says.items()}
    with scripted_endpoint.endpoint(answer) as server:
        yield files, models, server


def config_of(place, **changes):
    files, models, server = place
    flags = conversing.flags(models["user"], server.url, **files, **(SIZES | changes))
    return resolve_config("grsu:small", flags)


def prepared(place, work: Path, **stages: str) -> Path:
    """A work folder in which stages have left models: the user, and those that ``stages`` name."""
    for stage, model in {"sft": "user", **stages}.items():
        shutil.copytree(place[1][model], work / "checkpoints" / stage / "model")
    return work


def searched(config, work: Path) -> tuple[dict, list[dict]]:
    """(result, nodes of the search)."""
    result = grsu.run(config, work, ["interact", "evaluate"])
    trees = [json.loads(line) for line in (work / "trees" / "full.jsonl").read_text().splitlines()]
    nodes = [node for tree in trees for node in tree["nodes"]]
    assert len(trees) == 4
    assert collections.Counter(len(node["path"]) for node in nodes) == {1: 16, 2: 16}
    assert all(len(set(node["items"])) == 3 and set(node["items"]) <= set(range(12)) for node in nodes)
    assert {node["critique"] for node in nodes if len(node["path"]) == 2} == {CRITIQUE.strip()}
    assert result["protocol"]["recommender"] == config.recommender.kind
    assert [row["name"] for row in result["rows"]] == ["GRSU", "recommender alone, one list"]
    return result, nodes


def genres(node: dict) -> set[str]:
    return {GENRES[item] for item in node["items"]}


def first(nodes: list[dict]) -> list[dict]:
    return [node for node in nodes if len(node["path"]) == 1]


def test_retrieval_by_the_words_of_the_dialogue(place, tmp_path):
    _, nodes = searched(config_of(place, recommender__retrieval__turns=0), prepared(place, tmp_path))
    assert all("comedy" in node["text"] for node in nodes)
    assert all(node["text"].endswith(CRITIQUE) == (len(node["path"]) == 2) for node in nodes)
    heard = [node for node in first(nodes) if "no drama" not in node["text"]]
    assert heard
    assert all(genres(node) == {"comedy"} for node in heard)


def test_retrieval_by_an_encoder(place, tmp_path):
    """The first lists are those of all cosines, worked out apart."""
    config = config_of(
        place, recommender__index__encoder=ENCODER, recommender__index__max_length=40,
        recommender__index__instruction="the old sea ", recommender__retrieval__turns=0,
    )  # fmt: skip
    _, nodes = searched(config, prepared(place, tmp_path))
    assert (tmp_path / "recommender" / "items_dense" / "index.json").exists()
    encode = load_encoder(ENCODER).encode
    passages = item_passages(grsu.Run(config, 0, tmp_path, None).task.catalogue)
    vectors = encode([f"{p.title} {p.text}" for p in passages])
    for node in first(nodes):
        (query,) = encode([f"the old sea {node['text']}"])
        cosines = vectors @ query
        best = np.sort(cosines)[::-1][:3]
        np.testing.assert_allclose(cosines[node["items"]], best, atol=1e-5)


@pytest.mark.parametrize("where", ["endpoint", "folder"])
def test_retrieval_by_written_queries(place, tmp_path, where):
    own = {"recommender__writer__path": place[1]["query"]} if where == "folder" else {}
    _, nodes = searched(config_of(place, recommender__retrieval__queries="written", **own), prepared(place, tmp_path))
    assert {node["text"] for node in nodes} == {"war"}
    assert all(genres(node) == {"war"} for node in first(nodes))
    replies = tmp_path / ("recommender" if where == "folder" else "teacher") / "replies.jsonl"
    assert {json.loads(line)["request"]["role"] for line in replies.read_text().splitlines()} == {"recommender"}


def test_prompted_by_an_endpoint_of_its_own(place, tmp_path):
    own = {"url": place[2].url, "model": "other", "key_variable": "", "tries": 30, "temperature": 0.5, "max_tokens": 77}
    settings = {f"recommender__writer__{name}": value for name, value in own.items()}
    result, nodes = searched(
        config_of(place, recommender__kind="prompted", **settings), prepared(place, tmp_path)
    )  # fmt: skip
    assert {tuple(node["items"]) for node in nodes} == {(0, 1, 2)}
    assert max(node["tries"] for node in nodes) > 1  # four titles are no list
    asked = [json.loads(line) for line in (tmp_path / "recommender" / "replies.jsonl").read_text().splitlines()]
    sampling = [entry["request"]["sampling"] for entry in asked]
    assert {(s["temperature"], s["max_tokens"]) for s in sampling} == {(0.5, 77)}
    assert all(entry["teacher"].startswith("other at ") for entry in asked)
    settings["recommender__writer__tries"] = 1
    once, work = config_of(place, recommender__kind="prompted", **settings), prepared(place, tmp_path / "once")
    with pytest.raises(RuntimeError, match=r"none of 1 replies has exactly 3 titles"):
        grsu.run(once, work, ["interact"])


def test_prompted_by_a_model_that_is_run_here(place, tmp_path):
    own = {"recommender__kind": "prompted", "recommender__writer__path": place[1]["titles"]}
    _, nodes = searched(config_of(place, **own), prepared(place, tmp_path))
    assert {tuple(node["items"]) for node in nodes} == {(4, 5, 6)}


def test_sequential_goes_by_mentions_and_is_fitted_once(place, tmp_path, monkeypatch):
    sizes = {"dim": 4, "layers": 1, "heads": 1, "ffn_dim": 4, "max_len": 4, "epochs": 2, "batch_size": 8}
    settings = {f"recommender__sequential__{name}": value for name, value in sizes.items()}
    config = config_of(place, recommender__kind="sequential", **settings)
    _, nodes = searched(config, prepared(place, tmp_path))
    this = grsu.Run(config, 0, tmp_path, None)
    mentioned = {i.dialogue.id: set(i.dialogue.items) for i in this.task.parts["test"]}
    for line in (tmp_path / "trees" / "full.jsonl").read_text().splitlines():
        tree = json.loads(line)
        assert all(mentioned[tree["dialogue"]].isdisjoint(node["items"]) for node in tree["nodes"])
    asks = [Ask(instance.dialogue) for instance in this.task.parts["test"]]
    before = this.recommender.recommend(asks)
    monkeypatch.setattr(recommender_kinds, "fit_sequential", None)
    assert grsu.Run(config, 0, tmp_path, None).recommender.recommend(asks) == before


def test_a_query_writer_of_another_run(place, tmp_path):
    own = {"recommender__kind": "policy", "recommender__policy__path": place[1]["policy"]}
    _, nodes = searched(config_of(place, **own), prepared(place, tmp_path))
    assert {node["text"] for node in nodes} == {" war"}
    assert all(genres(node) == {"war"} for node in first(nodes))
    (shown,) = {tuple(node["items"]) for node in first(nodes)}
    again = [node for node in nodes if len(node["path"]) == 2]
    assert all(set(shown).isdisjoint(node["items"]) for node in again)


def test_a_query_writer_that_this_run_trains(place, tmp_path):
    config = config_of(place, recommender__kind="policy", rl__steps=1)
    work = prepared(place, tmp_path)
    this = grsu.Run(config, 0, work, None)
    assert isinstance(this.proposer, RetrievalRecommender)  # of synthesize, where no policy is there yet
    assert len(this.first_lists(this.task.parts["test"])) == 4
    with pytest.raises(UsageError, match=r"stage 'rl' has not finished in .*: run --stages=rl first"):
        _ = this.recommender
    prepared(place, tmp_path / "two", rl="policy", cold_start="policy")
    grsu.run(config, tmp_path / "two", ["interact"])
    assert (tmp_path / "two" / "trees" / "full.jsonl").exists()


def writes_several(kind: str) -> tuple[list[str], dict]:
    """What a model says one of, and fields with which it recommends; ``path`` stands for its folder."""
    queries = ["Analysis: funny\nQuery: war", "Analysis: sad\nQuery: drama"]
    if kind == "written":
        return queries, {"retrieval__queries": "written", "writer__path": "path"}
    if kind == "policy":
        return [" war\n", " drama\n"], {"kind": "policy", "policy__path": "path"}
    return [NAMED, NAMED.replace("Early", "Amber")], {"kind": "prompted", "writer__path": "path"}


@pytest.mark.parametrize("kind", ["written", "prompted", "policy"])
def test_a_model_that_writes_lies_on_the_runs_mesh(place, tmp_path, monkeypatch, kind):
    """On eight devices it draws what it draws on one."""
    says, fields = writes_several(kind)
    folder = conversing.parrot(tmp_path / "model", says, TITLES)
    own = {f"recommender__{name}": folder if value == "path" else value for name, value in fields.items()}
    config, load, loaded, found = config_of(place, **own), models.load, [], []
    monkeypatch.setattr(models, "load", lambda *args, **more: loaded.append(load(*args, **more)) or loaded[-1])
    for name, mesh in (("one", None), ("eight", models.make_mesh(data=2, fsdp=4))):
        this = grsu.Run(config, 0, tmp_path / name, mesh)
        asks = [Ask(instance.dialogue, seed=seed) for seed in range(4) for instance in this.task.parts["test"]]
        found.append(this.recommender.recommend(asks))
    assert [len(model.params["embed"].devices()) for model in loaded] == [1, 8]
    assert found[0] == found[1]
    assert len({reply.text for reply in found[0]}) == 2
    with pytest.raises(UsageError, match=f"kind={config.recommender.kind}: .* needs a mesh of one process"):
        _ = grsu.Run(config, 0, tmp_path / "pod", types.SimpleNamespace(is_multi_process=True)).recommender


def test_the_search_over_items_leaves_out_what_the_dialogue_names(place, tmp_path):
    dialogue = Dialogue("d", (Turn("user", "war war", (2, 5)),))
    for excluded in (False, True):
        config = config_of(place, recommender__index__exclude_mentioned=excluded)
        this = grsu.Run(config, 0, tmp_path, None)
        (reply,) = this.recommender.recommend([Ask(dialogue)])
        assert ({2, 5} & set(reply.items) == set()) == excluded


def test_an_index_of_other_items_is_refused(place, tmp_path):
    config = config_of(place)
    this = grsu.Run(config, 0, tmp_path, None)
    item_search(config.recommender.index, this.task, 3, tmp_path / "recommender")
    shutil.copytree(tmp_path / "recommender", tmp_path / "other" / "recommender")
    rows = conversing.lines(tmp_path / "fewer.jsonl", ROADS[:-1])
    other = grsu.Run(config_of((place[0] | {"catalogue": rows}, *place[1:])), 0, tmp_path / "other", None)
    with pytest.raises(UsageError, match="holds the items of another catalogue"):
        _ = other.recommender


def test_every_kind_has_its_group_of_fields():
    recommender = resolve_config("grsu:small").recommender
    assert set(recommender_kinds.KINDS) <= set(recommender)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "oracle"}, r"kind='oracle' must be one of world, retrieval, sequential, prompted, policy"),
        (
            {"kind": "world"},
            r"kind=world: it recommends items of the embedded world only; with data\.source=files take",
        ),
        ({"retrieval__queries": "dreamt"}, r"retrieval\.queries='dreamt' must be one of turns, written"),
        ({"retrieval__turns": -1}, r"retrieval\.turns=-1 must not be negative"),
        ({"retrieval__temperature": -1.0}, r"retrieval\.temperature=-1\.0 must not be negative"),
        ({"index__encoder": "nowhere"}, r"index\.encoder=nowhere: there is no config\.json"),
        ({"index__pool": 0}, r"index\.pool=0 must be at least 1"),
        ({"index__max_length": 0}, r"index\.max_length=0 must be at least 1"),
        ({"kind": "prompted", "prompted__min_ratio": 101.0}, r"min_ratio=101\.0 must lie between 0 and 100"),
        ({"kind": "prompted", "writer__tries": 0}, r"tries=0 must be at least 1"),
        ({"kind": "prompted", "writer__top_p": 0.0}, r"recommender\.prompted: .*top_p"),
        ({"kind": "prompted", "writer__path": "nowhere"}, r"writer\.path=nowhere: there is no config\.json"),
        (
            {"kind": "prompted", "writer__url": "http://h/v1"},
            r"recommender\.writer\.url and recommender\.writer\.model",
        ),
        ({"kind": "prompted", "writer__url": "h", "writer__model": "m"}, r"recommender\.writer: "),
        ({"kind": "prompted", "writer__path": "x", "writer__model": "m"}, r"writer: path names a model that is run"),
        ({"retrieval__queries": "written", "writer__max_tokens": 0}, r"recommender\.retrieval: .*max_tokens"),
        (
            {"kind": "sequential", "sequential__heads": 3},
            r"sequential\.heads=3 must divide recommender\.sequential\.dim",
        ),
        ({"kind": "sequential", "sequential__layers": 0}, r"sequential\.layers=0 must be at least 1"),
        (
            {"kind": "sequential", "sequential__dropout": 1.0},
            r"sequential\.dropout=1\.0 must be at least 0 and below 1",
        ),
        ({"kind": "sequential", "sequential__epochs": 0}, r"recommender\.sequential: epochs must be at least 1"),
        ({"kind": "policy"}, r"kind=policy: nobody has learned to write queries; set rl\.steps"),
        ({"kind": "policy", "policy__path": "nowhere"}, r"policy\.path=nowhere: there is no config\.json"),
        ({"kind": "policy", "policy__path": ENCODER, "policy__tries": 0}, r"policy\.tries=0 must be at least 1"),
        ({"kind": "policy", "policy__path": ENCODER, "retrieval__turns": -2}, r"retrieval\.turns=-2 must not"),
    ],
)
def test_bad_fields_are_named_before_a_device_is_used(place, changes, message):
    with pytest.raises(UsageError, match=message):
        grsu.check(config_of(place, **{f"recommender__{name}": value for name, value in changes.items()}))


def test_sequential_needs_validation(place):
    with pytest.raises(UsageError, match=r"sequential needs data\.valid_dialogues above 0"):
        grsu.check(config_of(place, recommender__kind="sequential", data__valid_dialogues=0))


def test_written_queries_on_the_world_need_a_writer():
    config = resolve_config("grsu:tiny", ["--config.recommender.kind=retrieval",
                                          "--config.recommender.retrieval.queries=written"])  # fmt: skip
    with pytest.raises(UsageError, match="teacher writes critiques alone; name a path, or url and model"):
        grsu.check(config)


def test_conversations_that_do_not_fit_the_query_writer_are_refused(place, tmp_path):
    short = conversing.parrot(tmp_path / "short", [" war\n"], TITLES, max_len=64)
    config = config_of(place, recommender__kind="policy", recommender__policy__path=short)
    with pytest.raises(UsageError, match=r"search\.depth=2 rounds may have \d+ tokens, .* holds 64: lower rl\.turns"):
        _ = grsu.Run(config, 0, tmp_path, None).recommender
