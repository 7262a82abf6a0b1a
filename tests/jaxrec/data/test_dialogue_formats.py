"""Dialogues from the field's files: what each format says, what is counted, and what a broken file is called."""

import copy
import json
import os
from pathlib import Path

import pytest

from jaxrec.data.catalogue_files import MERGED
from jaxrec.data.dialogue_formats import (
    EMPTY_TEXT,
    FORMATS,
    NO_TURN,
    DialogueData,
    detect_format,
    read_dialogues,
    read_parts,
    write_dialogues,
)
from jaxrec.data.dialogues import REPEATED, SYSTEM, USER, Dialogue, Instance, Turn

HEADER = "dialog_id\tutt_id\tspeaker\ttext\tmovies\tmovie_dict\tcoarse_label"
INSPIRED = [
    "d1\t1\tRECOMMENDER\tHi  there\t\t{'Heat (1995)': 0}\taccept_new",
    "d1\t2\tSEEKER\tQUOTATION_MARKHeatQUOTATION_MARK!\tHeat (1995)\t{'Heat (1995)': 0}\taccept_new",
    "d1\t3\tRECOMMENDER\tIt, or Up\tIt (2017);  Up (2009)\t{'Heat (1995): 0}\taccept_new",
    "d2\t1\tSEEKER\tfilms?\t\t\tnan",
    "d2\t2\tRECOMMENDER\tUp\tUp (2009)\t__import__('os').abort()\tnan",
    "d2\t3\tRECOMMENDER\tyes, Up\tUp (2009)\t{'Up (2009)': 0}\tnan",
]
REDIAL = {
    "conversationId": "391",
    "initiatorWorkerId": 0,
    "respondentWorkerId": 1,
    "movieMentions": {"11": "Heat (1995)", "12": "It  (2017)", "13": None},
    "messages": [
        {"senderWorkerId": 0, "text": "Like @11, not @13 or @99"},
        {"senderWorkerId": 0, "text": " "},
        {"senderWorkerId": 1, "text": "@12! Or @11."},
        {"senderWorkerId": 1, "text": "@12"},
    ],
}
GRSU = {
    "conv_id": 900,
    "messages": [
        {"turn_id": 0, "role": "user", "text": "Anything like Heat?", "item": ["Heat (1995)"]},
        {"turn_id": 1, "role": "system", "text": "It! It!", "item": ["It (2017)", "It (2017)", "Happy Days (1974)"]},
    ],
}
IEVALM = {
    "dialog_id": "7",
    "turn_id": 2,
    "context": ["", "Hi, what do you like?", "horror like It or it ends with us, and heat"],
    "entity": ["horror", "It", "Heat", "And"],
    "rec": ["Up"],
    "resp": "Up",
}
PLAIN = {
    "id": "a",
    "turns": [
        {"role": "user", "text": "مرحبا 🎬  \u2028 x", "items": ["Heat"]},
        {"role": "system", "text": "Up", "items": ["Up", "Up"]},
        {"role": "user", "text": "", "items": ["Heat"]},
    ],
}
FACTS = {"0": {"name": "Heat"}, "1": {"name": "Up"}, "2": {"name": "It"}}


def written(tmp_path, *entries, name="talks"):
    path = tmp_path / name
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def turns(data: DialogueData, number=0):
    titles = data.catalogue.titles
    return [(t.role, t.text, [titles[item] for item in t.items]) for t in data.dialogues[number].turns]


def changed(entry, *path_and_value):
    """The entry with another value at a path; without a value (None), without the field."""
    *path, last, value = path_and_value
    entry = copy.deepcopy(entry)
    at = entry
    for step in path:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return entry


def test_inspired(tmp_path):
    data = read_dialogues(written(tmp_path, HEADER, *INSPIRED))
    assert data.form == "inspired"
    assert [d.id for d in data.dialogues] == ["d1", "d2"]
    assert turns(data) == [
        (SYSTEM, "Hi there", []),
        (USER, '"Heat"!', ["Heat (1995)"]),
        (SYSTEM, "It, or Up", ["It (2017)", "Up (2009)"]),
    ]
    assert data.counts == {
        "dialogues": 2, "turns": 6, "turns that name an item": 4, "mentions of items": 5, "catalogue: items": 3,
        "movie_dict texts that cannot be read": 3, "lines whose outcome is nan": 3,
    }  # fmt: skip
    found, skipped = data.instances()
    assert [(i.dialogue.id, len(i.dialogue.turns), len(i.labels)) for i in found] == [("d1:2", 2, 2), ("d2:1", 1, 1)]
    assert skipped == {"no item of the catalogue": 1, REPEATED: 1}
    assert len(data.instances(only_new=False)[0]) == 3


