"""Catalogues from the field's files: what each form says, which titles become one, and what a broken file is called."""

import json

import pytest

from jaxrec.data.catalogue_files import MERGED, read_catalogue, write_catalogue
from jaxrec.data.item_catalogue import ItemCatalogue

HEAT = {"title": "Heat", "year": "1995", "genre": ["crime"], "star": ["Al Pacino"], "plot": "A  heist.", "writer": []}


def written(tmp_path, text, name="items"):
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_an_object_of_titles_is_grsus(tmp_path):
    found, counts = read_catalogue(written(tmp_path, {"Heat (1995)": HEAT, "Alien": {"plot": None}}))
    assert found.titles == ("Heat (1995)", "Alien")
    assert found.text(0) == "Heat (1995)\n  - genre: crime\n  - star: Al Pacino\n  - plot: A heist."
    assert found.attributes[0]["year"] == ("1995",)
    assert found.attributes[1] == {}
    assert counts == {"items": 2}


def test_facts_by_name_are_kept_for_what_may_be_recommended(tmp_path):
    facts = {
        "0": {"name": "Heat", "actor": ["Al Pacino", "Al Pacino"], "language": ["English"], "year": 1995},
        "7": {"name": "Actors' Studio"},
        "9": {"name": " "},
    }
    path = written(tmp_path, facts, "x_id2info.json")
    assert read_catalogue(path)[1] == {"items": 2, "items without a title, left out": 1}
    written(tmp_path, [5, 6], "x_item_ids.json")
    written(tmp_path, {"Heat": 5, "Alien": 6, "Actors' Studio": 7, "horror": 8}, "x_entity2id.json")
    found, counts = read_catalogue(path, order=("star", "language"))
    assert found.titles == ("Heat", "Alien")
    assert found.text(0) == "Heat\n  - star: Al Pacino\n  - language: English"
    assert found.attributes == ({"star": ("Al Pacino",), "language": ("English",), "year": ("1995",)}, {})
    assert counts["items that may not be recommended, left out"] == 1
    assert counts["items without any facts"] == 1


def test_tables_name_films_with_their_year(tmp_path):
    table = (
        "title\tyear\tgenre\tactors\tshort_plot\tlong_plot\trating\n"
        'Heat\t1995.0\tCrime, Drama\tAl Pacino,Val Kilmer\t\tA heist, and more.\t8\n"Up"\t\t\t\t\t\t\n'
    )
    found, _ = read_catalogue(written(tmp_path, table))
    assert found.titles == ("Heat (1995)", "Up")
    assert found.attributes[0] == {
        "year": ("1995.0",), "genre": ("Crime", "Drama"), "star": ("Al Pacino", "Val Kilmer"),
        "plot": ("A heist, and more.",),
    }  # fmt: skip
    mentions = 'movieId,movieName,nbMentions\n1,"Me, Myself (2000)",3\n2,  It (2017) ,4\n3,,1\n'
    found, counts = read_catalogue(written(tmp_path, mentions))
    assert found.titles == ("Me, Myself (2000)", "It (2017)")
    assert counts["items without a title, left out"] == 1


def test_titles_written_alike_become_one_item_but_years_tell_apart(tmp_path):
    facts = {
        "a": {"name": "WALL·E", "genre": ["family"], "plot": ""},
        "b": {"name": "WALL-E", "genre": ["robots", "family"], "plot": "Rubbish.", "star": ["Burtt"]},
        "c": {"name": "wall e", "plot": "Waste."},
        "d": {"name": "It (1990)"},
        "e": {"name": "It (2017)"},
        "f": {"name": "It (2017)"},
    }
    found, counts = read_catalogue(written(tmp_path, facts))
    assert found.titles == ("WALL·E", "It (1990)", "It (2017)")
    assert found.attributes[0] == {"genre": ("family", "robots"), "plot": ("Rubbish.",), "star": ("Burtt",)}
    assert counts[MERGED] == 3


def test_a_catalogue_comes_back_as_it_was_written(tmp_path):
    titles = ["Up", "🎬  Night", "فيلم", "1\u2028 2"]
    attributes = [{"genre": ["a", "a"], "plot": "b"}, {}, {"star": [f"person {i}" for i in range(3000)]}, {"year": "1"}]
    path = tmp_path / "items.jsonl"
    write_catalogue(path, ItemCatalogue(titles, attributes))
    found, counts = read_catalogue(path)
    assert (found.titles, counts) == (tuple(titles), {"items": 4})
    assert found.attributes == ItemCatalogue(titles, attributes).attributes
    with pytest.raises(ValueError, match="'title' cannot be"):
        write_catalogue(path, ItemCatalogue(["Up"], [{"title": "x"}]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("{}", "the catalogue is empty"),
        ('[{"title": "Up"}]', "no catalogue: it must be"),
        ("name,year\nUp,2009\n", "a column 'title'"),
        ("title\tyear\nUp\t2009\nHeat\n", r"items:3: the row has not the 2 columns"),
        ('{"title": "Up"}\n{"title": "He', r"items:2: not JSON"),
        ('{"Up": {"genre": ["fam', r"items:1: not JSON"),
        (lines({"title": "Up"}, {"name": "Heat"}), r"items:2: field 'title' is missing"),
        (lines({"title": "Up"}, {"title": 7}), r"items:2: field 'title' must be a text, not int"),
        (lines({"title": " "}), r"items:1: field 'title' is empty"),
        (lines({"title": "Up"}, {"title": "UP!"}), r"items: 1 titles name several items: 'Up' = 'UP!'"),
        (lines({"title": "Up", "genre": [1]}), r"items:1: 'Up': attribute 'genre' must be a text or a list of texts"),
        (lines({"title": "Up", "genre": True}), r"attribute 'genre' must be a text or a list of texts, not True"),
        (json.dumps({"Up": {"star": {"a": 1}}}), r"items: 'Up': attribute 'star'"),
        (json.dumps({"1": {"name": 5}}), r"items: the name of '1' must be a text"),
        (lines({"title": "Up \ud83d"}), r"items:1: field 'title' holds half a character"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        read_catalogue(written(tmp_path, text))


def test_files_of_ids_must_fit(tmp_path):
    path = written(tmp_path, {"0": {"name": "Up"}}, "id2info.json")
    written(tmp_path, {"0": 1}, "item_ids.json")
    with pytest.raises(ValueError, match=r"item_ids\.json: a list was expected, not dict"):
        read_catalogue(path)
    written(tmp_path, [0], "item_ids.json")
    with pytest.raises(FileNotFoundError, match="entity2id"):
        read_catalogue(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "items"
    path.write_bytes(b'{"title": "\xff"}\n')
    with pytest.raises(ValueError, match="items: not UTF-8"):
        read_catalogue(path)
