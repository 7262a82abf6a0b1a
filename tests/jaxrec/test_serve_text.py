"""Text while it is made: whole characters, nothing of a stop string, and in the end what the tokenizer decodes."""

import random
from pathlib import Path

import pytest

import models
from jaxrec.serve_text import Pieces, Stream
from models.stops import stop_table

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"


def tokenizers():
    yield "words", models.build_word_tokenizer(["é", "日本", " a b", "</q>"])
    for name in ("llama", "qwen3", "qwen3_untied"):
        yield name, models.load_tokenizer(FIXTURES / name)


TOKENIZERS = dict(tokenizers())


def read(stream: Stream, ids, rng: random.Random):
    """Push all ids (or up to a stop) and take now and then: (parts, tokens placed)."""
    parts, placed = [], []
    for index in ids:
        stream.push(index)
        if stream.stopped is not None:
            break
        if rng.random() < 0.7:
            text, more = stream.take()
            parts.append(text)
            placed += more
    text, more = stream.take(last=True)
    return [*parts, text], [*placed, *more]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_join_to_what_the_tokenizer_decodes(name):
    """Random ids, most of them no text by themselves, in every kind of decoder."""
    tokenizer, rng = TOKENIZERS[name], random.Random(0)
    pieces, whole = Pieces(tokenizer), 0
    for _ in range(1000):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        parts, placed = read(Stream(pieces), ids, rng)
        text = tokenizer.decode(ids)
        assert "".join(parts) == text
        assert [p.index for p in placed] == list(range(len(ids)))
        assert [p.offset for p in placed] == sorted(p.offset for p in placed)
        whole += "\ufffd" not in text
    assert 0 < whole < 1000


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_of_several_tokens_come_whole(name):
    tokenizer = TOKENIZERS[name]
    pieces, rng = Pieces(tokenizer), random.Random(1)
    text = "größere Café 15 € 日本 🏮 ünïcödé"
    ids = tokenizer.encode(text)
    assert any(not piece.decode(errors="ignore") for piece in (pieces.bytes[i] for i in ids))
    for _ in range(20):
        parts, placed = read(Stream(pieces), ids, rng)
        assert "".join(parts) == tokenizer.decode(ids)
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_of_a_stop_string_is_shown(name):
    """Against the automaton that the sampler stops by: the same stop, at the same token."""
    tokenizer, rng = TOKENIZERS[name], random.Random(2)
    pieces = Pieces(tokenizer)
    stops = ("ab", "</q>", "ba", "é<", "aab")
    table = stop_table(stops, tuple(tokenizer.token_bytes()))
    alphabet = ["a", "b", "<", "</", "q>", "é", " a", "x"]
    found = 0
    for _ in range(400):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 10)))
        ids = tokenizer.encode(text)
        state, end = 0, None
        for at, index in enumerate(ids):
            state = int(table.next_state[state, index])
            if state >= table.first_accept:
                end = at
                break
        stream = Stream(pieces, stops)
        parts, _ = read(stream, ids, rng)
        shown = "".join(parts)
        assert not any(stop in shown for stop in stops)
        if end is None:
            assert stream.stopped is None
            assert shown == tokenizer.decode(ids)
        else:
            found += 1
            assert stream.stopped == table.strings[state - table.first_accept]
            made = tokenizer.decode(ids[: end + 1])
            assert shown == made[: made.index(stream.stopped)]
    assert 50 < found < 400


def test_a_beginning_of_a_stop_string_waits():
    tokenizer = models.build_word_tokenizer([])
    stream = Stream(Pieces(tokenizer), ("</q>",))
    shown = []
    for character in "x</a</q>y":
        stream.push(tokenizer.encode(character)[0])
        shown.append(stream.take()[0])
        if stream.stopped:
            break
    assert shown == ["x", "", "", "</a", "", "", "", ""]


def test_tokens_that_are_no_text_have_names():
    pieces = Pieces(TOKENIZERS["qwen3"])
    lead = pieces.bytes.index(b"\xc3")
    assert pieces.name(lead) == "bytes:\\xc3"
    assert pieces.name(10_000) == ""  # a model may have more rows than its tokenizer has ids
