"""Both search agents on files in the field's formats, from the command's flags to result.json: a tiny model learns a
scripted teacher's exchange, and what stands on disk is compared with the official rules and with plain counts."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from jaxrec.config import UsageError, resolve_config
from jaxrec.data.qa import Question
from jaxrec.evaluate import search as judging
from jaxrec.systems import r1_searcher_pp, simple_deep_searcher
from jaxrec.systems.search_run import policy_config
from jaxrec.tools.search import Result, read_passages
from tests.jaxrec.systems import scripted_endpoint, searching

R1 = {
    "data__cold_questions": 4, "data__train_questions": 4, "cold_start__author": "teacher", "cold_start__samples": 3,
    "cold_start__steps": 40, "cold_start__batch_size": 4, "cold_start__lr": 0.02, "rl__steps": 1, "rl__group_size": 2,
    "rl__prompts_per_step": 2, "rl__micro_batches": 1, "env__k": 2, "env__test_k": 3,
    "rollout__max_prompt": 512, "rollout__max_total": 1024,
}  # fmt: skip
SDS = {
    "data__train_questions": 8, "sampling__total": 6, "sampling__min_domain": 1, "synthesize__samples": 3,
    "sft__steps": 40, "sft__batch_size": 4, "sft__micro_batches": 1, "sft__lr": 0.02, "dpo__steps": 0, "env__k": 3,
    "env__test_k": 3, "env__max_turns": 4, "curation__min_urls": 1.5, "rollout__max_prompt": 512,
    "rollout__max_total": 1024,
}  # fmt: skip
SYSTEMS = {
    "r1_searcher_pp": (r1_searcher_pp, R1, ("cold_start", "rl")),
    "simple_deep_searcher": (simple_deep_searcher, SDS, ("base", "sft", "uncurated")),
}
ANSWERS = ("Ann", "the Ann", "Ann Lee", "Zoe", "yes")  # of test questions; the model learns to say "Ann"


def hotpot(number: int, answer: str) -> dict:
    title = f"Town {number}"
    return {
        "_id": f"h{number}", "question": f"Who ruled town {number}?", "answer": answer, "type": "bridge",
        "level": "hard", "supporting_facts": [[title, 0]], "context": [[title, [f"Ann ruled town {number}."]]],
    }  # fmt: skip


def musique(number: int, answer: str) -> dict:
    return {
        "id": f"2hop__{number}_0", "question": f"Who ruled city {number}?", "answer": answer, "answerable": True,
        "answer_aliases": [f"{answer} the First"],
        "paragraphs": [{"idx": 0, "title": "City", "paragraph_text": "Ann ruled.", "is_supporting": True}],
        "question_decomposition": [
            {"id": 1, "question": "city >> ruler", "answer": answer, "paragraph_support_idx": 0}
        ],
    }  # fmt: skip


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_up(folder: Path) -> dict[str, Path]:
    """Training questions as HotpotQA has them, test questions as Bamboogle and MuSiQue do, passages as SQuAD does."""
    texts = [f"Ann ruled the old capital in year {i}, as is said." for i in range(6)]
    tree = {"data": [{"title": "Towns", "paragraphs": [{"context": text, "qas": []} for text in texts]}]}
    (folder / "squad.json").write_text(json.dumps(tree), encoding="utf-8")
    plain = [{"idx": i, "question": f"Who built tower {i}?", "answer": a} for i, a in enumerate(ANSWERS, 1)]
    return {
        "train": lines(folder / "hotpot.jsonl", [hotpot(i, "Ann") for i in range(8)]),
        "r1_searcher_pp": lines(folder / "bamboogle.jsonl", plain),
        "simple_deep_searcher": lines(folder / "musique.jsonl", [musique(i, a) for i, a in enumerate(ANSWERS)]),
        "corpus": folder / "squad.json",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search_files")
    with searching.endpoint() as server:
        yield folder, searching.tiny_folder(folder / "model"), server


def config_of(place, name: str, files: dict[str, Path], test: Path, **more):
    folder, model, server = place
    settings = {**SYSTEMS[name][1], "data__corpus_format": "squad", **more}
    found = searching.flags(folder, model, server.url, files["train"], test, files["corpus"], **settings)
    return resolve_config(f"{name}:small", found)


@pytest.fixture(scope="module", params=SYSTEMS)
def done(request, place):
    name = request.param
    files = made_up(place[0])
    config = config_of(place, name, files, files[name])
    work = place[0] / name
    work.mkdir()
    system = SYSTEMS[name][0]
    return name, work, config, system.run(config, work, system.STAGES)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_rows(name: str, work: Path, result: dict, questions: list) -> None:
    """Every model has one row a question, scored by the official rules, and the result is the mean of these."""
    for model, shown in zip(SYSTEMS[name][2], result["rows"], strict=True):
        rows = read(work / "questions" / f"{model}.jsonl")
        assert [row["id"] for row in rows] == [q.id for q in questions]
        assert [row["answers"] for row in rows] == [list(q.answers) for q in questions]
        for row in rows:
            wanted = searching.official(row["prediction"], row["answers"], r1=name == "r1_searcher_pp")
            assert {metric: row[metric] for metric in wanted} == pytest.approx(dict(wanted))
            assert row["failed_searches"] == 0
            assert row["contained"]["summaries"] <= bool(row["searches"])
        for metric in ("em", "cover", "f1", "searches"):
            assert shown[metric] == pytest.approx(sum(row[metric] for row in rows) / len(rows))
        assert shown["searches that failed"] == 0
        assert sum(result["by_seed"][0][model]["reasons"].values()) == len(rows)
        assert result["by_seed"][0][model]["failed_searches"] == 0
    assert result["protocol"]["samples"] == len(questions)
    assert result["protocol"]["source"] == "files"
    assert json.loads((work / "result.json").read_text()) == result


def test_every_question_has_a_row_scored_by_the_official_rules(done):
    name, work, config, result = done
    task = SYSTEMS[name][0].Run(config, 0, work, None).task
    assert len(task.test) == len(ANSWERS)
    check_rows(name, work, result, task.test)


def test_the_model_plays_what_it_learned(done):
    """It searches once, reads what BM25 found, and says "Ann": worked out by hand for the five right answers."""
    name, work, _, result = done
    trained = SYSTEMS[name][2][name == "simple_deep_searcher"]
    rows = read(work / "questions" / f"{trained}.jsonl")
    assert [row["prediction"] for row in rows] == ["Ann"] * 5
    assert [row["searches"] for row in rows] == [1] * 5
    assert [row["reason"] for row in rows] == ["answer"] * 5
    assert all(row["contained"]["pages"] == (i < 2) for i, row in enumerate(rows))  # passages tell of Ann, no Ann Lee
    assert [row["em"] for row in rows] == [1, 1, 0, 0, 0]
    # "Ann" beside "Ann Lee" has precision 1 and recall 1/2.
    assert [row["f1"] for row in rows] == pytest.approx([1, 1, 2 / 3, 0, 0])
    assert next(e for e in result["rows"] if e["searches"] == 1)["f1"] == pytest.approx((2 + 2 / 3) / 5)


def test_the_teacher_reads_no_control_tokens_of_the_policy(done, place):
    _, work, _, _ = done
    assert {role for role, _ in place[2].asked} >= {"author"}
    assert not any("<|im_start|>" in text for _, text in place[2].asked)
    if (work / "rollouts.jsonl").exists():  # the rollouts themselves begin with the policy's own prompt
        assert all(row["prompt"].startswith("<|im_start|>") for row in read(work / "rollouts.jsonl"))


def test_counts_of_training_data_add_up(done):
    name, work, config, _ = done
    if name == "r1_searcher_pp":
        found = json.loads((work / "cold_start.json").read_text())
        assert found["rollouts"] == 4 * 3 == found["kept"] + sum(found["dropped"].values())
        assert found["dropped"] == {"wrong answer": 4}  # the seeds that are wrong
        assert found["share of kept ones that search"] == 1
        return
    found, counts = (json.loads((work / f"{part}.json").read_text()) for part in ("synthesize", "curation"))
    assert (found["pool"], found["annotated"], found["sampled"]) == (8, 8, 6)
    assert found["rollouts"] == 18 == counts["rollouts"]["in"]
    assert found["right"] == pytest.approx(2 / 3)
    assert found["summaries"] == {"misfits": 0, "fitting": 18}
    assert counts["rollouts"]["out"] == len(read(work / "samples.jsonl")) == 6
    assert sum(counts["rollouts"]["dropped"].values()) == 12


def test_an_evaluation_that_was_killed_goes_on(done, place):
    name, work, config, result = done
    file = work / "questions" / f"{SYSTEMS[name][2][1]}.jsonl"
    whole, others = file.read_bytes(), [p for p in work.rglob("*.jsonl") if p != file and p.name != "metrics.jsonl"]
    before, asked = {p: p.stat().st_mtime_ns for p in others}, len(place[2].asked)
    parts = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(parts[:3]) + parts[3][:40])  # a kill in the middle of a line
    assert SYSTEMS[name][0].run(config, work, ["evaluate"]) == result
    assert file.read_bytes() == whole
    assert before == {p: p.stat().st_mtime_ns for p in others}
    assert len(place[2].asked) == asked  # summaries are stored, so that nobody is asked twice


def judged(done, place, work: Path, **settings) -> dict:
    """The result of the evaluation with a judge, in a folder that shares the models of a run and holds its rows."""
    name, finished, _, _ = done
    if not work.exists():
        work.mkdir()
        (work / "checkpoints").symlink_to(finished / "checkpoints")
        shutil.copytree(finished / "questions", work / "questions")
    files = made_up(place[0])
    config = config_of(place, name, files, files[name], evaluate__judge="an able judge", **settings)
    return SYSTEMS[name][0].run(config, work, ["evaluate"])


def test_a_judge_that_is_down_is_missing_and_asked_again(done, place, tmp_path):
    """The trained model says "Ann" to all: True for Ann, the Ann and Ann Lee, False for Zoe, "True." for yes."""
    name, _, _, plain = done
    assert not any("lasj" in row for row in plain["rows"])
    assert "judge" not in plain["protocol"]
    trained = SYSTEMS[name][2][name == "simple_deep_searcher"]
    rows = lambda: read(tmp_path / "work" / "questions" / f"{trained}.jsonl")  # noqa: E731
    with scripted_endpoint.endpoint(lambda *_: (None, "", "stop"), status=400) as down:
        settings = {"evaluate__judge_url": down.url, "evaluate__judge_key_variable": ""}
        result = judged(done, place, tmp_path / "work", **settings)
    assert all(row["lasj"] is None and row["lasj_missing"] == 5 and not row["lasj_invalid"] for row in result["rows"])
    assert {row["judge"] for row in rows()} == {None}
    asked = len(place[2].asked)
    result = judged(done, place, tmp_path / "work")
    shown = next(row for row in result["rows"] if row["searches"] == 1)
    assert (shown["lasj"], shown["lasj_invalid"], shown["lasj_missing"]) == (3 / 5, 1, 0)
    assert [row["judge"] for row in rows()] == ["True", "True", "True", "False", "True."]
    assert result["by_seed"][0][trained]["lasj_count"] == 5
    assert result["protocol"]["judge"].startswith("an able judge, ")
    new = place[2].asked[asked:]
    assert {role for role, _ in new} == {"judge"}  # what was played is not played again
    assert len(set(new)) == len(new)  # two models that say the same are judged once
    assert judged(done, place, tmp_path / "work") == result
    assert len(place[2].asked) == asked + len(new)
    metrics = ("em", "cover", "f1", "searches")
    assert [[row[m] for m in metrics] for row in result["rows"]] == [[r[m] for m in metrics] for r in plain["rows"]]


def test_a_judge_needs_an_address_and_a_key(place, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    files = made_up(tmp_path)
    for name, (system, _, _) in SYSTEMS.items():
        own = {"evaluate__judge": "m", "evaluate__judge_url": "http://127.0.0.1:9/v1"}
        config = config_of(place, name, files, files[name], **own, evaluate__judge_key_variable="NO_SUCH_KEY")
        with pytest.raises(UsageError, match=r"evaluate\.judge: the key .* set the environment variable NO_SUCH_KEY"):
            system.run(config, tmp_path, ["evaluate"])
        with pytest.raises(UsageError, match=r"set evaluate\.judge_url"):
            system.run(resolve_config(f"{name}:tiny", ["--config.evaluate.judge=m"]), tmp_path, ["evaluate"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_judges_request_has_tokens_of_its_own(place, tmp_path, name):
    """Whatever the teacher's replies may hold: one word by default, room to think where the config gives it."""
    files, pairs = made_up(tmp_path), [(Question("q", "Who?", ("Ann",), ""), "Ann")]
    for more, tokens in (({}, 64), ({"evaluate__judge_max_tokens": 900}, 900)):
        config = config_of(place, name, files, files[name], evaluate__judge="m", teacher__max_tokens=333, **more)
        assert SYSTEMS[name][0].Run(config, 0, tmp_path, None).judge(pairs) == ["True"]
        request = read(tmp_path / "teacher" / "judge.jsonl")[-1]["request"]
        assert (request["role"], request["sampling"]["max_tokens"]) == ("judge", tokens)
    none = config_of(place, name, files, files[name], evaluate__judge_max_tokens=0)
    with pytest.raises(UsageError, match=r"evaluate\.judge_max_tokens=0 must be at least 1"):
        SYSTEMS[name][0].run(none, tmp_path, ["evaluate"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_rollout_batch_gives_as_many_updates_as_the_config_says(place, tmp_path, monkeypatch, name):
    """One by default, in every variant: both papers are strictly on-policy."""
    system, given = SYSTEMS[name][0], []
    for variant in ("demo", "world", "tiny", "small", "paper"):
        assert policy_config(resolve_config(f"{name}:{variant}"), 0).updates_per_step == 1
    monkeypatch.setattr(system.Run, "model", lambda this, _: this.load(place[1]))
    monkeypatch.setattr(system.Run, "explore", lambda this, stage, model, settings, *rest: given.append(settings))
    monkeypatch.setattr(simple_deep_searcher, "questions_to_explore", lambda this, model: [])
    files = made_up(tmp_path)
    for more in ({}, {"rl__minibatches": 4}):
        own = {"rl__steps": 1, "rl__group_size": 2, "rl__prompts_per_step": 2, "rl__micro_batches": 1, **more}
        system.RECIPE["rl"](system.Run(config_of(place, name, files, files[name], **own), 0, tmp_path, None))
    assert [settings.minibatches for settings in given] == [1, 4]


def test_searches_that_fail_are_told_from_those_that_were_made(done, tmp_path):
    name, work, config, _ = done
    system, _, models = SYSTEMS[name]
    this = system.Run(config, 0, work, None)

    class Down:
        def search(self, queries, k):
            return [Result(None, "no connection", "unavailable") for _ in queries]

    fails = system.Run(config, 0, tmp_path, None)
    fails.__dict__["task"] = dataclasses.replace(this.task, backend=Down())
    (tmp_path / "checkpoints").symlink_to(work / "checkpoints")
    found = judging.evaluate_seed(fails, models[1:2], system.PLAN.protocol)
    (shown,) = judging.pool(config, [found], tmp_path, system.PLAN)["rows"]
    rows = read(tmp_path / "questions" / f"{models[1]}.jsonl")
    assert all(row["searches"] >= row["failed_searches"] == row["searches"] for row in rows)
    assert shown["searches"] == shown["searches that failed"] > 0
    assert not any(row["contained"]["pages"] for row in rows)


def test_what_does_not_fit_is_named_before_anything_is_trained(place, tmp_path):
    files = made_up(tmp_path)
    for name, (system, _, _) in SYSTEMS.items():
        for setting, value, message in (
            ("rollout__max_prompt", 40, "more than rollout.max_prompt=40: raise it, or leave the question out"),
            ("rollout__max_total", 8192, "rollout.max_total=8192 is more than the context of .*, 4096"),
            ("env__test_k", 7, "env.k and env.test_k ask for 7 passages; .*squad.json holds 6"),
        ):
            work = tmp_path / f"{name}{setting}"
            work.mkdir()
            with pytest.raises(UsageError, match=message):
                system.run(config_of(place, name, files, files[name], **{setting: value}), work, system.STAGES[:1])
            assert not (work / "checkpoints").exists()


def test_an_index_is_not_used_for_another_corpus(place, tmp_path):
    files = made_up(tmp_path)
    config = config_of(place, "r1_searcher_pp", files, files["r1_searcher_pp"])
    assert r1_searcher_pp.Run(config, 0, tmp_path, None).task.backend.size == 6
    files["corpus"].write_text(files["corpus"].read_text().replace("old", "older"), encoding="utf-8")
    with pytest.raises(UsageError, match="remove that folder, or choose another --workdir"):
        _ = r1_searcher_pp.Run(config, 0, tmp_path, None).task


def real(variable: str, *names: str) -> Path:
    path = Path(os.environ.get(variable) or pytest.fail(f"set {variable} (this test needs it)"))
    return path.joinpath(*names)


@pytest.mark.real_data
@pytest.mark.parametrize("name", SYSTEMS)
def test_real_questions_end_to_end(name, place):
    """Trained on 2WikiMultiHopQA, evaluated on Bamboogle and the multi-hop files over SQuAD's paragraphs."""
    corpus, multihop = real("JAXREC_SQUAD"), real("JAXREC_MULTIHOP")
    files = {"train": multihop / "2wiki_train_500.json", "corpus": corpus}
    system = SYSTEMS[name][0]
    size = {"data__test_questions": 12, "evaluate__batch_size": 6, "env__k": 2, "rollout__max_total": 4096}
    tests = [real("JAXREC_BAMBOOGLE", "bamboogle.jsonl"), *sorted(multihop.glob("*.json*"))]
    trained = place[0] / f"{name} real"
    passages = {p.text for p in read_passages(corpus, "squad")}
    for number, test in enumerate(tests):
        work = place[0] / f"{name} {test.name}"
        if number:  # other test questions, the same models
            shutil.copytree(trained, work, ignore=shutil.ignore_patterns("questions", "result.json", "figures.json"))
        else:
            work = trained
            work.mkdir()
        # The scripted teacher knows one answer: with another one, all of its rollouts would be dropped as wrong.
        config = config_of(place, name, {**files, "train": _told(place[0], files["train"])}, test, **size)
        result = system.run(config, work, ["evaluate"] if number else system.STAGES)
        this = system.Run(config, 0, work, None)
        assert len(this.task.test) == 12
        assert this.task.backend.size == len(passages) == 2067
        check_rows(name, work, result, this.task.test)
        rows = read(work / "questions" / f"{SYSTEMS[name][2][1]}.jsonl")
        assert {row["dataset"] for row in rows} == {q.dataset for q in this.task.test}
        assert sum(row["searches"] for row in rows) > 0


def _told(folder: Path, train: Path) -> Path:
    """The questions of a 2WikiMultiHopQA file with the one answer that the scripted teacher gives."""
    entries = json.loads(train.read_text(encoding="utf-8"))
    path = folder / "2wiki.json"
    path.write_text(json.dumps([{**entry, "answer": "Ann"} for entry in entries]), encoding="utf-8")
    return path
