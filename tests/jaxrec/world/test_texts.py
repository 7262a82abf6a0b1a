"""Text of the embedded world: true, deterministic, without leaks between splits, all of it known to the tokenizer."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from jaxrec.tools.world_model import arrays, encode, new_model, training_rows, world_tokenizer
from jaxrec.world import generate, world_config
from jaxrec.world.conversations import SAID, talk_phrases
from jaxrec.world.encyclopaedia import RELATIONS, Fact, facts, passage
from jaxrec.world.texts import CUE, DECISIONS, DOMAINS, END, Texts


@pytest.fixture(scope="module")
def world():
    return generate(world_config("tiny"))


@pytest.fixture(scope="module")
def texts(world):
    return Texts(world, titles=40)


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_facts_are_those_of_the_catalogue_and_fakes_are_not(world):
    found = facts(world)
    assert len({(f.subject, f.relation) for f in found}) == len(found)
    by = {(f.subject, f.relation): f for f in found}
    for item in range(1, world.num_items + 1):
        for name in ("maker", "era", "genre", "mood", "theme"):
            assert by[world.titles[item], name].object == world.word(name, item)
    maker = world.values["maker"][3]
    place = world.values["place"][world.maker_place[3]]
    assert by[maker, "birthplace"].object == place
    assert by[place, "region"].object == world.values["region"][world.place_region[world.maker_place[3]]]
    for f in found:
        assert f.fake != f.object
        assert f.fake in world.values[RELATIONS[f.relation][1]]
        assert f.internal or f.external
        assert f.object in f.statement(1)
        assert f.object not in f.question(0).split()


def test_shares_of_internal_facts(world):
    found = facts(world, internal=0.5, both=0.2)
    subjects = {f.subject: f for f in found}.values()
    assert 0.35 < np.mean([f.internal for f in subjects]) < 0.65
    assert 0.1 < np.mean([f.internal and f.external for f in subjects]) < 0.35
    assert not any(f.internal for f in facts(world, internal=0.0, both=0.0))
    with pytest.raises(ValueError, match="both"):
        facts(world, internal=0.1, both=0.2)


def test_a_passage_says_what_it_is_told_to(world):
    known = [f for f in facts(world) if f.subject == world.titles[1]]
    made = passage(known[:2], [0, 1], [False, True])
    assert known[0].object in made.text
    assert known[1].fake in made.text
    assert known[1].object not in made.text.replace(known[1].subject, "")


@pytest.mark.parametrize("domain", DOMAINS)
def test_samples_repeat_and_splits_share_nothing(texts, domain):
    train, test = (texts.sample(domain, split, rng(), 200) for split in ("train", "test"))
    assert train == texts.sample(domain, "train", rng(), 200)
    assert not {s.prompt for s in train} & {s.prompt for s in test}
    assert all(s.prompt and s.answer.startswith(" ") for s in train + test)


def test_what_is_read_is_stated_nowhere_else(texts):
    inside = {f.subject for f in texts.known}
    assert not inside & set(texts.readable["train"] + texts.readable["test"])
    assert not set(texts.readable["train"]) & set(texts.readable["test"])
    stated = " ".join(s.answer for s in texts.statements(rng(), 300))
    assert not [s for s in texts.readable["test"] if s in stated]
    for sample in texts.sample("reading", "test", rng(), 50):
        passages = sample.prompt.split("Question:")[0]
        assert sample.answer.strip() in passages


def test_sums_are_right(texts):
    for sample in texts.sample("sums", "test", rng(), 50):
        first, sign, second = (
            (p.replace(" ", "") for p in sample.prompt.removesuffix(" is").rpartition(" plus "))
            if (" plus " in sample.prompt)
            else (p.replace(" ", "") for p in sample.prompt.removesuffix(" is").rpartition(" minus "))
        )
        want = int(first) + int(second) if sign == "plus" else int(first) - int(second)
        assert sample.answer.replace(" ", "") == str(want)


def test_a_match_says_what_was_wished_for_of_what_an_item_has(texts):
    talks, counts, decided = texts.talks, set(), set()
    for split in ("train", "test"):
        for sample in texts.sample("match", split, rng(), 80):
            told, _, line = (sample.prompt + sample.answer).rpartition("\nItem: ")
            title, _, shown = line.partition(" - ")
            have = [talks.value(name, talks.catalogue.titles.index(title)) for name in SAID]
            wanted = {w.value for turn in told.split("\n") if turn.startswith("Seeker:") for w in talks.understand(turn)
                      if w.wanted}  # fmt: skip
            words = shown.split()
            values = [word for word in words if word not in DECISIONS]
            assert values == have[: len(values)]
            for value, said in itertools.pairwise(words):
                if said in DECISIONS:
                    assert (said == "Yes") == (value in wanted)
                    decided.add((split, talks.understand(value)[0].attribute, said))
            counts.add(len(wanted & set(have)))
    assert {0, 1, 2, 4} <= counts
    assert len(decided) == 2 * len(SAID) * len(DECISIONS)  # of each attribute both occur, in both splits


def test_words_are_said_to_be_seen_where_they_are(texts):
    found = []
    for sample in texts.seen(rng(), 60):
        run, words = sample.prompt.strip(" .").split(), sample.answer.split()
        assert all((said == "Yes") == (word in run) for word, said in zip(words[::2], words[1::2], strict=True))
        found += words[1::2]
    assert 0.4 < np.mean([said == "Yes" for said in found]) < 0.6


def test_of_what_cannot_be_foretold_only_decisions_are_learned(texts):
    tokenizer = world_tokenizer(texts, talk_phrases())
    rows = training_rows(texts, tokenizer, 20, 0, 128, 0, ("match",), seen=20)
    decisions = {tokenizer.encode(f" {word}")[0] for word in DECISIONS}
    assert set(rows["tokens"][rows["mask"] > 0].tolist()) == decisions
    asked = arrays(tokenizer, texts.sample("match", "test", rng(), 8))
    assert asked["mask"].sum(axis=1).tolist() == [1] * 8
    assert set(asked["tokens"][asked["mask"]].tolist()) <= decisions


def test_every_word_is_one_token_and_nothing_is_lost(texts):
    tokenizer = world_tokenizer(texts, talk_phrases())
    for domain in DOMAINS:
        for sample in texts.sample(domain, "train", rng(), 20):
            ids, start = encode(tokenizer, sample)
            text = sample.prompt + sample.answer
            assert tokenizer.decode(ids[:-1]) == text
            assert ids[-1] in tokenizer.eos_ids
            assert tokenizer.decode(ids[start:-1]) == sample.answer
            words = len(text.replace(":", " ").replace(".", " ").replace("?", " ").split())
            assert len(ids) < 2 * words + 4  # no word falls apart into letters


def test_training_rows_learn_answers_and_statements(texts):
    tokenizer = world_tokenizer(texts)
    rows = training_rows(texts, tokenizer, 20, 20, 96, 0)
    again = training_rows(texts, tokenizer, 20, 20, 96, 0)
    for name in rows:
        np.testing.assert_array_equal(rows[name], again[name])
    learned = rows["mask"] > 0
    assert (rows["segment_ids"][learned] > 0).all()
    assert not learned[rows["positions"] == 0].any()
    eos = rows["tokens"] == tokenizer.eos_ids[0]
    assert learned[eos & (rows["segment_ids"] > 0)].all()
    judged = arrays(tokenizer, texts.sample("facts", "test", rng(), 8))
    assert judged["tokens"].shape[1] % 32 == 0
    assert (judged["mask"].sum(axis=1) >= 2).all()


def test_bad_input(texts, world):
    with pytest.raises(ValueError, match="no domain 'poems'"):
        texts.sample("poems", "train", rng(), 1)
    with pytest.raises(ValueError, match="no internal facts"):
        Texts(world, internal=0.0, both=0.0)


def test_repeats_say_a_run_of_words_twice(texts):
    found = texts.repeats(rng(), 50, (3, 5))
    assert {len(s.answer.split()) for s in found} == {3, 4, 5}
    assert all(s.prompt == s.answer for s in found)
    assert len({s.answer for s in found}) == 50
    tokenizer = world_tokenizer(texts)
    for sample in found:  # every word is one token, in both copies
        ids, start = encode(tokenizer, sample)
        assert ids[:start] == ids[start:-1]
        assert start == len(sample.prompt.split()) + 1
    rows = training_rows(texts, tokenizer, 4, 0, 64, 0, ("reading",), prompt_weight=0.25, repeats=8)
    assert set(np.unique(rows["mask"]).tolist()) == {0.0, 0.25, 1.0}


def test_a_window_is_that_of_every_other_layer_or_of_those_named(texts):
    sizes = {"dim": 16, "layers": 3, "heads": 2, "head_dim": 8, "ffn_dim": 16, "experts": 0, "top_k": 0}
    assert new_model(texts, sizes, 64, 0).config.sliding_window is None
    config = new_model(texts, {**sizes, "window": 6}, 64, 0).config
    assert (config.sliding_window, config.sliding_layers) == (6, (True, False, True))
    named = new_model(texts, {**sizes, "window": 6, "narrow": (1,)}, 64, 0).config
    assert (named.sliding_window, named.sliding_layers) == (6, (False, True, False))


def told_as(texts, fact, prompt):
    """What a reader makes of a fact's sentence in a passage: the word behind its dialect's mark, looked up."""
    sentences = [s for s in re.split(r"(?<=\.)\s", prompt.replace("Passage: ", "")) if fact.subject in s]
    found = []
    for words in texts.dialects:
        for value in words:
            stated = dataclasses.replace(fact, object=value)
            found += [value for way in range(3) if stated.statement(way, words=words) in sentences]
    return found


def test_dialects_share_their_words_and_mean_other_values(world):
    with pytest.raises(ValueError, match="7 dialects: must lie between 0 and 6"):
        Texts(world, dialects=7)
    texts = Texts(world, titles=40, dialects=3)
    plain = Texts(world, titles=40)
    assert plain.dialects == ()
    assert plain.dialect(rng()) is None
    names = {v for values in world.values.values() for v in values}
    said = []
    for words in texts.dialects:
        assert set(words) == names
        (mark,) = {word.split()[0] for word in words.values()}
        said.append({value: word.split()[1] for value, word in words.items()})
        assert len(set(said[-1].values())) == len(names)
        assert not ({mark} | set(said[-1].values())) & set(plain.words)
    for values in world.values.values():
        assert {said[0][v] for v in values} == {said[1][v] for v in values} == {said[2][v] for v in values}
    same = np.mean([said[0][v] == said[1][v] for v in names])
    assert same < 0.4
    assert {w for words in said for w in words.values()} <= set(texts.words)


def test_passages_in_a_dialect_say_what_the_answer_is(world):
    texts = Texts(world, titles=40, dialects=2)
    for split, further in (("train", True), ("test", False)):
        for s in texts.sample("reading", split, rng(1), 40):
            asked = [(s.prompt.rsplit("Question: ", 1)[1].removesuffix(CUE), s.answer.split(END)[0].strip())]
            for more in s.answer.split(f"{END}Question: ")[1:]:
                asked.append(tuple(part.strip() for part in more.split(CUE)))
            assert (len(asked) > 1) == further
            for question, answer in asked:
                (fact,) = [
                    f
                    for name in texts.names[split]
                    for relation in ("maker", "era", "genre", "mood", "theme")
                    for f in [Fact(name, relation, answer, answer, False, True)]
                    if question in (f.question(0), f.question(1))
                ]
                assert told_as(texts, fact, s.prompt.rsplit("\nQuestion: ", 1)[0].replace("\n", " ")) == [answer]
                assert split == "train" or answer in {f.object for f in texts.subjects[fact.subject]}
    tokenizer = world_tokenizer(texts)
    ids, start = encode(tokenizer, texts.sample("reading", "train", rng(2), 1)[0])
    assert len(ids) < 160
    assert 0 < start < len(ids)


def test_unhelpful_passages_are_about_others(world):
    texts = Texts(world, titles=40, dialects=2)
    assert texts.unhelpful(rng(), 0) == []
    samples = texts.unhelpful(rng(), 50)
    assert samples == texts.unhelpful(rng(), 50)
    for s in samples:
        passages, question = s.prompt.removesuffix(CUE).rsplit("Question: ", 1)
        asked = [f for f in texts.known if question in (f.question(0), f.question(1))]
        assert s.answer.strip() in {f.object for f in asked}
        assert not any(f.subject in passages for f in asked)
        assert 1 <= passages.count("Passage:") <= 2


def test_a_world_without_pairs_of_words_to_spare_makes_up_no_names():
    """As one of more items than there are pairs of words: only texts that make up names need such pairs."""
    world = generate(world_config("tiny", title_words=8))
    texts = Texts(world, titles=40)
    assert texts.names["train"] == []
    assert texts.unhelpful(np.random.default_rng(0), 0) == []
    assert texts.sample("reading", "train", np.random.default_rng(0), 3)
    for more in ({"dialects": 2}, {"distractors": (1, 1)}):
        with pytest.raises(ValueError, match="none is left to make up: raise title_words"):
            Texts(world, titles=40, **more)
