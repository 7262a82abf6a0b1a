import pytest

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Instance, Turn, instances

A, B = 0, 1
GREETING = Turn(SYSTEM, "Hi, try A.", (A,))


def talk(*turns):
    return Dialogue("d", tuple(turns))


def test_a_system_turn_with_items_is_an_instance_of_what_stands_before_it():
    wish, told = Turn(USER, "Something dark?"), Turn(SYSTEM, "A or B, or A.", (A, B, A))
    made, skipped = instances([talk(wish, told, Turn(USER, "No."), Turn(SYSTEM, "Oh."))])
    assert made == [Instance(Dialogue("d:1", (wish,)), (A, B))]
    assert skipped == {"no item of the catalogue": 1}


def test_the_first_turn_can_be_no_instance():
    assert instances([talk(GREETING)]) == ([], {"no turn before it": 1})


@pytest.mark.parametrize(("drop", "before"), [(False, 3), (True, 2)])
def test_a_turn_that_repeats_an_item_is_no_instance(drop, before):
    turns = GREETING, Turn(USER, "I know A", (A,)), Turn(SYSTEM, "A!", (A,)), Turn(SYSTEM, "B?", (B,))
    made, skipped = instances([talk(*turns)], drop_skipped_turns=drop)
    assert [(i.dialogue.id, i.labels, len(i.dialogue.turns)) for i in made] == [("d:3", (B,), before)]
    assert skipped == {"no turn before it": 1, "an item was named before": 1}
    assert len(instances([talk(*turns)], only_new=False)[0]) == 2


def test_roles_and_empty_instances_are_refused():
    with pytest.raises(ValueError, match="'narrator'"):
        Turn("narrator", "x")
    with pytest.raises(ValueError, match="no label"):
        Instance(talk(GREETING), ())
    with pytest.raises(ValueError, match="no turn"):
        Instance(Dialogue("d", ()), (A,))
