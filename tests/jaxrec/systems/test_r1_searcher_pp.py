"""R1-Searcher++ end to end on the smallest world: stages leave what they say, resume, and refuse bad settings."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrec.config import UsageError, resolve_config
from jaxrec.systems import r1_searcher_pp as system
from jaxrec.tools.authors import rewrite_from_memory, select_rollouts, write_rollouts
from jaxrec.tools.rollouts import from_state
from jaxrec.tools.search_task import asked, plain_results
from jaxrec.tools.teacher import Failure, Sampling
from rl.envs.search import State
from rl.envs.tags import find_style

SPEC = "r1_searcher_pp:tiny"


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_models):
    folder = tmp_path_factory.mktemp("r1")
    config = resolve_config(SPEC)
    return folder, config, system.run(config, folder, system.STAGES)


@pytest.fixture(scope="module")
def this(done):
    folder, config, _ = done
    return system.Run(config, 0, folder, None)


@pytest.fixture(scope="module")
def env(this):
    return this.env(this.model("cold_start").tokenizer, k=1)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_leaves_what_it_says(done, this):
    folder, config, result = done
    selection = json.loads((folder / "cold_start.json").read_text())
    assert selection["rollouts"] == 12 * config.cold_start.samples
    assert selection["kept"] + sum(selection["dropped"].values()) == selection["rollouts"]
    assert 0 < selection["share of kept ones that search"] < 1
    names = ["cold_start", "rl", "no_group", "no_memory"]
    for name in names:
        assert (this.checkpoint(name) / "model" / "config.json").exists()
        rows = read(folder / "questions" / f"{name}.jsonl")
        assert [row["id"] for row in rows] == [q.id for q in this.task.test]
    assert [row["name"] for row in result["rows"]] == ["SFT", "R1-Searcher++", "without the group reward", "mu = 0"]
    assert sum("criterion" in entry for entry in result["comparisons"]) == 3
    assert all(row[f"closed book, {kind}"] >= 0 for row in result["rows"] for kind in ("never asked for",))


def test_without_memorisation_nothing_is_rewritten(done):
    folder, config, _ = done
    lines = read(folder / "rewrites.jsonl")
    assert {line["stage"] for line in lines} == {"rl", "no_group"}
    for line in lines:
        rows = config.rl.prompts_per_step * config.rl.group_size
        assert sum(v for k, v in line.items() if k not in ("stage", "step")) == rows


def test_a_finished_run_does_nothing_again(done):
    folder, config, result = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = system.run(config, folder, system.STAGES)
    assert again == result
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def written(this, env, copies=2):
    return write_rollouts(env, [asked(q) for q in this.task.cold], this.teacher, Sampling(seed=3), copies).states


def test_a_teacher_plays_through_the_environment(this, env):
    states = written(this, env)
    reward = this.reward()
    assert len(states) == 2 * len([asked(q) for q in this.task.cold])
    right = [s for s in states if not reward.faults(s) and reward.answer(s) == 1.0]
    assert len(right) > len(states) // 2
    found = []
    for state in states:
        facts = this.task.chains[state.example.id].facts
        recalled = state.policy_text.count("<internal>")
        assert recalled + len(state.calls) == len(facts)
        found += [any(call.passages[0].title == fact.subject for fact in facts) for call in state.calls]
    assert np.mean(found) > 0.5  # a question about one fact finds its passage, in a world of few words
    assert len({s.policy_text for s in states}) > len([asked(q) for q in this.task.cold])  # copies differ


def test_the_teachers_failures_are_counted_and_left_out(this, env):
    class Failing:
        id = "failing"

        def ask(self, requests, done=None):
            answers = this.teacher.ask(requests)
            return [Failure("timeout", "late") if i % 3 == 0 else a for i, a in enumerate(answers)]

    found = write_rollouts(env, [asked(q) for q in this.task.cold], Failing(), Sampling(seed=3), 1)
    assert found.failed["timeout"] > 0
    assert len(found.states) + found.failed["timeout"] == len([asked(q) for q in this.task.cold])
    assert all(s.segments[-1][0] == "policy" for s in found.states)


def test_rewrites_recall_what_was_found_and_nothing_else(this, env):
    states, reward = written(this, env), this.reward()
    rows, counts = rewrite_from_memory(states, env, reward, this.teacher, Sampling(seed=0), 1)
    assert sum(counts.values()) == len(states)
    assert counts["rewritten"] == len(rows) > 0
    questions = {f"Question: {q.text}\nAnswer:": q for q in this.task.cold}
    for prompt, segments in rows:
        ((author, text),) = segments
        assert author == "policy"
        assert "document" not in prompt + text
        assert "<external>" not in text
        assert text.count("<internal>") == questions[prompt].hops
        assert questions[prompt].answers[0] in text


def test_a_rewrite_that_is_wrong_or_searches_is_not_learned(this, env):
    class Saying:
        id = "saying"

        def __init__(self, text):
            self.text = text

        def ask(self, requests, done=None):
            reply = this.teacher.ask(requests)
            return [dataclasses.replace(r, texts=(self.text,), finish=("stop",)) for r in reply]

    states, reward = written(this, env), this.reward()
    for text in (
        " <internal> x </internal> \\boxed{ nonsense }", " <external> who? </external>", " <internal> x </internal>",
        " \\boxed{ x } <document> y </document>",
    ):  # fmt: skip
        rows, counts = rewrite_from_memory(states, env, reward, Saying(text), Sampling(), 4)
        assert rows == []
        assert counts["not verified"] > 0


def test_selection_adds_up(this, env):
    states = written(this, env)
    kept, dropped = select_rollouts(states, lambda s: "" if s.searches else "no search", 1)
    assert len(kept) + sum(dropped.values()) == len(states)
    assert len({s.example.id for s in kept}) == len(kept)
    assert all(s.searches for s in kept)


def test_results_are_worded_with_blanks_the_tokenizer_knows(this, env):
    tokenizer = this.model("cold_start").tokenizer
    passage = this.task.backend.search([this.task.train[0].text], 1)[0].passages[0]
    (body,) = plain_results([], ["q"], [[passage]])
    text = env.result(body)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    words = len(passage.text.replace(".", " .").split())
    assert words + 2 <= len(tokenizer.encode(text)) <= words + 4  # tags and nearly all words are one token each


def test_closed_book_starts_inside_the_tag(this):
    from jaxrec.evaluate.search import _Recalling

    inner = this.env(this.model("cold_start").tokenizer, k=1, max_searches=0)
    states, prompts = _Recalling(inner).reset([asked(q) for q in this.task.train[:2]], 2)
    assert len(states) == 4
    assert all(p.endswith("\nAnswer: <internal>") for p in prompts)
    assert all(isinstance(s, State) for s in states)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.source='web'", "data.source='web' must be one of world, files"),
        ("env.style='xml'", "env.style='xml' must be"),
        ("cold_start.author='nobody'", "must be teacher or self"),
        ("data.source='files'", "model.path goes with data.source=files"),
        ("evaluate.ablations=('no_luck',)", "no 'no_luck'"),
        ("memory.weight=0.0", "'no_memory' is the run itself"),
        ("reward.eta=0.0", "'no_group' is the run itself"),
        ("memory.share=-0.5", r"memory.share=-0.5 must be at least 0"),
        ("rollout.max_total=16", "rollout.max_total=16 must leave room"),
        ("env.style='r1_searcher'", "has no tag for recall; set it to 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(flag, message, tmp_path):
    name, _, value = flag.partition("=")
    with pytest.raises((UsageError, ValueError), match=message):
        system.run(resolve_config(SPEC, [f"--config.{name}={value.strip(chr(39))}"]), tmp_path, ["rl"])


def test_files_are_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    rows = [{"id": f"q{i}", "question": f"Who won race {i}?", "answer": ["Ann"]} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "1", "title": "Race", "text": "Ann won race 1."}) + "\n")
    files = [f"--config.data.{name}={tmp_path}/q.jsonl" for name in ("train", "test")]
    base = [
        "--config.data.source=files",
        f"--config.model.path={tmp_path}",
        "--config.teacher.key_variable=NO_SUCH_KEY",
    ]
    corpus = [f"--config.data.corpus={tmp_path}/p.jsonl"]
    for flags, message in (
        ([], "needs data.train"),
        (files, "needs data.corpus"),
        ([*files, *corpus], "teacher.url and teacher.model name the teacher"),
        ([*files, *corpus, "--config.teacher.url=http://127.0.0.1:9/v1", "--config.teacher.model=m"], "NO_SUCH_KEY"),
    ):
        with pytest.raises(UsageError, match=message):
            system.check(resolve_config(SPEC, [*base, *flags]))
    alone = ["--config.memory.weight=0.0", "--config.cold_start.author=self", "--config.evaluate.ablations=()"]
    config = resolve_config(SPEC, [*base, *files, *corpus, *alone, "--config.data.cold_questions=2"])
    system.check(config)  # a model that samples for itself needs no teacher
    task = system.Run(config, 0, tmp_path / "run", None).task
    assert {q.id for q in task.cold}.isdisjoint(q.id for q in task.train)
    assert (len(task.cold), len(task.train), len(task.test)) == (2, 2, 4)
    assert task.backend.search(["Who won?"], 1)[0].passages[0].title == "Race"


def test_an_answer_between_tags_is_the_prediction(this):
    style = find_style("r1_searcher")
    text = "I know </think><answer> Ann </answer>"
    state = State(asked(this.task.train[0]), "", style, [("policy", text)], turns=1, finish="answer")
    assert from_state(state).prediction == state.answer == "Ann"
    boxed = State(asked(this.task.train[0]), "", find_style("r1_searcher_pp"), [("policy", "\\boxed{(Ann)}")])
    assert from_state(boxed).prediction == "Ann"


def test_numbers_of_questions_that_the_world_does_not_have(tmp_path):
    config = resolve_config(SPEC, ["--config.data.test_questions=100000"])
    with pytest.raises(UsageError, match="ask for fewer"):
        _ = system.Run(config, 0, tmp_path, None).task


def test_a_stage_names_the_one_before(tmp_path):
    this = system.Run(resolve_config(SPEC), 0, tmp_path, None)
    with pytest.raises(UsageError, match="run --stages=cold_start first"):
        this.model("cold_start")
