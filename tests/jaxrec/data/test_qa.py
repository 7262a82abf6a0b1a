"""Questions from the field's files: what each format says, and what a broken entry is called."""

import json
import os
from pathlib import Path

import pytest

from jaxrec.data.qa import (
    CONTROL_TAGS,
    FORMATS,
    QuestionFile,
    check_ids,
    read_question_file,
    read_questions,
    sample_questions,
)

HOTPOT = {
    "_id": "h1",
    "question": " Which band? ",
    "answer": "Rush",
    "type": "bridge",
    "level": "hard",
    "context": [["Neil Peart", ["A drummer.", " Born in 1952."]], ["Toto", ["A band."]], ["Rush", ["A band too."]]],
    "supporting_facts": [["Neil Peart", 0], ["Rush", 7]],
}
MUSIQUE = {
    "id": "3hop1__1_2_3",
    "paragraphs": [
        {"idx": 0, "title": "Oslo", "paragraph_text": "A city.", "is_supporting": False},
        {"idx": 1, "title": "Oslo", "paragraph_text": "The capital.", "is_supporting": True},
    ],
    "question": "What is the capital?",
    "question_decomposition": [
        {"id": 1, "question": "Ann >> country", "answer": "Norway", "paragraph_support_idx": 1},
        {"id": 2, "question": "#1 >> capital", "answer": "Oslo", "paragraph_support_idx": 1},
    ],
    "answer": "Oslo",
    "answer_aliases": ["Kristiania", "Oslo"],
    "answerable": True,
}
IRCOT = {
    "question_id": "i1",
    "question_text": "Which post?",
    "answers_objects": [
        {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Chief of Protocol"]},
        {"number": "7", "date": {"day": "1", "month": "May", "year": "1990"}, "spans": []},
    ],
    "contexts": [{"id": "0", "title": "Temple", "paragraph_text": "An actress.", "is_supporting": True}],
}
HOPS = {"Question": "Who?", "Answer": "Ann", "Q1": "When?", "A1": ["1812"], "Q2": "Who then?", "A2": ["ann", "anne"]}
FRAMES = (
    'Unnamed: 0\tPrompt\tAnswer\twiki_links\treasoning_types\n0\t"How ""tall""?"\t37th\t{links}\tTabular | Temporal\n'
)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*entries) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def one(path: Path, **options):
    found = read_question_file(path, **options)
    assert len(found.questions) == found.records == 1
    return found.form, found.questions[0]


@pytest.mark.parametrize("content", [[HOTPOT], lines(HOTPOT), json.dumps(HOTPOT, indent=1)])
def test_hotpot_as_list_lines_and_object(tmp_path, content):
    form, q = one(write(tmp_path / "x.json", content))
    assert (form, q.id, q.text, q.answers, q.dataset) == ("hotpot", "h1", "Which band?", ("Rush",), "hotpot")
    assert (q.kind, q.level, q.hops) == ("bridge", "hard", 0)
    assert (q.contexts[0].title, q.contexts[0].text) == ("Neil Peart", "A drummer. Born in 1952.")
    assert (q.gold, q.gold_titles) == ((0, 2), ("Neil Peart", "Rush"))
    assert q.facts == (("Neil Peart", 0), ("Rush", 7))  # past the end, as some of 2WikiMultiHopQA's are


def test_hotpot_in_columns_and_two_wiki(tmp_path):
    columns = {k: v for k, v in HOTPOT.items() if k != "_id"} | {"id": "h2"}
    columns["context"] = {"title": ["Toto", "Rush"], "sentences": [["A band."], ["Another."]]}
    columns["supporting_facts"] = {"title": ["Rush"], "sent_id": [0]}
    form, q = one(write(tmp_path / "x.jsonl", lines(columns)))
    assert (form, q.id, q.gold, q.facts) == ("hotpot", "h2", (1,), (("Rush", 0),))
    form, q = one(write(tmp_path / "y.json", [HOTPOT | {"evidences": [["a", "b", "c"]] * 4, "type": "comparison"}]))
    assert (form, q.hops, q.kind, q.dataset) == ("2wiki", 4, "comparison", "2wiki")


def test_musique(tmp_path):
    form, q = one(write(tmp_path / "x.jsonl", lines(MUSIQUE)))
    assert (form, q.answers, q.kind, q.hops) == ("musique", ("Oslo", "Kristiania"), "3hop1", 2)
    assert (q.gold, q.gold_titles) == ((1,), ("Oslo",))  # the other passage of that title is no gold one
    assert q.steps == (("Ann >> country", ("Norway",)), ("#1 >> capital", ("Oslo",)))
    found = read_question_file(write(tmp_path / "y.jsonl", lines(MUSIQUE, MUSIQUE | {"id": "u", "answerable": False})))
    assert (found.records, len(found.questions), found.dropped) == (2, 1, {"unanswerable": 1})


