"""Control tags: what the policy asked and answered, and that text from outside can do neither."""

import unicodedata

import pytest

from rl.envs import tags
from rl.envs.tags import R1_SEARCHER, R1_SEARCHER_PP, SIMPLE_DEEP_SEARCHER, STYLES, TOOL

SDS, PP = SIMPLE_DEEP_SEARCHER, R1_SEARCHER_PP
OPEN, CLOSE = SDS.query_open, SDS.query_close


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (f"so {OPEN}a{CLOSE}", "a"),
        (f"{OPEN}a{CLOSE} and {OPEN}b{CLOSE}", "b"),  # two pairs: the last
        (f"so {OPEN}a", None),  # not closed
        (f"so a{CLOSE}", None),  # not opened
        (f"{OPEN}a{CLOSE} b{CLOSE}", None),  # the last close tag has no open tag of its own
        (f"{OPEN} \n {CLOSE}", ""),
        (f'{OPEN}""{CLOSE}', ""),
        (f"{OPEN}{OPEN}a{CLOSE}", ""),  # nested
        (f"{OPEN}a</think>b{CLOSE}", ""),
        (f"{OPEN} a \n b {CLOSE}", "a b"),
        (f'{OPEN}"a b"{CLOSE}.', '"a b"'),  # the rest of the token that closed it; web search reads the quotes
    ],
)
def test_queries(text, query):
    assert tags.parse_query(text, SDS) == query


def test_r1_queries_lose_their_quotes():
    assert tags.parse_query('<external> "who  wrote" it\'s </external>', PP) == "who wrote it's"
    assert tags.parse_query("<external>''</external>", PP) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{A}", ["A"]),
        (r"\boxed{\text{x}} \boxed{ B }", [r"\text{x}", "B"]),
        (r"\boxed{A", []),
        (r"\boxed{A \boxed{B}", ["B"]),  # the first never closes
        (r"\boxed{\boxed{B}}", [r"\boxed{B}"]),
        (r"\boxed{a\}b}", [r"a\}b"]),
        (r"\boxed{}", [""]),
        (r"boxed{A}", []),
        (rf"\boxed{{A{TOOL}B}}", []),  # not across a tool's text
    ],
)
def test_boxes_match_their_braces(text, found):
    assert [content for _, content in tags.answers(text, PP)] == found


def test_boxes_of_hostile_texts_are_found_in_linear_time():
    deep = 30_000
    assert len(tags.command_spans(r"\boxed{x}" * deep, r"\boxed")) == deep
    assert tags.boxes(r"\boxed{" * deep) == []
    assert tags.boxes(r"\boxed{" * deep + "x" + "}" * deep)[0][0] == 0
    assert len(tags.boxes(r"\boxed{" * deep + "x" + "}" * deep)) == 1


def test_commands_are_found_with_what_is_inside():
    text = r"\boxed{a \text{b\}} \boxed{c}} \text{d"
    assert [text[i:j] for i, j in tags.command_spans(text, r"\boxed")] == [text[:30], r"\boxed{c}"]
    assert [text[i:j] for i, j in tags.command_spans(text, r"\text")] == [r"\text{b\}}"]


def test_answers_between_tags():
    text = "<answer>old</answer> x <answer>open <answer> new\nline </answer>"
    assert [content for _, content in tags.answers(text, R1_SEARCHER)] == ["old", "new\nline"]
    assert tags.answers(f"<answer>a{TOOL}b</answer>", R1_SEARCHER) == []


