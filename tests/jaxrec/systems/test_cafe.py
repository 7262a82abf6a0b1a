"""CAFE as a recipe, at its smallest size: artefacts, resuming, the command line, files, and what is refused."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from analysis.heads import load_head_set
from jaxrec import cli
from jaxrec.config import UsageError, resolve_config
from jaxrec.evaluate.cafe import METHODS, best_last, bm25
from jaxrec.systems import cafe, world_lm
from jaxrec.systems.cafe_reader import answer, batches, make_prompts
from models import sample
from models.generation import generate_tokens
from models.tokenizer import FastTokenizer
from tests.jaxrec.explored import choices, widgets_of

SPEC = "cafe:tiny"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cafe")
    config = resolve_config(SPEC)
    return folder, config, cafe.run(config, folder, cafe.STAGES)


@pytest.fixture(scope="module")
def this(done):
    folder, config, _ = done
    return cafe.Run(config, 0, folder, None)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_leaves_what_it_says(done, this):
    folder, config, result = done
    shape = this.model.config.layers, this.model.config.heads
    for stage, k in (("coarse", config.detect.coarse_heads), ("fine", config.detect.fine_heads)):
        heads = load_head_set(folder / "heads" / f"{stage}.json", this.name, this.model.config)
        assert (len(heads.heads), heads.stage, heads.aggregation) == (k, stage, "mass")
        assert all(sample.startswith(stage) for sample in heads.validation)
        with np.load(folder / "heads" / f"{stage}.npz") as stored:
            assert stored["eta"].shape == shape
            assert np.isclose(stored["eta"][stored["layers"]].max(), heads.values[0] / heads.samples)
            assert stored["layers"].tolist() == [1]  # the first layer sees six tokens
    with np.load(folder / "filter" / "alpha.npz") as stored:
        assert stored["alpha"].shape[:3] == (10, *shape)
    kept = read(folder / "filter" / "documents.jsonl")
    records = read(folder / "questions.jsonl")
    m = config.filter.per_head
    for line, record in zip(kept, records, strict=True):
        assert m <= len(line["order"]) <= m * config.detect.coarse_heads
        assert line["gamma"] == sorted(line["gamma"])
        own = record["methods"]["cafe"]
        assert own["order"] == line["order"] == record["methods"]["stage1"]["order"]
        assert set(own["candidates"]) <= set(line["order"])
        assert 1 <= len(own["candidates"]) <= config.steer.per_head * config.detect.fine_heads
        assert record["methods"]["oracle"]["order"] == record["gold"]
        assert record["methods"]["last"]["order"] == list(range(6 - len(line["order"]), 6))
        assert sorted(record["methods"]["random_order"]["order"]) == sorted(line["order"])
        assert set(record["kinds"]) >= {"gold", "same"}
    names = [row["name"] for row in result["rows"]]
    assert names == [METHODS[m] for m in METHODS if m in config.evaluate.methods]
    rows = {row["name"]: row for row in result["rows"]}
    assert rows[METHODS["direct"]]["gold_recall"] == rows[METHODS["oracle"]]["gold_recall"] == 1.0
    recall = np.mean([line["gold_recall"] for line in kept])
    assert np.isclose(rows[METHODS["cafe"]]["gold_recall"], recall)
    assert sum("criterion" in entry for entry in result["comparisons"]) == 10
    figures = json.loads((folder / "figures.json").read_text())
    assert [figure["kind"] for figure in figures] == ["heatmap"] * 3 + ["lines"]
    assert np.shape(figures[0]["values"]) == shape


def test_run_again_computes_nothing_new_and_gives_the_same(done):
    folder, config, result = done
    paths = [p for part in ("heads", "filter", "answers") for p in (folder / part).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in paths}
    (folder / "answers" / "bm25.jsonl").unlink()
    again = cafe.run(config, folder, cafe.STAGES)
    assert again == result
    changed = {path.name for path in paths if path.stat().st_mtime_ns != before[path]}
    assert changed == {"bm25.jsonl"}


def test_prompts_are_the_readers_own_text_in_any_order(this):
    question = this.questions["test"][0]
    order = [4, 0, 2]
    (prompt,) = make_prompts(this, [question], [order])
    passages = "".join(f"Passage: {question.documents[i].text}\n" for i in order)
    text = f"{passages}Question: {question.question}"
    tokenizer = this.model.tokenizer
    assert prompt.tokens.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(prompt.tokens[slice(*prompt.question)]) == f" {question.question}"
    assert question.documents[0].text in tokenizer.decode(prompt.tokens[slice(*prompt.documents[1])])


def test_answers_without_steering_are_those_of_plain_generation_and_compile_nothing_anew(this):
    questions = this.questions["test"]
    whole = [range(len(q.documents)) for q in questions]
    prompts = make_prompts(this, questions, whole)
    texts, places = answer(this, prompts)
    assert places == [()] * len(prompts)
    model = this.model
    out = generate_tokens(
        model.params, model.config, [p.tokens.tolist() for p in prompts], this.config.evaluate.max_new
    )
    for text, tokens, count in zip(texts, out.tokens, out.counts, strict=True):
        ids = [i for i in tokens[:count].tolist() if i not in model.config.eos_ids]
        full = model.tokenizer.decode(ids)
        assert text == full.partition("\n")[0].strip()
    fine = this.heads("fine").heads
    answer(this, prompts, fine)
    programs = sample._prefill, sample._extend, sample._decode
    sizes = [program._cache_size() for program in programs]
    answer(this, prompts[::-1], fine)
    answer(this, prompts[::-1])
    assert answer(this, prompts, hidden=[()] * len(prompts)) == (texts, places)
    answer(this, prompts, hidden=[q.gold for q in questions])
    assert [program._cache_size() for program in programs] == sizes


def test_questions_of_the_world_have_distractors_of_every_kind(this):
    texts = world_lm.make_texts(world_lm.base_config("world_lm:tiny_reader", 0))
    rng = np.random.Generator(np.random.PCG64(0))
    for split in ("train", "test"):
        seen = dict.fromkeys(("gold", "same", "similar", "other"), 0)
        for _ in range(20):
            found = texts.reading(split, rng, 8, 3, 2)
            (gold,) = found.gold
            assert len(found.passages) == len(found.kinds) == 8
            subject = next(s for s in texts.names[split] if f" {s}" in found.question)
            for i, (text, kind) in enumerate(zip(found.passages, found.kinds)):
                seen[kind] += 1
                assert (i == gold) == (kind == "gold")
                assert (subject in text) == (kind in ("gold", "same"))
                assert (found.answer in text.replace(subject, "")) or kind != "gold"
        assert (seen["gold"], seen["same"]) == (20, 60)
        assert split == "test" or seen["similar"] > 0  # no two names of the smallest world's test split share a word
        assert seen["other"] == 160 - 80 - seen["similar"]
    assert not set(texts.names["train"]) & set(texts.world.titles)
    sample = texts.sample("reading", "test", rng, 1)[0]
    assert sample.prompt.endswith("?")
    assert "Question" not in sample.answer


def test_batches_hold_every_prompt_in_few_shapes():
    class Long:
        def __init__(self, n):
            self.tokens = np.zeros(n)

    lengths = [5, 8, 9, 16, 17, 6, 7, 8]
    found = list(batches([Long(n) for n in lengths], 3))
    assert sorted({i for part, _ in found for i in part}) == list(range(8))
    assert all(len(part) == 3 for part, _ in found)
    assert [width for _, width in found] == [8, 8, 16, 32]
    assert all(lengths[i] <= width < 2 * lengths[i] for part, width in found for i in part)


def test_bm25_by_hand_and_ties():
    scores = bm25("red fox", ["a red red house", "the fox", "nothing here"], k1=1.2, b=0.75)
    weight = np.log1p(2.5 / 1.5)  # either word stands in one of three documents
    long, short = (1.2 * (0.25 + 0.75 * n / (8 / 3)) for n in (4, 2))
    np.testing.assert_allclose(scores, [weight * 2 * 2.2 / (2 + long), weight * 2.2 / (1 + short), 0.0])
    assert best_last(scores, 2) == (1, 0)
    assert best_last(np.array([1.0, 2.0, 1.0, 1.0]), 3) == (0, 2, 1)


def test_files_as_questions_with_two_gold_documents(done, tmp_path):
    base = world_lm.cached("world_lm:tiny_reader", 0)
    rows = [
        {
            "question": f"who has {i}", "answers": [f"{i}"], "gold": [1, 3], "id": f"q{i}",
            "documents": [{"title": f"{d}", "text": f"{d} has {i + d}"} for d in range(4)],
        }
        for i in range(16)
    ]  # fmt: skip
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"--config.model.path={base}", f"--config.data.path={tmp_path}/set.jsonl", "--config.data.format=jsonl",
        "--config.detect.samples=4", "--config.detect.coarse_heads=2", "--config.detect.fine_heads=1",
        "--config.filter.per_head=2", "--config.steer.per_head=1", "--config.evaluate.samples=8",
        "--config.evaluate.batch_size=4", "--config.evaluate.max_new=4", "--config.steer.rows=include_generated",
        "--config.evaluate.methods=('direct','stage1','cafe')", "--config.prompt.system=",
    ]  # fmt: skip
    config = resolve_config("cafe:files", overrides)
    result = cafe.run(config, tmp_path / "run", cafe.STAGES)
    assert (result["protocol"]["samples"], result["protocol"]["documents"]) == (8, 4.0)
    records = read(tmp_path / "run" / "questions.jsonl")
    used = {q["id"] for q in records}
    for stage in ("coarse", "fine"):
        chose = set(json.loads((tmp_path / "run" / "heads" / f"{stage}.json").read_text())["validation"])
        assert not chose & used
        used |= chose
    again = resolve_config("cafe:files", [*overrides, "--config.evaluate.samples=12"])
    with pytest.raises(ValueError, match=r"set\.jsonl: 16 questions, 20 were asked for"):
        cafe.run(again, tmp_path / "more", cafe.STAGES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=web", r"data\.source='web' must be one of world, files"),
        ("data.format=csv", r"data\.format='csv' must be one of squad, hotpot, jsonl"),
        ("detect.aggregation=max", r"detect\.aggregation='max' must be one of mass"),
        ("filter.order=best", r"filter\.order='best' must be one of ascending"),
        ("steer.scaling=double", r"steer\.scaling='double' must be one of bias_after_scale"),
        ("steer.rows=all", r"steer\.rows='all' must be one of question_and_tail"),
        ("steer.delta=-1.0", r"steer\.delta=-1\.0 must be finite and at least 0"),
        ("steer.delta=inf", r"steer\.delta=inf must be finite"),
        ("filter.per_head=0", r"filter\.per_head=0 must be at least 1"),
        ("detect.coarse_heads=0", r"detect\.coarse_heads=0 must be at least 1"),
        ("evaluate.methods=('rag',)", "no 'rag'; known: direct"),
        ("data.path=x.json", r"data\.path goes with data\.source=files"),
        ("data.source=files --config.data.path=x.json", r"data\.source=files needs model\.path"),
        ("model.path=here", r"model\.path goes with data\.source=files"),
        ("prompt.document={body}", "document knows {title}, {text}"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(override, message, tmp_path):
    overrides = [f"--config.{part}" for part in override.split(" --config.")]
    with pytest.raises(UsageError, match=message):
        cafe.run(resolve_config(SPEC, overrides), tmp_path, cafe.STAGES)
    assert not list(tmp_path.iterdir())


def test_what_only_the_model_can_tell(done, tmp_path):
    with pytest.raises(UsageError, match=r"detect\.coarse_heads=5: the model has 4 heads"):
        cafe.run(resolve_config(SPEC, ["--config.detect.coarse_heads=5"]), tmp_path, ["detect"])
    long = resolve_config(SPEC, ["--config.evaluate.max_new=4090"])
    with pytest.raises(ValueError, match=r"question 'coarse-0': a prompt of \d+ tokens and an answer of 4090 does not"):
        cafe.run(long, tmp_path / "long", ["detect"])
    many = resolve_config(SPEC, ["--config.data.documents=60"])
    with pytest.raises(ValueError, match="60 passages: must lie between 1 and the"):
        cafe.run(many, tmp_path / "many", ["detect"])


def test_stages_in_the_wrong_order_and_heads_of_another_model(done, tmp_path):
    folder, config, _ = done
    for stage, needs in (("filter", "detect"), ("steer", "filter"), ("evaluate", "filter")):
        with pytest.raises(UsageError, match=f"run --stages={needs} first"):
            cafe.run(config, tmp_path, [stage])
    cafe.run(config, tmp_path, ["detect", "filter"])
    with pytest.raises(UsageError, match="run --stages=steer first"):
        cafe.run(config, tmp_path, ["evaluate"])
    path = tmp_path / "heads" / "coarse.json"
    path.write_text(path.read_text().replace('"model": "', '"model": "other-'))
    with pytest.raises(ValueError, match=r"coarse\.json: model is 'other-"):
        cafe.run(config, tmp_path, ["detect"])


def test_the_command_line_and_the_report(done, tmp_path, capsys):
    assert cli.main(["run", "--config=cafe:tiny", f"--workdir={tmp_path}/run"]) == 0
    shown = capsys.readouterr().out
    assert "gold documents only" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Retrieval heads, stage 1" in page
    assert "SubEM by place of the gold document" in page
    assert page.count("<img") >= 4
    assert isinstance(models.load(world_lm.cached("world_lm:tiny_reader", 0)), models.Model)
    check_explored(page, tmp_path / "run")


def check_explored(page, folder):
    """The page embeds what the stages wrote."""
    shown, heads = widgets_of(page)
    kept, records = read(folder / "filter" / "documents.jsonl"), read(folder / "questions.jsonl")
    assert len(shown["records"]) == len(records) == 10
    for found, line, record in zip(shown["records"], kept, records, strict=True):
        assert found["title"] == record["question"]
        assert found["numbers"] == list(range(6))
        assert found["labels"] == record["kinds"]
        assert found["marks"] == [record["gold"], line["order"], record["methods"]["cafe"]["candidates"]]
        np.testing.assert_allclose(np.array(found["scores"][0])[line["order"]], line["gamma"], rtol=1e-4)
        np.testing.assert_allclose(np.sum(found["scores"][1:], axis=0), found["scores"][0], rtol=1e-3, atol=1e-4)
        said = dict(zip(shown["outcomes"], found["outcomes"]))
        for method, judged in record["methods"].items():
            assert said[METHODS[method]] == [judged["sub_em"] == 1.0, judged["prediction"]]
        assert said["what stage 1 keeps"][0] == (line["gold_recall"] == 1.0)
    for (stage,), view, name in zip(choices(heads), heads["views"], ("coarse", "fine"), strict=True):
        chosen = json.loads((folder / "heads" / f"{name}.json").read_text())["heads"]
        marked = [[layer, head] for layer, row in enumerate(view["marks"]) for head, m in enumerate(row) if m == "1"]
        assert marked == sorted(chosen)
        with np.load(folder / "heads" / f"{name}.npz") as stored:
            np.testing.assert_allclose(heads["grids"][view["grid"]], stored["eta"], rtol=1e-4)
        assert stage == {"coarse": "1", "fine": "2"}[name]


@pytest.mark.real_data
def test_squad_passages_through_the_whole_pipeline(tmp_path):
    """Twelve real passages a prompt, with a small untrained model: spans, batches and scores, not answers."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    file = os.environ.get("JAXREC_SQUAD")
    if not file:
        pytest.fail("set JAXREC_SQUAD to SQuAD's dev-v1.1.json (this test needs it)")
    data = json.loads(Path(file).read_text(encoding="utf-8"))["data"]
    backend = Tokenizer(kinds.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator((p["context"] for article in data for p in article["paragraphs"]), trainer)
    tokenizer = FastTokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    shape = models.Config(
        family="qwen3", vocab_size=tokenizer.vocab_size, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
        qk_norm=True, tie_embeddings=True, eos_ids=tuple(tokenizer.eos_ids), max_len=8192,
    )  # fmt: skip
    models.save(models.Model(shape, models.init(shape, jax.random.key(0)), tokenizer), tmp_path / "model")
    overrides = [
        f"--config.model.path={tmp_path}/model", f"--config.data.path={file}", "--config.data.documents=12",
        "--config.detect.samples=8", "--config.filter.per_head=2", "--config.evaluate.samples=8",
        "--config.evaluate.batch_size=2", "--config.evaluate.max_new=8", "--config.evaluate.random_draws=1",
    ]  # fmt: skip
    config = resolve_config("cafe:files", overrides)
    result = cafe.run(config, tmp_path / "run", cafe.STAGES)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows[METHODS["direct"]]["gold_recall"] == rows[METHODS["oracle"]]["gold_recall"] == 1.0
    assert rows[METHODS["bm25"]]["gold_recall"] > 0.8  # real questions share words with their passages
    this = cafe.Run(config, 0, tmp_path / "run", None)
    question = this.questions["test"][0]
    (prompt,) = make_prompts(this, [question], [range(12)])
    assert len(prompt.tokens) > 1000
    for document, span in zip(question.documents, prompt.documents, strict=True):
        assert document.text in tokenizer.decode(prompt.tokens[slice(*span)])
