"""What EASY-EP, KAPE and CAFE give a reader to explore, on numbers small enough to check by hand."""

import numpy as np
import pytest

from analysis import experts
from analysis.heads import document_scores
from jaxrec.data.documents import Document, Question
from jaxrec.evaluate.explore import document_widgets, expert_widgets, neuron_widgets, stage_bands
from tests.jaxrec.explored import choices


def test_experts_by_hand():
    score = np.array([[1.0, 3.0, 4.0, 0.0], [2.0, 2.0, 0.0, 4.0]])
    found = {
        name: experts.Statistics(s, s + 1, s * 0 + 1, np.array([8, 8]))
        for name, s in (("a", score), ("b", score[::-1]))
    }
    masks = {
        (d, m, 2): experts.select_by(m, found[d], 2) if d in found else experts.select(score + score[::-1], 2)
        for d in ("a", "b", "mix") for m in ("easy_ep", "random")
    }  # fmt: skip
    right = {("a", "easy_ep", 2): {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 0.0])}}
    (found_map,) = expert_widgets(found, masks, right, {"easy_ep": "EASY-EP", "random": "random"}, 3)
    assert found_map["rows"] == {"name": "layer", "labels": ["3", "4"]}
    views = dict(zip(choices(found_map), found_map["views"]))
    a, drawn = views["a", "EASY-EP", "2"], views["a", "random", "2"]
    assert a["marks"] == ["0110", "1001"]  # of equals the lower number
    assert found_map["grids"][a["grid"]] == [[0.125, 0.375, 0.5, 0.0], [0.25, 0.25, 0.0, 0.5]]
    assert a["text"].endswith("by the questions' domain: a 0.500, b 0.000.")
    assert (drawn["grid"], drawn["text"]) == (None, "")
    mix = found_map["grids"][views["mix", "EASY-EP", "2"]["grid"]]
    assert mix == [[0.1875, 0.3125, 0.25, 0.25]] * 2


def test_neurons_by_hand():
    p = np.array([[[0.9, 0.1, 0.5, 0.0]], [[0.1, 0.9, 0.5, 0.0]]])
    entropy = np.array([[0.325083, 0.325083, np.log(2.0), np.inf]])
    sets = {"internal": np.array([[1, 0, 0, 0]], bool), "external": np.array([[0, 1, 0, 0]], bool)}
    spread, table = neuron_widgets(p, entropy, sets)
    columns = {column["name"]: column["values"] for column in table["columns"]}
    assert columns["unit"] == [0, 1, 2, 3]
    assert columns["set"] == ["internal", "external", "not chosen", "filtered out"]
    assert columns["entropy"] == [0.32508, 0.32508, 0.69315, None]
    assert columns["p external"] == [0.1, 0.9, 0.5, 0.0]
    grids = dict(zip(choices(spread), (spread["grids"][v["grid"]][0] for v in spread["views"])))
    place = int(0.325083 / np.log(2.0) * 20)
    assert np.flatnonzero(grids[("all that pass the filter",)]).tolist() == [place, 19]
    assert grids[("internal",)][place] == grids[("external",)][place] == grids[("not chosen",)][19] == 1
    assert spread["views"][0]["text"] == "3 of 4 neurons."
    both = {"internal": sets["internal"], "external": sets["internal"]}
    assert neuron_widgets(p, entropy, both)[1]["columns"][5]["values"][0] == "internal, external"


@pytest.mark.parametrize(
    ("begins", "bands"),
    [
        ((2, 4, 6), [("refinement", 0, 2), ("elicitation", 2, 4), ("expression", 4, 6), ("contestation", 6, 8)]),
        ((0, None, None), [("elicitation", 0, 8)]),
        ((None, None, 3), [("refinement", 0, 3), ("contestation", 3, 8)]),
        ((3, 3, 2), [("refinement", 0, 2), ("contestation", 2, 3), ("expression", 3, 8)]),
    ],
)
def test_stages_are_bands_of_layers(begins, bands):
    assert stage_bands(dict(zip(("elicitation", "expression", "contestation"), begins)), 8) == bands


def test_documents_by_hand():
    documents = tuple(Document(title, "text") for title in ("", "T", ""))
    question = Question("q1", "who?", ("x", "y"), documents, (2,), ("other", "same", "gold"))
    method = {"order": (0, 2), "candidates": (0,), "prediction": "x", "sub_em": 1.0}
    records = [{"methods": {"direct": {**method, "prediction": "z", "sub_em": 0.0}, "cafe": method}}]
    alpha = np.random.default_rng(0).random((1, 2, 2, 5))
    eta = {"1": np.eye(2), "2": np.eye(2)[::-1]}
    names = {"direct": "direct: all", "cafe": "CAFE"}
    shown, heads = document_widgets([question], records, names, alpha, eta, {"1": [(1, 0), (0, 1)], "2": [(0, 0)]})
    (record,) = shown["records"]
    beta, _ = document_scores(alpha[0, [1, 0], [0, 1], :3])
    np.testing.assert_allclose(record["scores"], [beta.sum(axis=0), *beta], rtol=1e-4)
    assert shown["scores"] == ["sum over the heads of stage 1", "layer 1, head 0", "layer 0, head 1"]
    assert record["marks"] == [[2], [0, 2], [0]]
    assert record["texts"] == ["text", "T: text", "text"]
    outcomes = dict(zip(shown["outcomes"], record["outcomes"]))
    assert outcomes == {
        "direct: all": [False, "z"], "CAFE": [True, "x"], "what stage 1 keeps": [True, "1 of 1 gold documents"],
        "what stage 2 chooses": [False, "0 of 1 gold documents"],
    }  # fmt: skip
    assert shown["filters"] == [1, 0]
    assert [view["marks"] for view in heads["views"]] == [["01", "10"], ["10", "00"]]
