import numpy as np
import pytest

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn
from jaxrec.tools.conversation import Ask
from jaxrec.world import generate, world_config
from jaxrec.world.conversations import (
    SAID,
    SPLITS,
    Conversations,
    RecommenderConfig,
    TalkConfig,
    Wish,
    WorldRecommender,
)  # fmt: skip


@pytest.fixture(scope="module")
def talks():
    return Conversations(generate(world_config("talk", items=1500, users=300)), config=TalkConfig(wishes=3))


def test_all_that_a_seeker_says_is_true_of_the_hidden_item_alone_of_few(talks):
    counts = []
    for instance in talks.sample("test", 60):
        (item,) = instance.labels
        wishes = talks.stated(instance.dialogue)
        assert sum(w.wanted for w in wishes) == 3
        fits = np.all([talks.fits(w) == w.wanted for w in wishes], axis=0)
        assert fits[item]
        counts.append(fits.sum())
        assert instance.dialogue.turns[0].role == SYSTEM
        assert instance.dialogue.turns[-1].role == USER
        assert talks.catalogue.titles[item] not in str(instance.dialogue)
    assert np.mean(counts) < 8


def test_splits_share_no_item_and_samples_repeat(talks):
    of = {split: {i.labels[0] for i in talks.sample(split, 200)} for split in SPLITS}
    assert not (of["train"] & of["test"])
    assert not (of["train"] & of["valid"])
    assert not (of["valid"] & of["test"])
    assert talks.sample("test", 5) == talks.sample("test", 9)[:5]
    again = Conversations(talks.world, seed=1, config=talks.config)
    assert again.sample("train", 5) != talks.sample("train", 5)


def test_negations_hold_within_their_clause(talks):
    genre, mood = talks.world.values["genre"][0], talks.world.values["mood"][1]
    assert talks.understand(f"No {genre}! I want something {mood}.") == [
        Wish("genre", genre, wanted=False), Wish("mood", mood),
    ]  # fmt: skip
    assert talks.understand(f"I want something {mood}, but no {genre}.") == [
        Wish("mood", mood), Wish("genre", genre, wanted=False),
    ]  # fmt: skip
    for wanted in (True, False):
        for name in SAID:
            wish = Wish(name, talks.world.values[name][-1], wanted)
            assert talks.understand(f"I want {wish.words}.") == [wish]


def mean_fit(talks, wishes, items):
    return np.mean([talks.fits(w)[list(items)] for w in wishes if w.wanted], axis=1)


def test_the_recommender_forgets_and_a_critique_reminds_it(talks):
    one = WorldRecommender(talks, RecommenderConfig(heard=1.0, kept=1.0))
    first, again, blank = [], [], []
    for number, instance in enumerate(talks.sample("test", 40)):
        wishes = [w for w in talks.stated(instance.dialogue) if w.wanted]
        shown = one.recommend([Ask(instance.dialogue, seed=number)])[0].items
        told = f"I want {wishes[0].words}."
        # The wish must be new to a list that is about the last one.
        asks = [Ask(instance.dialogue, shown, text, shown, number) for text in (told, "Hm.")]
        after, without = (reply.items for reply in one.recommend(asks))
        assert len(set(after)) == one.k
        assert not set(after) & set(shown)
        first.append(mean_fit(talks, wishes, shown))
        again.append(mean_fit(talks, wishes, after))
        blank.append(mean_fit(talks, wishes, without))
    first, again, blank = (np.mean(x, axis=0) for x in (first, again, blank))
    assert first[0] < 0.3
    assert first[-1] > 0.95
    assert again[0] > 0.8
    assert again[-1] > 0.8
    assert blank[0] < 0.3


@pytest.mark.parametrize(("kept", "low", "high"), [(0.0, 0.0, 0.4), (0.5, 0.4, 0.75), (1.0, 0.9, 1.0)])
def test_what_a_list_has_in_common_is_kept_as_often_as_asked(talks, kept, low, high):
    recommender = WorldRecommender(talks, RecommenderConfig(heard=0.0, kept=kept))
    wish = Wish("mood", talks.world.values["mood"][0])
    shown = tuple(map(int, np.flatnonzero(talks.fits(wish))[:10]))
    talk = talks.sample("test", 1)[0].dialogue
    lists = recommender.recommend([Ask(talk, shown, "Hm.", shown, seed) for seed in range(80)])
    assert low <= np.mean([np.mean(talks.fits(wish)[list(reply.items)]) for reply in lists]) <= high
    with pytest.raises(ValueError, match="kept=2"):
        RecommenderConfig(kept=2)


