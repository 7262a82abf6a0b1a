"""The snippet-centred window and its bounds, text of HTML, bytes of unknown encoding, the summariser's page block."""

import json

import pytest

from jaxrec.tools.search.pages import WebPage, decode_page, format_pages, html_text, page_context, sentences


def words(prefix: str, n: int) -> str:
    return " ".join(f"{prefix}{i}" for i in range(n))


def test_an_f_of_exactly_one_fifth_is_not_accepted():
    filler = "z " * 4000
    # One shared word: F = 2 / (|snippet| + |sentence|), so 10 words in all are exactly 0.2 and 9 are above it.
    exactly = filler + f". hit {words('a', 4)}. " + filler
    assert page_context(exactly, f"hit {words('b', 4)}") == exactly[:6000]
    above = filler + f". hit {words('a', 3)}. " + filler
    start = above.index("hit")
    assert page_context(above, f"hit {words('b', 4)}") == above[start - 3000 : start + len("hit a0 a1 a2.") + 3000]


def test_the_window_is_clipped_at_both_ends():
    sentence = "The needle lies here."
    early = "x" * 98 + ". " + sentence + " " + "y" * 9000
    assert early.index(sentence) == 100
    assert page_context(early, "needle lies here") == early[: 100 + len(sentence) + 3000]
    late = "x" * 9000 + ". " + sentence
    assert page_context(late, "needle lies here") == late[9002 - 3000 :]
    middle = "x" * 9000 + ". " + sentence + " " + "y" * 9000
    assert page_context(middle, "needle lies here") == middle[9002 - 3000 : 9002 + len(sentence) + 3000]
    beyond = "x" * 50_000 + ". " + sentence  # not looked for past 50,000 characters
    assert page_context(beyond, "needle lies here") == "x" * 6000


def test_words_are_sets_without_punctuation_marks_and_case():
    text = "First one here. THE needle, the Needle! Last one there? Yes."
    assert [text[a:b] for a, b in sentences(text)] == ["First one here.", "THE needle, the Needle!",
                                                      "Last one there?", "Yes."]  # fmt: skip
    long = "q " * 5000 + ". " + text
    window = page_context(long, "The <b>needle</b>...")
    assert window == long[long.index("THE") - 3000 :]
    assert page_context(long, "<b></b> ...") == long[:8000]  # a snippet without words is none
    assert page_context(long, "", page_chars=10) == long[:10]
    assert page_context("", "needle") == ""
    twice = f"a needle. {'x' * 7000}. a needle. {'y' * 7000}"
    assert page_context(twice, "a needle").startswith("a needle.")  # the first of equal ones


def test_sentences_cover_the_text():
    text = 'He said "no." Then\nleft! Dr. No? 3.14 is pi… and   more'
    spans = list(sentences(text))
    assert [text[a:b] for a, b in spans] == [
        'He said "no."', "Then", "left!", "Dr.", "No?", "3.14 is pi… and   more",
    ]  # fmt: skip
    assert list(sentences(" \n ")) == []


def test_visible_text():
    html = """<!doctype html><html><head><title>T</title><style>p {}</style><script>var x = "<p>no</p>";</script></head>
    <body onload="no()"><p>One&nbsp;&amp; <b>two</b></p><svg><svg>no</svg> no</svg><!-- no --><noscript>no</noscript>
    <template><p>no</p></template><br/>three &lt;/document&gt; <p>four<p>five</body></html>"""
    assert html_text(html) == "One & two three </document> four five"
    assert html_text("no tags") == "no tags"
    assert html_text("<meta charset=x><p>no head, no body") == "no head, no body"
    for broken in ("<p>a<b", "<p>a</script></svg>", "a <![CDATA[", "<" * 1000, "a</p", "<!", "<script>"):
        assert isinstance(html_text(broken), str)


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        ("Größe €".encode(), None, "Größe €"),
        ("Größe".encode("latin-1"), "ISO-8859-1", "Größe"),
        ("Größe €".encode("cp1252"), None, "Größe €"),
        ("дом".encode("koi8-r"), "koi8-r", "дом"),
        ('<meta charset="shift_jis">日本'.encode("shift_jis"), None, '<meta charset="shift_jis">日本'),
        ("é".encode()[:1], None, ""),  # cut inside a character
        (b"abc", "rot13", "abc"),
        (b"abc", "no-such-code", "abc"),
        (b"a\xffb", "utf-8", "a\ufffdb"),
        (b'<meta charset="zlib">x', None, '<meta charset="zlib">x'),
    ],
)
def test_encodings(body, charset, text):
    assert decode_page(body, charset) == text


def test_page_block():
    pages = [WebPage("u1", "A", "u1", "site", "2024", "s", "c é"), WebPage("u2", "B", "u2", error="timeout: x")]
    text = format_pages(pages)
    first, second = text.split("**Web Page ")[1:]
    assert json.loads(first.removeprefix("1:**\n")) == {
        "id": "u1", "title": "A", "url": "u1", "site_name": "site", "date": "2024", "snippet": "s", "context": "c é",
    }  # fmt: skip
    assert second.startswith('2:**\n{\n  "id": "u2",')
    assert format_pages([]) == ""
