"""GRSU end to end on the smallest world: stages leave what they say, resume, and refuse bad settings."""

import json

import numpy as np
import pytest

from jaxrec import chat_command, cli
from jaxrec.config import UsageError, resolve_config, save_config
from jaxrec.data.dialogues import Instance
from jaxrec.evaluate import grsu as judging
from jaxrec.systems import grsu as system
from jaxrec.systems import model_run, recommender_rl
from jaxrec.tools.conversation_search import SearchConfig, search
from jaxrec.tools.crs.environment import talks

SPEC = "grsu:tiny"


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_models):
    folder = tmp_path_factory.mktemp("grsu")
    config = resolve_config(SPEC)
    return folder, config, system.run(config, folder, system.STAGES)


@pytest.fixture(scope="module")
def this(done):
    folder, config, _ = done
    return system.Run(config, 0, folder, None)


def test_every_stage_leaves_what_it_says(done, this):
    folder, config, result = done
    counts = json.loads((folder / "instructions.json").read_text())
    rows = system.read_instructions(folder / "instructions.jsonl")
    assert counts["instances"] == {"train": 24, "valid": 4, "test": 4}
    assert counts["decisions"] + counts["critiques"] == len(rows)
    assert counts["critiques"] + sum(counts["critiques left out"].values()) == 24 * config.synthesize.rounds
    traced = json.loads((folder / "cold_start.json").read_text())
    assert traced["traces"] + traced["too long"] + sum(traced["failed"].values()) == 24
    assert result["counts"]["by seed"]["0"] == result["counts"]["in all"]
    assert [row["name"] for row in result["tables"][1]["rows"]] == [judging.FULL, *judging.ARMS.values()]
    for name in ("sft", "cold_start", "rl"):
        assert (this.checkpoint(name) / "model" / "config.json").exists()
    arms = ("full", *config.evaluate.arms)
    assert {path.stem for path in (folder / "trees").iterdir()} == set(arms)
    assert len((folder / "values.jsonl").read_text().splitlines()) == 4 * len(arms)
    assert [row["name"] for row in result["rows"]] == [
        judging.FULL, *judging.ARMS.values(), *judging.POLICIES.values(),
    ]  # fmt: skip
    assert sum("criterion" in entry for entry in result["comparisons"]) == len(config.evaluate.arms) + 4


def test_decisions_are_as_many_of_each_and_no_prompt_holds_what_is_asked_for(this):
    rows = system.synthesize(this)
    replies = [row.text[1].strip() for row in rows]
    decided = [reply for reply in replies if reply in ("Yes", "No")]
    assert decided.count("Yes") == decided.count("No") == 24 * this.config.synthesize.scores
    labels = {this.task.catalogue.titles[i.labels[0]] for i in this.task.parts["train"]}
    for row in rows:
        prompt, reply = row.text
        if reply.strip() not in ("Yes", "No"):
            assert not any(title in reply for title in labels)
        dialogue = row.prompt[0]
        assert not any(title in dialogue for title in labels)


def test_the_search_sees_no_label(this):
    """Every request is the same when what was really recommended is something else."""
    instances = this.task.parts["test"]
    others = [Instance(i.dialogue, ((i.labels[0] + 1) % len(this.task.catalogue),)) for i in instances]
    user, config = this.user("sft"), SearchConfig(2, 2, 2, k=3, allow_shrink=True)
    one, two = (
        search([i.dialogue for i in part], this.recommender, user, config) for part in (instances, others)
    )  # fmt: skip
    assert one == two


def test_a_finished_run_asks_nothing_again(done, this, monkeypatch):
    folder, config, result = done

    def never(*args, **kwargs):
        raise AssertionError("something was asked again")

    monkeypatch.setattr(system.ModelUser, "criticise", never)
    monkeypatch.setattr(model_run, "train", never)
    monkeypatch.setattr(recommender_rl, "conversations", lambda this, user, name: (_policy(4), []))
    monkeypatch.setattr(system, "conversations", recommender_rl.conversations)
    again = system.run(config, folder, system.STAGES)
    assert again["rows"][0] == result["rows"][0]


def _policy(n):
    return {name: np.zeros(n) for name in ("hit", "hit_last", "score")}


def test_keywords_leave_out_what_is_not_wanted():
    known = frozenset({"dark", "comedy", "1950s", "ocean"})
    assert recommender_rl.keywords("I want something Dark. But no comedy, from the 1950s!", known) == ["Dark", "1950s"]
    assert recommender_rl.keywords("It isn't about the ocean", known) == []


