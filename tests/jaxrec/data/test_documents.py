"""Questions over many documents from the field's JSON formats, and what a broken entry is called."""

import json

import numpy as np
import pytest

from jaxrec.data.documents import read_questions


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def squad(passages=6):
    paragraphs = [
        {
            "context": f"Passage {i} tells of thing {i}.",
            "qas": [
                {
                    "id": f"q{i}",
                    "question": f" What of {i}? ",
                    "answers": [{"text": f"thing {i}", "answer_start": 17}] * 2 + [{"text": f"{i}", "answer_start": 8}],
                }
            ],
        }
        for i in range(passages)
    ]
    return {"version": "1.1", "data": [{"title": "A_title", "paragraphs": paragraphs}]}


def hotpot(entries=3):
    return [
        {
            "_id": f"h{e}",
            "question": f"Which {e}?",
            "answer": f"answer {e}",
            "context": [[f"T{e}{d}", [f"First of {e} {d}.", f" Second of {e} {d}."]] for d in range(4)],
            "supporting_facts": [[f"T{e}1", 0], [f"T{e}3", 1], [f"T{e}3", 0]],
        }
        for e in range(entries)
    ]


def plain():
    return {"question": "Who?", "answers": ["Ann"], "documents": [{"title": "t", "text": "Ann."}, {"text": "Bob."}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_squad_puts_the_own_passage_among_others(tmp_path):
    path = write(tmp_path / "dev.json", squad())
    found = read_questions(path, "squad", rng(), documents=4, count=5)
    assert len({q.id for q in found}) == 5
    for q in found:
        number = q.id[1:]
        assert q.question == f"What of {number}?"
        assert q.answers == (f"thing {number}", number)
        assert len({d.text for d in q.documents}) == 4
        (gold,) = q.gold
        assert q.documents[gold].text == f"Passage {number} tells of thing {number}."
        assert q.documents[gold].title == "A title"
    assert len({q.gold for q in found}) > 1
    assert read_questions(path, "squad", rng(), 4, 5) == found
    assert [q.id for q in read_questions(path, "squad", rng(), 6, 5)] == [q.id for q in found]
    assert [q.id for q in read_questions(path, "squad", rng(1), 4, 5)] != [q.id for q in found]
    alone = read_questions(path, "squad", rng())
    assert (len(alone), {len(q.documents) for q in alone}) == (6, {1})


def test_hotpot_keeps_its_documents_or_fills_up(tmp_path):
    path = write(tmp_path / "hotpot.json", hotpot())
    for q in read_questions(path, "hotpot", rng()):
        e = q.id[1:]
        assert [d.title for d in q.documents] == [f"T{e}{d}" for d in range(4)]
        assert q.documents[1].text == f"First of {e} 1. Second of {e} 1."
        assert q.gold == (1, 3)
    for q in read_questions(path, "hotpot", rng(), documents=9):
        assert len({d.title for d in q.documents}) == 9
        assert {q.documents[i].title for i in q.gold} == {f"T{q.id[1:]}1", f"T{q.id[1:]}3"}


def test_plain_lines(tmp_path):
    rows = [{**plain(), "gold": [0, 0]}, {**plain(), "id": "x", "gold": [1]}]
    path = write(tmp_path / "set.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    found = {q.id: q for q in read_questions(path, "jsonl", rng())}
    assert set(found) == {"1", "x"}
    assert found["1"].gold == (0,)
    assert [(d.title, d.text) for d in found["x"].documents] == [("t", "Ann."), ("", "Bob.")]


def test_too_few_questions_or_documents(tmp_path):
    path = write(tmp_path / "dev.json", squad())
    with pytest.raises(ValueError, match=r"dev\.json: 6 questions, 7 were asked for"):
        read_questions(path, "squad", rng(), 2, 7)
    with pytest.raises(ValueError, match="7 documents were asked for, but the file gives no more than 6"):
        read_questions(path, "squad", rng(), 7, 1)
    with pytest.raises(ValueError, match="no format 'csv' of documents; formats: squad, hotpot, jsonl"):
        read_questions(path, "csv", rng())
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.json", "squad", rng())


def broken_squad(change):
    content = squad(2)
    change(content["data"][0]["paragraphs"][1])
    return content


def broken_hotpot(**fields):
    content = hotpot(2)
    content[1].update(fields)
    return content


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("squad", "{", r"set: not JSON"),
        ("squad", {"rows": []}, r"set: field 'data' is missing, empty or not a list"),
        ("squad", broken_squad(lambda p: p.pop("context")), r"data\[0\]\.paragraphs\[1\]: field 'context' is missing"),
        (
            "squad",
            broken_squad(lambda p: p["qas"][0].update(answers=[])),
            r"paragraphs\[1\]\.qas\[0\]: field 'answers'",
        ),
        (
            "squad",
            broken_squad(lambda p: p["qas"][0].update(answers=[{"text": " "}])),
            r"qas\[0\]: field 'answers' holds ' '",
        ),
        ("squad", broken_squad(lambda p: p["qas"][0].update(id="q0")), "field 'id' of two questions is the same"),
        (
            "squad",
            broken_squad(lambda p: p.update(qas=[3])),
            r"qas\[0\]: an object with 'answers' was expected, not int",
        ),
        ("hotpot", {}, "a list of questions was expected"),
        ("hotpot", broken_hotpot(answer=3), "entry 1: field 'answer' is missing, empty or not a text"),
        ("hotpot", broken_hotpot(context=[["T", "text"]]), r"entry 1: field 'context' holds no \[title"),
        ("hotpot", broken_hotpot(context=[["T", [""]]]), "entry 1: field 'context' holds no sentence at 0"),
        ("hotpot", broken_hotpot(supporting_facts=[["X", 0]]), r"entry 1: field 'supporting_facts' names \['X', 0\]"),
        ("hotpot", broken_hotpot(_id="h0"), "entry 1: field '_id' is 'h0' again"),
        ("jsonl", "\n{", r"set:2: not JSON"),
        ("jsonl", json.dumps([1]), r"set:1: an object with 'question' was expected, not list"),
        ("jsonl", json.dumps(plain()), r"set:1: field 'gold' is missing"),
        ("jsonl", json.dumps({**plain(), "gold": [2]}), r"set:1: field 'gold' holds 2, which is no number of its 2"),
        ("jsonl", json.dumps({**plain(), "gold": [True]}), r"set:1: field 'gold' holds True"),
        ("jsonl", json.dumps({**plain(), "answers": [""], "gold": [0]}), r"set:1: field 'answers' holds ''"),
        (
            "jsonl",
            json.dumps({**plain(), "documents": [{"title": "t", "text": ""}], "gold": [0]}),
            r"set:1: documents\[0\]: field 'text' is missing, empty",
        ),
    ],
)
def test_what_is_not_as_it_should_be_is_named(tmp_path, form, content, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "set", content), form, rng())
