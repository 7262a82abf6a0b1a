"""KAPE as a recipe, at its smallest size: prompts, artefacts, resuming, the command line, and what is refused."""

import json

import numpy as np
import pytest

import analysis
from analysis.segments import SEGMENTS
from jaxrec import cli
from jaxrec.config import UsageError, resolve_config
from jaxrec.data import conflicts
from jaxrec.evaluate import kape as judging
from jaxrec.systems import kape, world_lm
from jaxrec.tools.world_model import arrays, rows_by_source
from tests.jaxrec.explored import choices, widgets_of

SPEC = "kape:tiny"
LAYERS, WIDTH = 2, 32


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kape")
    config = resolve_config(SPEC)
    return folder, config, kape.run(config, folder, kape.STAGES)


@pytest.fixture
def this(done):
    folder, config, _ = done
    return kape.Run(config, 0, folder)


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_conflicts_contradict_and_a_share_of_them_wins(this):
    texts = this.texts
    split = {name: {f.subject for f in texts.disputed(name)} for name in ("train", "test")}
    assert not split["train"] & split["test"]
    assert all(f.internal for f in texts.disputed("train"))
    for share in (0.0, 0.5, 1.0):
        samples = texts.conflicts("train", rng(), 300, share)
        assert samples == texts.conflicts("train", rng(), 300, share)
        won = 0
        for s in samples:
            text, question = s.prompt.split("\nQuestion: ")
            said = any(words[s.answer.strip()] in text for words in texts.dialects)
            known = [f for f in texts.known if f.question(0) in question or f.question(1) in question]
            won += said and all(f.object != s.answer.strip() for f in known)
        assert abs(won / 300 - share) < 0.1
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        texts.conflicts("train", rng(), 1, 2)


def test_without_conflicts_a_world_has_the_text_it_had(this):
    from jaxrec.tools.world_model import training_rows

    make = lambda **more: training_rows(this.texts, this.model.tokenizer, 20, 10, 128, 0, **more)["tokens"]  # noqa: E731
    np.testing.assert_array_equal(make(), make(conflicts=0))
    assert make(conflicts=50).size > make().size
    assert make(unhelpful=50).size > make().size
    assert "conflicts" not in resolve_config("world_lm:dense").text
    off, on = (resolve_config(f"world_lm:{name}").to_dict() for name in ("no_conflict", "conflict"))
    assert (off["text"].pop("conflicts"), on["text"].pop("conflicts")) == (0, 8000)
    assert off == {**on, "variant": "no_conflict"}


def test_each_kind_of_text_has_its_units(this):
    more = {"conflicts": 30, "conflict_share": 0.4, "unhelpful": 20, "repeats": 10, "prompt_weight": 0.05}
    tokenizer, domains = this.model.tokenizer, ("facts", "reading", "sums", "catalogue")
    rows = rows_by_source(this.texts, tokenizer, 20, 10, 160, 0, domains, 3, 8, **more)
    assert len(rows["tokens"]) == len(rows["unit_away"])
    found = {}
    for tokens, away in zip(rows["tokens"], rows["unit_away"], strict=True):
        found.setdefault("".join("x" if unit else "." for unit in away), []).append(tokenizer.decode(tokens))
    assert set(found) == {"...xxxxx", "xxx...xx", "xxxxxx..", "......xx"}
    for silent, texts in found.items():
        read = [text for text in texts if "Passage:" in text]
        summed = [text for text in texts if " plus " in text or " minus " in text]
        assert bool(read) == (silent in ("xxx...xx", "......xx"))
        assert bool(summed) == (silent == "xxxxxx..")
    with pytest.raises(UsageError, match=r"train\.source_units=17: two sets of so many must fit model\.ffn_dim=32"):
        world_lm.check(resolve_config("world_lm:tiny_conflict", ["--config.train.source_units=17"]))


@pytest.mark.parametrize("answers", [True, False])
def test_parts_share_no_subject_and_if_asked_no_answer(this, answers):
    found = conflicts.parts(this.texts, answers)
    trained = {f.subject for f in this.texts.disputed("train")}
    subjects = [{f.subject for f in part.facts} for part in found.values()]
    said = [
        {(f.relation, o) for f, w in zip(p.facts, p.wrong, strict=True) for o in (f.object, *w)} for p in found.values()
    ]
    assert not subjects[0] & subjects[1]
    assert not trained & (subjects[0] | subjects[1])
    assert bool(said[0] & said[1]) != answers
    assert all(f.object not in w for p in found.values() for f, w in zip(p.facts, p.wrong, strict=True))


