"""GRSU on files in the field's formats, from the command's flags to the report: a tiny model learns what a scripted
teacher writes, and what stands on disk is compared with plain counts."""

import copy
import html
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxrec import cli
from jaxrec.config import UsageError, resolve_config
from jaxrec.data.catalogue_files import read_catalogue
from jaxrec.data.dialogue_formats import read_dialogues
from jaxrec.data.dialogues import REPEATED
from jaxrec.systems import grsu, recommender_rl
from tests.jaxrec.systems import conversing

CROWD = [f"Actor {number}" for number in range(3000)]
ITEMS = [
    {"title": "Heat (1995)", "genre": ["crime"], "star": CROWD, "plot": "A thief and a policeman meet."},
    {"title": "It (1990)", "genre": ["horror"]},
    {"title": "It (2017)", "genre": ["horror"], "director": "Andy Muschietti"},
    {"title": "مدينة 🎬 (2001)", "genre": ["دراما"], "plot": "قصة <b>&"},
    *({"title": f"{name} Road", "genre": [genre]} for name, genre in
      zip(["Amber", "Broad", "Cold", "Dusty", "Early", "Far", "Green", "High"], ["comedy", "drama"] * 4, strict=True)),
]  # fmt: skip


def turn(role: str, text: str, *items: str) -> dict:
    return {"role": role, "text": text, "items": list(items)}


def talk(number: int, said: str, first: str, second: str) -> dict:
    """A conversation that recommends twice: two instances."""
    return {
        "id": f"talk:{number}",
        "turns": [
            turn("user", f"{said} number {number}"), turn("system", f"What about {first}?", first),
            turn("user", "Not that, something like Heat (1995)", "Heat (1995)"), turn("system", second, second),
        ],
    }  # fmt: skip