def test_ircot_bamboogle_and_plain(tmp_path):
    form, q = one(write(tmp_path / "dev.jsonl", lines(IRCOT)))
    assert (form, q.answers, q.dataset) == ("ircot", ("Chief of Protocol", "7", "1 May 1990"), "dev")
    assert q.gold_titles == ("Temple",)
    form, q = one(write(tmp_path / "hops.json", [HOPS]))
    assert (form, q.id, q.answers, q.hops, q.dataset) == ("bamboogle", "1", ("Ann",), 2, "bamboogle")
    assert q.steps == (("When?", ("1812",)), ("Who then?", ("ann", "anne")))
    row = {"idx": 4, "question": "Who?", "answer": "Ann", "gen_text_store": ""}
    form, q = one(write(tmp_path / "bamboogle.jsonl", lines(row)))
    assert (form, q.id, q.answers, q.dataset) == ("plain", "4", ("Ann",), "bamboogle")


@pytest.mark.parametrize(
    ("entry", "answers"),
    [
        ({"answer": ["14 May", "May 14"]}, ("14 May", "May 14")),
        ({"answer": "14 May"}, ("14 May",)),
        ({"answers": ["14 May ", "14 May"]}, ("14 May",)),
        ({"golden_answers": ["14 May"]}, ("14 May",)),
    ],
)
def test_plain_lines_take_a_text_or_a_list(tmp_path, entry, answers):
    form, q = one(write(tmp_path / "nq.jsonl", "\n" + lines({"question": "When?\u2028Now?", **entry}) + "\n"))
    assert (form, q.id, q.answers, q.dataset) == ("plain", "1", answers, "nq")
    assert q.text == "When?\u2028Now?"  # one line of the file, whatever Unicode calls a line


def test_items_of_simple_deep_searcher(tmp_path):
    item = {"id": "musique_1", "Question": "Who?", "answer": ["Ann"], "source": "musique", "Level": 2}
    form, q = one(write(tmp_path / "pool.json", [item]))
    assert (form, q.id, q.answers, q.dataset, q.level) == ("searcher", "musique_1", ("Ann",), "musique", "2")
    with pytest.raises(
        ValueError, match=r"pool.json: entry 0: field 'answer' must be a list of answers, not the text 'Ann'"
    ):
        read_questions(write(tmp_path / "pool.json", [item | {"answer": "Ann"}]))


def test_frames_as_table(tmp_path):
    links = """"['https://en.wikipedia.org/wiki/Jane_Eyre', ""https://en.wikipedia.org/wiki/O'Brien%20(x)""]\""""
    form, q = one(write(tmp_path / "test.tsv", "\ufeff" + FRAMES.format(links=links)))
    assert (form, q.id, q.text, q.answers) == ("frames", "0", 'How "tall"?', ("37th",))
    assert q.gold_titles == ("Jane Eyre", "O'Brien (x)")
    assert q.kind == "Tabular | Temporal"
    path = write(tmp_path / "test.csv", 'Prompt,Answer\n"Two\nlines?",x\nWhat?,y\n')
    assert [q.text for q in read_questions(path)] == ["Two\nlines?", "What?"]
    with pytest.raises(ValueError, match=r"test.tsv:2: field 'wiki_links' is no list of addresses"):
        read_questions(write(tmp_path / "test.tsv", FRAMES.format(links="[print('x')]")))
    with pytest.raises(ValueError, match=r"bad.csv:3: the row has not the 2 columns of the header"):
        read_questions(write(tmp_path / "bad.csv", "Prompt,Answer\nWhat?,y\nWhat?,y,z\n"))
    with pytest.raises(ValueError, match="neither JSON nor a table"):
        read_questions(write(tmp_path / "bad.csv", "What?,y\n"))


def test_squad_questions_have_their_own_passage(tmp_path):
    asked = [
        {"id": "a", "question": "What?", "answers": [{"text": "."}, {"text": "Blue"}, {"text": "Blue"}]},
        {"id": "b", "question": "And?", "answers": [], "is_impossible": True},
    ]
    tree = {"version": "1.1", "data": [{"title": "A_sky", "paragraphs": [{"context": "Blue.", "qas": asked}]}]}
    for indent in (None, 1):
        found = read_question_file(write(tmp_path / "x.json", json.dumps(tree, indent=indent)))
        (q,) = found.questions
        assert (found.form, found.records, found.dropped) == ("squad", 2, {"unanswerable": 1})
        assert (q.answers, found.empty_golds) == (("Blue",), 1)
        assert (q.contexts[0].title, q.contexts[0].text, q.gold_titles) == ("A sky", "Blue.", ("A sky",))


