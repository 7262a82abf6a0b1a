"""What the players of GRSU count, from a stage's files to result.json."""

import json

from jaxrec.systems import grsu
from jaxrec.systems.grsu_counts import as_metrics, of_metrics, stage_counts
from rl.metrics import MetricsWriter
from tests.jaxrec.systems import conversing, scripted_endpoint, test_grsu_endpoint
from tests.jaxrec.systems.conversing import TITLES

STEPS = [
    {"query writer": {"search: filled": 2}, "simulated user": {"replies": 5, "failed_timeout": 1}},
    {"simulated user": {"replies": 7}},
]


def test_steps_are_summed_and_those_done_again_count_once(tmp_path):
    with MetricsWriter(tmp_path, "rl", console=False) as writer:
        for step, counts in enumerate([*STEPS, {"simulated user": {"replies": 100}}], 1):
            writer.write(step, {"reward": 0.5, **as_metrics(counts)})
        writer.resume(2)  # the third is about to be done again
    with MetricsWriter(tmp_path, "cold_start", console=False) as writer:
        writer.write(1, as_metrics({"simulated user": {"replies": 1000}}))
    found = stage_counts(tmp_path, [])
    assert found == {
        "rl": {"query writer": {"search: filled": 2}, "simulated user": {"replies": 12, "failed_timeout": 1}}
    }
    assert of_metrics([]) == {}


def test_every_stage_has_its_file(tmp_path):
    assert stage_counts(tmp_path, []) == {}
    (tmp_path / "instructions.json").write_text(json.dumps({"items": 3, "players": {"recommender": {"tries": 4}}}))
    (tmp_path / "cold_start.json").write_text(
        json.dumps({"traces": 3, "players": {"query writer": {"query: empty": 1}}})
    )
    trees = [{"recommender": {"tries": 1}}, {}, {"recommender": {"tries": 2, "misfits": 1}}]
    assert stage_counts(tmp_path, trees) == {
        "synthesize": {"recommender": {"tries": 4}}, "cold start": {"query writer": {"query: empty": 1}},
        "interact": {"recommender": {"tries": 3, "misfits": 1}},
    }  # fmt: skip


def answer(prompt: str, seed: int) -> tuple[str, str, str]:
    """A user as before, and a recommender: one title that does not exist, one that comes twice, and every other reply
    has one too many."""
    if "**Name (year)**" not in prompt:
        return test_grsu_endpoint.answer(prompt, seed)
    titles = [TITLES[0], TITLES[0], "Qqqq Xxxx Zzzz", TITLES[1]][: 3 + seed % 2]
    return "titles", "\n".join(f"{number}. **{title}**" for number, title in enumerate(titles, 1)), "stop"


def test_counts_of_seeds_are_told_apart_and_summed(tmp_path):
    """What a recommender counts, against the nodes of the trees."""
    with scripted_endpoint.endpoint(answer, tokens=test_grsu_endpoint.tokens) as server:
        writer = {"url": server.url, "model": "writes", "key_variable": "", "tries": 40}
        changes = {f"recommender__writer__{name}": value for name, value in writer.items()}
        files = conversing.road_files(tmp_path)[0]
        config = test_grsu_endpoint.config_of(
            files, server.url, recommender__kind="prompted", seeds="(0, 1)", **changes
        )
        result = grsu.run(config, tmp_path / "work", ["interact", "evaluate"])
    counts = result["counts"]
    assert list(counts["by seed"]) == ["0", "1"]
    summed = {}
    for seed, found in counts["by seed"].items():
        assert list(found) == ["interact", "evaluate"]
        kept = (tmp_path / "work" / f"seed{seed}" / "trees").glob("*.jsonl")
        trees = [json.loads(line) for path in kept for line in path.read_text().splitlines()]
        nodes = [node for tree in trees for node in tree["nodes"]]
        tries = sum(node["tries"] for node in nodes)
        expected = {
            "tries": tries, "asked again": tries - len(nodes), "misfits": tries - len(nodes),
            "wrong number of titles": tries - len(nodes), "names": 3 * len(nodes), "duplicates": len(nodes),
            "without a close title": len(nodes),
        }  # fmt: skip
        assert tries > len(nodes) > 0
        assert found["interact"]["recommender"] == expected
        assert found["evaluate"]["recommender"]["names"] == 3 * 2  # of the validation dialogues, for the AUC
        summed = {what: n + summed.get(what, 0) for what, n in expected.items()}
    assert counts["in all"]["interact"]["recommender"] == summed
    told = {row["name"]: row for row in result["tables"][0]["rows"]}
    assert told["recommender: wrong number of titles"]["interact"] == summed["wrong number of titles"]
    assert told["recommender: names"]["in all"] == summed["names"] + 2 * 6