@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_traces_ask_for_what_was_said_last_and_what_is_recalled(this, recall):
    model = this.load(this.base)
    env = recommender_rl.environment(this, this.user("sft"), model.tokenizer)
    known = recommender_rl.catalogue_words(this.task.catalogue)
    rng = np.random.default_rng(0)
    states = recommender_rl.traces(env, talks(this.task.parts["train"][:4]), known, recall, rng)
    for state in states:
        first = next(text for author, text in state.segments if author == "policy")
        said = [turn.text for turn in state.example.dialogue.turns if turn.role == "user"]
        words = [word for text in said for word in recommender_rl.keywords(text, known)]
        assert first.strip().split() == (list(dict.fromkeys(words)) if recall else words[-1:])
        assert all(len(set(items)) == 3 for items in state.lists)


class Known:
    """A user who scores by a table."""

    def __init__(self, table):
        self.table = table

    def score(self, dialogues, items):
        return [np.array([self.table(item) for item in own], np.float64) for own in items]


def test_auc_is_the_share_of_pairs_in_order(this):
    part = this.task.parts["valid"]
    proposed = this.first_lists(part)
    labels = {i.labels[0] for i in part}
    size = len(this.task.catalogue)
    assert judging.label_auc(Known(lambda i: float(i in labels)), part, size, proposed, 0).mean() > 0.9
    assert np.all(judging.label_auc(Known(lambda i: 0.5), part, size, proposed, 0) == 0.5)
    assert judging.label_auc(Known(lambda i: -float(i in labels)), part, size, proposed, 0).mean() < 0.1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.source=web", "data.source='web'"),
        ("model.path=x", "model.path goes with"),
        ("recommender.kind=oracle", "recommender.kind='oracle'"),
        ("recommender.kind=prompted", "with data.source=world take one of world, retrieval, policy"),
        ("evaluate.ranking=median", "evaluate.ranking='median'"),
        ("synthesize.long=cut", "synthesize.long='cut'"),
        ("synthesize.rounds=0", "synthesize.rounds=0"),
        ("search.beams=0", "beams"),
        ("search.reward=luck", "reward"),
        ("search.score=logit", "score"),
        ("rl.reward=stars", "rl.reward='stars'"),
        ("rl.max_total=10", "rl.max_total=10"),
        ("rl.kl_coef=-0.1", "rl.kl_coef=-0.1 must be finite"),
        ("rl.kl=k9", "kl must be one of"),
        ("sft.packed=9", "sft.packed=9 must be 0"),
        ("sft.weigh=both", "sft.weigh='both' must be one of token, row"),
        ("synthesize.closest=-1", "synthesize.closest=-1 must not"),
        ("data.wishes=9", "wishes=9"),
        ("recommender.k=65", "catalogue of 64"),
    ],
)
def test_bad_settings_are_refused(flag, message, tmp_path, base_models):
    config = resolve_config(SPEC, [f"--config.{flag}"])
    with pytest.raises((UsageError, ValueError), match=message):
        system.run(config, tmp_path, ["synthesize"])


def test_files_and_teacher_are_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    base = ["--config.model.path=x"]
    with pytest.raises(UsageError, match=r"data\.train"):
        system.run(resolve_config("grsu:small", base), tmp_path, system.STAGES)
    (tmp_path / "talks.jsonl").write_text('{"id": "a", "turns": [{"role": "user", "text": "Hello?"}]}\n')
    files = [*base, f"--config.data.train={tmp_path}/talks.jsonl", f"--config.data.test={tmp_path}/talks.jsonl"]
    with pytest.raises(UsageError, match=r"teacher\.url"):
        system.run(resolve_config("grsu:small", files), tmp_path, system.STAGES)


def test_a_stage_names_the_one_before(tmp_path, base_models):
    for stage, needed in (("sft", "synthesize"), ("interact", "sft")):
        with pytest.raises(UsageError, match=f"stages={needed}"):
            system.run(resolve_config(SPEC), tmp_path / stage, [stage])


@pytest.mark.parametrize("variant", ["demo", "world", "remembers", "tiny"])
def test_every_variant_of_the_world_can_be_checked(variant):
    system.check(resolve_config(f"grsu:{variant}"))


def test_chat_talks_over_a_finished_run(done, monkeypatch, capsys):
    folder, config, _ = done
    save_config(folder, config)
    lines = iter(["I want something dark.", "/critique", "/why 1", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--config=grsu:tiny", f"--workdir={folder}"]) == 0
    said = capsys.readouterr().out
    assert "Simulated user" in said or "simulated user" in said
    assert "score" in said


def test_chat_needs_a_run_of_grsu(tmp_path, capsys):
    assert cli.main(["chat", "--config=grsu:tiny", f"--workdir={tmp_path}/none"]) == 2
    assert "--stages=synthesize,sft" in capsys.readouterr().err
    assert cli.main(["chat", "--config=deeprec:tiny", f"--workdir={tmp_path}"]) == 2
    assert "take grsu" in capsys.readouterr().err
    assert cli.main(["chat", "--help"]) == 0
    assert "/critique" in chat_command.DETAILS