BAD = [
    ({"question": " \n"}, "the question is empty", "empty question"),
    ({"question": None}, "field 'question' is missing", "malformed"),
    ({"answer": ""}, "the right answer is missing or empty", "no answer"),
    ({"answer": None}, "field 'answer' is missing", "no answer"),
    ({"answer": []}, "the right answer is missing or empty", "no answer"),
    ({"answer": [""]}, "the right answer is missing or empty", "no answer"),
    ({"answer": "The"}, "the right answer 'The' normalises to nothing", "answer is nothing"),
    ({"answer": ["?!", "an"]}, "normalises to nothing", "answer is nothing"),
    ({"answer": 1999}, "field 'answer' is 1999, not a text", "malformed"),
    ({"answer": [1999]}, "field 'answer' holds 1999, which is no text", "malformed"),
    ({"answers": "Ann"}, "must be a list of answers, not the text 'Ann'", "malformed"),
    ({"answer": "['Ann', 'Anne']"}, "holds a list written as a text", "malformed"),
    ({"id": "1"}, "id '1' was there before; ids must be unique", "id again"),
    ({"question": r"What is \boxed{x}?"}, r"holds the control tag '\\\\boxed{'; escape_tags=True", "control tag"),
]


@pytest.mark.parametrize(("change", "message", "reason"), BAD)
def test_a_bad_entry_is_named_or_counted(tmp_path, change, message, reason):
    entry = {"id": "2", "question": "Who?", "answer": "Ann"}
    path = write(tmp_path / "x.jsonl", lines(entry | {"id": "1"}, entry | change))
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:2")
    assert message.replace("\\\\\\\\", "\\\\") in str(error.value)
    found = read_question_file(path, bad="drop")
    assert (found.records, [q.id for q in found.questions], found.dropped) == (2, ["1"], {reason: 1})


def test_the_id_stands_in_the_error(tmp_path):
    with pytest.raises(ValueError, match=r"entry 0 \(id 'h1'\): the right answer 'a' normalises to nothing"):
        read_questions(write(tmp_path / "x.json", [HOTPOT | {"answer": "a"}]))


@pytest.mark.parametrize(
    ("form", "entry", "message"),
    [
        ("hotpot", HOTPOT | {"supporting_facts": [["Nobody", 0]]}, r"\['Nobody', 0\], which is no \[title, number\]"),
        ("hotpot", HOTPOT | {"context": [["Toto"]]}, r"field 'context' must be a list of \[title, sentences\]"),
        ("hotpot", HOTPOT | {"context": [["Toto", "A band."]]}, r"holds no \[title, \[sentence"),
        ("hotpot", HOTPOT | {"context": {"title": ["a"], "sentences": []}}, "columns of unequal length"),
        ("musique", MUSIQUE | {"answer_aliases": "Kristiania"}, "'answer_aliases' must be a list of answers"),
        ("musique", MUSIQUE | {"paragraphs": [{"title": "x"}]}, r"paragraphs\[0\]: field 'paragraph_text' is missing"),
        ("bamboogle", HOPS | {"A2": "ann"}, "'A2' must be a list of answers, not the text 'ann'"),
        (
            "ircot",
            IRCOT | {"answers_objects": [{"spans": "x"}]},
            r"objects\[0\]: field 'spans' is 'x', not a list",
        ),
        ("plain", "text", "an object was expected, not str"),
    ],
)
def test_errors_name_the_field(tmp_path, form, entry, message):
    with pytest.raises(ValueError, match="x.json: entry 0.*" + message):
        read_questions(write(tmp_path / "x.json", [entry]), form)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no entries"),
        ("[]", "no entries"),
        ('[{"question": ', "x.json: not JSON"),
        ('{"question": "a", "answer": "b"}\n{"question"\n', "x.json:2: not JSON"),
        ('{"question"\n{"question": "a", "answer": "b"}\n', "x.json:1: not JSON"),
        ("[" * 100_000, "x.json: not JSON"),
        ([{"text": "a"}], "no known format of questions has these fields: text; formats: squad, ircot"),
        ([3], "no known format of questions has these fields: int"),
        ({"data": [{"paragraphs": "x"}]}, r"data\[0\]: field 'paragraphs' is missing or not a list"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "x.json", content))


