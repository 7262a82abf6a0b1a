"""BM25 beside the formula written out here, ties, what an index refuses, and real questions."""

import json
import math
import os
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxrec.data.qa import read_questions
from jaxrec.tools.search import Passage, PassageStore, build_store, read_passages
from jaxrec.tools.search.bm25 import BM25Search, BM25Settings, build_bm25, tokenizer

PLAIN = BM25Settings(stemmer="", stopwords="", titles=False)


def formula(texts: list[str], query: str, k1: float, b: float) -> np.ndarray:
    """float64 scores: the formula of the module, a word of the query at a time."""
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in re.findall(r"\w+", query.lower()):
        n = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        for i, document in enumerate(documents):
            tf = Counter(document)[word]
            scores[i] += tf and idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / average))
    return scores


def store_of(texts, folder) -> PassageStore:
    # Ids run against the order of the rows, and "10" stands before "9".
    return build_store([Passage(str(len(texts) - i), f"t{i}", text) for i, text in enumerate(texts)], folder)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)] + ["Größe", "naïve", "日本", "x"]
    weights = 1 / np.arange(1, len(words) + 1)
    made = [" ".join(rng.choice(words, rng.integers(1, 30), p=weights / weights.sum())) for _ in range(300)]
    return made + made[:40]  # equal passages tie


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 1.0)])
def test_scores_and_order_are_the_formulas(texts, tmp_path, k1, b):
    store = store_of(texts, tmp_path / "store")
    search = build_bm25(store, tmp_path / "bm25", BM25Settings(k1, b, "", "", titles=False))
    queries = ["w0 w3", "w39", "größe NAÏVE x", "w1 w1 w2", "日本 w0 unknown", "unknown"]
    references = [formula(texts, query, k1, b) for query in queries]
    for k in (1, 7, 340):
        for wanted, result in zip(references, search.search(queries, k), strict=True):
            # Equal passages have equal scores in the reference too; rounding keeps it from splitting them.
            keys = sorted((-round(s, 9), store[i].id) for i, s in enumerate(wanted) if s > 0)[:k]
            assert [p.id for p in result.passages] == [id for _, id in keys]
            np.testing.assert_allclose([p.score for p in result.passages], [-s for s, _ in keys], rtol=2e-6)
    assert result.passages == ()  # searched, nothing found


def test_ties_at_the_cut_are_broken_by_id(tmp_path):
    texts = ["b"] * 5 + ["a"] * 30 + ["a a"] * 2
    search = build_bm25(store_of(texts, tmp_path / "s"), tmp_path / "i", PLAIN)
    tied = sorted(str(37 - i) for i in range(5, 35))
    best = [p.id for p in search.search(["a"], 37)[0].passages]
    assert set(best[:2]) == {"1", "2"}
    assert best[2:] == tied
    for k in range(1, 33):  # whatever is asked for is the head of the same list
        assert [p.id for p in search.search(["a"], k)[0].passages] == best[:k]
    one, two = search.search(["b a", "a b"], 5)
    assert one == two
    assert search.search(["a"] * 3 + ["b"], 4) == [search.search([q], 4)[0] for q in "aaab"]  # no query leaves traces


