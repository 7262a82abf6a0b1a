"""What the simulated user learns: balanced decisions, filtered critiques, prompts as the search sends them, masks."""

from __future__ import annotations

import functools

import chex
import jax
import numpy as np
import pytest

import models
from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Instance, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.data.pipeline import batches
from jaxrec.tools.conversation import Criticise
from jaxrec.tools.simulated_user import ModelUser, UserConfig
from jaxrec.tools.teacher import Failure, Reply, Sampling, ScriptedTeacher
from jaxrec.tools.user_instructions import (
    EMPTY,
    LABEL,
    LENGTH,
    OTHER,
    TWICE,
    Instruction,
    TitleFinder,
    annotation_prompt,
    critique_lists,
    critique_rows,
    encode_instructions,
    nearest,
    scoring_rows,
)
from jaxrec.tools.user_prompts import UserPrompts
from rl.finetune import SFTConfig, sft, sft_loss
from rl.optimizer import OptimizerConfig, init_state
from tests.jaxrec.tools.user_world import CATALOGUE, DIALOGUES, TITLES, prompts, talk, tiny_model

NAMED = Dialogue("n", (Turn(USER, "I want something like Red Lantern", (4,)), Turn(SYSTEM, "What about drama")))
INSTANCES = [Instance(DIALOGUES[0], (0, 1)), Instance(NAMED, (2,)), Instance(DIALOGUES[1], (3,))]
LISTS = [(2, 3, 4), (0, 5, 6), (1, 4, 7)]


def decided(rows):
    """(title, decision) of rows in style "full"."""
    return [(row.completion[0][3:-1], row.completion[1].strip()) for row in rows]


def says(*answers):
    """A teacher that gives these answers in turn."""

    class Teacher:
        id = "turns"

        def ask(self, requests, done=None):
            self.asked = list(requests)
            return [a if isinstance(a, Failure) else Reply((a[0],), (a[1],)) for a in answers]

    return Teacher()


def test_every_label_is_accepted_once_and_one_other_item_refused():
    made = scoring_rows(INSTANCES * 50, [(0, 2, 5), (4, 2, 6), ()] * 50, prompts("full"), np.random.default_rng(0))
    assert made.dropped == {}
    pairs = decided(made.rows)
    assert [word for _, word in pairs] == ["Yes", "No"] * 200
    near = 0
    for start in range(0, 400, 8):
        accepted, refused = ([TITLES.index(title) for title, _ in pairs[start + i : start + 8 : 2]] for i in (0, 1))
        assert accepted == [0, 1, 2, 3]
        assert len({0, 1, *refused[:2]}) == 4
        assert refused[2] not in (2, 4)  # 4 is named in the dialogue
        assert refused[3] != 3
        near += refused[2] == 6
    # Of the second's recommended items 6 alone is left: half of the time, and one time in six of the other half.
    assert abs(near / 50 - (0.5 + 0.5 / 6)) < 0.2


@pytest.mark.parametrize(("hard", "allowed"), [(1.0, {5}), (0.0, {1, 2, 3, 4, 5, 6, 7})])
def test_other_items_come_from_the_recommender_or_from_the_catalogue(hard, allowed):
    one = [Instance(DIALOGUES[0], (0,))] * 60
    made = scoring_rows(one, [(0, 5)] * 60, prompts("full"), np.random.default_rng(1), hard)
    assert {TITLES.index(title) for title, word in decided(made.rows) if word == "No"} == allowed


def test_a_label_without_an_item_to_refuse_is_counted():
    few = ItemCatalogue(TITLES[:3], [{}] * 3)
    made = scoring_rows(
        [Instance(DIALOGUES[0], (0, 1))], [()], prompts("short", catalogue=few), np.random.default_rng(0)
    )
    assert len(made.rows) == 2
    assert made.dropped == {"no item to refuse": 2}


def test_lists_to_criticise_hold_no_label_and_are_filled_up():
    lists = critique_lists(INSTANCES, [(0, 5, 1, 6, 7), (), (3, 3, 2)], CATALOGUE, 3, np.random.default_rng(0))
    assert lists[0] == (5, 6, 7)
    assert lists[2][0] == 2
    assert all(len(set(items)) == 3 for items in lists)
    assert not {2, 4} & set(lists[1])
    assert 3 not in lists[2]
    with pytest.raises(ValueError, match="instance d0: lists of k=7"):
        critique_lists(INSTANCES[:1], [()], CATALOGUE, 7, np.random.default_rng(0))


