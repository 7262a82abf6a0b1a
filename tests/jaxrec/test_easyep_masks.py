"""The expert masks published with EASY-EP (arXiv 2504.06792), on a model with DeepSeek-R1's layers and experts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.convert import read_expert_mask, write_expert_mask
from models import Config
from models.moe import check_expert_mask

pytestmark = pytest.mark.real_data

# Layers, experts and groups are R1's, all widths tiny.
CONFIG = Config(
    family="deepseek_v3", router_score="sigmoid", vocab_size=40, dim=16, layers=61, first_dense=3, dense_ffn_dim=8,
    heads=2, kv_heads=2, head_dim=8, kv_lora=4, rope_dim=4, value_dim=4, experts=256, top_k=8, groups=8, top_groups=4,
    ffn_dim=4, shared_dim=4, norm_topk=True, routed_scale=2.5, tie_embeddings=False, init_std=0.3,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def recorded():
    """(router biases [58, 256], function of a mask [58, 256] -> records of the routers [58, 24, ..])."""
    params = models.init(CONFIG, jax.random.key(0))
    bias = 0.1 * np.random.default_rng(1).standard_normal((58, 256)).astype(np.float32)
    params["layers"]["router_bias"] = jnp.asarray(bias)
    sites = ("moe.logits", "moe.index", "moe.weights")
    run = jax.jit(lambda mask: models.forward(params, CONFIG, TOKENS, record=sites, expert_mask=mask).records)
    return bias, lambda mask: jax.device_get(run(mask))


def routed(logits: np.ndarray, bias: np.ndarray, mask: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    """One token by the paper's words, expert by expert: (the eight experts, all weights [256], all scores [256])."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    score = {e: scores[e] + bias[e] for e in np.flatnonzero(mask)}  # a masked expert does not exist
    groups = {}
    for e in score:
        groups.setdefault(e // 32, []).append(score[e])
    best = sorted(groups, key=lambda g: -sum(sorted(groups[g])[-2:]))[:4]
    allowed = [e for e in score if e // 32 in best]
    chosen = sorted(allowed, key=lambda e: -score[e])[:8]
    weights = np.zeros(256)
    weights[chosen] = scores[chosen] / scores[chosen].sum() * 2.5
    return chosen, weights, scores + bias


def test_masks_are_read_and_honoured(easyep, recorded, tmp_path):
    bias, run = recorded
    for path in sorted(easyep.glob("*.json")):
        mask = read_expert_mask(path)
        assert (mask.shape, mask.dtype) == ((58, 256), bool), path
        if named := re.search(r"_(\d+)\.json$", path.name):
            assert (mask.sum(axis=1) == int(named[1])).all(), path
        check_expert_mask(mask, CONFIG)
        write_expert_mask(tmp_path / "again.json", mask)
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()

        records = run(mask)
        index = records["moe.index"]
        assert index.shape == (58, TOKENS.size, 8)
        assert np.take_along_axis(mask[:, None], index, axis=2).all(), path  # no masked expert is ever chosen
        same = 0
        for layer, token in np.ndindex(index.shape[:2]):
            chosen, weights, score = routed(records["moe.logits"][layer, token], bias[layer], mask[layer])
            mine = index[layer, token]
            # Equal scores aside, and the difference between float32 and float64.
            np.testing.assert_allclose(np.sort(score[mine]), np.sort(score[chosen]), atol=1e-5)
            if set(mine.tolist()) == set(chosen):
                same += 1
                np.testing.assert_allclose(records["moe.weights"][layer, token], weights[mine], rtol=1e-4)
        assert same >= 0.99 * index.shape[0] * index.shape[1]
        free = run(np.ones_like(mask))["moe.index"]
        assert not np.take_along_axis(mask[:, None], free, axis=2).all()  # without the mask they would be