def shares(talks, wish, replies):
    return np.array([np.mean(talks.fits(wish)[list(reply.items)]) for reply in replies])


@pytest.mark.parametrize("stubborn", [0.0, 0.5, 1.0])
def test_a_stubborn_recommender_does_not_let_go_of_some_values(talks, stubborn):
    """Of 60 dialogues, in the share that it is stubborn in, whatever the draw; other wishes are heeded all the same."""
    recommender = WorldRecommender(talks, RecommenderConfig(heard=1.0, stubborn=stubborn))
    old, new = (Wish("mood", value) for value in talks.world.values["mood"][:2])
    shown = tuple(map(int, np.flatnonzero(talks.fits(old))[:10]))
    dialogues = [Dialogue(f"d{number}", (Turn(USER, "Hm."),)) for number in range(60)]
    found = []
    for seed in (1, 2):
        replies = recommender.recommend([Ask(d, shown, f"I want {new.words}.", shown, seed) for d in dialogues])
        held, heeded = (shares(talks, wish, replies) > 0.8 for wish in (old, new))
        assert np.all(held != heeded)
        found.append(held)
    np.testing.assert_array_equal(*found)
    assert abs(found[0].mean() - stubborn) < 0.2
    other = Wish("genre", talks.world.values["genre"][0])
    replies = recommender.recommend([Ask(d, shown, f"I want {other.words}.", shown, 1) for d in dialogues])
    assert np.all(shares(talks, other, replies) > 0.8)
    with pytest.raises(ValueError, match="stubborn=2"):
        RecommenderConfig(stubborn=2)


def test_a_hunch_is_about_what_was_not_read(talks):
    wish = Wish("mood", talks.world.values["mood"][0])
    asks = [Ask(Dialogue("d", (Turn(USER, f"I want {wish.words}."),)), seed=seed) for seed in range(60)]
    for hunch in (0.0, 1.0):
        replies = WorldRecommender(talks, RecommenderConfig(heard=1.0, hunch=hunch)).recommend(asks)
        common = [talks.common(reply.items, 0.8) for reply in replies]
        assert np.mean(shares(talks, wish, replies)) > 0.8
        others = [[w for w in own if w.attribute != "mood"] for own in common]
        share = np.mean([len(own) >= 1 for own in others])  # a maker of few items does not fill a list
        assert share > 0.6 if hunch else share < 0.1
    assert len({w.attribute for own in others for w in own}) == len(SAID) - 1
    whole = Ask(Dialogue("d", (Turn(USER, " ".join(f"I want {Wish(n, talks.value(n, 0)).words}." for n in SAID)),)))
    settings = [RecommenderConfig(heard=1.0, memory=0, temperature=0.0, hunch=hunch) for hunch in (0.0, 1.0)]
    assert len({WorldRecommender(talks, own).recommend([whole])[0].items for own in settings}) == 1  # all was read


def test_a_recommender_that_remembers_all_meets_every_wish(talks):
    all_turns = WorldRecommender(talks, RecommenderConfig(memory=0, heard=1.0, temperature=0.0))
    hits = [i.labels[0] in all_turns.recommend([Ask(i.dialogue)])[0].items for i in talks.sample("test", 60)]
    assert np.mean(hits) > 0.9


def test_seeds_decide_alone(talks):
    recommender = WorldRecommender(talks)
    asks = [Ask(i.dialogue, seed=7) for i in talks.sample("test", 3)]
    assert recommender.recommend(asks) == [recommender.recommend([ask])[0] for ask in asks]
    assert recommender.recommend(asks[:1] * 2)[0] != recommender.recommend([Ask(asks[0].dialogue, seed=8)])[0]


def test_what_cannot_be_is_refused(talks):
    with pytest.raises(ValueError, match="wishes=6"):
        TalkConfig(wishes=6)
    with pytest.raises(ValueError, match="no item for training"):
        TalkConfig(valid=0.5, test=0.5)
    with pytest.raises(ValueError, match="splits: train, valid, test"):
        talks.sample("dev", 1)
    with pytest.raises(ValueError, match="of a catalogue of 1500"):
        WorldRecommender(talks, RecommenderConfig(k=1501))
    with pytest.raises(ValueError, match="at least one turn"):
        Ask(Dialogue("d", ()))
    assert Turn(USER, "x").items == ()