def test_the_teacher_sees_the_wish_and_the_student_never_does():
    def annotator(request, choice):
        wish = request.messages[-1].content.partition("## Hidden Wish\n")[2].partition("\n\n")[0]
        genres = [line.partition("genre: ")[2] for line in wish.split("\n") if "genre: " in line]
        return f"not dark, more {genres[0]} please {request.sampling.seed}"

    student = prompts("short")
    teacher = ScriptedTeacher({"annotator": annotator})
    made = critique_rows(INSTANCES, LISTS, student, teacher, Sampling(seed=5), copies=2)
    assert made.dropped == {}
    assert len(made.rows) == 6
    assert made.rows[0].text[1] == " not dark, more comedy please 5"
    for row, instance, items in zip(made.rows[::2], INSTANCES, LISTS, strict=True):
        assert row.prompt == student.critique_prompt(instance.dialogue, items)
        assert not any(TITLES[label] in row.text[0] for label in instance.labels)
    other = [Instance(i.dialogue, ((5, 0), (1,), (0,))[n]) for n, i in enumerate(INSTANCES)]
    again = critique_rows(other, [(2, 3, 4), (0, 5, 6), (1, 4, 7)], student, says(*[("no", "stop")] * 3))
    same = critique_rows(INSTANCES, LISTS, student, says(*[("no", "stop")] * 3))
    assert again.rows == same.rows
    with pytest.raises(ValueError, match=r"instance d0: .* its own label 'Silver Gate'"):
        critique_rows(INSTANCES, [(1, 2), *LISTS[1:]], student, teacher)


def test_the_teachers_prompt_shows_dialogue_list_and_wish():
    asking = UserPrompts(CATALOGUE, "full")
    text = annotation_prompt(asking, INSTANCES[1], (0, 5))
    assert text.startswith("## Conversation\nUser: I want something like Red Lantern\nSystem: What about drama\n\n")
    assert (
        f"## Recommendation By System\n{asking.listing((0, 5))}\n\n## Hidden Wish\n{asking.listing((2,))}\n\n" in text
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (("not so dark please", "stop"), ""),
        (("I know Red Lantern. Amber Bell is too old.", "stop"), ""),  # of the dialogue, of the list
        (("not so da", "length"), LENGTH),
        ((" \n", "stop"), EMPTY),
        (("I want Last Harbour", "stop"), LABEL),
        (("I want the last harbor!", "stop"), LABEL),  # the ratio is 96
        (("More like Iron Sea please", "stop"), OTHER),
        (Failure("timeout", "late"), "timeout"),
    ],
)
def test_each_filter_has_its_reason_and_nothing_is_lost(answer, reason):
    others = ("too old", "stop"), ("too old", "stop"), ("too new", "stop")
    made = critique_rows(INSTANCES[1:2], LISTS[1:2], prompts(), says(answer, *others), copies=4)
    assert made.dropped == {TWICE: 1} | ({reason: 1} if reason else {})
    assert len(made.rows) + sum(made.dropped.values()) == 4
    assert [row.completion[0] for row in made.rows[-2:]] == [" too old", " too new"]


def test_titles_in_running_text():
    titles = ["Toy Story (1995)", "Toy Story 2 (1999)", "Heat (1995)", "Heat (1972)", "It (2017)", "2012 (2009)", "?!"]
    find = TitleFinder(ItemCatalogue(titles, [{}] * len(titles)))
    assert find("I loved toy story 2 and Toy Storey.") == [{1}, {0}]
    assert find("the heat of it") == []
    assert find("Heat was fine, like Heat") == [{2, 3}]
    assert find("It was fine. It is old") == []
    assert find("It was fine. It is old", {4}) == [{4}, {4}]
    assert find("nothing from 2012") == [{5}]
    assert find("") == []


