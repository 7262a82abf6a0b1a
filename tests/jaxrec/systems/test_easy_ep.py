"""EASY-EP as a recipe, at its smallest size: artefacts, resuming, the command line, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import models
from jaxrec import cli
from jaxrec.config import UsageError, resolve_config
from jaxrec.convert import read_expert_mask
from jaxrec.evaluate.experts import NAMES
from jaxrec.systems import easy_ep, world_lm
from tests.jaxrec.explored import choices, widgets_of

SPEC = "easy_ep:tiny"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("easy_ep")
    config = resolve_config(SPEC)
    return folder, config, easy_ep.run(config, folder, easy_ep.STAGES)


def test_every_stage_leaves_what_it_says(done):
    folder, config, result = done
    domains = ("facts", "reading", "sums", "dialogue", "catalogue")
    for name in domains:
        with np.load(folder / "statistics" / f"{name}.npz") as stored:
            assert stored["score"].shape == stored["gate"].shape == (2, 16)
            assert stored["frequency"].sum() == 2 * stored["count"].sum()
            assert stored["layer_ids"].tolist() == [0, 1]
    for domain in (*domains, "mix"):
        for method in config.select.methods:
            large, small = (read_expert_mask(folder / "masks" / f"{domain}_{method}_{k}.json") for k in (8, 4))
            assert (large.sum(axis=1) == 8).all()
            assert (small.sum(axis=1) == 4).all()
            if method != "random":
                assert (small <= large).all()
            about = json.loads((folder / "masks" / f"{domain}_{method}_8.meta.json").read_text())
            assert (about["experts"], about["layers"], about["mask_mode"]) == (16, 2, "mask_first")
    names = [row["name"] for row in result["rows"]]
    assert "all 16 experts" in names
    assert "EASY-EP, 4 experts" in names
    assert result["rows"][0]["kept"] in (0.0, 1.0)
    assert len(result["comparisons"]) == 4
    kinds = {figure["title"].split(":")[0] for figure in json.loads((folder / "figures.json").read_text())}
    assert {"Expert scores", "Accuracy with 4 experts"} <= kinds


def test_the_pruned_folder_is_the_masked_model(done):
    folder, config, _ = done
    smaller = models.load(folder / "pruned" / "mix_8")
    assert smaller.config.experts == 8
    full = models.load(world_lm.cached(config.model.base, 0))
    mask = read_expert_mask(folder / "masks" / "mix_easy_ep_8.json")
    tokens = np.random.default_rng(0).integers(2, 100, (2, 20))
    want = models.forward(full.params, full.config, tokens, expert_mask=mask).logits
    np.testing.assert_allclose(models.forward(smaller.params, smaller.config, tokens).logits, want, atol=1e-5)


def test_run_again_computes_nothing_new_and_gives_the_same(done):
    folder, config, result = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "statistics").iterdir()}
    again = easy_ep.run(config, folder, easy_ep.STAGES)
    assert {path: path.stat().st_mtime_ns for path in (folder / "statistics").iterdir()} == before
    assert again == result


def test_own_gold_and_no_answers_and_a_mesh(done, tmp_path):
    _, config, _ = done
    counts, scores = {}, {}
    for answers in easy_ep.ANSWERS:
        chosen = resolve_config(SPEC, [f"--config.calibrate.answers={answers}"])
        this = easy_ep.Run(chosen, 0, tmp_path / answers, None)
        easy_ep.calibrate(this)
        found = easy_ep.read_statistics(this)["sums"]
        counts[answers], scores[answers] = found.count[0], found.score
    assert counts["none"] < counts["gold"]
    assert counts["none"] < counts["own"]
    spread = easy_ep.Run(resolve_config(SPEC), 0, tmp_path / "mesh", models.make_mesh(data=2, fsdp=2, expert=2))
    easy_ep.calibrate(spread)
    got = easy_ep.read_statistics(spread)["sums"].score
    np.testing.assert_allclose(got, scores["own"], rtol=1e-3, atol=1e-5 * scores["own"].max())


def test_files_as_domains(done, tmp_path):
    base = world_lm.cached("world_lm:tiny_moe", 0)
    rows = [{"prompt": f"{i} plus {i} is", "response": f" {2 * i}"} for i in range(1, 13)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"--config.model.path={base}", f"--config.data.files=('sums={tmp_path}/sums.jsonl',)",
        "--config.calibrate.samples=4", "--config.calibrate.max_new=4", "--config.select.keep=(8,)",
        "--config.prune.keep=8", "--config.prune.domains=('sums',)",
    ]  # fmt: skip
    config = resolve_config("easy_ep:files", overrides)
    result = easy_ep.run(config, tmp_path / "run", easy_ep.STAGES)
    assert result["protocol"]["samples"] == 8
    assert models.load(tmp_path / "run" / "pruned" / "sums_8").config.experts == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.methods=('easy_ep','wanda')", "no 'wanda'"),
        ("select.methods=('gate',)", "must name easy_ep"),
        ("evaluate.random_draws=0", r"evaluate\.random_draws and calibrate\.samples"),
        ("select.mix=False", r"prune\.domains names 'mix'"),
        ("calibrate.answers=mine", r"calibrate\.answers='mine' must be one of own, gold, none"),
        ("prune.keep=5", r"prune\.keep=5 must be one of select\.keep"),
        ("data.files=('a=b.jsonl',)", r"data\.files goes with data\.source=files"),
        ("select.mask_mode=first", r"select\.mask_mode='first' must be one of mask_first"),
        ("model.path=here", r"model\.path goes with data\.source=files"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(override, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        easy_ep.run(resolve_config(SPEC, [f"--config.{override}"]), tmp_path, easy_ep.STAGES)
    assert not list(tmp_path.iterdir())


def test_stages_in_the_wrong_order_and_masks_of_another_model(done, tmp_path):
    _, config, _ = done
    for stage, needs in (("select", "calibrate"), ("prune", "select"), ("evaluate", "calibrate")):
        with pytest.raises(UsageError, match=f"run --stages={needs} first"):
            easy_ep.run(config, tmp_path, [stage])
    few = resolve_config(SPEC, ["--config.select.keep=(8,1)"])
    easy_ep.run(few, tmp_path, ["calibrate"])
    with pytest.raises(ValueError, match="keeps 1 experts in layer 0, fewer than the 2"):
        easy_ep.run(few, tmp_path, ["select"])
    dense = world_lm.cached("world_lm:tiny", 0)
    this = easy_ep.Run(resolve_config("easy_ep:files", [f"--config.model.path={dense}"]), 0, tmp_path, None)
    with pytest.raises(UsageError, match="is a dense qwen3 model"):
        _ = this.model


def test_the_command_line_and_the_report(done, tmp_path, capsys):
    folder, config, _ = done
    assert cli.main(["run", "--config=easy_ep:tiny", f"--workdir={tmp_path}/run"]) == 0
    shown = capsys.readouterr().out
    assert "all 16 experts" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Expert scores: facts" in page
    assert page.count("<img") >= 7  # five maps of scores, overlap, accuracy
    (found,) = widgets_of(page)
    by_domain = json.loads((tmp_path / "run" / "result.json").read_text())["by_domain"]
    views = dict(zip(choices(found), found["views"]))
    assert len(views) == 6 * 4 * 2
    for (domain, name, keep), view in views.items():
        method = {shown: method for method, shown in NAMES.items()}[name]
        mask = read_expert_mask(tmp_path / "run" / "masks" / f"{domain}_{method}_{keep}.json")
        assert view["marks"] == ["".join("01"[int(m)] for m in row) for row in mask]
        assert (view["grid"] is None) == (method == "random")
        if domain != "mix" and method != "random":
            with np.load(tmp_path / "run" / "statistics" / f"{domain}.npz") as stored:
                values = stored["score" if method == "easy_ep" else method]
            want = values / values.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(found["grids"][view["grid"]], want, rtol=1e-4)
        if domain != "mix":
            assert f"{domain} {by_domain[domain][f'{method}_{keep}']:.3f}" in view["text"]


def test_without_homes_for_domains_a_base_model_is_trained_too(tmp_path):
    assert resolve_config("world_lm:moe_even").train.domain_experts == 0
    config = resolve_config("world_lm:tiny_moe", ["--config.train.domain_experts=0", "--config.train.steps=1"])
    assert config.train.domain_weight > 0
    model = models.load(world_lm.train(config, tmp_path))
    assert model.config.experts == config.model.experts


def test_a_base_model_is_made_once_per_config_and_seed():
    one = world_lm.cached("world_lm:tiny_moe", 0)
    stamp = (one / "config.json").stat().st_mtime_ns
    assert world_lm.cached("world_lm:tiny_moe", 0) == one
    assert (one / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="a base model is made by world_lm"):
        world_lm.cached("deeprec:tiny", 0)
    with pytest.raises(UsageError, match=r"train\.router_balance is for models with experts"):
        world_lm.check(resolve_config("world_lm:tiny", ["--config.train.router_balance=0.1"]))
    with pytest.raises(UsageError, match="no 'poems'"):
        world_lm.check(resolve_config("world_lm:tiny", ["--config.text.domains=('poems',)"]))
    with pytest.raises(UsageError, match=r"world\.scale='small' must be one of tiny"):
        world_lm.make_texts(resolve_config("world_lm:tiny", ["--config.world.scale=small"]))
    with pytest.raises(UsageError, match=r"world\.title_words=0 must lie between 1 and 80"):
        world_lm.make_texts(resolve_config("world_lm:tiny_conflict", ["--config.world.title_words=0"]))
    with pytest.raises(UsageError, match=r"model\.narrow names layer 2; of model\.layers=2 the first is 0"):
        world_lm.check(resolve_config("world_lm:tiny_talker", ["--config.model.narrow=(0, 2)"]))
    with pytest.raises(UsageError, match=r"text\.seen=-1 must be a count"):
        world_lm.check(resolve_config("world_lm:tiny_talker", ["--config.text.seen=-1"]))
    with pytest.raises(UsageError, match=r"none is left to make up: raise title_words"):
        world_lm.make_texts(resolve_config("world_lm:tiny_conflict", ["--config.world.title_words=8"]))


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    config = resolve_config("world_lm:tiny")
    whole = models.load(world_lm.train(config, tmp_path / "whole"))

    class Stopped(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        step = world_lm.sft

        def half(settings, model_config, state, feed, steps, *rest):
            step(settings, model_config, state, feed, steps // 2, *rest)
            raise Stopped

        patch.setattr(world_lm, "sft", half)
        with pytest.raises(Stopped):
            world_lm.train(config, tmp_path / "half")
    parts = models.load(world_lm.train(config, tmp_path / "half"))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert dataclasses.asdict(parts.config) == dataclasses.asdict(whole.config)
