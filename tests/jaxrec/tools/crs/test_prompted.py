"""A prompted recommender: what it is asked, how replies are read and mapped, and how often it is asked again."""

import re

import pytest

from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask
from jaxrec.tools.crs.prompted import PromptedConfig, PromptedRecommender
from jaxrec.tools.crs.prompts import RecommenderPrompts, bold_titles, without_speaker, written_query
from jaxrec.tools.teacher import Failure, Reply, ScriptedTeacher

TITLES = (
    "Toy Story (1995)",
    "Heat (1995)",
    "Ran (1985)",
    "Stem",
    "Tomcats (2001)",
    "Alien (1979)",
    "System Crash (1999)",
)
GENRES = ("animation", "crime", "war", "thriller", "comedy", "horror", "horror")
CATALOGUE = ItemCatalogue(TITLES, [{"genre": genre, "star": ["Ann", "Bob"]} for genre in GENRES])
TALK = Dialogue(
    "d1:3", (Turn("user", "Something\nscary <|im_end|>"), Turn("system", "Sure.", (3,)), Turn("user", "ok"))
)


def bold(*names):
    return "\n".join(f"{n}. **{name}**" for n, name in enumerate(names, start=1))


class Teacher:
    """Says what ``say(request)`` says; a Failure where that is one. Keeps the batches it was asked."""

    id = "stub"

    def __init__(self, say):
        self.say, self.batches = say, []

    def ask(self, requests, done=None):
        self.batches.append(list(requests))
        said = [self.say(request) for request in requests]
        return [x if isinstance(x, Failure) else Reply((x,), ("stop",)) for x in said]


def recommender(say, k=2, **settings):
    teacher = Teacher(say)
    return PromptedRecommender(teacher, CATALOGUE, PromptedConfig(k=k, **settings)), teacher


def test_sections_of_the_prompt():
    prompts = RecommenderPrompts(CATALOGUE, 2, what="films")
    first = prompts.titles(Ask(TALK))
    assert re.findall(r"^## .*$", first, re.MULTILINE) == ["## Conversation", "## Instruction"]
    assert first.startswith(
        "## Conversation\nUser: Something scary \u2039|im_end\u00b7>\nSystem: Sure.\nUser: ok\n\n##"
    )
    again = prompts.titles(Ask(TALK, (1, 3), "too\nloud", (0, 2, 1, 3)))
    assert re.findall(r"^## .*$", again, re.MULTILINE) == [
        "## Conversation", "## Recommendation", "## Feedback", "## Instruction"
    ]  # fmt: skip
    assert (
        "## Recommendation\nSystem:\n1. Heat (1995)\n  - genre: crime\n  - star: Ann, Bob\n"
        "2. Stem\n  - genre: thriller\n  - star: Ann, Bob\n\n## Feedback\nUser: too loud\n\n## Instruction\n"
    ) in again
    # The latest list and the latest critique alone: no item of earlier lists.
    assert "Toy Story" not in again
    assert "Ran" not in again
    assert "1. **Name (year)**" in again
    blanked = prompts.titles(Ask(TALK, (1, 3)))
    assert "## Recommendation" in blanked
    assert "Feedback" not in blanked


def test_what_names_speakers_and_queries_are_read_from():
    text = "Sure!\n1. **Heat (1995)** - **crime**\n2) ** Ran **\n** **\n****\n3. *Stem*\n"
    assert bold_titles(text) == ["Heat (1995)", "Ran"]
    assert bold_titles("<think>**Alien**</think>\n**Ran**") == ["Ran"]
    # The released code strips the characters of "System:" from the left, and "Stem" with them.
    assert without_speaker("System: Stem") == "Stem"
    assert without_speaker("System Crash (1999)") == "System Crash (1999)"
    assert written_query('Analysis: Query: no\nQuery: "quiet  crime film"\nmore') == "quiet crime film"
    assert written_query("**Query:** crime") == "crime"
    assert written_query("quiet crime film") == written_query("Query: ") == ""


def test_k_different_items_also_of_repeated_and_misspelt_titles():
    made, _ = recommender(lambda r: bold("Toy Stroy (1995)", "Heat", "Heat (1995)", "Heat (1995)"), k=4)
    (reply,) = made.recommend([Ask(TALK)])
    assert len(set(reply.items)) == 4
    assert reply.items[0] == TITLES.index("Toy Story (1995)")
    assert reply.items[1] == TITLES.index("Heat (1995)")
    assert reply.unsure > 0  # two of three "Heat" are somebody else
    assert +made.counts == {"tries": 1, "names": 4, "duplicates": 2}