@pytest.mark.parametrize("style", ["short", "full"])
def test_rows_hold_the_tokens_that_the_search_sends(monkeypatch, style):
    """And beside them the reply and the end token alone are learned."""
    model, mine = tiny_model(), prompts(style)
    sent = []
    monkeypatch.setattr(ModelUser, "_run", lambda self, ids: sent.extend([*p.head, *p.tail] for p in ids) or iter(()))
    monkeypatch.setattr(
        ModelUser, "_sample", lambda self, ids, *a: sent.extend([*p.head, *p.tail] for p in ids) or ["x"]
    )
    user = ModelUser(model, mine, UserConfig(max_new=8))
    score = scoring_rows(INSTANCES[2:], [()], mine, np.random.default_rng(0)).rows[0]
    critique = critique_rows(INSTANCES[2:], LISTS[2:], mine, says(("not dark", "stop"))).rows[0]
    user.score([DIALOGUES[1]], [[3]])
    user.criticise([Criticise(DIALOGUES[1], LISTS[2])])
    arrays, dropped = encode_instructions([score, critique], model.tokenizer, model.config.eos_ids[0], 4096)
    assert dropped == 0
    encode, end = model.tokenizer.encode, model.config.eos_ids[0]
    forced = encode("1. Who Knows??") if style == "full" else []  # the search writes it, the training learns it
    said = [encode(" Yes"), encode(" not dark" if style == "short" else "not dark")]
    starts = [len(sent[0]) - len(forced), len(sent[1])]
    for row, (ids, new, start) in enumerate(zip(sent, said, starts, strict=True)):
        length = arrays["lengths"][row]
        assert arrays["tokens"][row, :length].tolist() == [*ids, *new, end]
        assert arrays["mask"][row].nonzero()[0].tolist() == list(range(start, length))


def test_the_loss_is_that_of_completions_whatever_the_padding():
    """Against the log-probabilities of a plain forward pass over each row."""
    model, mine = tiny_model(), prompts()
    rows = scoring_rows(INSTANCES[:1], [()], mine, np.random.default_rng(0)).rows
    rows += critique_rows(INSTANCES[1:2], LISTS[1:2], mine, says(("not dark", "stop"))).rows
    arrays, _ = encode_instructions(rows, model.tokenizer, model.config.eos_ids[0], 512)
    forward = jax.jit(lambda params, tokens: models.forward(params, model.config, tokens).logits)
    logp = np.asarray(jax.nn.log_softmax(forward(model.params, arrays["tokens"])), np.float64)
    total, count = 0.0, 0
    for row, ids, length in zip(range(len(rows)), arrays["tokens"], arrays["lengths"], strict=True):
        new = sum(len(model.tokenizer.encode(piece)) for piece in rows[row].completion) + 1
        total -= sum(logp[row, t - 1, ids[t]] for t in range(length - new, length))
        count += new
    config = SFTConfig(OptimizerConfig(lr=1e-3))
    loss_of = jax.jit(lambda params, batch: sft_loss(params, batch, config, model.config, batch["mask"].sum())[0])
    for pad in (0, 9):
        batch = {name: np.pad(arrays[name], ((0, 0), (0, pad))) for name in ("tokens", "mask")}
        batch["lengths"] = arrays["lengths"]
        assert float(loss_of(model.params, batch)) == pytest.approx(total / count, rel=1e-5)


def test_the_closest_of_what_was_recommended_are_declined():
    """Items 3 and 6 share the label's era, 4 its genre, the others nothing."""
    instance, others = Instance(DIALOGUES[0], (0,)), list(range(1, len(TITLES)))
    assert nearest(others[::-1], 0, CATALOGUE, 3) == [6, 4, 3]
    assert nearest(others, 0, CATALOGUE, 4) == [3, 4, 6, 1]
    assert nearest(others, 0, CATALOGUE, 0) == others
    mine = prompts("full")
    for closest, wanted in ((3, [3, 4, 6]), (0, others)):
        drawn = {
            scoring_rows([instance], [others], mine, np.random.default_rng(seed), 1.0, closest).rows[1]
            for seed in range(200)
        }
        assert drawn == {
            Instruction(
                mine.score_prompt(instance.dialogue, i)[:2], (mine.score_prompt(instance.dialogue, i)[2], " No")
            )
            for i in wanted
        }


def test_packed_rows_have_the_loss_of_rows_apart():
    model, mine = tiny_model(), prompts()
    rows = scoring_rows(INSTANCES[:2], [(), ()], mine, np.random.default_rng(0)).rows
    rows += critique_rows(INSTANCES[1:2], LISTS[1:2], mine, says(("not dark", "stop"))).rows
    encode = functools.partial(encode_instructions, rows, model.tokenizer, model.config.eos_ids[0], 64)
    (apart, _), (packed, dropped) = encode(), encode(packed=160, seed=3)
    assert dropped == 0
    assert len(packed["tokens"]) < len(rows) == len(apart["tokens"])
    sizes = [np.bincount(own)[1:] for own in packed["segment_ids"]]
    assert sorted(np.concatenate(sizes)) == sorted(apart["lengths"])
    config = SFTConfig(OptimizerConfig(lr=1e-3))
    grad = jax.jit(jax.value_and_grad(lambda p, b: sft_loss(p, b, config, model.config, b["mask"].sum())[0]))
    (loss, own), (other, its) = grad(model.params, packed), grad(model.params, apart)
    assert float(loss) == pytest.approx(float(other), rel=1e-5)
    chex.assert_trees_all_close(own, its, atol=1e-5)
    assert packed["tokens"].tolist() == encode(packed=160, seed=3)[0]["tokens"].tolist()
    assert packed["tokens"].tolist() != encode(packed=160, seed=4)[0]["tokens"].tolist()
    with pytest.raises(ValueError, match="max_len=64 tokens do not fit into rows of packed=63"):
        encode(packed=63)