def test_titles_of_a_catalogue_of_its_own_are_the_only_items(tmp_path):
    table = written(tmp_path, "title\tyear\tgenre", "Up\t2009\tFamily", "Heat\t1995\tCrime", name="movies.tsv")
    data = read_dialogues(written(tmp_path, HEADER, *INSPIRED), "inspired", catalogue_path=table)
    assert data.catalogue.text(1) == "Heat (1995)\n  - genre: Crime"
    assert turns(data)[2] == (SYSTEM, "It, or Up", ["Up (2009)"])
    assert data.counts["mentions of what is no item of the catalogue"] == 1


def test_redial(tmp_path):
    alone = changed(changed(REDIAL, "conversationId", "2"), "respondentWorkerId", 0)
    silent = changed(changed(changed(REDIAL, "conversationId", 3), "movieMentions", []), "messages", [])
    data = read_dialogues(written(tmp_path, REDIAL, alone, silent))
    assert (data.form, len(data.dialogues)) == ("redial", 1)
    assert turns(data) == [
        (USER, "Like Heat (1995), not @13 or @99", ["Heat (1995)"]),
        (SYSTEM, "It (2017)! Or Heat (1995).", ["It (2017)", "Heat (1995)"]),
        (SYSTEM, "It (2017)", ["It (2017)"]),
    ]
    assert data.counts == {
        "dialogues": 3, "dialogues of one worker with itself, left out": 1, NO_TURN: 1, EMPTY_TEXT: 1, "turns": 3,
        "turns that name an item": 3, "mentions of items": 4, "film marks without a title": 2, "catalogue: items": 2,
    }  # fmt: skip
    assert data.instances() == ([], {REPEATED: 2})


def test_ievalm_counts_roles_from_the_end(tmp_path):
    facts = written(tmp_path, FACTS, name="id2info.json")
    context = ["Yes?", "Hm, Up?"]
    asked = {**IEVALM, "dialog_id": 8, "turn_id": 1, "context": context, "entity": ["Up"], "rec": ["Up", "It"]}
    unknown = {**asked, "dialog_id": 9, "rec": ["The Neon Bible"]}
    data = read_dialogues(written(tmp_path, IEVALM, asked, unknown), catalogue_path=facts)
    heat, up, it = range(3)
    first = Instance(
        Dialogue("7:2", (Turn(SYSTEM, IEVALM["context"][1]), Turn(USER, IEVALM["context"][2], (it, heat)))), (up,)
    )
    second = Instance(Dialogue("8:1", (Turn(SYSTEM, "Yes?"), Turn(USER, "Hm, Up?", (up,)))), (up, it))
    assert data.instances(only_new=False) == ([first, second], {})
    assert data.instances() == ([first], {REPEATED: 1})
    assert data.counts == {
        "rows": 3, "dialogues": 3, "turns": 6, EMPTY_TEXT: 1, "turns that name an item": 3, "mentions of items": 4,
        "mentions of what is no item of the catalogue": 2, "labels": 4, "labels that are no item of the catalogue": 1,
        "rows without a label in the catalogue, left out": 1, "catalogue: items": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match="drop_skipped_turns must be off"):
        data.instances(drop_skipped_turns=True)
    with pytest.raises(ValueError, match="needs catalogue_path"):
        read_dialogues(written(tmp_path, IEVALM))


def test_names_count_as_whole_words_only(tmp_path):
    facts = written(tmp_path, FACTS, name="id2info.json")
    row = {**IEVALM, "context": ["I sit in the heath: heaths!", "Upstream, it's up."], "entity": ["It", "Heat", "Up"]}
    data = read_dialogues(written(tmp_path, row), catalogue_path=facts)
    assert [turn.items for turn in data.rows[0].dialogue.turns] == [(), (2, 1)]
    assert data.counts["names that no turn holds"] == 1


