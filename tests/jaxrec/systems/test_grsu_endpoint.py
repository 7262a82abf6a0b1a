"""GRSU with a user behind an endpoint: no model of ours is there, and every figure follows from the script."""

import json
import math
import re

import pytest

from jaxrec.config import UsageError, resolve_config
from jaxrec.systems import grsu
from tests.jaxrec.systems import conversing, scripted_endpoint
from tests.jaxrec.systems.conversing import GENRES, TITLES

LIKES = {"comedy": 0.9, "drama": 0.2, "war": 0.6}
SAID = "Rather a war film, please."


def answer(prompt: str, seed: int) -> tuple[str, str, str]:
    """A user: decides about the one item it is shown, or criticises."""
    shown = re.findall(r"^1\. (.* Road \(2001\))$", prompt, re.MULTILINE)
    if "then Yes or No" not in prompt:
        return "critique", SAID, "stop"
    word = "Yes" if LIKES[GENRES[TITLES.index(shown[-1])]] > 0.5 else "No"
    return "score", f"1. {shown[-1]}? {word}", "stop"


def tokens(said: str) -> list:
    title, _, word = said.removeprefix("1. ").rpartition("? ")
    likes = LIKES[GENRES[TITLES.index(title)]]
    beside = [(" Yes", math.log(likes)), (" No", math.log(1 - likes))]
    return [("1. ", 0.0, []), (f"{title}?", 0.0, []), (f" {word}", math.log(max(likes, 1 - likes)), beside)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return conversing.road_files(tmp_path_factory.mktemp("endpoint"))[0]


def config_of(files, url, **changes):
    sizes = {
        "user__kind": "endpoint", "user__url": url, "user__model": "served", "user__key_variable": "",
        "data__valid_dialogues": 2, "evaluate__arms": "('crs_alone',)", "recommender__retrieval__turns": 0,
        "recommender__retrieval__temperature": 0,
    }  # fmt: skip
    return resolve_config("grsu:small", conversing.flags("", "", **files, **(sizes | changes)))


def trees_of(work):
    return [json.loads(line) for line in (work / "trees" / "full.jsonl").read_text().splitlines()]


def test_a_served_model_scores_and_criticises(files, tmp_path):
    with scripted_endpoint.endpoint(answer, tokens=tokens) as server:
        config = config_of(files, server.url)
        result = grsu.run(config, tmp_path, grsu.STAGES)
        asked = len(server.asked)
        assert {"critique", "score"} == set(server.asked)
        assert grsu.run(config, tmp_path, grsu.STAGES) == result
        assert len(server.asked) == asked  # what was said is kept
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "instructions.jsonl").exists()
    nodes = [node for tree in trees_of(tmp_path) for node in tree["nodes"]]
    assert {node["critique"] for node in nodes} == {"", SAID}
    for node in nodes:
        assert node["scores"] == pytest.approx([LIKES[GENRES[item]] for item in node["items"]])
    assert list(result["auc"]) == ["endpoint"]
    named = [entry["name"] for entry in result["comparisons"]]
    assert "simulated user - chance" in named
    assert not any("before training" in name for name in named)
    check_counts(result)


def check_counts(result) -> None:
    """Every item of a dialogue is asked about once, and every list that is revised."""
    told, searched = (table["rows"] for table in result["tables"])
    assert [row["name"] for row in searched] == ["GRSU", "recommender alone, one list"]
    replies = sum(row["scored"] + row["critiques"] for row in searched)
    found = result["counts"]["in all"]
    assert found["interact"]["simulated user"] == {"replies": replies}
    assert list(found["evaluate"]["simulated user"]) == ["replies"]
    assert result["counts"]["by seed"] == {"0": found}
    own = next(row for row in told if row["name"] == "simulated user: replies")
    parts = {stage: found[stage]["simulated user"]["replies"] for stage in ("interact", "evaluate")}
    assert own == {"name": own["name"], **parts, "in all": sum(parts.values())}


def test_auc_of_a_served_model_by_hand(files, tmp_path):
    """An item without a score is as good as any: half of its comparisons are right."""
    with scripted_endpoint.endpoint(answer, tokens=tokens) as server:
        this = grsu.Run(config_of(files, server.url), 0, tmp_path, None)
        (instance, *_) = this.task.parts["test"]
        (label,) = instance.labels
        (scores,) = this.user("endpoint").score([instance.dialogue], [range(12)])
    assert scores[label] == pytest.approx(LIKES[GENRES[label]])

    class Silent:
        def score(self, dialogues, items):
            return [scores[list(own)] * math.nan for own in items]

    assert grsu.judging.label_auc(Silent(), [instance], 12, [(0, 1, 2)], 0) == [0.5]


def test_a_served_model_that_is_down_leaves_no_tree(files, tmp_path):
    with scripted_endpoint.endpoint(answer, 401, tokens) as server:
        with pytest.raises(RuntimeError, match=r"who plays the user, did not answer \d+ of \d+ requests .*'auth': \d+"):
            grsu.run(config_of(files, server.url), tmp_path, ["interact"])
    assert not (tmp_path / "trees" / "full.jsonl").exists()


def test_short_levels_are_counted_by_reason_and_told_in_one_line(files, tmp_path, capsys):
    """Nobody criticises: of eight levels of four dialogues, the second ones are empty."""

    def silent(prompt, seed):
        note, said, finish = answer(prompt, seed)
        return note, "" if note == "critique" else said, finish

    with scripted_endpoint.endpoint(silent, tokens=tokens) as server:
        result = grsu.run(config_of(files, server.url), tmp_path, ["interact", "evaluate"])
    # Of four dialogues two beams want two critiques each; none has one after three rounds, nor after two more.
    told = result["counts"]["in all"]["interact"]["simulated user"]
    assert (told["no critique"], told["empty"], told["asked again"]) == (16, 16 * 5, 16 * 4)
    line = "levels with fewer lists than beams: GRSU 4 of 8 (no critique could be had: 4)"
    assert [said for said in capsys.readouterr().out.splitlines() if "fewer lists" in said] == [f"interact: {line}"]
    assert result["notes"] == [line]
    assert result["short_levels"]["full"] == {"levels": 8, "no critique could be had": 4}
    assert result["short_levels"]["crs_alone"] == {"levels": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user__kind": "oracle"}, r"user\.kind='oracle' must be one of tuned, endpoint"),
        ({"evaluate__arms": "('untuned',)"}, r"arms: untuned compares with the model before training"),
        ({"user__model": ""}, r"user\.url and user\.model name the user: an OpenAI-compatible address"),
        ({"user__url": "", "user__model": ""}, r"teacher\.url and teacher\.model name"),
        ({"user__kind": "tuned"}, r"model\.path goes with data\.source=files"),
        ({"rl__steps": 1}, r"model\.path goes with data\.source=files"),
        ({"user__url": "served"}, r"user: the base_url of a teacher must have the form"),
    ],
)
def test_users_that_cannot_be_had(files, changes, message):
    with pytest.raises(UsageError, match=message):
        grsu.check(config_of(files, "http://127.0.0.1:9/v1", **changes))


def test_the_world_has_no_endpoint_of_its_own():
    flags = ["--config.user.kind=endpoint", "--config.evaluate.arms=()"]
    with pytest.raises(UsageError, match=r"teacher scores nothing; set user\.url and user\.model"):
        grsu.check(resolve_config("grsu:tiny", flags))