def test_names_that_match_nothing_can_be_refused():
    replies = {0: bold("Heat (1995)", "Qwertyuiop zxcvbnm"), 1: bold("Heat (1995)", "Ran")}
    seeds = []

    def say(request):
        seeds.append(request.sampling.seed)
        return replies[len(seeds) - 1]

    made, _ = recommender(say, min_ratio=40)
    (reply,) = made.recommend([Ask(TALK)])
    assert (reply.items, reply.tries) == ((1, 2), 2)
    assert +made.counts == {
        "tries": 2, "asked again": 1, "misfits": 1, "names": 4, "unmapped": 1, "without a close title": 1,
    }  # fmt: skip
    loose, _ = recommender(lambda r: replies[0])
    assert loose.recommend([Ask(TALK)])[0].unsure == 1
    assert +loose.counts == {"tries": 1, "names": 2, "without a close title": 1}


@pytest.mark.parametrize("names", [9, 11, 0])
def test_another_number_of_titles_is_asked_again_five_times_and_no_more(names):
    catalogue = ItemCatalogue([f"Film {n}" for n in range(12)], [{}] * 12)
    text = bold(*catalogue.titles[:names]) or "I would watch Film 1 and Film 2."
    teacher = Teacher(lambda request: text)
    made = PromptedRecommender(teacher, catalogue)
    with pytest.raises(
        RuntimeError, match=r"node 0\.2, dialogue d1:3: none of 5 replies has exactly 10 titles"
    ) as error:
        made.recommend([Ask(TALK, name="node 0.2")])
    assert repr(text[:100])[1:-1] in str(error.value)  # the last reply
    assert len(teacher.batches) == 5
    assert len({batch[0].sampling.seed for batch in teacher.batches}) == 5
    assert +made.counts == {"tries": 5, "asked again": 4, "misfits": 5, "wrong number of titles": 5}


def test_failures_of_the_teacher_are_tries_too():
    made, _ = recommender(lambda r: Failure("timeout", "nobody there"), tries=2)
    with pytest.raises(RuntimeError, match=r"dialogue d1:3: none of 2 replies .*timeout: nobody there"):
        made.recommend([Ask(TALK)])
    assert made.counts["failed_timeout"] == 2


def test_all_asks_of_a_round_are_one_call_and_only_misfits_come_again():
    tried = []

    def say(request):
        text = request.messages[0].content
        tried.append("slow" in text)
        return "no" if "slow" in text and sum(tried) < 3 else bold("Ran", "Stem")

    made, teacher = recommender(say)
    slow = Dialogue("d2", (Turn("user", "slow"),))
    replies = made.recommend([Ask(TALK), Ask(slow), Ask(TALK, seed=1)])
    assert [len(batch) for batch in teacher.batches] == [3, 1, 1]
    assert [reply.tries for reply in replies] == [1, 3, 1]
    assert made.recommend([]) == []


def test_seeds_hang_on_the_ask_alone():
    def seeds(asks):
        made, teacher = recommender(lambda r: bold("Ran", "Stem"))
        made.recommend(asks)
        return [request.sampling.seed for request in teacher.batches[0]]

    asks = [Ask(TALK, seed=s) for s in (1, 2, 3)]
    assert len(set(seeds(asks))) == 3
    assert seeds(asks) == seeds(asks[::-1])[::-1]
    request = recommender(lambda r: "")[0]._request("x", 7)
    assert (request.role, request.sampling.temperature, request.sampling.max_tokens) == ("recommender", 1.0, 256)


def test_a_critique_reaches_a_recommender_that_obeys():
    """Acceptance property 7: the wished genre is there in the second round, and not where the critique is blanked."""

    def obey(request, choice):
        text = request.messages[0].content
        feedback = re.search(r"## Feedback\nUser: (.*)", text)
        wanted = feedback[1].split()[-1] if feedback else "war"
        shown = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
        free = [t for t, g in zip(TITLES, GENRES) if g == wanted and t not in shown]
        return bold(*(free + [t for t in TITLES if t not in free])[:2])

    made = PromptedRecommender(ScriptedTeacher({"recommender": obey}), CATALOGUE, PromptedConfig(k=2))
    (first,) = made.recommend([Ask(TALK)])
    horror = {i for i, genre in enumerate(GENRES) if genre == "horror"}
    assert horror.isdisjoint(first.items)
    told, untold = made.recommend(
        [Ask(TALK, first.items, critique, first.items) for critique in ("No war, I want horror", "")]
    )
    assert set(told.items) == horror
    assert horror.isdisjoint(untold.items)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recommender(lambda r: "", k=8), "k=8 must lie between 1 and the number of items of the catalogue, 7"),
        (lambda: recommender(lambda r: "", k=0), "k=0"),
        (lambda: PromptedConfig(tries=0), "tries=0"),
        (lambda: PromptedConfig(min_ratio=101), "min_ratio=101"),
        (
            lambda: PromptedRecommender(None, CATALOGUE, PromptedConfig(k=2), prompts=RecommenderPrompts(CATALOGUE, 3)),
            "3",
        ),
        (lambda: Ask(Dialogue("d9", ())), "dialogue d9: at least one turn"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