@pytest.mark.parametrize("id", ["conv_id", "conversationId"])
def test_grsu(tmp_path, id):
    facts = written(tmp_path, {"Heat (1995)": {"genre": ["crime"]}, "It (2017)": {}}, name="movie2info.json")
    entry = {id: 900, "messages": GRSU["messages"]}
    if id == "conversationId":  # ReDial's part keeps the release's fields
        entry |= {"initiatorWorkerId": 1, "respondentWorkerId": 2, "movieMentions": []}
    data = read_dialogues(written(tmp_path, entry), catalogue_path=facts)
    assert data.form == "grsu"
    assert turns(data)[1] == (SYSTEM, "It! It!", ["It (2017)", "It (2017)"])
    (instance,), _ = data.instances()
    assert (instance.dialogue.id, instance.labels) == ("900:1", (1,))
    assert data.counts["mentions of what is no item of the catalogue"] == 1


def test_our_own_form_comes_back_as_it_was_written(tmp_path):
    data = read_dialogues(written(tmp_path, PLAIN, {**PLAIN, "id": 5}))
    assert (data.form, data.catalogue.titles) == ("jsonl", ("Heat", "Up"))
    assert turns(data)[0] == (USER, "مرحبا 🎬  \u2028 x", ["Heat"])
    path = tmp_path / "again"
    write_dialogues(path, data.dialogues, data.catalogue)
    again = read_dialogues(path)
    assert again.dialogues == data.dialogues
    assert [d.id for d in again.dialogues] == ["a", "5"]
    assert again.instances(drop_skipped_turns=True) == data.instances()


def test_parts_share_one_catalogue_with_titles_written_alike_as_one(tmp_path):
    other = changed(PLAIN, "turns", 0, "items", ["UP!", "Alien"])
    parts = read_parts({"train": written(tmp_path, PLAIN), "test": written(tmp_path, other, name="test")})
    assert parts["train"].catalogue is parts["test"].catalogue
    assert parts["test"].catalogue.titles == ("Heat", "Up", "Alien")
    assert parts["test"].dialogues[0].turns[0].items == (1, 2)
    assert parts["train"].counts[f"catalogue: {MERGED}"] == 1


def test_every_format_is_recognised(tmp_path):
    firsts = {"inspired": HEADER, "redial": REDIAL, "ievalm": IEVALM, "grsu": GRSU, "jsonl": PLAIN}
    assert set(firsts) == set(FORMATS)
    assert {form: detect_format(written(tmp_path, first)) for form, first in firsts.items()} == {f: f for f in FORMATS}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "talks: the file is empty"),
        ([HEADER], "talks: no dialogues"),
        (["id,text"], r"talks:1: no known format of dialogues begins with id,text"),
        ([{"question": "?"}], r"talks:1: no known format of dialogues has these fields: question"),
        ([PLAIN, '{"id": "b", "tur'], r"talks:2: not JSON"),
        ([PLAIN, "[]"], r"talks:2: an object was expected, not list"),
        ([PLAIN, PLAIN], r"talks:2: id 'a' was there before, at .*talks:1"),
        ([changed(PLAIN, "id", None)], r"talks:1: field 'id' is missing"),
        ([changed(PLAIN, "id", True)], r"talks:1: field 'id' must be a text or a whole number, not True"),
        ([changed(PLAIN, "turns", [])], r"talks:1: field 'turns' is empty"),
        (
            [changed(PLAIN, "turns", 1, "role", "narrator")],
            r"talks:1, turn 1: role 'narrator' must be one of user, sys",
        ),
        ([changed(PLAIN, "turns", 1, "items", None)], r"talks:1, turn 1: field 'items' is missing"),
        ([changed(PLAIN, "turns", 1, "items", "Up")], r"turn 1: field 'items' must be a list, not Up"),
        ([changed(PLAIN, "turns", 1, "items", [7])], r"turn 1: field 'items' must be a text, not int"),
        ([changed(PLAIN, "turns", 0, "text", 7)], r"talks:1, turn 0: field 'text' must be a text, not 7"),
        ([changed(PLAIN, "turns", 0, "text", "\udc00")], r"turn 0: field 'text' holds half a character"),
        ([changed(PLAIN, "turns", ["Hi"])], r"talks:1, turn 0: an object was expected, not str"),
        ([{"id": 1, "turns": [{"role": "user", "text": "Hi", "items": []}]}], "talks: the catalogue is empty"),
        ([changed(GRSU, "conv_id", None)], r"talks:1: field 'conversationId' is missing"),
        ([changed(GRSU, "messages", 1, "item", None)], r"talks:1, turn 1: field 'item' is missing"),
        (
            [changed(REDIAL, "messages", 2, "senderWorkerId", 5)],
            r"turn 2: field 'senderWorkerId' is 5, neither 0 nor 1",
        ),
        ([changed(REDIAL, "movieMentions", ["x"])], r"talks:1: field 'movieMentions' must be an object, or an empty"),
        ([changed(REDIAL, "respondentWorkerId", None)], r"talks:1: field 'respondentWorkerId' is missing"),
        ([changed(IEVALM, "rec", [])], r"talks:1: field 'rec' is empty"),
        ([changed(IEVALM, "entity", None)], r"talks:1: field 'entity' is missing"),
        ([changed(IEVALM, "context", [None])], r"talks:1: field 'context' must be a text, not NoneType"),
        ([HEADER, INSPIRED[0], "d1\t2\tSEEKER"], r"talks:3: 3 cells where the header has 7"),
        ([HEADER, INSPIRED[0].replace("RECOMMENDER", "X")], r"talks:2: speaker 'X' must be one of SEEKER, RECOMMENDER"),
    ],
)
def test_files_that_are_not_as_their_format_says_are_named(tmp_path, entries, words):
    with pytest.raises(ValueError, match=words):
        read_dialogues(written(tmp_path, *entries))


