"""Demonstrations from JSON lines: what calibrates, what is left, and what a broken line is called."""

import json

import numpy as np
import pytest

from jaxrec.data.demonstrations import read_demonstrations


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def rows(count):
    return [{"prompt": f"p{i}", "response": "r" * (i + 1)} for i in range(count)]


def test_samples_are_chosen_by_seed_or_length_and_the_rest_is_for_evaluation(tmp_path):
    path = write(tmp_path / "maths.jsonl", rows(12))
    files = [f"maths={path}"]
    chosen, rest = read_demonstrations(files, 5, "random", np.random.default_rng(0))["maths"]
    assert (len(chosen), len(rest)) == (5, 7)
    assert {d.prompt for d in chosen} | {d.prompt for d in rest} == {f"p{i}" for i in range(12)}
    assert [d.prompt for d in chosen] != [f"p{i}" for i in range(5)]
    longest, _ = read_demonstrations(files, 3, "longest", np.random.default_rng(0))["maths"]
    assert [d.prompt for d in longest] == ["p9", "p10", "p11"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"maths\.jsonl:2: not JSON"),
        ("[1]", r"maths\.jsonl:2: an object"),
        ('{"prompt": "x"}', r"maths\.jsonl:2: field 'response' is missing"),
        ('{"prompt": "", "response": "y"}', r"maths\.jsonl:2: field 'prompt' is missing, empty"),
        ('{"prompt": "x", "response": 3}', r"maths\.jsonl:2: field 'response'"),
    ],
)
def test_broken_lines(tmp_path, line, message):
    path = tmp_path / "maths.jsonl"
    path.write_text('{"prompt": "x", "response": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_demonstrations([f"maths={path}"], 1, "random", np.random.default_rng(0))


def test_too_few_and_wrong_names(tmp_path):
    path = write(tmp_path / "maths.jsonl", rows(2))
    with pytest.raises(ValueError, match=r"2 demonstrations, calibrate\.samples asks for 3"):
        read_demonstrations([f"maths={path}"], 3, "random", np.random.default_rng(0))
    for entry in (str(path), f"={path}"):
        with pytest.raises(ValueError, match=r"must be NAME=FILE\.jsonl"):
            read_demonstrations([entry], 1, "random", np.random.default_rng(0))
