"""SimpleDeepSearcher's optional reinforcement learning: a tiny model that learned to say one of two names at random."""

import json
import os
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

import rl.policy
from jaxrec.config import UsageError, resolve_config
from jaxrec.systems import simple_deep_searcher as system
from tests.jaxrec.systems import searching

SETTINGS = {
    "data__train_questions": 8, "data__test_questions": 0, "sampling__total": 8, "sampling__min_domain": 1,
    "synthesize__samples": 3, "sft__steps": 40, "sft__batch_size": 4, "sft__micro_batches": 1, "sft__lr": 0.02,
    "env__k": 3, "env__test_k": 3, "env__max_turns": 4, "curation__min_urls": 1.5, "rollout__max_prompt": 512,
    "rollout__max_total": 768, "evaluate__ablations": "()", "evaluate__batch_size": 16, "rl__steps": 3,
    "rl__samples": 4, "rl__most_right": 3, "rl__group_size": 4, "rl__prompts_per_step": 2, "rl__micro_batches": 1,
    "rl__save_every": 1, "rl__lr": 1e-3, "rl__kl": 0.01,
}  # fmt: skip
BODY = "ruled the old capital in year"  # of every passage, in no words that the policy learns to say


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Half of the questions want Ann, half Bob, and nothing in a question says which: so a model learns either."""
    folder = tmp_path_factory.mktemp("search_rl")
    rows = [
        {"id": f"q{i}", "question": f"Who ruled town {i}?", "answer": ["Ann", "Bob"][i % 2 :][:1]} for i in range(8)
    ]
    passages = [{"id": str(i), "title": "Town", "text": f"Ann {BODY} {i}."} for i in range(6)]
    train, test = lines(folder / "train.jsonl", rows), lines(folder / "test.jsonl", rows[:2])
    corpus = lines(folder / "corpus.jsonl", passages)
    with searching.endpoint() as server:
        flags = searching.flags(
            folder, searching.tiny_folder(folder / "model"), server.url, train, test, corpus, **SETTINGS
        )
        work = folder / "work"
        work.mkdir()
        config = resolve_config("simple_deep_searcher:small", flags)
        system.run(config, work, ("synthesize", "curate", "sft"))
        yield work, config


@pytest.fixture(scope="module")
def done(place):
    """What the updates of the stage were given, and the result."""
    work, config = place
    with pytest.MonkeyPatch.context() as patch:
        batches, update = [], rl.policy.update

        def noting(state, batch, *rest):
            batches.append(batch)
            return update(state, batch, *rest)

        patch.setattr(rl.policy, "update", noting)
        result = system.run(config, work, ("rl", "evaluate"))
    return batches, result


def weights(work, name):
    return (work / "checkpoints" / name / "model" / "model.safetensors").read_bytes()


def test_questions_are_those_that_are_right_now_and_then(place, done):
    found = json.loads((place[0] / "rl.json").read_text())
    times = found["questions by right rollouts"]
    assert sum(times.values()) == found["pool"] == 8
    assert len(found["chosen"]) == sum(times.get(str(n), 0) for n in (1, 2, 3)) >= 2
    rows = [json.loads(line) for line in (place[0] / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "rl"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["reward"] == pytest.approx(row["reward/answer"] + row["reward/format"]) for row in rows)
    assert all(row["reward/format"] == pytest.approx(-2 * (1 - row["valid_format"])) for row in rows)
    assert any(row["reward_std"] > 0 for row in rows)


def test_weights_change_and_what_tools_wrote_weighs_nothing(place, done):
    assert weights(place[0], "rl") != weights(place[0], "sft")
    batches, result = done
    tokenizer, read = system.Run(place[1], 0, place[0], None).model("sft").tokenizer, 0
    assert len(batches) == 3  # one update a rollout
    for batch in batches:
        for ids, mask, advantages, length in zip(batch.ids, batch.mask, batch.advantages, batch.lengths, strict=True):
            ours = np.asarray(mask[:length]) > 0
            assert ours.any()
            assert not np.asarray(mask[length:]).any()
            assert not np.asarray(advantages)[:length][~ours].any()
            assert BODY not in tokenizer.decode(ids[:length][ours].tolist())
            read += BODY in tokenizer.decode(ids[:length][~ours].tolist())
    assert read > 12  # of 24 rows: most of them searched and read a result
    assert [row["name"] for row in result["rows"]][1:] == ["SimpleDeepSearcher", "SimpleDeepSearcher + REINFORCE++"]
    assert {c["metric"] for c in result["comparisons"] if "REINFORCE" in c["name"]} == {"cover", "searches", "words"}


def test_a_run_that_was_killed_goes_on_to_the_same_weights(place, done, tmp_path, monkeypatch):
    work, config = place
    for name in os.listdir(work):
        if name not in ("checkpoints", "questions", "metrics.jsonl"):
            (shutil.copytree if (work / name).is_dir() else shutil.copy)(work / name, tmp_path / name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sft").symlink_to(work / "checkpoints" / "sft")
    update, calls = rl.policy.update, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(rl.policy, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        system.run(config, tmp_path, ("rl",))
    assert not (tmp_path / "checkpoints" / "rl" / "model").exists()
    system.run(config, tmp_path, ("rl",))
    assert len(calls) == 4  # the third step alone is done again
    assert weights(tmp_path, "rl") == weights(work, "rl")


def test_too_few_questions_are_an_error_that_says_how_many_there_are(place, done, tmp_path):
    work, config = place
    more = ConfigDict(config.to_dict())
    more.rl.prompts_per_step = 9
    this = system.Run(more, 0, tmp_path, None)
    shutil.copy(work / "rl.json", tmp_path / "rl.json")
    with pytest.raises(
        ValueError, match=r"fewer than rl\.prompts_per_step=9; questions by right rollouts: .*raise rl\.pool"
    ):
        system.questions_to_explore(this, None)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("rl.steps=-1", r"rl\.steps=-1"),
        ("rl.least_right=2", r"rl\.least_right=2 to rl\.most_right=1 right ones"),
        ("rl.advantage=best", "advantage must be one of"),
        ("rl.group_size=1", "group_size is 1"),
        ("reward.max_reflections=-1", "max_reflections must be at least 0"),
    ],
)
def test_bad_settings_are_refused(flag, message):
    with pytest.raises((UsageError, ValueError), match=message):
        system.check(resolve_config("simple_deep_searcher:tiny", [f"--config.{flag}"]))


def test_the_stage_is_off_by_default(tmp_path):
    for variant in ("demo", "world", "tiny", "small", "paper"):
        assert resolve_config(f"simple_deep_searcher:{variant}").rl.steps == 0
    system.rl_stage(system.Run(resolve_config("simple_deep_searcher:tiny"), 0, tmp_path, None))
    assert list(tmp_path.iterdir()) == []
