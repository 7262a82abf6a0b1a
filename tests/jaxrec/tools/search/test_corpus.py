"""Passages from files of the field's forms, what is wrong with them, and the store that indexes share."""

import gzip
import json
import random

import pytest

from jaxrec.tools.search import Passage, PassageStore, Report, build_store, read_passages, split_article

WANTED = [Passage("1", "Ada", 'She said "no".'), Passage("2", "Karel Čapek", "Robots.")]


def read(path, form, **options):
    return list(read_passages(path, form, **options))


def test_formats(tmp_path):
    lines = {
        "jsonl": [
            json.dumps({"id": 1, "title": "Ada", "text": 'She said "no".', "more": 0}),
            json.dumps({"_id": "2", "contents": '"Karel Čapek"\nRobots.'}, ensure_ascii=False),
        ],
        "dpr": ["id\ttext\ttitle", '1\t"She said ""no""."\tAda', "2\tRobots.\tKarel Čapek"],
        "kilt": ['1\tAda   She said "no".', "2\tKarel Čapek   Robots."],
    }
    for form, rows in lines.items():
        for end, name in (("\n", f"{form}.txt"), ("\r\n", f"{form}.crlf")):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + end.join(rows).encode())
            assert read(tmp_path / name, form) == WANTED
        with gzip.open(tmp_path / f"{form}.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join([*rows, ""]))
        assert read(tmp_path / f"{form}.gz", form, progress=True) == WANTED
    squad = {"data": [{"title": "A_b", "paragraphs": [{"context": "x"}, {"context": "y", "qas": []}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert read(tmp_path / "squad.json", "squad") == [Passage("0.0", "A b", "x"), Passage("0.1", "A b", "y")]
    with pytest.raises(ValueError, match="no format 'tsv'"):
        read_passages(tmp_path / "x", "tsv")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_passages(tmp_path / "x", "dpr")


GOOD = b'{"id": "g", "title": "t", "text": "x"}'


@pytest.mark.parametrize(
    ("form", "line", "reason"),
    [
        ("jsonl", b'{"id": "a", "title": "t", "text": " "}', "empty passage"),
        ("jsonl", b'{"id": "a", "title": "", "text": "x"}', "missing title"),
        ("jsonl", b'{"id": "a", "contents": "no title here"}', "missing title"),
        ("jsonl", b'{"id": "g", "title": "t", "text": "y"}', "duplicate id"),
        ("jsonl", b'{"title": "t", "text": "y"}', "missing id"),
        ("jsonl", b'{"id": true, "title": "t", "text": "y"}', "missing id"),
        ("jsonl", b'{"id": " ", "title": "t", "text": "y"}', "missing id"),
        ("jsonl", b'{"id": "a", "title": "t"}', "missing text"),
        ("jsonl", b'{"id": "a", "title": 3, "text": "y"}', "missing text"),
        ("jsonl", b'{"id": "a", "title": "t", "text": "\xff"}', "undecodable bytes"),
        ("jsonl", b'{"id": "a", "title": "t", "text": "\\ud800"}', "undecodable text"),
        ("jsonl", b'{"id": "a", ', "not JSON"),
        ("jsonl", b"[1]", "no object"),
        ("dpr", b"1\ttext", "wrong columns"),
        ("dpr", b"1\ttext\t", "missing title"),
        ("kilt", b"1 no tab", "wrong columns"),
        ("kilt", b"1\tno gap", "missing title"),
        ("kilt", b"1\ttitle   ", "empty passage"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path, form, line, reason):
    first = {"jsonl": GOOD, "dpr": b"id\ttext\ttitle", "kilt": b"g\tt   x"}[form]
    last = {"jsonl": GOOD.replace(b'"g"', b'"h"'), "dpr": b"h\tx\tt", "kilt": b"h\tt   x"}[form]
    path = tmp_path / "file"
    path.write_bytes(b"\n".join([first, b"", line, last]))
    with pytest.raises(ValueError, match=rf"file, line 3: {reason}"):
        read(path, form)
    with pytest.raises(ValueError, match="give it a report"):
        read(path, form, drop=True)
    report = Report()
    kept = read(path, form, drop=True, report=report)
    assert [p.id for p in kept] == (["h"] if form == "dpr" else ["g", "h"])
    assert report.read == len(kept)
    assert report.dropped == {reason: 1}
    assert str(report) == f"{len(kept)} passages, 1 dropped: 1 {reason} (first: {path}, line 3)"
    if reason == "missing title":
        assert len(read(path, form, require_title=False)) == len(kept) + 1


def test_headers_and_whole_files(tmp_path):
    path = tmp_path / "file"
    path.write_text("1\tx\tt\n")
    with pytest.raises(ValueError, match="line 1: DPR's files begin with a header"):
        read(path, "dpr")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "'data' is missing"),
        ('{"data": [{"title": "t"}]}', r"data\[0\]: field 'paragraphs'"),
        ('{"data": [{"title": "t", "paragraphs": [{}]}]}', r"data\[0\].paragraphs\[0\]: missing text"),
        ('{"data": [{"title": 1, "paragraphs": [{"context": "x"}]}]}', r"data\[0\].paragraphs\[0\]: missing text"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path, "squad")


def test_split_article():
    words = [f"w{i}" for i in range(250)]
    parts = split_article(" ".join(words))
    assert [len(p.split()) for p in parts] == [100, 100, 50]
    assert " ".join(parts).split() == words
    page = ["Title\n", "First  words.", "Section::::History.", "BULLET::::- item"]
    assert split_article(page, 3) == ["Title First words.", "History. - item"]
    assert split_article("", 3) == split_article("Section::::", 3) == []
    with pytest.raises(ValueError, match="words=0"):
        split_article("x", 0)


def passages(n):
    ids = [str(i) for i in range(n)]
    random.Random(0).shuffle(ids)
    return [Passage(i, f"t{i}", f"line\nof {i} \u2028é", url=f"http://x/{i}") for i in ids]


def test_store_round_trip_order_and_hash(tmp_path):
    given = passages(120)
    store = build_store(iter(given), tmp_path / "a", progress=True)
    assert len(store) == 120
    assert list(store) == given
    assert [given[i].id for i in store.order] == sorted(p.id for p in given)
    assert all(store.order[store.ranks[i]] == i for i in range(120))
    assert [p.score for p in store.hits([3, 4], [0.5, 0.25])] == [0.5, 0.25]
    again = PassageStore(tmp_path / "a")
    again.verify()
    assert again.hash == store.hash == build_store(given, tmp_path / "b").hash
    assert build_store(given[1:], tmp_path / "c").hash != store.hash
    with pytest.raises(IndexError, match="120 of 120"):
        store[120]
    with pytest.raises(FileExistsError, match="there already"):
        build_store(given, tmp_path / "a")


def test_store_refuses(tmp_path):
    with pytest.raises(ValueError, match="corpus is empty"):
        build_store([], tmp_path / "a")
    with pytest.raises(ValueError, match="passages 0 and 2 have the same id 'x'"):
        build_store([Passage("x", "", "1"), Passage("y", "", "2"), Passage("x", "", "3")], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []  # nothing half written is left
    with pytest.raises(FileNotFoundError, match="no finished passage store"):
        PassageStore(tmp_path / "a")
    build_store(passages(3), tmp_path / "a")
    file = tmp_path / "a" / "passages.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not as long"):
        PassageStore(tmp_path / "a")
    file.write_bytes(whole.replace(b"line", b"lime"))
    with pytest.raises(ValueError, match="not what was written"):
        PassageStore(tmp_path / "a").verify()
    file = tmp_path / "a" / "corpus.json"
    facts = file.read_text()
    file.write_text(facts.replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="version 9, not 'passage store', version 1"):
        PassageStore(tmp_path / "a")
    file.write_text(facts[:10])
    with pytest.raises(ValueError, match="damaged"):
        PassageStore(tmp_path / "a")
