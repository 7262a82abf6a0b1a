"""Dense search beside numpy, on one device and on eight; builds that go on after a kill; what an index refuses."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrec.tools.search import Passage, PassageStore, build_store, read_passages
from jaxrec.tools.search import dense as module
from jaxrec.tools.search.dense import DenseSearch, Embedder, build_dense, encoder_embedder
from models.sharding import make_mesh
from models.text_features import TextFeatures

ENCODER = Path(__file__).resolve().parents[3] / "fixtures" / "encoder"


def embed(texts, dim=24):
    """A vector drawn from the bytes of a text."""
    seeds = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8]) for t in texts]
    return np.stack([np.random.default_rng(s).normal(size=dim) for s in seeds]).astype(np.float32)


TOY = Embedder("toy:1", embed)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> PassageStore:
    folder = tmp_path_factory.mktemp("store") / "store"
    # Every tenth text stands there three times, under ids far apart: exact ties.
    given = [Passage(str((i * 37) % 211), "", f"text {i % 70 if i % 10 == 0 else i}") for i in range(211)]
    return build_store(given, folder)


@pytest.fixture(scope="module")
def index(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    build_dense(store, folder, TOY, chunk=32)
    return folder


def reference(store, queries, k):
    """Ids by float64 inner products, ties by id."""
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    passages = list(store)
    scores = unit(embed(queries).astype(np.float64)) @ unit(embed([p.text for p in passages]).astype(np.float64)).T
    return [sorted(((-round(s, 12), p.id) for s, p in zip(row, passages)), key=lambda pair: pair)[:k] for row in scores]


@pytest.mark.parametrize("block", [7, 64, 65_536])
@pytest.mark.parametrize("devices", [1, 8])
def test_exact_search_is_numpys(store, index, monkeypatch, devices, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if devices == 8 else None
    search = DenseSearch(store, index, TOY, mesh=mesh)
    if mesh is not None:
        assert len(search._vectors.sharding.device_set) == 8
        assert search._vectors.addressable_shards[0].data.shape[0] * 8 == search._vectors.shape[0]
    queries = [f"question {i}" for i in range(5)] + ["text 10", "text 60"]
    for k in (1, 10, 211):
        for result, wanted in zip(search.search(queries, k), reference(store, queries, k)):
            assert [p.id for p in result.passages] == [id for _, id in wanted]
            np.testing.assert_allclose([p.score for p in result.passages], [-s for s, _ in wanted], atol=2e-6)
    top = search.search(["text 10"], 4)[0].passages
    assert [p.text for p in top[:3]] == ["text 10"] * 3
    assert [p.id for p in top[:3]] == sorted(p.id for p in top[:3])


def test_approximate_search_is_exact_on_cpus(store, index):
    exact, approximate = DenseSearch(store, index, TOY), DenseSearch(store, index, TOY, approximate=True)
    assert exact.id != approximate.id
    queries = [f"question {i}" for i in range(9)]
    found = [[round(p.score, 5) for p in r.passages] for r in approximate.search(queries, 20)]
    assert found == [[round(p.score, 5) for p in r.passages] for r in exact.search(queries, 20)]


def test_batches_of_a_bucket_share_a_program(store, index):
    search = DenseSearch(store, index, TOY)
    wanted = search.search([f"question {i}" for i in range(300)], 3)
    before = module._search._cache_size()
    assert search.search([f"question {i}" for i in range(8)], 3) == wanted[:8]
    for n in (5, 6, 7):
        search.search([f"question {i}" for i in range(n)], 3)
    assert module._search._cache_size() == before + 1
    empty, good = search.search(["", "question 0"], 3)
    assert empty.kind == "bad_query"
    assert [p.id for p in good.passages] == [p.id for p in wanted[0].passages]
    assert search.search([], 3) == []
    with pytest.raises(ValueError, match="k=212 is larger than the corpus"):
        search.search(["x"], 212)


def test_half_precision_files(store, tmp_path):
    build_dense(store, tmp_path, TOY, dtype="float16")
    assert np.load(tmp_path / "00000.npy").dtype == np.float16
    search = DenseSearch(store, tmp_path, TOY)
    wanted = reference(store, ["question 1"], 5)[0]
    np.testing.assert_allclose([p.score for p in search.search(["question 1"], 5)[0].passages],
                               [-s for s, _ in wanted], atol=2e-3)  # fmt: skip
    with pytest.raises(ValueError, match="dtype='int8'"):
        build_dense(store, tmp_path, TOY, dtype="int8")


def test_a_build_goes_on_where_it_stopped(store, index, tmp_path):
    calls = []

    def stopping(texts):
        calls.append(len(texts))
        if len(calls) == 5:  # one for the width, three chunks
            raise KeyboardInterrupt
        return embed(texts)

    with pytest.raises(KeyboardInterrupt):
        build_dense(store, tmp_path, Embedder("toy:1", stopping), chunk=32)
    assert calls == [1, 32, 32, 32, 32]
    with pytest.raises(FileNotFoundError, match=r"00003.npy is missing: the index is unfinished"):
        DenseSearch(store, tmp_path, TOY)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")}
    build_dense(store, tmp_path, Embedder("toy:1", stopping), chunk=32)
    assert calls[5:] == [32, 32, 32, 19]
    assert before.items() < {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")}.items()
    for path in index.glob("*.npy"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_killed_build_goes_on(store, index, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_dense import embed, build_dense, Embedder, PassageStore\n"
        "def slow(texts):\n    time.sleep(0.2 if len(texts) > 1 else 0)\n    return embed(texts)\n"
        f"build_dense(PassageStore({str(store.folder)!r}), {str(tmp_path)!r}, Embedder('toy:1', slow), chunk=32)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    end = time.monotonic() + 600
    while not (tmp_path / "00001.npy").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("*.npy"))) < 7
    build_dense(store, tmp_path, TOY, chunk=32)
    for path in index.glob("*.npy"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_an_index_knows_corpus_and_encoder(store, index, tmp_path):
    other = build_store([Passage("1", "", "x")], tmp_path / "other")
    for build in (True, False):
        make = (lambda s, e: build_dense(s, index, e, chunk=32)) if build else (lambda s, e: DenseSearch(s, index, e))
        with pytest.raises(ValueError, match="corpus"):
            make(other, TOY)
        with pytest.raises(ValueError, match=r"encoder.*toy:1.* not .*toy:2"):
            make(store, Embedder("toy:2", embed))
    with pytest.raises(ValueError, match="chunk 32, not 64"):
        build_dense(store, index, TOY, chunk=64)
    narrow = DenseSearch(store, index, Embedder("toy:1", lambda texts: embed(texts, 8)))
    with pytest.raises(ValueError, match="queries have 8 numbers, the index 24"):
        narrow.search(["x"], 1)
    folder = tmp_path / "damaged"
    build_dense(other, folder, TOY)
    np.save(folder / "00000.npy", np.zeros((2, 24), np.float32))
    with pytest.raises(ValueError, match="remove it"):
        DenseSearch(other, folder, TOY)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda texts: np.zeros((len(texts), 4)), "length 0.0 for 'text"),
        (lambda texts: np.full((len(texts), 4), np.nan), "length nan"),
        (lambda texts: np.ones((1, 4, 2)), r"shape \(1, 4, 2\)"),
        (lambda texts: np.ones((len(texts) + 1, 4)), "for 1 texts"),
    ],
)
def test_bad_vectors(store, tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        build_dense(store, tmp_path, Embedder("bad", made))


def test_instruction_goes_before_queries_only(store, tmp_path):
    seen = []
    spy = Embedder("toy:1", lambda texts: (seen.extend(texts), embed(texts))[1], instruction="Find: ")
    build_dense(store, tmp_path, spy)
    assert not any("Find" in text for text in seen)
    seen.clear()
    DenseSearch(store, tmp_path, spy).search(["x"], 1)
    assert seen == ["Find: x"]
    assert DenseSearch(store, tmp_path, spy).id != DenseSearch(store, tmp_path, TOY).id


def test_an_encoder_folder(tmp_path):
    store = build_store([Passage(str(i), "T", f"{word} text") for i, word in enumerate("abcd")], tmp_path / "store")
    embedder = encoder_embedder(ENCODER)
    build_dense(store, tmp_path / "index", embedder)
    search = DenseSearch(store, tmp_path / "index", encoder_embedder(ENCODER))
    top = search.search(["T c text"], 1)[0].passages[0]
    assert top.score == pytest.approx(1.0, abs=1e-5)
    stored = np.load(tmp_path / "index" / "00000.npy")
    np.testing.assert_allclose(stored, embedder.embed([f"T {word} text" for word in "abcd"]), atol=1e-6)
    assert encoder_embedder(ENCODER, max_length=8).id != embedder.id


@pytest.mark.real_data
def test_squad_questions_by_hashed_words(tmp_path, capsys):
    """All 10,570 questions of SQuAD over its 2,067 paragraphs, vectors without a neural encoder: the order is that of
    exact inner products, and recall is what overlap of words gives. It says nothing about a trained encoder."""
    file = Path(os.environ.get("JAXREC_SQUAD") or pytest.fail("set JAXREC_SQUAD to dev-v1.1.json (this test needs it)"))
    store = build_store(read_passages(file, "squad"), tmp_path / "store")
    texts = [f"{p.title} {p.text}" for p in store]
    features = TextFeatures.fit(texts, 1024)
    embedder = Embedder("hashed words, 1024", features.encode)
    build_dense(store, tmp_path / "dense", embedder)
    search = DenseSearch(store, tmp_path / "dense", embedder)
    asked = [
        (question["question"], f"{a}.{p}")
        for a, article in enumerate(json.loads(file.read_text(encoding="utf-8"))["data"])
        for p, paragraph in enumerate(article["paragraphs"])
        for question in paragraph["qas"]
    ]
    assert len(asked) == 10_570
    results = search.search([question for question, _ in asked], 20)
    exact = features.encode([q for q, _ in asked]).astype(np.float64) @ features.encode(texts).astype(np.float64).T
    ids = [p.id for p in store]
    for scores, result in zip(exact, results, strict=True):
        best = np.argsort(-scores)[:20]
        np.testing.assert_allclose([p.score for p in result.passages], scores[best], atol=2e-6)
        assert len({ids[row] for row in best} ^ {p.id for p in result.passages}) <= 2  # near ties at the cut
    found = [[p.id for p in r.passages] for r in results]
    recall = {k: np.mean([gold in ids[:k] for ids, (_, gold) in zip(found, asked)]) for k in (1, 5, 20)}
    with capsys.disabled():
        print(
            "\nhashed words on SQuAD dev, recall of the paragraph:", {k: round(float(r), 4) for k, r in recall.items()}
        )
    assert recall[1] > 0.55
    assert recall[5] > 0.75
    assert recall[20] > 0.87