def test_prompts_and_their_segments(this):
    tokenizer, items = this.model.tokenizer, this.items()["judge"]
    for kind in conflicts.KINDS:
        prompts = conflicts.encode_prompts(tokenizer, items, kind)
        assert prompts.tokens.shape == prompts.labels.shape == (len(items), 32 * (prompts.tokens.shape[1] // 32))
        for item, tokens, labels, cue, target in zip(
            items, prompts.tokens, prompts.labels, prompts.cues, prompts.targets, strict=True
        ):
            said = {name: tokenizer.decode(tokens[labels == n]) for n, name in enumerate(SEGMENTS)}
            assert said["key"].strip() == {"golden": item.told, "fake": item.told_fake}.get(kind, "")
            assert said["query"] == ("" if kind == "closed" else "\n") + f"Question: {item.question}"
            assert said["answer"] == "\nAnswer:"
            assert SEGMENTS[labels[cue[0]]] == "answer"
            assert [tokenizer.decode([t]).strip() for t in target[0]] == [item.object, item.fake]
            assert (kind == "closed") == (said["context"] == "")
            assert item.told_fake not in said["context"] or kind != "fake"
            assert not {item.object, item.fake} & set((said["context"] + said["key"]).split())


def test_counted_tokens(this):
    rows = arrays(this.model.tokenizer, [item.sample("fake") for item in this.items()["find"][:8]])
    lengths, answers = rows["lengths"], rows["mask"].sum(axis=1)
    assert (conflicts.counted_tokens(rows, "cue").sum(axis=1) == 1).all()
    np.testing.assert_array_equal(conflicts.counted_tokens(rows, "answer").sum(axis=1), answers)
    np.testing.assert_array_equal(conflicts.counted_tokens(rows, "all").sum(axis=1), lengths - 1)
    decoded = [this.model.tokenizer.decode(t[c]) for t, c in zip(rows["tokens"], conflicts.counted_tokens(rows, "cue"))]
    assert set(decoded) == {"\nAnswer:"}


def test_every_stage_leaves_what_it_says(done):
    folder, config, result = done
    with np.load(folder / "firings.npz") as stored:
        for name in ("internal", "external"):
            assert stored[name].shape == (LAYERS, WIDTH)
            assert 16 <= stored[name].max() <= stored[f"{name}_tokens"]
        assert stored["internal_prompts"] + stored["external_prompts"] == 64
    file = analysis.read_neurons(folder / "neurons.json")
    assert file.conditions == "conflict"
    assert not (file.internal & file.external).any()
    found = json.loads((folder / "interventions.json").read_text())
    several = {f"{kind}_{name}" for kind in ("random", "difference") for name in ("internal", "external")}
    assert set(found) == {"none", "internal", "external"} | several
    assert len(found["random_internal"]) == 10
    assert all(len(found[name]["sources"]) == 32 for name in ("none", "internal", "external"))
    with np.load(folder / "flows.npz") as stored:
        assert stored["saliency_fake_mean"].shape == (LAYERS, 4, 4)
        assert stored["attention_golden_samples"][1, 3] == 16
        assert stored["knock_out_answer"].shape == (LAYERS, 2)
    with np.load(folder / "contributions.npz") as stored:
        assert {f"{k}_{n}" for k in ("golden", "irrelevant", "fake") for n in ("attn", "mlp")} <= set(stored)
        assert all(stored[name].shape == (LAYERS, 2) for name in stored)
    assert result["protocol"]["method"] == "KAPE (our reading)"
    assert [row["name"] for row in result["rows"]][:2] == ["no intervention", "internal neurons off"]
    assert all(
        abs(row["internal_rate"] + row["external_rate"] + row["other_rate"] - 1) < 1e-9 for row in result["rows"]
    )
    assert len(result["comparisons"]) == 6
    kinds = [figure["kind"] for figure in json.loads((folder / "figures.json").read_text())]
    assert kinds == ["heatmap", "lines", "lines", "lines", "lines"]


def test_run_again_computes_nothing_new_and_gives_the_same(done):
    folder, config, result = done
    names = ("items.json", "firings.npz", "neurons.json", "interventions.json", "flows.npz", "contributions.npz")
    before = [(folder / name).stat().st_mtime_ns for name in names]
    assert kape.run(config, folder, kape.STAGES) == result
    assert [(folder / name).stat().st_mtime_ns for name in names] == before


def test_other_readings_run_too(done, tmp_path):
    overrides = [
        "data.conditions=open_closed", "data.counted=all", "identify.firing=z>0", "identify.assign=bar",
        "intervene.value=mean", "intervene.positions=answer",
    ]  # fmt: skip
    config = resolve_config(SPEC, [f"--config.{word}" for word in overrides])
    kape.run(config, tmp_path, ["collect", "identify", "intervene"])
    file = analysis.read_neurons(tmp_path / "neurons.json")
    assert (file.conditions, file.selection.firing) == ("open_closed", "z>0")
    with np.load(tmp_path / "firings.npz") as stored:
        assert stored["internal_tokens"] != stored["external_tokens"]


def test_another_rule_takes_the_largest_differences():
    p = np.array([[[0.9, 0.5, 0.2]], [[0.8, 0.1, 0.3]]])
    assert kape.most_different(p, 1).tolist() == [[False, True, False]]
    assert kape.most_different(p[::-1], 1).tolist() == [[False, False, True]]


def result_of(rates, random, neutral=1.0):
    """A seed with 40 facts of two prompts each. rates: share of the external answer by set."""

    def found(external, neutral=1.0):
        said = (np.arange(80) < round(80 * external)).astype(int)
        return {"sources": said, "margin": [0.0], "known": 1.0, "reading": 1.0, "neutral": neutral}

    sets = {name: found(rate, neutral if name == "internal" else 1.0) for name, rate in rates.items()}
    sets |= {f"difference_{of}": sets[of] for of in ("internal", "external")}
    sets |= {f"random_{of}": [found(rate) for rate in random] for of in ("internal", "external")}
    return judging.SeedResult(sets, np.arange(80) // 2, [], {})


def test_criteria_compare_with_the_strongest_random_set(tmp_path):
    config = resolve_config(SPEC)
    clear = result_of({"none": 0.5, "internal": 0.9, "external": 0.1}, [0.45, 0.5, 0.6, 0.4])
    assert [c["met"] for c in judging.pool(config, [clear, clear], tmp_path)["comparisons"]] == [True] * 6
    assert clear.strongest("internal", "external") is clear.interventions["random_internal"][2]
    random = result_of({"none": 0.5, "internal": 0.7, "external": 0.1}, [0.5, 0.75], neutral=1.2)
    met = {(c["name"], c["metric"]): c["met"] for c in judging.pool(config, [random], tmp_path)["comparisons"]}
    assert met["internal neurons off - no intervention", "external rate"]
    assert not met["internal neurons off - the most effective random set", "external rate"]
    assert not met["internal neurons off - no intervention", "neutral loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.conditions=both", r"data\.conditions='both' must be one of conflict, open_closed"),
        ("data.counted=none", r"data\.counted='none' must be one of answer, cue, all"),
        ("identify.rate=2.0", r"identify: rate is a share of all neurons in \(0, 1\], not 2"),
        ("identify.filter_quantile=1.0", "filter_quantile must lie between 0 and 1"),
        ("intervene.draws=2", r"intervene\.draws=2 must be at least 5"),
        ("intervene.neutral_domains=('poems',)", "no 'poems'"),
        ("intervene.neutral_domains=()", "must name at least one domain"),
        ("data.judge=0", r"data\.judge=0 must be at least 1"),
        ("report.window=5", r"report\.window=5 must lie in 1 \.\. 2, the layers"),
        ("model.base=world_lm:tiny_moe", "has experts"),
        ("model.base=easy_ep:tiny", "a base model is made by world_lm"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(override, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        kape.run(resolve_config(SPEC, [f"--config.{override}"]), tmp_path, kape.STAGES)
    assert not list(tmp_path.iterdir())


def test_stages_in_the_wrong_order_and_too_little_to_find(done, tmp_path):
    _, config, _ = done
    for stage, needs in (("identify", "collect"), ("intervene", "identify"), ("report", "intervene")):
        with pytest.raises(UsageError, match=f"run --stages={needs} first"):
            kape.run(config, tmp_path, [stage])
    known = resolve_config(SPEC, ["--config.data.known=True", "--config.data.answers=exact"])
    with pytest.raises(ValueError, match="the model knows none of the"):
        kape.run(known, tmp_path, ["collect"])
    many = resolve_config(SPEC, ["--config.identify.min_tokens=1000"])
    kape.run(many, tmp_path, ["collect"])
    with pytest.raises(ValueError, match="each needs 1000"):
        kape.run(many, tmp_path, ["identify"])
    one = resolve_config(SPEC, ["--config.identify.rate=0.01"])
    with pytest.raises(ValueError, match="something to switch off"):
        kape.run(one, tmp_path, ["identify"])
    with pytest.raises(UsageError, match=r"text\.conflict_share=2.0 lie between 0 and 1"):
        world_lm.check(resolve_config("world_lm:tiny_conflict", ["--config.text.conflict_share=2.0"]))
    with pytest.raises(UsageError, match=r"text\.unhelpful=-1 must be a count"):
        world_lm.check(resolve_config("world_lm:tiny_conflict", ["--config.text.unhelpful=-1"]))
    flags = ["--config.model.experts=4", "--config.model.top_k=2", "--config.train.mlp_sparsity=0.5"]
    with pytest.raises(UsageError, match=r"train\.mlp_sparsity=0.5 is for models without experts"):
        world_lm.check(resolve_config("world_lm:tiny_conflict", flags))
    with pytest.raises(UsageError, match=r"world: 9 dialects: must lie between 0 and 6"):
        world_lm.make_texts(resolve_config("world_lm:tiny_conflict", ["--config.world.dialects=9"]))


def test_the_command_line_and_the_report(done, tmp_path, capsys):
    assert cli.main(["run", "--config=kape:tiny", f"--workdir={tmp_path}/run"]) == 0
    shown = capsys.readouterr().out
    assert "KAPE (our reading)" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Saliency from key; stages at" in page
    assert page.count("<img") >= 5
    spread, table, streams = widgets_of(page)
    file = analysis.read_neurons(tmp_path / "run" / "neurons.json")
    with np.load(tmp_path / "run" / "entropy.npz") as stored:
        p, entropy = stored["p"], stored["entropy"]
    columns = {column["name"]: column["values"] for column in table["columns"]}
    assert sorted(zip(columns["layer"], columns["unit"])) == [(x, y) for x in range(LAYERS) for y in range(WIDTH)]
    at = columns["layer"], columns["unit"]
    np.testing.assert_allclose(columns["p internal"], p[0][at], rtol=1e-4)
    np.testing.assert_allclose(columns["p external"], p[1][at], rtol=1e-4)
    shown = np.array([np.inf if value is None else value for value in columns["entropy"]])
    np.testing.assert_allclose(shown, entropy[at], rtol=1e-4)
    for name in ("internal", "external"):
        chosen = getattr(file, name)
        np.testing.assert_array_equal(np.array(columns["set"]) == name, chosen[at])
        assert (np.array(columns["set"])[: chosen.sum()] != "filtered out").all()
        grid = np.array(spread["grids"][spread["views"][choices(spread).index((name,))]["grid"]])
        np.testing.assert_array_equal(grid.sum(axis=1), chosen.sum(axis=1))
    begins = json.loads((tmp_path / "run" / "result.json").read_text())["analysis"][0]["stages"]
    with np.load(tmp_path / "run" / "flows.npz") as stored:
        assert len(streams["views"]) == 8
        for (measure, passage, quantity), view in zip(choices(streams), streams["views"]):
            flow = stored[f"{measure}_{passage}_{'mean' if quantity.startswith('mean') else 'mass'}"]
            for series in view["series"]:
                source, target = (SEGMENTS.index(name) for name in series["name"].split(" to "))
                np.testing.assert_allclose(series["values"], flow[:, source, target], rtol=1e-4)
            if quantity.startswith("mean"):
                wanted = {start for start in begins[f"{measure}_{passage}"].values() if start is not None}
                assert {band["start"] for band in view["bands"]} == wanted | {0}
