"""Replies that must fit: the papers' rules, exact types, bounded tries, nothing dropped."""

import collections

import pytest

from jaxrec.tools.teacher import (
    Checked,
    Failure,
    Field,
    Misfit,
    Reply,
    Sampling,
    after_marker,
    ask_checked,
    ask_text,
    json_fields,
    parse_json,
    true_or_false,
)

KEY_POINTS = json_fields({"domain": str, "key_points": Field([str], least=2, most=4)})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('thinking {"a": 0} </think> more </think>\n {"a": 1} \n', {"a": 1}),
        ('{"a": 1}\n\nI hope that helps.', {"a": 1}),
        ('{"a": 1}\n \t\nAnd more {', {"a": 1}),
        ("[1,\n\n2]", [1, 2]),  # whole: decoded before the blank line counts
    ],
)
def test_json_is_read_by_the_rules_of_query_sampling(text, value):
    """arXiv 2505.16834: behind the last end-of-thinking marker; else the part before the first blank line."""
    assert parse_json(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "{", "Here it is: {}", '```json\n{"a": 1}\n```', '\n\nx\n\n{"a": 1}', '{"a": NaN}', "[" * 100_000, "9" * 5000],
)
def test_what_is_no_json_is_a_misfit(text):
    with pytest.raises(Misfit, match="not JSON"):
        parse_json(text)


def test_fields_have_names_types_and_bounds():
    assert KEY_POINTS('{"domain": "film", "key_points": ["director", "age"], "note": 1}') == {
        "domain": "film", "key_points": ["director", "age"],
    }  # fmt: skip
    form = json_fields({
        "score": Field(float, least=0, most=1), "pick": ("yes", "no"), "n": Field(int, optional=True),
        "who": {"name": str}, "sure": bool,
    })  # fmt: skip
    value = form('{"score": 1, "pick": "no", "who": {"name": "x"}, "sure": true}')
    assert value == {"score": 1.0, "pick": "no", "n": None, "who": {"name": "x"}, "sure": True}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "reply is [], not an object"),
        ('{"key_points": ["a", "b"]}', "no field 'domain'"),
        ('{"domain": null, "key_points": ["a", "b"]}', "no field 'domain'"),
        ('{"domain": 1, "key_points": ["a", "b"]}', "reply.domain is 1, not str"),
        ('{"domain": " ", "key_points": ["a", "b"]}', "reply.domain is blank"),
        ('{"domain": "x", "key_points": "a, b"}', "not a list"),
        ('{"domain": "x", "key_points": ["a"]}', "less than 2"),
        ('{"domain": "x", "key_points": ["a", "b", "c", "d", "e"]}', "more than 4"),
        ('{"domain": "x", "key_points": ["a", true]}', "reply.key_points[1] is True, not str"),
    ],
)
def test_misfits_name_the_place(text, why):
    with pytest.raises(Misfit) as caught:
        KEY_POINTS(text)
    assert why in str(caught.value)


def test_numbers_and_choices_are_exact():
    for form, text in ((int, "true"), (int, "1.0"), (float, '"1"'), (bool, "1"), ((1, 2), "true"), (("a",), '"b"')):
        with pytest.raises(Misfit):
            json_fields({"x": form})(f'{{"x": {text}}}')


def test_a_verdict_is_exactly_true_or_false():
    check = true_or_false()
    assert check("True") is True
    assert check("I think it is False. </think>\n False\n") is False
    for text in ("True.", "true", "TRUE", "True\nbecause", "", "The answer is True"):
        with pytest.raises(Misfit):
            check(text)


def test_a_summary_stands_behind_the_last_marker():
    check = after_marker()
    assert check("**Final Information**\nno\n**Final Information**\n`Born in\n1901.`\n") == "Born in 1901."
    assert check("plan </think> All of it\nhere") == "All of it here"
    with pytest.raises(Misfit):
        check("words **Final Information**\n ``` ")
    with pytest.raises(Misfit, match="no '"):
        after_marker(required=True)("words")


class Says:
    """Replies by a function of (text, seed); remembers what it was asked."""

    id = "says"

    def __init__(self, function):
        self.function, self.asked = function, []

    def ask(self, requests, done=None):
        self.asked.append([(r.messages[-1].content, r.sampling.seed, r.sampling.temperature) for r in requests])
        said = [self.function(r.messages[-1].content, r.sampling.seed) for r in requests]
        return [s if isinstance(s, Failure) else Reply((s,), ("stop",)) for s in said]


def test_what_does_not_fit_is_asked_again_with_another_seed_and_then_counted():
    def say(text, seed):
        return {
            "good": "True",
            "late": "maybe" if seed < 9 else "False",
            "never": "True.",
            "down": Failure("server", "x"),
        }[text]

    teacher, counts = Says(say), collections.Counter()
    requests = [ask_text("judge", text, sampling=Sampling(seed=7)) for text in ("never", "good", "late", "down")]
    out = ask_checked(teacher, requests, true_or_false(), tries=3, temperature=1.0, counts=counts)
    assert out[0] == Failure("invalid", "'True.' is neither True nor False", 3)
    assert out[1] == Checked(True, Reply(("True",), ("stop",)), 1)
    assert (out[2].value, out[2].tries) == (False, 3)
    assert out[3] == Failure("server", "x")
    assert teacher.asked == [
        [("never", 7, 0.0), ("good", 7, 0.0), ("late", 7, 0.0), ("down", 7, 0.0)],
        [("never", 8, 1.0), ("late", 8, 1.0)],
        [("never", 9, 1.0), ("late", 9, 1.0)],
    ]
    assert counts == {"fitting": 2, "invalid": 1, "server": 1, "misfits": 5}


def test_several_replies_and_no_tries_are_refused():
    with pytest.raises(ValueError, match="request 0 asks for 2"):
        ask_checked(Says(str), [ask_text("judge", "x", n=2)], true_or_false())
    with pytest.raises(ValueError, match="tries"):
        ask_checked(Says(str), [], true_or_false(), tries=0)
    assert ask_checked(Says(str), [], true_or_false()) == []


def test_a_defect_of_a_check_is_not_taken_for_a_misfit():
    def broken(text):
        raise KeyError(text)

    with pytest.raises(KeyError):
        ask_checked(Says(lambda text, seed: "x"), [ask_text("judge", "x")], broken)
