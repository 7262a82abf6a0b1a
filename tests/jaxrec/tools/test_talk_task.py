"""What a recipe about conversations works on, of files: parts that share no conversation, draws, and errors."""

import collections
import json

import pytest
from ml_collections import ConfigDict

from jaxrec.config import UsageError
from jaxrec.data.dialogues import USER, Dialogue, Instance, Turn
from jaxrec.tools.talk_task import check_files, file_task, told

TITLES = [f"Film {chr(65 + number)} (2000)" for number in range(20)]


def talk(number: int, recommended: int = 2, prefix: str = "talk") -> dict:
    """A conversation of as many instances as items are recommended; the colon must not confuse ids."""
    turns = []
    for k in range(recommended):
        turns.append({"role": "user", "text": f"{prefix} {number} asks {k}", "items": []})
        title = TITLES[(number + k) % len(TITLES)]
        turns.append({"role": "system", "text": f"See {title}", "items": [title]})
    return {"id": f"{prefix}:{number}", "turns": turns}


def row(number: int, turn: int) -> dict:
    """A line of iEvaLM-CRS."""
    context = [f"row {number}", *["more"] * (turn - 1)]
    return {"dialog_id": number, "turn_id": turn, "context": context, "entity": [], "rec": [TITLES[number]]}


def write(path, rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Settings of 12 training and 4 test conversations, 2 instances each."""
    return ConfigDict(
        {
            "form": "", "catalogue": "", "only_new": True, "drop_skipped_turns": False,
            "train": write(tmp_path / "train", [talk(n) for n in range(12)]),
            "test": write(tmp_path / "test", [talk(n, prefix="test") for n in range(4)]),
            "train_dialogues": 0, "valid_dialogues": 5, "test_dialogues": 0,
        }
    )  # fmt: skip


def conversations(instances):
    return {i.dialogue.id.rpartition(":")[0] for i in instances}


def test_no_conversation_is_in_two_parts(data):
    held = []
    for seed in range(6):
        task = file_task(data, seed)
        train, valid, test = (conversations(task.parts[part]) for part in ("train", "valid", "test"))
        assert not [*train & valid, *train & test, *valid & test]
        assert {part: len(own) for part, own in task.parts.items()} == {"train": 18, "valid": 5, "test": 8}
        assert task.skipped["valid: instances not drawn"] == 1  # three conversations were held back for five instances
        assert len(valid) == 3
        held.append(frozenset(valid))
        again = file_task(data, seed)
        assert all(again.parts[part] == task.parts[part] for part in task.parts)
    assert len(set(held)) > 1  # the seed draws them


def test_draws_keep_the_order_and_are_counted(data):
    whole = file_task(data, 3)
    data.train_dialogues, data.test_dialogues = 7, 3
    some = file_task(data, 3)
    assert some.parts["valid"] == whole.parts["valid"]
    for part, count, left in (("train", 7, 11), ("test", 3, 5)):
        assert len(some.parts[part]) == count
        places = [whole.parts[part].index(instance) for instance in some.parts[part]]
        assert places == sorted(places)
        assert some.skipped[f"{part}: instances not drawn"] == left
    data.train_dialogues = 100
    assert len(file_task(data, 3).parts["train"]) == 18
    assert "train: instances not drawn" not in file_task(data, 3).skipped


def test_without_validation_everything_trains(data):
    data.valid_dialogues = 0
    task = file_task(data, 0)
    assert (len(task.parts["train"]), task.parts["valid"]) == (24, [])


def test_rows_of_one_conversation_stay_together(data, tmp_path):
    """iEvaLM-CRS numbers conversations and turns apart."""
    facts = {str(n): {"name": title} for n, title in enumerate(TITLES)}
    data.catalogue = str(tmp_path / "id2info.json")
    (tmp_path / "id2info.json").write_text(json.dumps(facts))
    data.train = write(tmp_path / "rows", [row(n, turn) for n in range(9) for turn in (1, 3, 5)])
    data.test = write(tmp_path / "others", [row(n, 1) for n in range(9, 12)])
    task = file_task(data, 0)
    counts = collections.Counter(i.dialogue.id.partition(":")[0] for i in task.parts["train"])
    assert set(counts.values()) == {3}
    assert not set(counts) & {i.dialogue.id.partition(":")[0] for i in task.parts["valid"]}
    data.test = write(tmp_path / "others", [row(n, 7) for n in range(8, 12)])
    with pytest.raises(UsageError, match=r"1 conversations of .*others are in .*rows too, e.g. '8': .*by conversation"):
        file_task(data, 0)


def test_the_same_number_in_both_files_is_no_same_conversation(data, tmp_path):
    data.test = write(tmp_path / "test", [{**talk(n, prefix="test"), "id": f"talk:{n}"} for n in range(4)])
    assert len(file_task(data, 0).parts["test"]) == 8
    data.test = data.train
    with pytest.raises(UsageError, match="12 conversations of"):
        file_task(data, 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("form", "csv", r"data\.form='csv' must be one of inspired, redial"),
        ("train", "", r"needs data\.train, a file of dialogues"),
        ("test", "nowhere", r"data\.test=nowhere: there is no such file"),
        ("catalogue", "nowhere", r"data\.catalogue=nowhere: there is no such file"),
        ("form", "ievalm", r"ievalm needs data\.catalogue"),
    ],
)
def test_files_are_checked_by_field(data, field, value, message):
    check_files(data)
    data[field] = value
    with pytest.raises(UsageError, match=message):
        check_files(data)


def test_a_folder_is_no_file_and_unknown_content_is_named(data, tmp_path):
    data.train = str(tmp_path)
    with pytest.raises(UsageError, match="there is no such file"):
        check_files(data)
    data.train = write(tmp_path / "train", [{"question": "?"}])
    with pytest.raises(ValueError, match="train:1: no known format of dialogues has these fields"):
        check_files(data)


def test_an_empty_part_is_an_error_that_says_why(data, tmp_path):
    data.valid_dialogues = 24
    with pytest.raises(UsageError, match=r"no instance is left for train: 24 of .*data\.valid_dialogues=24"):
        file_task(data, 0)
    data.valid_dialogues = 5
    data.test = write(tmp_path / "test", [{"id": "x", "turns": talk(0)["turns"][:1]}])
    with pytest.raises(UsageError, match="no instance is left for test"):
        file_task(data, 0)


def test_told_holds_every_conversation_once_with_its_last_label():
    said = (Turn(USER, "a", (1,)), Turn("system", "b", (2,)), Turn(USER, "c", (3,)))
    one = [Instance(Dialogue("x:1", said[:1]), (2,)), Instance(Dialogue("x:3", said), (4, 5))]
    other = [Instance(Dialogue("y:1", said[:1]), (9,))]
    found = told([one[1], *other, one[0]])
    assert [(d.id, d.items) for d in found] == [("x", (1, 2, 3, 4, 5)), ("y", (1, 9))]