def test_words(tmp_path):
    given = [Passage("1", "Running", "the dogs"), Passage("2", "Other", "a cat of the house")]
    store = build_store(given, tmp_path / "s")
    search = build_bm25(store, tmp_path / "i")
    found = [[p.id for p in r.passages] for r in search.search(["RUN", "dog", "houses", "the of"], 2)]
    assert found == [["1"], ["1"], ["2"], []]
    assert search.store[0] == given[0]
    for settings, message in (
        ({"stemmer": "klingon"}, "no stemmer 'klingon'"),
        ({"stopwords": "klingon"}, "no list of stop words"),
        ({"b": 1.5}, "b=1.5"),
        ({"k1": -1}, "k1=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            build_bm25(store, tmp_path / "j", BM25Settings(**settings))
    assert not (tmp_path / "j").exists()


def test_bad_requests(tmp_path):
    search = build_bm25(store_of(["a b", "b c"], tmp_path / "s"), tmp_path / "i", PLAIN)
    with pytest.raises(ValueError, match="k=3 is larger than the corpus"):
        search.search(["a"], 3)
    with pytest.raises(TypeError, match="one string"):
        search.search("a", 1)
    empty, good = search.search([" \n", "a"], 1)
    assert empty.kind == "bad_query"
    assert good.passages[0].text == "a b"
    assert search.search([], 1) == []
    with pytest.raises(ValueError, match="no passage has a word"):
        build_bm25(store_of(["!", "?"], tmp_path / "t"), tmp_path / "j", PLAIN)


def test_an_index_knows_its_corpus_and_settings(tmp_path):
    one, two = store_of(["a b", "b c"], tmp_path / "one"), store_of(["a b", "b d"], tmp_path / "two")
    built = build_bm25(one, tmp_path / "i", PLAIN)
    opened = BM25Search(PassageStore(tmp_path / "one"), tmp_path / "i", PLAIN)
    assert opened.search(["b c"], 2) == built.search(["b c"], 2)
    assert opened.id == built.id
    with pytest.raises(ValueError, match=rf"indexes the corpus {one.hash} .* not .*{two.hash}"):
        BM25Search(two, tmp_path / "i")
    with pytest.raises(ValueError, match=r"was built with .*k1=0\.9.* not .*k1=1\.2"):
        BM25Search(one, tmp_path / "i", BM25Settings(k1=1.2))
    with pytest.raises(FileExistsError, match="there already"):
        build_bm25(one, tmp_path / "i", PLAIN)
    assert build_bm25(one, tmp_path / "j", BM25Settings(k1=1.2)).id != built.id
    facts = json.loads((tmp_path / "i" / "index.json").read_text())
    assert (facts["corpus"], facts["passages"], facts["settings"]["k1"]) == (one.hash, 2, 0.9)
    (tmp_path / "i" / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished BM25 index"):
        BM25Search(one, tmp_path / "i")


def test_a_passage_of_a_megabyte_and_one_without_words(tmp_path):
    texts = ["needle " + "hay straw " * 100_000, "...", "needle"]
    search = build_bm25(store_of(texts, tmp_path / "s"), tmp_path / "i", PLAIN)
    assert [p.text for p in search.search(["needle"], 3)[0].passages] == ["needle", texts[0]]


def test_threads_share_an_index(texts, tmp_path):
    search = build_bm25(store_of(texts, tmp_path / "s"), tmp_path / "i")
    queries = [f"w{i} w{i + 1}" for i in range(30)]
    wanted, found = search.search(queries, 5), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: search.search(queries, 5)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n] == wanted for n in range(4))


def squad() -> Path:
    """SQuAD's development set."""
    file = os.environ.get("JAXREC_SQUAD")
    return Path(file or pytest.fail("set JAXREC_SQUAD to SQuAD's dev-v1.1.json (this test needs it)"))


@pytest.mark.real_data
def test_squad_scores_and_order_are_the_formulas(tmp_path):
    """60 questions over 2,067 paragraphs beside the formula in float64 over postings that are made here."""
    settings = BM25Settings()
    store = build_store(read_passages(squad(), "squad"), tmp_path / "store")
    search = build_bm25(store, tmp_path / "bm25", settings)
    split, postings, lengths = tokenizer(settings), {}, []
    for row, passage in enumerate(store):
        words = Counter(split(f"{passage.title}\n{passage.text}"))
        lengths.append(words.total())
        for word, count in words.items():
            postings.setdefault(word, {})[row] = count
    average = sum(lengths) / len(lengths)
    questions = [q.text for q in read_questions(squad())][::177]
    assert len(questions) == 60
    for question, result in zip(questions, search.search(questions, 20), strict=True):
        scores: Counter[int] = Counter()
        for word in split(question):
            found = postings.get(word, {})
            idf = math.log(1 + (len(lengths) - len(found) + 0.5) / (len(found) + 0.5))
            for row, tf in found.items():
                weight = tf + settings.k1 * (1 - settings.b + settings.b * lengths[row] / average)
                scores[row] += idf * tf * (settings.k1 + 1) / weight
        wanted = sorted((-round(score, 9), store[row].id) for row, score in scores.items())[:20]
        assert [p.id for p in result.passages] == [id for _, id in wanted]
        np.testing.assert_allclose([p.score for p in result.passages], [-s for s, _ in wanted], rtol=2e-6)


@pytest.mark.real_data
def test_squad_questions_find_their_paragraphs(tmp_path, capsys):
    """10,570 questions of SQuAD's development set over its 2,067 paragraphs."""
    store = build_store(read_passages(squad(), "squad"), tmp_path / "store")
    search = build_bm25(store, tmp_path / "bm25")
    data = json.loads(squad().read_text(encoding="utf-8"))["data"]
    asked = [
        (question["question"], f"{a}.{p}")
        for a, article in enumerate(data)
        for p, paragraph in enumerate(article["paragraphs"])
        for question in paragraph["qas"]
    ]
    assert (len(store), len(asked)) == (2067, 10570)
    results = search.search([question for question, _ in asked], 20)
    ranks = np.array([[p.id for p in r.passages].index(g) if g in [p.id for p in r.passages] else 99
                      for r, (_, g) in zip(results, asked)])  # fmt: skip
    recall = {k: float((ranks < k).mean()) for k in (1, 5, 20)}
    with capsys.disabled():
        print("\nBM25 on SQuAD dev, recall of the question's paragraph:", {k: round(r, 4) for k, r in recall.items()})
    assert recall[1] > 0.76
    assert recall[5] > 0.92
    assert recall[20] > 0.965