def test_options_and_files(tmp_path):
    path = write(tmp_path / "x.json", [{"question": "Who?", "answer": "The"}])
    with pytest.raises(ValueError, match=r"none of 1 entries can be used: \{'answer is nothing': 1\}"):
        read_questions(path, bad="drop")
    with pytest.raises(ValueError, match="no format 'nq' of questions; formats: squad"):
        read_questions(path, "nq")
    with pytest.raises(ValueError, match="bad must be 'error' or 'drop', not 'skip'"):
        read_questions(path, bad="skip")
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_questions(path)
    with pytest.raises(AssertionError, match="not all accounted for"):
        QuestionFile("x", "plain", (), 1, {})
    assert len(FORMATS) == 9


@pytest.mark.parametrize("tag", CONTROL_TAGS)
def test_control_tags_are_refused_or_escaped(tmp_path, tag):
    path = write(tmp_path / "x.jsonl", lines({"question": f"a {tag} b {tag}?", "answer": "x"}))
    with pytest.raises(ValueError, match=r"x.jsonl:1 .*control tag"):
        read_questions(path)
    (q,) = read_questions(path, escape_tags=True)
    assert tag not in q.text
    assert not any(t in q.text for t in CONTROL_TAGS)
    assert q.text.startswith("a &")
    (q,) = read_questions(path, tags=("<other>",))
    assert tag in q.text


def test_a_sample_depends_on_seed_and_ids_alone(tmp_path):
    rows = [{"id": f"q{i}", "question": "Who?", "answer": "Ann"} for i in range(300)]
    questions = read_questions(write(tmp_path / "x.jsonl", lines(*rows)))
    chosen = [q.id for q in sample_questions(questions, 40, seed=3)]
    # Worked out once, with hashlib alone: what any version must choose.
    assert chosen[:5] == ["q9", "q22", "q24", "q30", "q32"]
    assert chosen == sorted(chosen, key=lambda id: int(id[1:]))
    backwards = sample_questions(questions[::-1], 40, seed=3)
    assert {q.id for q in backwards} == set(chosen)
    assert {q.id for q in sample_questions(questions, 40, seed=4)} != set(chosen)
    assert set(chosen) <= {q.id for q in sample_questions(questions, 41, seed=3)}
    assert len(sample_questions(questions, 300)) == 300
    for count in (0, 301):
        with pytest.raises(ValueError, match="there are 300"):
            sample_questions(questions, count)
    with pytest.raises(ValueError, match="1 ids of questions occur twice"):
        check_ids([*questions, questions[0]])


def folder(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.fail(f"set {variable} to a folder of question files (this test needs it)")
    return Path(path)


def report(found: QuestionFile) -> None:
    counts = f"{found.records} entries, {len(found.questions)} questions, dropped {dict(found.dropped)}"
    print(f"{found.path}: {found.form}, {counts}, {found.empty_golds} empty answers left out")


@pytest.mark.real_data
def test_multihop_files_load_whole():
    files = sorted(folder("JAXREC_MULTIHOP").glob("*.json*"))
    assert files
    for file in files:
        found = read_question_file(file)
        report(found)
        assert found.form in ("hotpot", "2wiki", "ircot", "musique")
        assert found.dropped == {}
        for q in found.questions:
            assert q.gold
            assert q.gold_titles
            assert len(q.contexts) >= 2
            assert found.form != "musique" or len(q.steps) == len(q.gold) == int(q.kind[0]) == q.hops
            assert found.form != "2wiki" or q.hops in (2, 4)
        assert len(sample_questions(found.questions, 50)) == 50


@pytest.mark.real_data
def test_bamboogle_files_agree():
    files = sorted(folder("JAXREC_BAMBOOGLE").glob("*.json*"))
    read = {found.form: found for found in map(read_question_file, files)}
    for found in read.values():
        report(found)
        assert found.dropped == {}
    assert set(read) == {"plain", "bamboogle"}
    plain, hops = read["plain"].questions, read["bamboogle"].questions
    assert [(q.text, q.answers) for q in plain] == [(q.text, q.answers) for q in hops]
    assert all(len(q.steps) == 2 for q in hops)


@pytest.mark.real_data
def test_squad_questions_load_whole():
    found = read_question_file(os.environ.get("JAXREC_SQUAD") or pytest.fail("set JAXREC_SQUAD to dev-v1.1.json"))
    report(found)
    assert found.form == "squad"
    assert found.dropped == {}
    for q in found.questions:
        (passage,) = q.contexts
        assert all(answer in passage.text for answer in q.answers)