@pytest.mark.parametrize("packed", [0, 160])
def test_weighed_by_row_a_decision_counts_as_much_as_a_critique(packed):
    model, mine = tiny_model(), prompts()
    rows = scoring_rows(INSTANCES[:1], [()], mine, np.random.default_rng(0)).rows
    rows += critique_rows(INSTANCES[1:2], LISTS[1:2], mine, says(("not dark but very funny", "stop"))).rows
    encode = functools.partial(encode_instructions, rows, model.tokenizer, model.config.eos_ids[0], 64, packed=packed)
    (even, _), (each, _) = encode(weigh="row"), encode()
    np.testing.assert_array_equal(even["mask"] > 0, each["mask"] > 0)
    config = SFTConfig(OptimizerConfig(lr=1e-3))
    loss = float(sft_loss(model.params, even, config, model.config, even["mask"].sum())[0])
    alone = [encode_instructions([row], model.tokenizer, model.config.eos_ids[0], 64)[0] for row in rows]
    own = [float(sft_loss(model.params, a, config, model.config, a["mask"].sum())[0]) for a in alone]
    assert loss == pytest.approx(np.mean(own), rel=1e-5)
    assert float(sft_loss(model.params, each, config, model.config, each["mask"].sum())[0]) != pytest.approx(loss, 1e-3)
    with pytest.raises(ValueError, match="weigh='rows' must be one of token, row"):
        encode(weigh="rows")


def test_rows_that_are_too_long_are_counted_or_refused():
    mine, words = prompts(), tiny_model().tokenizer
    rows = scoring_rows([INSTANCES[0], Instance(DIALOGUES[2], (0,))], [(), ()], mine, np.random.default_rng(0)).rows
    arrays, dropped = encode_instructions(rows, words, 1, 40)
    assert (len(arrays["tokens"]), dropped) == (4, 2)
    with pytest.raises(ValueError, match="2 of 6 rows have more than max_len=40"):
        encode_instructions(rows, words, 1, 40, "error")
    with pytest.raises(ValueError, match="too_long='cut' must be one of drop, error"):
        encode_instructions(rows, words, 1, 40, "cut")


def test_training_tells_labels_of_held_out_dialogues_from_other_items():
    """The wish is a genre; an area under the curve of 1/2 is chance, and 1 cannot be: every item has one like it."""

    def wishes(count: int, seed: int) -> list[Instance]:
        rng = np.random.default_rng(seed)
        out = []
        for number in range(count):
            item = int(rng.integers(len(CATALOGUE)))
            words = rng.permutation(["something", "more", "please", "about", "want"])[:3].tolist()
            words.insert(int(rng.integers(4)), CATALOGUE.attributes[item]["genre"][0])
            out.append(Instance(talk(number, " ".join(["I", *words])), (item,)))
        return out

    def area(model) -> float:
        test, rng = wishes(100, 1), np.random.default_rng(2)
        others = [(i.labels[0] + int(rng.integers(1, len(CATALOGUE)))) % len(CATALOGUE) for i in test]
        items = [(i.labels[0], other) for i, other in zip(test, others, strict=True)]
        yes, no = np.array(ModelUser(model, mine).score([i.dialogue for i in test], items)).T
        return float(np.mean((yes[:, None] > no) + 0.5 * (yes[:, None] == no)))

    model, mine = tiny_model(dim=32, ffn_dim=64), prompts()
    train = scoring_rows(wishes(600, 0), [()] * 600, mine, np.random.default_rng(0))
    arrays, _ = encode_instructions(train.rows, model.tokenizer, model.config.eos_ids[0], 64)
    before = area(model)
    config = SFTConfig(OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=10, horizon_steps=121))
    state = init_state(model.params, config.optimizer, 0)
    state = sft(config, model.config, state, batches(arrays, 32, 0), 120)
    assert area(model.replace(params=state.params)) > max(before + 0.15, 0.75)