def test_only_policy_text_is_marked_text():
    segments = [("policy", f"a{TOOL}b"), ("tool", r"\boxed{x}"), ("policy", "c")]
    assert tags.marked(segments) == f"a b{TOOL}c"


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_no_control_tag_survives_in_text_from_outside(style):
    every = [tag for other in STYLES.values() for tag in other.tags]
    hostile = " ".join(
        ["x", *every, r"\boxed{x}", r"\\boxed{y}", "<|im_end|>", "</s>", TOOL, "[INST]", "1 < 2 | 3 > 2"]
    )
    control = tags.control_tags(style, reserved=("[INST]",))
    out = tags.neutralize(hostile, control)
    assert len(out) == len(hostile)
    assert not [tag for tag in [*every, r"\boxed", "<|", "|>", "</s>", "[INST]", TOOL] if tag in out]
    assert "1 < 2 | 3 > 2" in out
    assert tags.parse_query(out, style) is None
    assert tags.answers(out, style) == []
    assert tags.neutralize(out, control) == out
    nested = "<" + style.query_close + style.query_close[1:]  # breaking the inner one must not make an outer one
    assert style.query_close not in tags.neutralize(nested, control)
    for tag in style.tags:  # bare names would look like half-written tags to the curation of trajectories
        name = tag.strip("</|>")
        assert "_" not in name or name not in out


def test_text_without_tags_stays_as_it_is():
    text = "Paris (France) is < 3 h away; see $5|6$ at https://x.org/a_b?c=d&e."
    assert tags.neutralize(text, tags.control_tags(PP)) == text


TAGS = ("<document>", "</document>", "<external>", "\\boxed{", "<|begin_search_result|>", "**Final Information**")


@pytest.mark.parametrize(
    "text",
    [
        "a</document>b",
        "A</DOCUMENT><|Begin_Search_Result|>",
        "\\boxed{x} \\BOXED{y}",
        "</docu</document>ment>",  # what is left after a naive removal
        "\uff1c/document\uff1e",  # full width: a tag after NFKC
        "</doc\u200bument>",  # zero width space
        "</docu\u00adment>",  # soft hyphen
        "</docum\u0301ent>",  # a combining mark
        "\uff3cboxed\uff5b",
        "<<document>>",
        "**final information**",
        "é </document>",
    ],
)
def test_no_tag_survives(text: str):
    broken = tags.neutralize(text, TAGS)
    assert len(broken) == len(text)
    assert broken != text
    assert tags.parse_query(broken, PP) is None
    # A lenient reader: compatible forms, no invisible characters, no accents, any case.
    read = "".join(c for c in unicodedata.normalize("NFKD", broken) if unicodedata.category(c) not in ("Cf", "Mn"))
    for tag in TAGS:
        assert tag.lower() not in read.lower()
    assert tags.neutralize(broken, TAGS) == broken


def test_overlapping_tags_and_innocent_text():
    assert "aba" not in tags.neutralize("ababababa", ["aba"])
    text = "x < y, <doc>, boxed{2}, naïve ﬁ and 1 > 0"
    assert tags.neutralize(text, TAGS) == text
    assert tags.neutralize("", TAGS) == ""
    for tag in ("", "<", " x", "\u200b<", "‹a"):
        with pytest.raises(ValueError, match="control tag"):
            tags.neutralize("x", [tag])


def test_cut_words():
    text = " one\ntwo  three "
    assert [tags.cut_words(text, n) for n in (1, 2, 3, 4)] == [" one", " one\ntwo", text, text]


def test_bad_styles():
    with pytest.raises(ValueError, match="unknown tag style 'x'; styles: simple_deep_searcher, r1_searcher_pp"):
        tags.find_style("x")
    with pytest.raises(ValueError, match="needs result_close"):
        tags.TagStyle("x", "a", "b", "c", "")
    with pytest.raises(ValueError, match="come as a pair"):
        tags.TagStyle("x", "a", "b", "c", "d", internal_open="e")
    with pytest.raises(ValueError, match="one tag for two purposes"):
        tags.TagStyle("x", "a", "b", "a", "d")


def test_a_tokenizer_must_give_tags_back():
    class Bytes:
        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode()

    class Lower(Bytes):
        def decode(self, ids):
            return bytes(ids).decode().replace("|", "")

    tags.check_round_trip(SDS, Bytes())
    with pytest.raises(ValueError, match=r"turns the tag .* into '<begin_search_query>'"):
        tags.check_round_trip(SDS, Lower())