def test_formats_and_files_must_be_named_right(tmp_path):
    with pytest.raises(ValueError, match="no format 'tsv' of dialogues; formats: inspired, redial"):
        read_dialogues(written(tmp_path, PLAIN), "tsv")
    with pytest.raises(ValueError, match=r"talks:1: the header has no column dialog_id, speaker"):
        read_dialogues(written(tmp_path, "text\tmovies"), "inspired")
    with pytest.raises(ValueError, match="no file of dialogues"):
        read_parts({})
    with pytest.raises(FileNotFoundError):
        read_dialogues(tmp_path / "nothing")


def folder(variable: str, what: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.fail(f"set {variable} to {what} (this test needs it)")
    return Path(path)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "lines", "naming", "broken", "nan", "instances"),
    [("dev.tsv", 3538, 533, 41, 1, (246, 315)), ("test.tsv", 3438, 473, 0, 0, (246, 292))],
)
def test_inspired_files_load_whole(name, lines, naming, broken, nan, instances):
    data = read_dialogues(folder("JAXREC_INSPIRED", "a folder with INSPIRED's dev.tsv and test.tsv") / name)
    print(f"{data.path}: {dict(data.counts)}; {data.instances()[1]}")
    assert (data.form, len(data.dialogues)) == ("inspired", 99)
    assert sum(len(d.turns) for d in data.dialogues) == data.counts["turns"] == lines
    assert {len(d.turns) for d in data.dialogues} <= set(range(20, 77))
    assert data.counts["turns that name an item"] == naming
    assert data.counts.get("movie_dict texts that cannot be read", 0) == broken
    assert data.counts.get("lines whose outcome is nan", 0) == nan
    assert tuple(len(data.instances(only_new=only_new)[0]) for only_new in (True, False)) == instances


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "rows", "dialogues", "labels", "unknown", "items", "merged", "new"),
    [("redial", 2716, 985, 3595, 0, 6576, 7, 2461), ("opendialkg", 1188, 1124, 1254, 1, 2958, 7, 737)],
)
def test_crs_files_load_whole(name, rows, dialogues, labels, unknown, items, merged, new):
    path = folder("JAXREC_CRS", "a folder with iEvaLM-CRS's *_valid_eval.jsonl, *_id2info.json and others")
    data = read_dialogues(path / f"{name}_valid_eval.jsonl", catalogue_path=path / f"{name}_id2info.json")
    print(f"{data.path}: {dict(data.counts)}; {data.instances()[1]}")
    assert data.form == "ievalm"
    assert (data.counts["rows"], data.counts["dialogues"], data.counts["labels"]) == (rows, dialogues, labels)
    assert data.counts.get("labels that are no item of the catalogue", 0) == unknown
    assert sum(len(row.labels) for row in data.rows) == labels - unknown
    assert (len(data.catalogue), data.counts[f"catalogue: {MERGED}"]) == (items, merged)
    assert all(row.dialogue.turns[-1].role == USER for row in data.rows)
    assert (len(data.instances(only_new=False)[0]), len(data.instances()[0])) == (rows - unknown, new)
