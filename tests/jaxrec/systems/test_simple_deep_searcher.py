"""SimpleDeepSearcher end to end on the smallest world: stages leave what they say, add up, resume, mask what tools
wrote, and refuse bad settings."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxrec.config import UsageError, resolve_config
from jaxrec.systems import simple_deep_searcher as system
from jaxrec.tools import search_task
from jaxrec.tools.curation import describe, faults
from jaxrec.tools.rollouts import read_rollouts
from jaxrec.tools.samples import read_samples
from jaxrec.tools.search import SearchTool

SPEC = "simple_deep_searcher:tiny"
MODELS = ("base", "sft", "uncurated", "no_format", "dpo")


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_models):
    folder = tmp_path_factory.mktemp("sds")
    config = resolve_config(SPEC)
    return folder, config, system.run(config, folder, system.STAGES)


@pytest.fixture(scope="module")
def this(done):
    folder, config, _ = done
    return system.Run(config, 0, folder, None)


@pytest.fixture(scope="module")
def base(this):
    return this.model("base")


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_synthesis_adds_up(done, this):
    folder, config, _ = done
    found, rollouts = load(folder / "synthesize.json"), read_rollouts(folder / "rollouts.jsonl")
    assert found["pool"] == found["annotated"] + sum(found["not annotated"].values()) == 24
    assert sum(found["quotas"].values()) == config.sampling.total == found["sampled"]
    assert found["rollouts wanted"] == found["rollouts"] + sum(found["teacher failed"].values())
    assert len(rollouts) == found["rollouts"] == found["sampled"] * config.synthesize.samples
    assert sum(found["ended"].values()) == len(rollouts)
    assert found["summaries"]["fitting"] == sum(r.search_count for r in rollouts)
    assert set(Counter(r.id for r in rollouts).values()) == {config.synthesize.samples}
    assert {r.id for r in rollouts} == {q.id for q in this.played}
    assert 0.5 < found["right"] < 1  # the teacher errs, but not always
    assert len({r.text for r in rollouts}) > found["sampled"]  # and not always alike


def test_results_are_summaries(done, this):
    for rollout in read_rollouts(done[0] / "rollouts.jsonl"):
        shown = [text for author, text in rollout.segments if author == "tool"]
        assert len(shown) == rollout.search_count
        for text, search in zip(shown, rollout.searches, strict=True):
            assert len(search.passages) == 2
            body = text.strip().removeprefix("<|begin_search_result|>").removesuffix("<|end_search_result|>").strip()
            sentences = body.replace(". ", ".\n").split("\n")
            assert body == "None" or all(any(s in passage for passage in search.passages) for s in sentences)


def test_curation_adds_up_and_keeps_the_shortest_valid_rollout(done):
    folder, config, _ = done
    counts, samples = load(folder / "curation.json"), read_samples(folder / "samples.jsonl")
    for entry in counts.values():
        assert entry["in"] == entry["out"] + sum(entry["dropped"].values())
        assert entry["out"] == len(samples) > 0
    assert len(counts["rollouts"]["dropped"]) >= 3  # the filters have something to do
    filters = system.curation_config(config)
    groups = {}
    for rollout in read_rollouts(folder / "rollouts.jsonl"):
        if not faults(describe(rollout, filters), filters):
            groups.setdefault(rollout.id, []).append(rollout)
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        assert sample.search_count == min(r.search_count for r in groups[sample.id])
        assert sample.metrics["em"] == 1


def test_what_the_environment_wrote_is_never_learned(done, this, base):
    rows, _ = system.training_rows(this, base, "sft")
    samples = read_samples(done[0] / "samples.jsonl")
    assert len(rows["tokens"]) == len(samples)
    close = base.tokenizer.encode("<|end_search_result|>\n\n")
    for sample, ids, mask, length in zip(samples, rows["tokens"], rows["mask"], rows["lengths"], strict=True):
        said = base.tokenizer.decode(ids[:length][mask[:length]].tolist()[:-1])
        assert said == "".join(text for author, text in sample.segments if author == "policy")
        read = base.tokenizer.decode(ids[:length][~mask[:length]].tolist())
        assert read == sample.input + "".join(text for author, text in sample.segments if author == "tool")
        assert ids[length - 1] == base.config.eos_ids[0]
        assert not np.isin(ids[:length][mask[:length]], close).any()
        assert not mask[length:].any()


def test_the_ablation_learns_from_as_many_rollouts(done, this, base):
    folder, _, _ = done
    rows = {name: load(folder / f"{name}.json")["rows"] for name in ("sft", "uncurated", "no_format")}
    assert rows["sft"] == rows["uncurated"] == len(read_samples(folder / "samples.jsonl"))
    assert 0 < rows["no_format"] <= rows["sft"]
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    examples = system.uncurated(rollouts, 0)
    assert sorted(examples) == sorted((r.prompt, r.segments) for r in rollouts)  # all of them, faulty ones too
    first = [prompt for prompt, _ in examples[: len(this.played)]]
    assert len(set(first)) == len(first)  # one of each question before another one
    assert examples != system.uncurated(rollouts, 1)


def test_pairs_are_curated_samples_and_faulty_own_rollouts(done, this):
    found = load(done[0] / "dpo.json")
    assert sum(found["became"].values()) == found["rollouts"] == found["questions"] * 2
    paired = sum(n for reason, n in found["became"].items() if reason.startswith("paired"))
    pairs, _ = system.preference_pairs(this, this.model("sft"))
    assert pairs["tokens"].shape[:2] == (paired, 2)
    tokenizer, samples = this.model("sft").tokenizer, read_samples(done[0] / "samples.jsonl")
    policy = {"".join(t for a, t in s.segments if a == "policy") for s in samples}
    for ids, mask in zip(pairs["tokens"], pairs["mask"], strict=True):
        assert tokenizer.decode(ids[0][mask[0]].tolist()[:-1]) in policy
        assert mask[1].any()
        assert tokenizer.decode(ids[1][mask[1]].tolist()) not in policy


def test_every_model_answers_every_test_question(done, this):
    folder, _, result = done
    for name in MODELS:
        lines = (folder / "questions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == [q.id for q in this.task.test]
    assert [row["name"] for row in result["rows"]] == [system.PLAN.names[name] for name in MODELS]
    assert all({"em", "cover", "f1", "searches", "answer in pages"} <= row.keys() for row in result["rows"])
    (criterion,) = (entry for entry in result["comparisons"] if "criterion" in entry)
    assert criterion["name"] == "SimpleDeepSearcher - as many uncurated rollouts"
    assert criterion["metric"] == "cover"
    assert criterion["criterion"] == "lower end of the paired 95 % interval over 0"
    assert criterion["met"] == (criterion["low"] > 0)


def test_a_finished_run_does_nothing_again(done):
    folder, config, result = done
    kept = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".jsonl") or p.name in ("curation.json",)]
    assert len(kept) > 8
    before = {p: p.stat().st_mtime_ns for p in kept}
    assert system.run(config, folder, system.STAGES) == result
    assert before == {p: p.stat().st_mtime_ns for p in kept}


def test_a_synthesis_that_was_interrupted_asks_nothing_twice(done, this, tmp_path):
    folder, config, _ = done
    (tmp_path / "teacher").mkdir()
    replies = (folder / "teacher" / "replies.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "teacher" / "replies.jsonl").write_bytes(b"".join(replies[: len(replies) // 3]))
    again = system.Run(config, 0, tmp_path, None)
    system.synthesize(again)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (folder / "rollouts.jsonl").read_bytes()
    new = (tmp_path / "teacher" / "replies.jsonl").read_bytes().splitlines()
    assert len(new) == len(set(new))


def test_the_switch_a_teacher_without_errors_and_no_filters(tmp_path):
    flags = ["--config.teacher.error=0.0", "--config.sampling.total=8", "--config.data.train_questions=8"]
    flags += [f"--config.curation.{name}=False" for name in system.FILTERS] + ["--config.evaluate.ablations=()"]
    system.run(resolve_config(SPEC, flags), tmp_path, ["synthesize", "curate"])
    assert load(tmp_path / "synthesize.json")["right"] == 1
    assert load(tmp_path / "curation.json")["rollouts"]["dropped"] == {"another rollout was chosen": 24}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.source=web"], "data.source='web' must be one of world, files"),
        (["env.style=r1_searcher"], "env.style='r1_searcher' must be simple_deep_searcher"),
        (["data.source=files"], "model.path goes with data.source=files"),
        (["evaluate.ablations=('no_luck',)"], "no 'no_luck'"),
        (["curation.format=False"], "'no_format' is the run itself"),
        (["curation.min_urls=2.0"], r"min_urls=2.0 distinct pages per search cannot be exceeded with env.k=2"),
        (["sampling.total=25"], r"sampling.total=25 questions of a pool of data.train_questions=24"),
        (["sampling.score=odd"], "score must be one of"),
        (["sampling.max_failed=2.0"], r"sampling.max_failed=2.0 must lie"),
        (["synthesize.samples=0"], r"synthesize.samples=0"),
        (["dpo.steps=-1"], r"dpo.steps=-1"),
        (["rollout.max_total=16"], r"rollout.max_total=16 must leave room"),
        (["teacher.error=1.5"], "error must lie between 0 and 1"),
        (["teacher.faults=('sloth',)"], "no fault 'sloth'"),
        (["env.max_turns=0"], "needs max_turns"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(flags, message, tmp_path):
    config = resolve_config(SPEC, [f"--config.{flag}" for flag in flags])
    with pytest.raises((UsageError, ValueError), match=message):
        system.run(config, tmp_path, ["sft"])
    assert list(tmp_path.iterdir()) == []


def files(tmp_path, *flags, corpus=True):
    """Flags of a run on files that are there."""
    rows = [{"id": f"q{i}", "question": f"Who won race {i}?", "answer": ["Ann"]} for i in range(4)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    passages = [{"id": "1", "title": "Race", "text": "Ann won race 1."}, {"id": "2", "title": "Sea", "text": "Blue."}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages), encoding="utf-8")
    named = {name: f"{tmp_path}/{name}.jsonl" for name in ("train", "test", *(["corpus"] if corpus else []))}
    found = [f"--config.data.{name}={path}" for name, path in named.items()]
    found += ["--config.data.source=files", f"--config.model.path={tmp_path}", *(f"--config.{flag}" for flag in flags)]
    return resolve_config(SPEC, found)


TEACHER = ("teacher.url=http://127.0.0.1:9/v1", "teacher.model=m", "teacher.key_variable=NO_SUCH_KEY")
WEB = ("data.search=web", "data.search_key=NO_SEARCH_KEY", *TEACHER)


@pytest.mark.parametrize(
    ("flags", "corpus", "message"),
    [
        ((), True, "teacher.url and teacher.model name the teacher"),
        (TEACHER, True, "set the environment variable NO_SUCH_KEY"),
        (TEACHER, False, "needs data.corpus or data.search=web"),
        (("data.corpus_format=csv",), True, "data.corpus_format='csv' must be one of jsonl"),
        (("data.search=grep",), True, "data.search='grep' must be one of bm25, web"),
        (("data.train=/no/file",), True, "data.train=/no/file: there is no such file"),
        (WEB, False, "data.search=web needs data.endpoint"),
        ((*WEB, "data.endpoint=ftp://x"), False, "must be an http or https address"),
        ((*WEB, "data.endpoint=http://127.0.0.1:9/s"), False, "set the environment variable NO_SEARCH_KEY"),
    ],
)
def test_missing_files_addresses_and_keys_are_named_before_any_rollout(flags, corpus, message, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(UsageError, match=message):
        system.run(files(tmp_path, *flags, corpus=corpus), work, ["synthesize"])
    assert list(work.iterdir()) == []


def test_files_are_searched_by_bm25_or_on_the_web(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_SUCH_KEY", "k")
    monkeypatch.setenv("NO_SEARCH_KEY", "s")
    config = files(tmp_path, *TEACHER, "data.train_questions=0", "data.test_questions=0")
    system.check(config)
    task = system.Run(config, 0, tmp_path / "a", None).task
    assert [q.id for q in task.train] == ["q0", "q1", "q2", "q3"]
    assert task.backend.search(["Who won?"], 1)[0].passages[0].title == "Race"
    web = files(tmp_path, *WEB, "data.endpoint=http://127.0.0.1:9/s", corpus=False)
    system.check(web)
    tool = system.Run(web, 0, tmp_path / "b", None).task.backend
    assert isinstance(tool, SearchTool)
    assert tool.cache.path == tmp_path / "b" / "index" / "web.jsonl"
    assert tool.search([" "], 1)[0].kind == "bad_query"


def test_a_stage_names_the_one_before(tmp_path):
    this = system.Run(resolve_config(SPEC), 0, tmp_path, None)
    with pytest.raises(UsageError, match="run --stages=synthesize first"):
        system.curate_rollouts(this)
    with pytest.raises(UsageError, match="run --stages=sft first"):
        system.dpo_stage(this)


@pytest.mark.parametrize("variant", ["demo", "world", "small", "paper"])
def test_every_variant_can_be_checked(variant, monkeypatch):
    monkeypatch.setattr(search_task, "check_files", lambda *_: None)
    config = resolve_config(
        f"simple_deep_searcher:{variant}", ["--config.model.path=x"] if variant in "small paper" else []
    )
    system.check(config)
    assert system.search_options(config, config.env.k, config.env.max_searches).turns == config.env.max_turns