# Instances by hand: 2 each, but one of "naming", whose second item was named before.
TRAIN = [
    talk(0, "I want comedy 🎬 <script>", "Amber Road", "Cold Road"),
    talk(1, "I am talkative and want drama", "Broad Road", "Dusty Road"),
    talk(2, "I am indiscreet and want drama", "High Road", "It (2017)"),
    talk(3, "I am silent and want horror", "It (1990)", "It (2017)"),
    talk(4, "naming", "Far Road", "FAR ROAD!"),
    talk(5, "أريد دراما 🎬", "مدينة 🎬 (2001)", "Green Road"),
    talk(6, "something else", "Early Road", "Unheard Of (1900)"),
    talk(7, "I want comedy", "Early Road", "Green Road"),
]
EMPTY = {"id": "empty", "turns": [turn("user", "  "), turn("system", "")]}
BEGUN = {"id": "begun", "turns": [turn("system", "Heat!", "Heat (1995)"), turn("user", "no")]}
TEST = [
    talk(10, "I want comedy", "Amber Road", "Green Road"),
    talk(11, "أريد مدينة 🎬 & <i>more</i>", "مدينة 🎬 (2001)", "It (1990)"),
]
READ = {  # what is left out of TRAIN with EMPTY and BEGUN, counted by hand
    "train: no item of the catalogue": 1, "train: no turn before it": 1, f"train: {REPEATED}": 1,
    "train: dialogues without a turn, left out": 1, "train: turns without text or item, left out": 2,
    "train: mentions of what is no item of the catalogue": 1, "train: dialogues": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder, files, model, teacher)."""
    folder = tmp_path_factory.mktemp("grsu_files")
    files = {
        "train": conversing.lines(folder / "train.jsonl", [*TRAIN, EMPTY, BEGUN]),
        "test": conversing.lines(folder / "test.jsonl", TEST),
        "catalogue": conversing.lines(folder / "items.jsonl", ITEMS),
    }
    texts = [turn["text"] for talk in TRAIN + TEST for turn in talk["turns"]]
    texts += [f"\n1. {item['title']}\n  - genre: {item['genre'][0]}\n  - star: Actor" for item in ITEMS]
    with conversing.endpoint() as server:
        yield folder, files, conversing.tiny_folder(folder / "model", texts), server


SMALL = {"data__valid_dialogues": 2, "evaluate__arms": "('crs_alone','untuned')", "rl__steps": 1,
         "prompts__attribute_chars": 100}  # fmt: skip


def flags_of(place, **changes):
    _, files, model, server = place
    files = files | {name: changes.pop(name) for name in ("train", "test", "catalogue") if name in changes}
    model, url = changes.pop("model", model), changes.pop("url", server.url)
    return conversing.flags(model, url, **files, **(SMALL | changes))


@pytest.fixture(scope="module")
def done(place):
    """(work folder, flags) of a finished run."""
    work, flags = place[0] / "run", flags_of(place)
    assert cli.main(["run", "--config=grsu:small", f"--workdir={work}", *flags]) == 0
    return work, flags


@pytest.fixture(scope="module")
def this(done):
    return grsu.Run(resolve_config("grsu:small", done[1]), 0, done[0], None)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_was_left_out_is_counted_with_its_reason(done, this):
    counts = json.loads((done[0] / "instructions.json").read_text())
    sizes = counts["instances"]
    undrawn = counts["reading the files"].get("valid: instances not drawn", 0)
    assert sizes["train"] + sizes["valid"] + undrawn == 2 * len(TRAIN) - 2
    assert (sizes["valid"], sizes["test"], counts["items"]) == (2, 4, len(ITEMS))
    assert {what: counts["reading the files"][what] for what in READ} == READ
    held = {i.dialogue.id.rpartition(":")[0] for i in this.task.parts["valid"]}
    assert not held & {i.dialogue.id.rpartition(":")[0] for i in this.task.parts["train"]}
    assert counts["decisions"] == 2 * sizes["train"]
    out, words = {}, {"talkative": "cut by length", "indiscreet": "names what is wished for", "silent": "empty"}
    for instance in this.task.parts["train"]:
        for word, reason in words.items():
            if word in instance.dialogue.turns[0].text:
                out[reason] = out.get(reason, 0) + 1
    assert counts["critiques left out"] == out
    assert counts["critiques"] == sizes["train"] - sum(out.values())
    rows = read(done[0] / "instructions.jsonl")
    tuned = json.loads((done[0] / "sft.json").read_text())
    assert len(rows) == counts["decisions"] + counts["critiques"] == sum(tuned.values())


def test_the_teacher_is_asked_once_for_bounded_prompts(done, place):
    work, flags = done
    asked = list(place[3].asked)
    assert len(asked) == json.loads((work / "instructions.json").read_text())["instances"]["train"]
    heat = [prompt for prompt in asked if "\n  - star: Actor 0, " in prompt]
    assert heat
    assert all(", ..." in prompt and "Actor 2999" not in prompt for prompt in heat)
    assert max(map(len, asked)) < 2000
    assert any("🎬 <script>" in prompt for prompt in asked)
    # What stands on disk is enough: nothing is asked again, and the result is the same.
    before = (work / "result.json").read_bytes()
    assert cli.main(["run", "--config=grsu:small", f"--workdir={work}", *flags]) == 0
    assert place[3].asked == asked
    assert (work / "result.json").read_bytes() == before


def check_result(work: Path, k: int) -> dict:
    """The table is the mean of what stands in values.jsonl, and that follows from the trees by plain counts."""
    result = json.loads((work / "result.json").read_text())
    config = resolve_config("grsu:small", read_flags(work))
    this = grsu.Run(config, 0, work, None)
    test = this.task.parts["test"]
    assert result["protocol"] | {"part": "test", "source": "files", "samples": len(test)} == result["protocol"]
    assert result["protocol"]["items"] == len(this.task.catalogue)
    assert result["protocol"]["labels"] == sum(len(i.labels) for i in test)
    trees = {tree["dialogue"]: tree["nodes"] for tree in read(work / "trees" / "full.jsonl")}
    assert set(trees) == {i.dialogue.id for i in test}
    found, first = [], []
    for instance in test:
        nodes, scores = trees[instance.dialogue.id], {}
        for node in nodes:
            assert len(set(node["items"])) == k
            scores |= zip(node["items"], node["scores"], strict=True)
        best = sorted(scores, key=lambda item: -scores[item])[:10]
        assert all(0 <= score <= 1 for score in scores.values())
        found.append(sum(label in scores for label in instance.labels) / len(instance.labels))
        # Ties at the border of the first ten would make this count another one.
        if len(scores) <= 10 or scores[best[9]] > sorted(scores.values())[::-1][10]:
            first.append((instance.dialogue.id, sum(i in best for i in instance.labels) / len(instance.labels)))
    row = result["rows"][0]
    assert row["in the pool"] == pytest.approx(sum(found) / len(test))
    values = {v["id"]: v for v in read(work / "values.jsonl") if v["search"] == "full"}
    assert len(first) > 0
    for id, share in first:
        assert values[id]["recall@10"] == pytest.approx(share)
    for metric in ("recall@1", "recall@10", "ndcg@10"):
        assert row[metric] == pytest.approx(sum(v[metric] for v in values.values()) / len(test))
    return result


def read_flags(work: Path) -> list[str]:
    return json.loads((work / "flags.json").read_text())


def test_the_table_follows_from_the_trees(done):
    work, flags = done
    (work / "flags.json").write_text(json.dumps(flags))
    result = check_result(work, 3)
    assert [row["name"] for row in result["rows"]] == [
        "GRSU", "recommender alone, one list", "simulated user before training", "query writer, supervised",
        "query writer, RL on the user",
    ]  # fmt: skip
    assert sum(row["stage"] == "rl" for row in read(work / "metrics.jsonl")) == 1
    trained = [node for tree in read(work / "trees" / "full.jsonl") for node in tree["nodes"] if node["critique"]]
    assert any(node["critique"] in conversing.CRITIQUES for node in trained)  # the model says what it has learned


def test_the_report_shows_dialogues_critiques_scores_and_rankings(done):
    page = (done[0] / "report.html").read_text(encoding="utf-8")
    samples = json.loads((done[0] / "result.json").read_text())["samples"]
    assert "<h2>Samples</h2>" in page
    assert "<i>more" not in page
    assert html.escape("مدينة 🎬 & <i>more</i>", quote=True) in page
    for sample in samples[:3]:
        assert html.escape(sample["dialogue"], quote=True) in page
        for shown in (*sample["ranking"], *(item for r in sample["rounds"] for item in r["items"])):
            assert html.escape(shown, quote=True) in page
        assert html.escape(sample["rounds"][-1]["critique"], quote=True) in page
    assert all("conversation" in sample for sample in samples[3:])


def test_the_policy_that_was_trained_recommends_in_a_search(done, place):
    """One run goes on with its own; another takes it from the folder that the first has left."""
    work = place[0] / "policy"
    shutil.copytree(done[0], work, ignore=shutil.ignore_patterns("trees", "result.json", "report.html"))
    flags = flags_of(place, recommender__kind="policy", evaluate__arms="('crs_alone',)")
    own = grsu.run(resolve_config("grsu:small", flags), work, ["interact", "evaluate"])
    trees = read(work / "trees" / "full.jsonl")
    assert all(len(set(node["items"])) == 3 for tree in trees for node in tree["nodes"])
    assert any(node["critique"] for tree in trees for node in tree["nodes"])
    shutil.rmtree(work / "trees")
    path = done[0] / "checkpoints" / "rl" / "model"
    flags += ["--config.rl.steps=0", f"--config.recommender.policy.path={path}"]
    taken = grsu.run(resolve_config("grsu:small", flags), work, ["interact", "evaluate"])
    again = read(work / "trees" / "full.jsonl")
    assert [tree["nodes"] for tree in again] == [tree["nodes"] for tree in trees]
    assert not {tree["key"] for tree in again} & {tree["key"] for tree in trees}  # keys name who recommends
    assert own["protocol"]["recommender"] == taken["protocol"]["recommender"] == "policy"
    assert own["rows"][:2] == taken["rows"]


def test_chat_over_a_run_on_files(done, monkeypatch, capsys):
    work, flags = done
    said = iter(["I want comedy 🎬", "أريد شيئا آخر", "/critique", "/why 1", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert cli.main(["chat", "--config=grsu:small", f"--workdir={work}", *flags]) == 0
    out = capsys.readouterr().out
    assert "No answer this time" not in out
    assert out.count("mean score") == 3
    assert "accepts it with probability" in out
    assert "Actor 2999" not in out


def changed(entry: dict, *path_and_value) -> dict:
    *path, last, value = path_and_value
    entry = copy.deepcopy(entry)
    at = entry
    for step in path:
        at = at[step]
    at[last] = value
    return entry


IEVALM = {"dialog_id": "1", "turn_id": 1, "context": ["Hi"], "entity": [], "rec": ["Heat (1995)"]}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("train", [changed(TRAIN[0], "turns", 1, "role", "narrator")], r"train:1, turn 1: role 'narrator' must be one"),
        ("train", [changed(TRAIN[0], "turns", [])], r"train:1: field 'turns' is empty"),
        ("train", [changed(IEVALM, "rec", [])], r"train:1: field 'rec' is empty"),
        ("train", [EMPTY], "no instance is left for train"),
        ("train", TRAIN[:1], r"no instance is left for train: 2 of .*train are for validation"),
        ("train", [*TRAIN, TEST[0]], r"1 conversations of .*test.jsonl are in .*train too, e.g. 'talk:10'"),
        ("test", [{**EMPTY, "id": "t"}, {**BEGUN, "id": "u"}], "no instance is left for test"),
        ("catalogue", [], "catalogue: the file is empty"),
        ("catalogue", ITEMS[:2], r"no instance is left for train.*what is no item of the catalogue': 15"),
        ("catalogue", [*ITEMS, {"title": "HEAT (1995)"}], r"titles name several items: 'Heat \(1995\)' = 'HEAT"),
        ("catalogue", [*ITEMS, {"title": "X", "star": [1]}], r"catalogue:13: 'X': attribute 'star' must be a text or"),
        ("catalogue", [{"title": ""}], r"catalogue:1: field 'title' is empty"),
    ],
)
def test_bad_files_are_named(name, rows, message, place, tmp_path):
    path = conversing.lines(tmp_path / name, rows)
    with pytest.raises((UsageError, ValueError), match=message):
        grsu.run(resolve_config("grsu:small", flags_of(place, **{name: path})), tmp_path, ["synthesize"])
    assert not (tmp_path / "instructions.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft__length": 9000}, r"sft\.length=9000 is more than the context of the model, 8192"),
        ({"search__max_new": 8000}, r"search\.max_new=8000 may follow, but the context of the model holds 8192"),
        ({"prompts__attribute_chars": 0}, r"with the 3 longest items its prompt has \d+ tokens.*attribute_chars"),
        ({"recommender__k": 13}, r"k=13 must lie between 1 and the number of items of the catalogue, 12"),
        ({"rl__max_prompt": 12}, r"dialogue talk:\d+:\d: its prompt has \d+ tokens, more than rl\.max_prompt=12"),
        ({"rl__max_total": 9000}, r"rl\.max_total=9000 is more than the context"),
        ({"prompts__turns": -1}, r"prompts\.turns=-1 must not be negative"),
        ({"data__test_dialogues": -3}, r"data\.test_dialogues=-3 must not be negative"),
        ({"catalogue": Path("nothing")}, r"data\.catalogue=nothing: there is no such file"),
        ({"data__form": "xml"}, r"data\.form='xml' must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_the_teacher_is_asked(changes, message, place, tmp_path):
    asked = len(place[3].asked)
    with pytest.raises(UsageError, match=message):
        grsu.run(resolve_config("grsu:small", flags_of(place, **changes)), tmp_path, ["synthesize"])
    assert len(place[3].asked) == asked


def test_rows_of_ievalm_need_a_catalogue(place, tmp_path):
    path = conversing.lines(tmp_path / "rows", [IEVALM])
    with pytest.raises(UsageError, match=r"ievalm needs data\.catalogue, a file \*id2info\.json"):
        grsu.run(resolve_config("grsu:small", flags_of(place, train=path, catalogue="")), tmp_path, ["synthesize"])


def test_a_teacher_that_says_nothing_usable_is_an_error(place, tmp_path):
    with conversing.endpoint(status=401) as server:
        config = resolve_config("grsu:small", flags_of(place, url=server.url))
        with pytest.raises(UsageError, match=r"no critique to learn from; .*'auth': \d+"):
            grsu.run(config, tmp_path, ["synthesize"])
    with pytest.raises(UsageError, match=r"not asked for 5 critiques.*run again; what it has written is kept"):
        grsu.check_critiques({"not_asked": 5, "server": 16}, 70)


def test_a_user_who_never_answers_is_named_before_a_policy_is_trained(place, tmp_path):
    this = grsu.Run(resolve_config("grsu:small", flags_of(place)), 0, tmp_path, None)

    class Silent:
        def score(self, dialogues, items):
            return [np.full(len(own), 0.5) for own in items]

        def criticise(self, requests):
            return [""] * len(requests)

    with pytest.raises(UsageError, match=r"none of \d+ conversations.*'critique': \d+.*search\.max_new"):
        recommender_rl.reinforce(this, Silent())


# --- real files ------------------------------------------------------------------------------------------------------


def real(variable: str, *names: str) -> Path:
    path = Path(os.environ.get(variable) or pytest.fail(f"set {variable} (this test needs it)"))
    return path.joinpath(*names)


def halves(path: Path, folder: Path) -> tuple[Path, Path]:
    """An ievalm file in two, by conversation."""
    parts = ([], [])
    numbers: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        id = str(json.loads(line)["dialog_id"])
        parts[numbers.setdefault(id, len(numbers)) % 2].append(line + "\n")
    paths = tuple(folder / f"{path.stem}_{half}.jsonl" for half in ("even", "odd"))
    for to, own in zip(paths, parts, strict=True):
        to.write_text("".join(own), encoding="utf-8")
    return paths


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["inspired", "redial", "opendialkg"])
def test_real_dialogues_end_to_end(name, tmp_path, capsys):
    if name == "inspired":
        train, test, catalogue = real("JAXREC_INSPIRED", "dev.tsv"), real("JAXREC_INSPIRED", "test.tsv"), None
    else:
        catalogue = real("JAXREC_CRS", f"{name}_id2info.json")
        train, test = halves(real("JAXREC_CRS", f"{name}_valid_eval.jsonl"), tmp_path)
    texts = [path.read_text(encoding="utf-8") for path in (train, test)]
    if catalogue:
        items, _ = read_catalogue(catalogue)
        texts += [items.text(item) for item in range(len(items))]
    model = conversing.tiny_folder(tmp_path / "model", texts)
    sizes = {
        "data__train_dialogues": 8, "data__valid_dialogues": 4, "data__test_dialogues": 4, "recommender__k": 10,
        "sft__length": 4096, "sft__batch_size": 2, "sft__steps": 3, "evaluate__arms": "('crs_alone',)", "rl__steps": 1,
        "rl__max_prompt": 1536, "rl__max_total": 3072, "rl__rounds": 1,
    }  # fmt: skip
    work = tmp_path / "run"
    with conversing.endpoint() as server:
        flags = conversing.flags(model, server.url, train, test, catalogue, **sizes)
        assert cli.main(["run", "--config=grsu:small", f"--workdir={work}", *flags]) == 0
        lengths = sorted(map(len, server.asked))
    print(capsys.readouterr().out, f"annotation prompts: {lengths} characters")
    counts = json.loads((work / "instructions.json").read_text())
    assert counts["instances"] == {"train": 8, "valid": 4, "test": 4}
    assert counts["critiques"] + sum(counts["critiques left out"].values()) == 8
    for part, path in (("train", train), ("test", test)):  # every recommending turn is an instance or counted
        data = read_dialogues(path, catalogue_path=catalogue or "")
        whole, skipped = data.instances()
        own = counts["reading the files"]
        left = sum(own.get(f"{p}: instances not drawn", 0) for p in ((part, "valid") if part == "train" else (part,)))
        used = counts["instances"][part] + (counts["instances"]["valid"] if part == "train" else 0)
        assert used + left == len(whole)
        assert {r: own.get(f"{part}: {r}") for r in skipped} == skipped
    (work / "flags.json").write_text(json.dumps(flags))
    check_result(work, 10)
    page = (work / "report.html").read_text(encoding="utf-8")
    for sample in json.loads((work / "result.json").read_text())["samples"]:
        assert html.escape(sample["dialogue"], quote=True)[:3000] in page
