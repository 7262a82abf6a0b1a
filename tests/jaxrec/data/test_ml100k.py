"""MovieLens-100K in RecBole's form: the published counts, sequences and floors (needs JAXREC_ML100K)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from jaxrec.data import (
    Interactions,
    disambiguate_titles,
    filter_rating,
    k_core,
    leave_one_out,
    load_interactions,
    title_index,
)
from jaxrec.data.movielens import GENRES_100K
from jaxrec.data.tfds_sources import load_prepared, prepare_interactions
from jaxrec.evaluate import evaluate_ranking
from models.recsys.floors import Markov, Popularity

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def inter(ml100k: Path) -> Interactions:
    return load_interactions(ml100k)


def test_counts(inter: Interactions):
    assert (len(inter), inter.num_users, inter.num_items) == (100_000, 943, 1_682)
    assert np.bincount(inter.ratings.astype(int)).tolist() == [0, 6_110, 11_370, 27_145, 34_174, 21_201]
    lengths, popularity = np.bincount(inter.users)[1:], np.bincount(inter.items)[1:]
    assert (lengths.min(), lengths.max(), round(lengths.mean(), 2)) == (20, 737, 106.04)
    assert (popularity.min(), popularity.max()) == (1, 583)
    assert len(np.unique(inter.users.astype(np.int64) * 2000 + inter.items)) == 100_000
    assert (inter.times.min(), inter.times.max()) == (874_724_710, 893_286_638)
    assert not any(inter.report.values())


def test_filters(inter: Interactions):
    def counts(left: Interactions) -> tuple[int, int, int]:
        return len(left), left.num_users, left.num_items

    assert counts(k_core(inter, 5, 5)) == (99_287, 943, 1_349)
    assert counts(k_core(inter, 10, 10)) == (97_953, 943, 1_152)
    assert counts(filter_rating(inter, 3)) == (82_520, 943, 1_574)
    assert counts(filter_rating(inter, 4)) == (55_375, 942, 1_447)


def test_sequences_and_samples(inter: Interactions):
    split = leave_one_out(inter)
    for user, length, first, last in (
        ("1", 272, "168 172 165 156 196", "111 256 5 74 102"),
        ("196", 39, None, "411 108 1118 94 110"),
    ):
        tokens = inter.item_tokens[split.sequence(inter.user_index()[user])].tolist()
        assert len(tokens) == length
        assert first is None or " ".join(tokens[:5]) == first
        assert " ".join(tokens[-5:]) == last
    assert [len(split.samples(part, 50)) for part in ("train", "valid", "test")] == [97_171, 943, 943]
    assert len(split.train_events()[0]) == 98_114


def test_rounded_times_change_what_is_held_out(inter: Interactions):
    exact, rounded = leave_one_out(inter), leave_one_out(inter, float32_times=True)
    changed = [(exact.sequence(u) != rounded.sequence(u)).any() for u in range(1, 944)]
    assert sum(changed) == 908
    for part, count in (("test", 149), ("valid", 254)):
        assert (exact.samples(part, 1).targets != rounded.samples(part, 1).targets).sum() == count


def test_titles(inter: Interactions):
    item = inter.item_index()
    assert inter.titles[item["1"]] == "Toy Story (1995)"
    assert inter.categories[item["1"]] == "Animation, Children's, Comedy"
    names = [title.removesuffix(")").rpartition(" (")[0] or title for title in inter.titles[1:]]
    assert len(names) - len(set(names)) == 23  # without the year
    with pytest.raises(ValueError, match="18 titles belong to several items"):
        title_index(inter)
    unique = disambiguate_titles(inter)
    assert unique.report["titles_disambiguated"] == 18
    assert len(title_index(unique)) == 1_682


# model, history excluded, split: Recall@5/10/20, NDCG@5/10/20, MRR@10
FLOORS = [
    ("Pop", False, "valid", "0.0148 0.0382 0.0700 0.0098 0.0173 0.0252 0.0113"),
    ("Pop", False, "test", "0.0255 0.0498 0.0827 0.0144 0.0224 0.0306 0.0142"),
    ("Pop", True, "valid", "0.0392 0.0742 0.1145 0.0232 0.0345 0.0448 0.0228"),
    ("Pop", True, "test", "0.0583 0.0859 0.1262 0.0363 0.0449 0.0550 0.0326"),
    ("Markov", False, "valid", "0.0668 0.1092 0.1686 0.0404 0.0538 0.0690 0.0372"),
    ("Markov", False, "test", "0.0647 0.1103 0.1771 0.0407 0.0555 0.0722 0.0391"),
    ("Markov", True, "valid", "0.0965 0.1432 0.2100 0.0597 0.0748 0.0915 0.0539"),
    ("Markov", True, "test", "0.0944 0.1442 0.2259 0.0608 0.0766 0.0971 0.0562"),
]
COLUMNS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@10")


def floor(name: str, inter: Interactions, float32_times: bool = False):
    split = leave_one_out(inter, float32_times)
    _, items, previous = split.train_events()
    model = Popularity.fit(items, inter.num_items) if name == "Pop" else Markov.fit(previous, items, inter.num_items)
    return split, model.scores


@pytest.mark.parametrize(("name", "excluded", "part", "expected"), FLOORS)
def test_floor_table(inter: Interactions, name: str, excluded: bool, part: str, expected: str):
    split, scorer = floor(name, inter)
    metrics = evaluate_ranking(scorer, split, part, exclude_history=excluded, ks=(5, 10, 20)).metrics
    assert " ".join(f"{metrics[column]:.4f}" for column in COLUMNS) == expected


@pytest.mark.parametrize(("name", "recall", "ndcg"), [("Pop", "0.0456", "0.0201"), ("Markov", "0.1082", "0.0557")])
def test_floors_with_rounded_times(inter: Interactions, name: str, recall: str, ndcg: str):
    split, scorer = floor(name, inter, float32_times=True)
    metrics = evaluate_ranking(scorer, split, "test", exclude_history=False, ks=(10,)).metrics
    assert (f"{metrics['recall@10']:.4f}", f"{metrics['ndcg@10']:.4f}") == (recall, ndcg)


def test_constant_scorer_is_never_perfect(inter: Interactions):
    metrics = evaluate_ranking(
        lambda history, lengths: np.zeros((len(history), 1_683)), leave_one_out(inter), exclude_history=False
    ).metrics
    assert f"{metrics['recall@10']:.4f}" == "0.0170"
    assert math.isclose(metrics["recall@10"], 16 / 943)


def test_grouplens_layout_gives_identical_interactions(inter: Interactions, ml100k: Path, tmp_path: Path):
    rows = [line.split("\t") for line in (ml100k / "ml-100k.inter").read_text().splitlines()[1:]]
    (tmp_path / "u.data").write_text("".join("\t".join(row) + "\n" for row in rows))
    lines = []
    for token, title, kinds in zip(inter.item_tokens[1:].tolist(), inter.titles[1:], inter.categories[1:]):
        flags = ["1" if genre in kinds.split(", ") else "0" for genre in GENRES_100K]
        lines.append("|".join([token, title, "", "", "", *flags]) + "\n")
    (tmp_path / "u.item").write_text("".join(lines), encoding="latin-1")
    other = load_interactions(tmp_path)
    for name in ("items", "times", "ratings", "item_tokens"):
        np.testing.assert_array_equal(getattr(other, name), getattr(inter, name))
    np.testing.assert_array_equal(other.user_tokens[other.users], inter.user_tokens[inter.users])
    assert other.titles == inter.titles


def test_prepared_round_trip(inter: Interactions, tmp_path: Path):
    again = load_prepared(prepare_interactions(inter, tmp_path))
    for name in ("users", "items", "times", "ratings"):
        np.testing.assert_array_equal(getattr(again, name), getattr(inter, name))
    assert again.titles == inter.titles
