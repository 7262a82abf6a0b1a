"""The scripted seeker: what it says against a list, how it scores items, and what it writes as a teacher."""

import numpy as np
import pytest

from jaxrec.data.dialogues import USER, Dialogue, Turn
from jaxrec.tools.conversation import Criticise
from jaxrec.tools.talk_task import annotate
from jaxrec.tools.user_instructions import annotation_prompt
from jaxrec.tools.user_prompts import UserPrompts
from jaxrec.world import generate, world_config
from jaxrec.world.conversations import NAMES, SAID, Conversations, TalkConfig
from jaxrec.world.seeker import Seeker, SeekerConfig


@pytest.fixture(scope="module")
def talks():
    return Conversations(generate(world_config("demo", seed=0)), 0, TalkConfig(wishes=4, avoid=1.0))


@pytest.fixture(scope="module")
def prompts(talks):
    return UserPrompts(talks.catalogue, "full", roles=tuple(NAMES.values()))


def values(talks, item):
    """What the catalogue says of an item, by attribute; the referee of what is met."""
    return {name: talks.catalogue.attributes[item][name][0] for name in SAID}


def missed(talks, wishes, shown):
    """Wishes that fewer than half of a list's items meet, by a count over the catalogue."""
    out = []
    for wish in wishes:
        met = sum((values(talks, item)[wish.attribute] == wish.value) == wish.wanted for item in shown)
        if met < len(shown) / 2:
            out.append(wish)
    return out


def lists(talks, count, seed=1):
    rng = np.random.default_rng(seed)
    return [tuple(rng.choice(len(talks.catalogue), 6, replace=False).tolist()) for _ in range(count)]


def test_critiques_name_only_wishes_that_the_list_misses(talks):
    instances, seeker = talks.sample("test", 40), Seeker(talks, SeekerConfig(most=2))
    named = 0
    for number, (instance, shown) in enumerate(zip(instances, lists(talks, 40), strict=True)):
        (text,) = seeker.criticise([Criticise(instance.dialogue, shown, number, "x")])
        open_ = missed(talks, talks.stated(instance.dialogue), shown)
        said = talks.understand(text)
        assert set(said) <= set(open_)
        assert bool(said) == bool(open_)
        assert len(said) <= 2
        named += len(said)
    assert named > 40  # some name two


def test_the_worst_comes_first_and_a_list_that_meets_all_is_asked_for_one_thing_more(talks):
    (instance,) = talks.sample("test", 1)
    wishes, label = talks.stated(instance.dialogue), instance.labels[0]
    asked = Criticise(instance.dialogue, (label,) * 3, 0, "x")  # the hidden item meets whatever was said
    assert Seeker(talks).criticise([asked]) == ["I want something else."]
    rng = np.random.default_rng(0)
    (more,) = talks.understand(Seeker(talks).critique(instance.dialogue, (label,), rng, label))
    assert more.attribute not in {w.attribute for w in wishes}
    assert values(talks, label)[more.attribute] == more.value
    shown = lists(talks, 1)[0]
    shares = {
        w: sum((values(talks, item)[w.attribute] == w.value) == w.wanted for item in shown) for w in wishes
    }  # fmt: skip
    (first,) = talks.understand(Seeker(talks).critique(instance.dialogue, shown, rng))
    assert shares[first] == min(shares.values())


def test_scores_are_shares_of_wishes_met(talks):
    instances = talks.sample("test", 5)
    shown = lists(talks, 5)
    found = Seeker(talks).score([i.dialogue for i in instances], shown)
    for instance, items, scores in zip(instances, shown, found, strict=True):
        wishes = talks.stated(instance.dialogue)
        for item, score in zip(items, scores, strict=True):
            known = values(talks, item)
            met = sum((known[w.attribute] == w.value) == w.wanted for w in wishes)
            assert score == pytest.approx(met / len(wishes))
        assert Seeker(talks).score([instance.dialogue], [instance.labels])[0].tolist() == [1.0]
    (nothing,) = Seeker(talks).score([Dialogue("d", (Turn(USER, "Hello"),))], [(0, 1)])
    assert np.isnan(nothing).all()


def test_the_teacher_reads_dialogue_list_and_wish_from_the_prompt(talks, prompts):
    """What it writes of the prompt is what it would say knowing all of it."""
    teacher, seen = Seeker(talks), 0
    for instance, shown in zip(talks.sample("train", 30), lists(talks, 30), strict=True):
        text = annotate(teacher, prompts, annotation_prompt(prompts, instance, shown), 3)
        open_ = missed(talks, talks.stated(instance.dialogue), shown)
        said = talks.understand(text)
        assert said
        assert set(said) <= set(open_) or not open_
        seen += bool(open_)
        assert text == annotate(teacher, prompts, annotation_prompt(prompts, instance, shown), 3)
    assert seen > 20
    # A list of the hidden item itself: only what the wish section says can be asked for.
    (instance,) = talks.sample("train", 1)
    (more,) = talks.understand(annotate(teacher, prompts, annotation_prompt(prompts, instance, instance.labels * 2), 0))
    assert values(talks, instance.labels[0])[more.attribute] == more.value


@pytest.mark.parametrize("error", [0.0, 0.3, 1.0])
def test_errors_come_at_the_stated_rate(talks, prompts, error):
    """A wrong critique asks for another value of the attribute: by chance the right one again, once in so many."""
    teacher, wrong, expected = Seeker(talks, SeekerConfig(error)), 0, 0.0
    instances, shown = talks.sample("train", 20), lists(talks, 20)
    for instance, items in zip(instances, shown, strict=True):
        prompt = annotation_prompt(prompts, instance, items)
        stated = talks.stated(instance.dialogue)
        open_ = missed(talks, stated, items)
        assert open_
        for seed in range(40):
            (said,) = talks.understand(annotate(teacher, prompts, prompt, seed))
            wrong += said not in stated
            expected += error * (1 - 1 / len(talks.world.values[said.attribute]))
    assert wrong == pytest.approx(expected, abs=3 * np.sqrt(800 * error * (1 - error)) + 0.06 * expected)


@pytest.mark.parametrize("section", ["Conversation", "Recommendation By Recommender", "Hidden Wish"])
def test_a_prompt_of_another_form_is_an_error(talks, prompts, section):
    (instance,) = talks.sample("train", 1)
    prompt = annotation_prompt(prompts, instance, (0, 1))
    with pytest.raises(ValueError, match=f"the section '{section.split()[0]}' is missing"):
        annotate(Seeker(talks), prompts, prompt.replace(f"## {section}\n", "## Else\n"), 0)


@pytest.mark.parametrize("settings", [{"error": -0.1}, {"error": 1.1}, {"most": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="error must lie between 0 and 1"):
        SeekerConfig(**settings)
