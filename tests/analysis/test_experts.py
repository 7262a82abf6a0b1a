"""EASY-EP: the worked numbers of the method, its laws, planted experts found, and routing under a mask."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis import experts
from analysis.experts import Calibration, layer_statistics, masked_picks, mix, select, select_by
from models.config import Config
from models.moe import check_expert_mask, route
from models.taps import Taps

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
EXPERTS = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
TOKENS = np.random.default_rng(0).integers(0, 60, (3, 10), dtype=np.int32)
LENGTHS = np.array([10, 6, 1], np.int32)


def worked(index=((0, 1), (1, 2)), valid=(1.0, 1.0)):
    """Three experts, two tokens, D = 2: A with experts 1 and 2, B with experts 2 and 3."""
    values = {
        "resid.mid": jnp.array([[[1.0, 0.0], [2.0, 0.0]]]), "moe.routed": jnp.array([[[1.8, 2.8], [1.0, 0.25]]]),
        "moe.index": jnp.array(index), "moe.weights": jnp.array([[0.6, 0.4], [0.5, 0.5]]),
        "moe.expert_norm": jnp.array([[5.0, 1.0], [2.0, 0.5]]),
    }  # fmt: skip
    return layer_statistics(values, jnp.array(valid), 3, likeness=False)


def test_worked_numbers_and_what_the_baselines_prefer():
    found = jax.tree.map(np.asarray, worked())
    np.testing.assert_allclose(found.score, [0.8786797, 0.1206115, 0.0008636], atol=1e-6)
    np.testing.assert_allclose(found.score / found.score.sum(), [0.878544, 0.120593, 0.000863], atol=1e-6)
    np.testing.assert_allclose(found.gate, [0.6, 0.9, 0.5], atol=1e-6)
    np.testing.assert_array_equal(found.frequency, [1, 2, 1])
    found = jax.tree.map(lambda x: x[None], found)
    assert select(found.score, 1).tolist() == [[True, False, False]]
    assert select(found.score, 2).tolist() == [[True, True, False]]
    for method in experts.BASELINES:
        assert select_by(method, found, 1).tolist() == [[False, True, False]]


def test_worked_mixture_of_two_domains():
    one, two = np.asarray(worked().score, np.float64)[None], np.array([[10.0, 20.0, 70.0]])
    np.testing.assert_allclose(mix({"one": one, "two": two}), [[0.489272, 0.160296, 0.350432]], atol=1e-6)
    assert (one + two).argmax() == 2  # without normalising, the domain with the larger numbers decides alone
    assert mix({"one": one, "two": two}).argmax() == 0


def test_a_token_that_is_not_turned_counts_nothing():
    """Any number of tokens whose routed output is parallel to the residual leaves scores as they are."""
    x = jnp.ones((1, 5, 4))
    values = {
        "resid.mid": x, "moe.routed": 3.0 * x, "moe.index": jnp.zeros((5, 1), int), "moe.weights": jnp.ones((5, 1)),
        "moe.expert_norm": jnp.full((5, 1), 6.0),
    }  # fmt: skip
    found = layer_statistics(values, jnp.ones(5), 2, likeness=False)
    np.testing.assert_allclose(found.score, 0.0, atol=1e-5)
    assert found.gate[0] == 5
    zero = experts.token_weight(jnp.zeros((1, 4)), jnp.ones((1, 4)))
    np.testing.assert_array_equal(zero, 0.0)


def by_hand(model, tokens, lengths):
    """Scores from full records, token by token."""
    config = model.config
    sites = ("resid.mid", "moe.index", "moe.weights", "moe.expert_out", "moe.routed")
    records = models.forward(model.params, config, jnp.asarray(tokens), record=sites).records
    records = {name: np.asarray(x, np.float64) for name, x in records.items()}
    L, E, T = config.moe_layers, config.experts, tokens.shape[1]
    score = np.zeros((L, E))
    for layer in range(L):
        for m in range(tokens.size):
            b, t = divmod(m, T)
            if t >= lengths[b]:
                continue
            x, r = records["resid.mid"][layer + config.first_dense, b, t], records["moe.routed"][layer, b, t]
            s = max(1 - x @ (x + r) / np.linalg.norm(x) / np.linalg.norm(x + r), 0.0)
            for j in range(config.top_k):
                e = int(records["moe.index"][layer, m, j])
                out = records["moe.expert_out"][layer, m, j]
                score[layer, e] += records["moe.weights"][layer, m, j] * np.linalg.norm(out) * s
    return score


@pytest.mark.parametrize("name", EXPERTS)
def test_scores_of_every_layout_equal_a_sum_token_by_token(name):
    model = models.load(FIXTURES / name)
    calibration = Calibration(model.params, model.config)
    calibration.add(TOKENS, LENGTHS)
    found = calibration.result()
    chex.assert_shape([found.score, found.gate, found.frequency], (model.config.moe_layers, model.config.experts))
    want = by_hand(model, TOKENS, LENGTHS)
    np.testing.assert_allclose(found.score, want, rtol=1e-4, atol=1e-6 * want.max())
    np.testing.assert_array_equal(found.count, LENGTHS.sum())
    np.testing.assert_array_equal(found.frequency.sum(axis=1), LENGTHS.sum() * model.config.top_k)


def test_batches_padding_and_order_change_nothing():
    model = models.load(FIXTURES / "qwen3_moe")

    def scores(*parts):
        calibration = Calibration(model.params, model.config)
        for tokens, lengths in parts:
            calibration.add(tokens, lengths)
        return calibration.result().score

    whole = scores((TOKENS, LENGTHS))
    parts = scores((TOKENS[2:], LENGTHS[2:]), (TOKENS[:1], LENGTHS[:1]), (TOKENS[1:2], LENGTHS[1:2]))
    wider = scores((np.pad(TOKENS, ((0, 0), (0, 7)), constant_values=9), LENGTHS))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(wider, whole, rtol=1e-5, atol=1e-7)


def test_what_shared_experts_write_turns_no_token():
    model = models.load(FIXTURES / "deepseek_v3")
    calibration = Calibration(model.params, model.config)
    calibration.add(TOKENS, LENGTHS)
    shared = model.params["layers"]["s_down"]
    changed = {**model.params, "layers": {**model.params["layers"], "s_down": shared.at[-1].mul(-3.0)}}
    other = Calibration(changed, model.config)
    other.add(TOKENS, LENGTHS)
    np.testing.assert_array_equal(calibration.result().score[-1], other.result().score[-1])


def planted(loud, quiet, seed=0):
    """A model of one layer in which tokens of domain d (ids d*8 .. d*8+7) go to the experts ``loud[d]`` with long
    outputs across the residual, and to ``quiet[d]`` with the largest gate and next to no output."""
    E, D = 16, 24
    config = Config(
        family="qwen3_moe", vocab_size=16, dim=D, layers=1, heads=1, kv_heads=1, head_dim=4, ffn_dim=8, experts=E,
        top_k=3, norm_topk=True, qk_norm=True,
    )  # fmt: skip
    params = models.init(config, jax.random.key(seed))
    layers = dict(params["layers"])
    embed = np.zeros((16, D), np.float32)
    embed[:8, 0], embed[8:, 1] = 1.0, 1.0  # the axis that names the domain
    embed[np.arange(16), 2 + np.arange(16) % 8] = 0.3
    router = np.zeros((D, E), np.float32)
    rng = np.random.default_rng(seed)
    router[2:10] = 0.1 * rng.standard_normal((8, E))
    for d in range(2):
        router[d, list(loud[d])], router[d, quiet[d]] = 4.0, 5.0
    down = 0.05 * rng.standard_normal((E, 8, D)).astype(np.float32)
    for d in range(2):
        down[list(loud[d]), :, 12:] *= 60.0
        down[quiet[d]] *= 1e-3
    layers |= {"router": jnp.asarray(router)[None], "e_down": jnp.asarray(down)[None], "wo": 0.0 * layers["wo"]}
    for name in ("e_gate", "e_up"):
        layers[name] = 0.5 * jax.random.normal(jax.random.key(9), layers[name].shape)
    return {**params, "embed": jnp.asarray(embed), "layers": layers}, config


def test_planted_experts_are_found_and_those_with_gates_alone_are_not():
    loud, quiet = ((3, 7), (2, 11)), (5, 9)
    params, config = planted(loud, quiet)
    rng = np.random.default_rng(1)
    scores, gates = {}, {}
    for domain, rows in ((0, 4), (1, 400)):  # the second domain has a hundred times as many tokens
        calibration = Calibration(params, config)
        tokens = rng.integers(8 * domain, 8 * domain + 8, (rows, 12)).astype(np.int32)
        calibration.add(tokens, np.full(rows, 12))
        found = calibration.result()
        scores[domain], gates[domain] = found.score, found
    for domain in (0, 1):
        assert set(np.flatnonzero(select(scores[domain], 2)[0])) == set(loud[domain])
        assert quiet[domain] in np.flatnonzero(select_by("gate", gates[domain], 1)[0])
    both = set(loud[0] + loud[1])
    assert set(np.flatnonzero(select(mix(scores), 4)[0])) == both
    assert set(np.flatnonzero(select(scores[0] + scores[1], 2)[0])) == set(loud[1])  # without normalising


def test_selection_is_nested_and_fills_up_by_index(rng):
    score = rng.random((3, 16))
    assert (select(score, 4) <= select(score, 8)).all()
    score[:, 5:] = 0.0
    assert select(score, 8)[0].tolist() == [True] * 8 + [False] * 8
    np.testing.assert_array_equal(select(np.zeros((1, 6)), 2), [[True, True, False, False, False, False]])


# --- routing under a mask --------------------------------------------------------------------------------------------

P = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
BIAS = np.array([0, 0, 0, 0, 0, 0, 0.5, 0.5])


def routed(mask, mode):
    """Experts and weights of one token whose sigmoid scores are P, with groups of two, two of them allowed."""
    config = Config(
        family="deepseek_v3", vocab_size=8, dim=1, layers=1, heads=1, kv_heads=1, head_dim=4, ffn_dim=2, kv_lora=2,
        rope_dim=2, value_dim=2, experts=8, top_k=2, groups=4, top_groups=2, router_score="sigmoid", norm_topk=True,
        routed_scale=2.5, mask_mode=mode,
    )  # fmt: skip
    layer = {
        "router": jnp.asarray(np.log(P / (1 - P)), jnp.float32)[None],
        "router_bias": jnp.asarray(BIAS, jnp.float32),
    }
    if mask is not None:
        layer["expert_mask"] = jnp.asarray(mask, bool)
    index, weights = route(jnp.ones((1, 1)), layer, config, Taps())
    return index[0].tolist(), np.asarray(weights[0])


A, B = (0, 0, 1, 1, 1, 1, 1, 0), (0, 0, 1, 0, 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("mask", "mode", "index", "weights"),
    [
        (None, "mask_first", [0, 1], [1.3235, 1.1765]),
        (A, "official_zero_fill", [6, 0], [0.625, 1.875]),
        (A, "mask_first", [2, 3], [1.3462, 1.1538]),
        (B, "mask_first", [2, 4], [1.4583, 1.0417]),
        (A, "drop", [0, 1], [0.0, 0.0]),
    ],
)
def test_worked_routing(mask, mode, index, weights):
    got, found = routed(mask, mode)
    assert got == index
    np.testing.assert_allclose(found, weights, atol=1e-4)


def test_the_released_routine_picks_masked_experts_only():
    index, _ = routed(B, "official_zero_fill")
    assert set(index) == {0, 1}  # both are masked
    assert set(routed(B, "group_then_mask")[0]) <= set(np.flatnonzero(B))


def test_masks_that_leave_chosen_groups_too_little_are_refused_where_groups_come_first():
    config = models.load(FIXTURES / "deepseek_v3").config
    size = config.experts // config.groups
    mask = np.ones((config.moe_layers, config.experts), bool)
    mask[0, : config.top_groups * size] = False
    mask[0, 0] = True
    check_expert_mask(mask, config)
    for mode in ("group_then_mask", "official_zero_fill"):
        with pytest.raises(ValueError, match=r"emptiest of layer 0 keep 1 experts.*mask_mode='mask_first'"):
            check_expert_mask(mask, config.replace(mask_mode=mode))


@pytest.mark.parametrize("name", EXPERTS)
def test_no_masked_expert_is_ever_taken_and_new_masks_compile_nothing(name):
    model = models.load(FIXTURES / name)
    config = model.config
    valid = jnp.asarray(np.arange(10) < LENGTHS[:, None])
    count = jax.jit(masked_picks, static_argnums=1)
    size = config.experts // config.groups
    for seed in range(4):
        rng = np.random.default_rng(seed)
        keep = int(rng.integers(config.top_k, config.experts + 1))
        mask = select(rng.random((config.moe_layers, config.experts)), keep)
        if seed == 3 and config.groups > 1:  # whole groups gone
            mask[:] = True
            mask[:, : (config.groups - 1) * size] = False
            mask[:, : max(config.top_k - size, 0)] = True
        np.testing.assert_array_equal(count(model.params, config, TOKENS, valid, mask), 0)
        if seed == 0:
            before = count._cache_size()
    assert count._cache_size() == before


def test_dropping_leaves_out_what_masked_experts_write():
    model = models.load(FIXTURES / "qwen3_moe")
    config = model.config.replace(mask_mode="drop", layers=1)
    params = {**model.params, "layers": jax.tree.map(lambda w: w[:1], model.params["layers"])}
    mask = np.ones((1, config.experts), bool)
    sites = ("moe.expert_out", "moe.weights", "moe.index", "moe.routed")
    plain = models.forward(params, config, TOKENS, record=sites).records
    same = models.forward(params, config, TOKENS, expert_mask=mask).logits
    np.testing.assert_array_equal(same, models.forward(params, config, TOKENS).logits)
    mask[0, :2] = False
    got = models.forward(params, config, TOKENS, expert_mask=mask, record=sites).records
    weights = np.where(mask[0][np.asarray(plain["moe.index"][0])], plain["moe.weights"][0], 0.0)
    want = np.einsum("mkd,mk->md", plain["moe.expert_out"][0], weights).reshape(plain["moe.routed"][0].shape)
    np.testing.assert_allclose(got["moe.routed"][0], want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - plain["moe.routed"][0]).max() > 0.01


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mask_of_ones_is_no_mask(name):
    model = models.load(FIXTURES / name)
    ones = np.ones((model.config.moe_layers, model.config.experts), bool)
    run = jax.jit(models.forward, static_argnums=1)
    np.testing.assert_allclose(
        run(model.params, model.config, TOKENS, expert_mask=ones).logits,
        run(model.params, model.config, TOKENS).logits, rtol=1e-6, atol=1e-6,
    )  # fmt: skip


# --- merging, files, bad input ---------------------------------------------------------------------------------------


def test_merging_alike_experts_changes_nothing_and_others_are_averaged():
    """Two copies of an expert, one with its units in another order, become one."""
    model = models.load(FIXTURES / "qwen3_moe")
    config, layers = model.config, dict(model.params["layers"])
    turn = np.random.default_rng(0).permutation(config.ffn_dim)
    for name in ("e_gate", "e_up"):
        layers[name] = layers[name].at[:, 1].set(layers[name][:, 0][..., turn])
    layers["e_down"] = layers["e_down"].at[:, 1].set(layers["e_down"][:, 0][:, turn])
    layers["router"] = layers["router"].at[:, :, 1].set(0.9 * layers["router"][:, :, 0])
    params = {**model.params, "layers": layers}
    calibration = Calibration(params, config, likeness=True)
    calibration.add(TOKENS, LENGTHS)
    found = calibration.result()
    found.frequency[:] = np.arange(config.experts, 0, -1)
    found.frequency[:, 1] = 0.5  # the copy alone is not dominant
    merged, group = experts.merge_experts(params, config, found, config.experts - 1)
    np.testing.assert_array_equal(group[:, 1], 0)
    logits = models.forward(merged, config, TOKENS).logits
    np.testing.assert_allclose(logits, models.forward(params, config, TOKENS).logits, atol=1e-4)
    fewer, group = experts.merge_experts(params, config, found, 2)
    for layer in range(config.layers):
        for lead in np.unique(group[layer]):
            members = np.asarray(fewer["layers"]["e_up"])[layer, group[layer] == lead]
            np.testing.assert_array_equal(members, np.broadcast_to(members[:1], members.shape))


def test_the_released_selection_on_random_statistics(rng):
    """The released script's rule, spelled out: sum over samples of weights * norms * max(1 - similarity, 0) by expert,
    then the 128 largest of 256 in each of 58 layers; our sums over the same numbers give the same mask."""
    L, N, k = 58, 256, 8
    total, ours = np.zeros((L, N)), []
    for tokens in (60, 45):
        idxs = rng.random((L, tokens, N)).argsort(axis=-1)[..., :k]
        weights, norms = rng.random((L, tokens, k)), rng.random((L, tokens, k))
        similarity = rng.uniform(0.5, 1.001, (L, tokens))
        for layer in range(L):
            share = weights[layer] * norms[layer] * np.maximum(1 - similarity[layer], 0)[:, None]
            np.add.at(total[layer], idxs[layer], share)
        ours.append((idxs, weights, norms, similarity))
    score = np.zeros((L, N))
    for idxs, weights, norms, similarity in ours:
        # Two unit vectors at that angle stand for the residual before and after.
        cosine = np.minimum(similarity, 1.0)
        before = np.stack([np.ones_like(cosine), np.zeros_like(cosine)], axis=-1)
        after = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=-1)
        for layer in range(L):
            values = {
                "resid.mid": jnp.asarray(before[layer]), "moe.routed": jnp.asarray(after[layer] - before[layer]),
                "moe.index": jnp.asarray(idxs[layer]), "moe.weights": jnp.asarray(weights[layer], jnp.float32),
                "moe.expert_norm": jnp.asarray(norms[layer], jnp.float32),
            }  # fmt: skip
            score[layer] += np.asarray(layer_statistics(values, jnp.ones(len(idxs[layer])), N, False).score)
    want = np.zeros((L, N), bool)
    np.put_along_axis(want, np.argsort(-total, axis=1, kind="stable")[:, :128], True, axis=1)
    np.testing.assert_array_equal(select(score, 128), want)


def test_bad_input_names_what_is_wrong():
    model = models.load(FIXTURES / "qwen3_moe")
    config = model.config
    with pytest.raises(ValueError, match="a qwen3 model has no experts"):
        Calibration(models.load(FIXTURES / "qwen3").params, models.load(FIXTURES / "qwen3").config)
    with pytest.raises(ValueError, match="code holds no token"):
        Calibration(model.params, config).result("code")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Calibration(model.params, config).add(TOKENS + 10**6, LENGTHS)
    with pytest.raises(ValueError, match=r"cannot keep 9 of 8"):
        select(np.ones((2, 8)), 9)
    with pytest.raises(ValueError, match=r"cannot keep 0 of 8"):
        select(np.ones((2, 8)), 0)
    bad = np.ones((2, 8))
    bad[1] = 0.0
    with pytest.raises(ValueError, match="maths: the expert scores of layer 1 are all 0"):
        mix({"law": np.ones((2, 8)), "maths": bad})
    with pytest.raises(ValueError, match=r"different models cannot be mixed.*\(2, 8\).*\(2, 4\)"):
        mix({"law": np.ones((2, 8)), "maths": np.ones((2, 4))})
    with pytest.raises(ValueError, match="likeness=True"):
        experts.merge_experts(model.params, config, experts.Statistics(bad, bad, bad, bad), 2)
    with pytest.raises(ValueError, match="mask_mode must be one of"):
        config.replace(mask_mode="first")
