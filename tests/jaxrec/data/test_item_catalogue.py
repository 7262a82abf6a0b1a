import pytest

from jaxrec.data.item_catalogue import ItemCatalogue, Match

TITLES = ["Toy Story (1995)", "Toy Story 2 (1999)", "Alien (1979)", "Amélie", "Heat (1995)"]


def catalogue(titles=TITLES, **attributes):
    return ItemCatalogue(titles, [attributes] * len(titles))


def test_a_misspelt_title_finds_its_item_and_a_second_one_the_closest_free():
    assert [m.item for m in catalogue().match(["Toy Stroy (1995)", "Toy Story (1995)"])] == [0, 1]
    assert catalogue().match(["alien 1979"]) == [Match(2, 100.0)]


def test_every_name_gets_an_item_of_its_own_until_none_is_left():
    found = catalogue().match(["Alien (1979)"] * 7)
    assert sorted(m.item for m in found) == [0, 1, 2, 3, 4]
    assert [m.repeated for m in found] == [False, True, True, True, True]
    assert [m.repeated for m in catalogue().match(["Heat", "Alien", "heat (1995)"])] == [False, False, True]
    assert [m.repeated for m in catalogue(TITLES[:2]).match(["Toy Story (1995)", "zzz qqq"])] == [False, False]


def test_names_far_from_all_titles_can_be_left_out():
    assert len(catalogue().match(["zzz qqq"])) == 1
    assert catalogue().match(["zzz qqq"], min_ratio=60) == []


def test_text_shows_attributes_in_order_and_leaves_out_empty_ones():
    attributes = {"plot": "A shark.", "genre": ["horror", "drama"], "star": [], "year": "1975"}
    assert ItemCatalogue(["Jaws"], [attributes]).text(0) == "Jaws\n  - genre: horror, drama\n  - plot: A shark."
    assert catalogue(genre="x").listing([2, 3]) == "1. Alien (1979)\n  - genre: x\n2. Amélie\n  - genre: x"


@pytest.mark.parametrize(
    ("titles", "words"),
    [
        ([], "empty"),
        (["Heat", "HEAT"], "'Heat' = 'HEAT'"),
        (["Heat", "  "], "empty title"),
        (["Heat (1995)", "Heat, 1995", "Heat"], "1 titles name several"),
    ],
)
def test_titles_that_cannot_be_told_apart_are_refused(titles, words):
    with pytest.raises(ValueError, match=words):
        catalogue(titles)


def test_an_attribute_that_is_no_text_names_title_and_attribute():
    with pytest.raises(TypeError, match=r"'Heat'.*'genre'"):
        ItemCatalogue(["Heat"], [{"genre": [1]}])


def test_titles_in_other_scripts_are_told_apart():
    made = catalogue(["فيلم", "🎬 Night", "夜", "?!"])
    assert [m.item for m in made.match(["夜", "night", "?!", "فيلم"])] == [2, 1, 3, 0]
