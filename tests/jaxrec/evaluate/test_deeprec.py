"""The book of rows, and how seeds are pooled and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrec.config import resolve_config
from jaxrec.evaluate import deeprec as judging
from jaxrec.evaluate.deeprec import BEST_ALONE, HISTORY_ONLY, LABELS, SFT, STAGE1, STAGE2, SeedResult, pool


def test_a_book_is_read_back_row_by_row(tmp_path: Path):
    kinds = np.array([1, 0, 1, 0])
    rank = np.array([1, 11, 3, 64])
    book = judging._Book(tmp_path / "evaluate", kinds)
    assert not book.known("TRM, history only")
    book.add_ranks("TRM, history only", rank, seconds=2.5)
    row = book.rows["TRM, history only"]
    assert row["recall@1"] == 0.25
    assert row["recall@10"] == 0.5
    assert row["ndcg@10"] == pytest.approx((1 + 0.5) / 4)
    assert (row["recall@10_intent"], row["recall@10_other"], row["seconds"]) == (1.0, 0.0, 2.5)

    again = judging._Book(tmp_path / "evaluate", kinds)
    assert again.rows == {}
    assert again.known("TRM, history only")
    assert again.rows == book.rows
    for metric, values in book.values["TRM, history only"].items():
        np.testing.assert_array_equal(again.values["TRM, history only"][metric], values)
    assert not again.known("SASRec")


def test_every_name_has_a_file_of_its_own(tmp_path: Path):
    names = [*judging.NAMES.values(), *LABELS.values(), SFT, STAGE1, STAGE2, HISTORY_ONLY, judging.ORACLE]
    book = judging._Book(tmp_path, None)
    assert len({book._path(name) for name in names}) == len(names)
    assert set(LABELS) == set(judging.CONTROLS)


def test_records_of_a_stage_are_replaced(tmp_path: Path):
    path = tmp_path / "trajectories.jsonl"
    judging._replace_records(path, "a", [{"stage": "a", "n": 1}, {"stage": "a", "n": 2}])
    judging._replace_records(path, "b", [{"stage": "b", "n": 3}])
    judging._replace_records(path, "a", [{"stage": "a", "n": 4}])
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [3, 4]


def seed_result(seed: int, hits: dict[str, np.ndarray], best: str = "SASRec") -> SeedResult:
    values = {name: {"recall@10": np.asarray(v, float)} for name, v in hits.items()}
    rows = {name: {"recall@10": float(np.mean(v)), "turns": 1.0 + seed} for name, v in hits.items()}
    if BEST_ALONE in rows:
        rows[BEST_ALONE]["is"] = best
    protocol = {"split": "leave-one-out", "users": len(next(iter(hits.values())))}
    return SeedResult(seed, rows, values, protocol)


def comparison(result: dict, start: str) -> dict:
    (found,) = [c for c in result["comparisons"] if c["name"].startswith(start)]
    return found


@pytest.fixture(scope="module")
def config():
    return resolve_config("deeprec:tiny", ["--config.seeds=(3, 4)"])


def test_the_criterion_is_met_or_not(config, tmp_path: Path):
    users = np.arange(100)
    low, high = (users < 20), (users < 50)
    better = [seed_result(s, {SFT: low, STAGE2: high, HISTORY_ONLY: high}) for s in (3, 4)]
    result = pool(config, better, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    decided = comparison(result, "RL over its SFT start")
    assert decided["met"] is True
    assert decided["criterion"] == config.evaluate.criterion
    assert decided["difference"] == pytest.approx(0.3)
    assert 0 < decided["low"] < 0.3 < decided["high"]
    assert (decided["high"] - decided["low"]) / 2 == pytest.approx(1.96 * np.sqrt(0.21 / 200), rel=0.1)
    even = comparison(result, "over the TRM with history only")
    assert (even["difference"], even["low"], even["high"]) == (0.0, 0.0, 0.0)
    assert "met" not in even
    assert len(result["comparisons"]) == 2  # nothing is said of rows that do not exist

    for stage2 in (low, np.roll(low, 50), users < 21):  # the same, only other users, hardly more
        result = pool(config, [seed_result(s, {SFT: low, STAGE2: stage2}) for s in (3, 4)], tmp_path)
        assert comparison(result, "RL over its SFT start")["met"] is False


def test_intervals_run_over_all_seeds_users(config, tmp_path: Path):
    one = seed_result(3, {SFT: [0, 0, 0, 0], STAGE2: [1, 1, 1, 1]})
    two = seed_result(4, {SFT: [0, 0], STAGE2: [0, 0]})
    result = pool(config, [one, two], tmp_path)
    assert comparison(result, "RL over")["difference"] == pytest.approx(4 / 6)
    assert result["protocol"] == {"split": "leave-one-out", "users": 6, "seeds": [3, 4]}
    (row,) = [r for r in result["rows"] if r["name"] == STAGE2]
    assert row["recall@10"] == 0.5  # the mean over seeds
    assert row["recall@10_std"] == pytest.approx(np.std([1, 0], ddof=1))
    assert row["turns"] == 4.5
    assert result["seed"] == [3, 4]


def test_the_best_alone_is_named_and_rows_some_seeds_lack_are_left_out(config, tmp_path: Path):
    one = seed_result(3, {BEST_ALONE: [0, 1], STAGE2: [1, 1], LABELS["one_call"]: [0, 0]}, "SASRec")
    two = seed_result(4, {BEST_ALONE: [0, 1], STAGE2: [1, 1]}, "GRU4Rec")
    result = pool(config, [one, two], tmp_path)
    names = [row["name"] for row in result["rows"]]
    assert names == ["best recommender alone (GRU4Rec, SASRec)", STAGE2]
    assert comparison(result, "over the best validated")["difference"] == 0.5
    assert not [c for c in result["comparisons"] if c["name"].startswith("several calls")]
    single = pool(config, [one], tmp_path)
    assert "recall@10_std" not in single["rows"][0]
    assert comparison(single, "several calls over one")["difference"] == 1.0
