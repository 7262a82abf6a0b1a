"""Settings that cannot work are refused before anything is trained, in words that name the field."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxrec import cli
from jaxrec.config import resolve_config
from jaxrec.systems import deeprec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.controls=('no_point',)"], r"'no_point' is the run itself when reward\.point=0"),
        (["env.results=5", "evaluate.controls=('one_call',)"], r"'one_call' cannot fill a list of env\.answers=10"),
        (["baselines.form=windows"], r"baselines\.form='windows' must be one of prefix, all"),
        (["baselines.stride=99"], r"baselines\.stride=99 must lie between 0 and data\.max_history=12"),
        (["trm.max_history=13"], r"trm\.max_history=13 must lie between 0 .* data\.max_history=12"),
        (["cold_start.open=1.5"], r"cold_start\.open=1\.5 is a share"),
        (["evaluate.controls=('lr0',)"], r"evaluate\.controls: no 'lr0' \(did you mean lr_0\?\); known: lr_0, blank"),
        (["baselines.names=('sasrec', 'gru')"], r"baselines\.names: no 'gru'.*known: sasrec, gru4rec, trm_no_text"),
        (["data.source=wrld"], r"data\.source='wrld': choose 'world' or 'files'"),
        (["data.source=files"], r"--config\.data\.path=FOLDER"),
        (["data.source=files", "data.path=/nowhere/x"], r"/nowhere/x does not exist"),
        (["cold_start.steps=0"], r"cold_start\.steps=0 needs a pretrained model: set --config\.model\.path"),
        (["cold_rl.steps=0"], r"cold_rl\.steps=0 must be at least 1"),
        (["rl.group_size=1"], r"group_size is 1, so a group-relative advantage is 0 everywhere"),
        (["rl.micro_batches=3"], r"4 prompts x 4 trajectories do not split into"),
        (["rl.advantage=grpo2"], r"advantage must be one of"),
        (["reward.match=fuzzy"], r"match must be 'exact' or 'substring', not 'fuzzy'"),
        (["env.results=65"], r"results=65 must lie between 1 and the number of items \(64\)"),
        (["env.answers=65"], r"answers=65 must lie between 1 and the number of items \(64\)"),
        (["env.answers=9"], r"env\.answers=9: the figures go to rank 10"),
        (["env.max_calls=0"], r"max_calls=0 must be at least 1"),
        (
            ["env.max_calls=6", "env.exclude_seen=True"],
            r"env\.max_calls=6 calls of env\.results=10 new items.* need 72 items.* has 64",
        ),
        (["rollout.max_prompt=12"], r"the longest prompt has \d+ tokens, more than rollout\.max_prompt=12"),
        (["rollout.max_prompt=128"], r"rollout\.max_total=128 must leave room behind rollout\.max_prompt=128"),
    ],
)
def test_refused_before_any_stage(overrides, message, tmp_path: Path):
    chosen = resolve_config("deeprec:tiny", [f"--config.{o}" for o in ("data.world.users=40", *overrides)])
    with pytest.raises((ValueError, OSError), match=message):
        deeprec.run(chosen, tmp_path / "run", deeprec.STAGES)
    assert not (tmp_path / "run").exists()


def test_what_is_refused_without_exclusion_is_allowed_with_it(tmp_path: Path):
    chosen = resolve_config(
        "deeprec:tiny", ["--config.env.max_calls=6", "--config.env.exclude_seen=False", "--config.data.world.users=40"]
    )
    task = deeprec.config_task(chosen.data, chosen.text, 0)
    deeprec.check_task(deeprec.Run(chosen, 0, tmp_path, task, None))


def test_on_the_command_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--config=deeprec:tiny", "--workdir=w"]
    assert cli.main([*words, "--config.evaluate.controls=('lr0',)"]) == cli.USAGE
    assert "did you mean lr_0" in capsys.readouterr().err


def _atomic(folder: Path, titles: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    events = [f"u{u}\ti{(u + k) % len(titles)}\t5\t{10 * u + k}" for u in range(30) for k in range(6)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "toy.inter").write_text("\n".join([header, *events]) + "\n")
    rows = [f"i{i}\t{title}\tnoir tale" for i, title in enumerate(titles)]
    (folder / "toy.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tclass:token_seq", *rows]) + "\n")


def test_files_with_titles_that_repeat_or_lack(tmp_path: Path):
    _atomic(tmp_path / "data", ["Comet", "comet", "", *(f"Title {i}" for i in range(27))])
    chosen = resolve_config("deeprec:ml100k", [f"--config.data.path={tmp_path / 'data'}"])
    task = deeprec.config_task(chosen.data, chosen.text, 0)
    assert task.report["titles_disambiguated"] == 1
    assert task.report["items_without_title"] == 1
    assert task.catalogue.find("comet [i1]") != task.catalogue.find("Comet") > 0
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="data does not exist"):
        deeprec.run(chosen, tmp_path / "run", ["trm"])
