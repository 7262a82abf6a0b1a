"""Experts: three ways to run them agree, masked ones are never chosen, masking equals removing."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.plan_hlo import KINDS, bytes_of, parse, replica_groups
from models.config import Config
from models.generation import pad_rows
from models.layout import decode_weights
from models.moe import block_size, check_expert_mask, keep_experts, moe, route
from models.sample import decode, extend, prefill, routing_of
from models.sharding import sharding_for
from models.taps import Scale, Taps, sites

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
CONFIG = Config(
    vocab_size=20, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=12, family="mixtral", norm_topk=True,
    experts=6, top_k=2, init_std=0.5,
)  # fmt: skip
MASK = np.array([[1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], bool)


def layer_of(key, config: Config = CONFIG, **changes):
    layers = models.init(config, key)["layers"]
    return {name: w[0] for name, w in layers.items() if name in ("router", "e_gate", "e_up", "e_down")} | changes


def run(layer, x, form: str):
    return moe(x, layer, CONFIG.replace(moe_form=form), Taps())


@pytest.mark.parametrize(
    ("form", "tokens"),
    [("block", 1), ("block", 150), ("ragged", 1), ("ragged", 150), ("kernel", 128), ("triton", 1), ("triton", 150)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_agrees_with_dense(form, tokens, masked, key):
    changes = {"expert_mask": jnp.array([True, False, True, True, False, True])} if masked else {}
    layer, x = layer_of(key, **changes), jax.random.normal(key, (1, tokens, CONFIG.dim))

    def loss(layer, x, form):
        return jnp.sum(jnp.sin(run(layer, x, form)))

    chex.assert_shape(run(layer, x, form), x.shape)
    np.testing.assert_allclose(run(layer, x, form), run(layer, x, "dense"), atol=1e-5)
    weights = {name: w for name, w in layer.items() if name != "expert_mask"}

    def gradient(form):
        return jax.jit(jax.grad(lambda w, x: loss(w | changes, x, form), argnums=(0, 1)))(weights, x)

    ours, reference = gradient(form), gradient("dense")
    chex.assert_trees_all_equal_shapes(ours, reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    if masked:
        for name in ("e_gate", "e_up", "e_down"):
            assert not np.asarray(ours[0][name])[[1, 4]].any()
        assert not np.asarray(ours[0]["router"])[:, [1, 4]].any()


@pytest.mark.parametrize("form", ["block", "ragged"])
def test_no_token_is_dropped_when_all_want_the_same_expert(form, key):
    router = jnp.zeros((CONFIG.dim, CONFIG.experts)).at[:, 3].set(5.0).at[:, 1].set(3.0)
    layer, x = layer_of(key, router=router), jnp.abs(jax.random.normal(key, (1, 200, CONFIG.dim)))
    index, _ = route(x[0], layer, CONFIG, Taps())
    assert set(np.asarray(index).ravel().tolist()) == {1, 3}
    np.testing.assert_allclose(run(layer, x, form), run(layer, x, "dense"), atol=1e-5)


def test_the_work_of_blocks_follows_the_choices_not_the_experts():
    for tokens, top_k, experts in ((512, 2, 8), (512, 2, 64), (4, 2, 64), (4096, 8, 128)):
        size = block_size(tokens, top_k, experts)
        rows = (tokens * top_k // size + min(experts, tokens * top_k)) * size
        assert rows <= 8 * tokens * top_k + 8 * min(experts, tokens * top_k)
        assert 8 <= size <= 128
    few, many = (block_size(512, 2, e) * (512 * 2 // block_size(512, 2, e) + e) for e in (8, 64))
    assert many <= 2 * few  # eight times the experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2"])
def test_a_masked_model_equals_one_without_those_experts(name):
    model = models.load(FIXTURES / name)
    tokens = jnp.asarray(np.load(FIXTURES / name / "expected.npz")["tokens"])
    mask = np.ones((model.config.moe_layers, model.config.experts), bool)
    mask[:, 1] = False
    masked = models.forward(model.params, model.config, tokens, expert_mask=jnp.asarray(mask), record=("moe.index",))
    assert not (np.asarray(masked.records["moe.index"]) == 1).any()
    params, config = keep_experts(model.params, model.config, mask)
    assert (config.experts, params["layers"]["e_gate"].shape[1]) == (model.config.experts - 1,) * 2
    np.testing.assert_allclose(models.forward(params, config, tokens).logits, masked.logits, atol=1e-4)
    free = models.forward(model.params, model.config, tokens).logits
    assert np.abs(np.asarray(free - masked.logits)).max() > 0.1


def test_the_sampler_honours_the_mask():
    model = models.load(FIXTURES / "qwen3_moe")
    config, mask = model.config.replace(eos_ids=()), jnp.asarray(MASK)
    tokens, lengths, new = np.array([[5, 7, 11, 2]], np.int32), np.array([4], np.int32), 12
    weights = decode_weights(model.params, config, expert_mask=mask)
    session = prefill(weights, config, tokens, lengths, size=16)
    out, _ = decode(weights, config, session, jax.random.key(0), np.array([new], np.int32), temperature=0.0)
    written = np.asarray(out.tokens)[:, :new]
    whole = jnp.asarray(np.concatenate([tokens, written], axis=1))
    logits = models.forward(model.params, config, whole, expert_mask=mask).logits
    np.testing.assert_array_equal(np.asarray(logits[:, 3:-1].argmax(-1)), written)
    free = models.generate_tokens(model.params, config, [tokens[0].tolist()], new)
    assert np.asarray(free.tokens)[0, :new].tolist() != written[0].tolist()


MESHES = [
    {"expert": 8}, {"expert": 4, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4},
    {"data": 2, "tensor": 4},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "axes"), [("qwen3_moe", MESHES[1]), ("deepseek_v3", MESHES[1]), ("deepseek_v3", MESHES[2])]
)
def test_sharded_experts_agree_with_one_device(axes, name):
    plain = models.load(FIXTURES / name)
    tokens = jnp.asarray(np.load(FIXTURES / name / "expected.npz")["tokens"])
    mesh = models.make_mesh(**axes)
    model = models.load(FIXTURES / name, mesh=mesh)
    assert ("expert" in axes) == ("expert" in str(model.params["layers"]["e_gate"].sharding.spec))
    with models.use_mesh(mesh):
        logits = jax.jit(lambda p, t: models.forward(p, model.config, t).logits)(model.params, tokens)
    alone = models.forward(plain.params, plain.config, tokens).logits
    np.testing.assert_allclose(logits, alone, atol=1e-4 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize(
    ("axes", "form", "rows"),
    [*[(axes, "block", 8) for axes in MESHES], (MESHES[0], "block", 3), (MESHES[2], "block", 3),
     (MESHES[1], "ragged", 8), (MESHES[2], "ragged", 8), (MESHES[2], "dense", 8), (MESHES[2], "kernel", 8),
     (MESHES[2], "triton", 8)],
)  # fmt: skip
def test_values_and_gradients_under_a_mesh(axes, form, rows, key):
    config = CONFIG.replace(experts=8, top_k=3, moe_form=form)
    layer, x = layer_of(key, config), jax.random.normal(key, (rows, 5 if form != "kernel" else 64, config.dim))

    def loss(layer, x):
        out = moe(x, layer, config, Taps())
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), grads = both(layer, x)
    mesh = models.make_mesh(**axes)
    names = {"router": ("embed", "router"), "e_gate": ("experts", "embed", "ffn"), "e_up": ("experts", "embed", "ffn"),
             "e_down": ("experts", "ffn", "embed")}  # fmt: skip
    layer = {n: jax.device_put(w, sharding_for(mesh, w.shape, names[n])) for n, w in layer.items()}
    x = jax.device_put(x, sharding_for(mesh, x.shape, ("batch", "time", "model")))
    with models.use_mesh(mesh):
        (_, spread_out), spread_grads = both(layer, x)
    np.testing.assert_allclose(spread_out, out, atol=1e-5)
    for a, b in zip(jax.tree.leaves(spread_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_tokens_stay_on_their_device_where_experts_are_not_split(key):
    config = CONFIG.replace(moe_form="block")
    layer, x = layer_of(key, config), jax.random.normal(key, (8, 16, config.dim))
    mesh = models.make_mesh(data=8)
    x = jax.device_put(x, sharding_for(mesh, x.shape, ("batch", "time", "model")))
    with models.use_mesh(mesh):
        text = jax.jit(lambda x: moe(x, layer, config, Taps())).lower(x).compile().as_text()
    # Sums over mesh axes of one device are left in the text.
    moves = [line for line in text.splitlines() if re.search("= .*(all-|reduce-scatter|collective-permute)", line)]
    assert all(replica_groups(line, 8).shape[1] == 1 for line in moves), moves


def test_what_experts_make_of_a_token_can_be_recorded_and_edited_under_a_mesh():
    model = models.load(FIXTURES / "qwen3_moe")
    tokens = jnp.asarray(np.load(FIXTURES / "qwen3_moe" / "expected.npz")["tokens"])
    edit = {"moe.expert_out": Scale(jnp.array([1.0, 0.5, 2.0]))}

    def run(params):
        return models.forward(params, model.config, tokens, record=("moe.expert_out",), edit=edit)

    alone = jax.jit(run)(model.params)
    mesh = models.make_mesh(expert=4, fsdp=2)
    with models.use_mesh(mesh):
        spread = jax.jit(run)(models.load(FIXTURES / "qwen3_moe", mesh=mesh).params)
    for a, b in ((spread.logits, alone.logits), (*spread.records.values(), *alone.records.values())):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("axes", "form", "rows"),
    [*[(axes, "block", 8) for axes in MESHES], (MESHES[0], "block", 3), (MESHES[2], "block", 3),
     (MESHES[1], "ragged", 8), (MESHES[2], "kernel", 8), ({"tensor": 8}, "block", 8)],
)  # fmt: skip
def test_lengths_of_what_experts_make_under_a_mesh(axes, form, rows, key):
    config = CONFIG.replace(experts=8, top_k=3, moe_form=form, dim=12 if axes == {"tensor": 8} else 16)
    layer, x = layer_of(key, config), jax.random.normal(key, (rows, 5 if form != "kernel" else 64, config.dim))

    def loss(layer, x, site):
        taps = Taps((site,))
        return jnp.sum(jnp.sin(moe(x, layer, config, taps))), taps.finish()[site]

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnames="site")
    (value, made), grads = both(layer, x, "moe.expert_out")
    with models.use_mesh(models.make_mesh(**axes)):
        (spread, norms), spread_grads = both(layer, x, "moe.expert_norm")
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, np.linalg.norm(made, axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spread, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(spread_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 4, "fsdp": 2}])
def test_only_lengths_travel_where_only_lengths_are_wanted(axes, key):
    config = CONFIG.replace(experts=8, top_k=3, moe_form="block", dim=128)
    mesh, names = models.make_mesh(**axes), ("batch", "time", "model")
    layer = layer_of(key, config)
    x = jax.ShapeDtypeStruct((8, 64, config.dim), jnp.float32, sharding=sharding_for(mesh, (8, 64, 128), names))
    pairs = 8 * 64 // (8 // axes["expert"]) * config.top_k * config.dim  # of all devices that share their experts

    def largest(site: str) -> int:
        """Numbers in the largest array that goes in or comes out of a collective."""

        def run(x):
            taps = Taps((site,))
            return moe(x, layer, config, taps), taps.finish()[site]

        with models.use_mesh(mesh):
            computations, _ = parse(jax.jit(run).lower(x).compile().as_text())
        named = [each for computation in computations.values() for each in computation.items()]
        types = dict(named)
        moves = [each for _, each in named if each.opcode.removesuffix("-start") in KINDS]
        arrays = [part for each in moves for part in (each.type, *(types[name].type for name in each.operands))]
        return max(int(bytes_of(part)) // 4 for part in arrays)

    assert largest("moe.expert_out") == pairs
    assert largest("moe.expert_norm") <= pairs // config.top_k


def group_config(**changes) -> Config:
    fields = {
        "vocab_size": 20, "dim": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 4,
        "init_std": 0.5, "kv_lora": 4, "rope_dim": 4, "value_dim": 4, "family": "deepseek_v3",
        "router_score": "sigmoid", "experts": 8, "top_k": 3, "groups": 4, "top_groups": 2,
    }  # fmt: skip
    return Config(**fields | changes)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_masked_expert_is_never_chosen_though_its_group_is_the_best(family, key):
    score = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}[family]
    config = group_config(family=family, router_score=score)
    x = jax.random.normal(key, (200, config.dim))
    layer = {"router": jax.random.normal(key, (config.dim, 8)), "router_bias": jnp.zeros(8).at[:4].set(50.0)}
    for kept in ([0, 2, 5], [0, 1, 2], [1, 6, 7, 4]):  # best groups with fewer than three kept, or without any
        mask = jnp.zeros(8, bool).at[jnp.array(kept)].set(True)
        index, weights = route(x, layer | {"expert_mask": mask}, config, Taps())
        assert set(np.unique(index)) <= set(kept)
        assert (np.sort(index, axis=1)[:, 1:] != np.sort(index, axis=1)[:, :-1]).all()
        assert np.isfinite(weights).all()
        assert (np.asarray(weights) > 0).all()


def test_a_masked_model_with_groups_equals_one_without_those_experts():
    model = models.load(FIXTURES / "deepseek_v2_groups")
    tokens = jnp.asarray(np.load(FIXTURES / "deepseek_v2_groups" / "expected.npz")["tokens"])
    mask = np.tile([True, False, False, True], (3, 2))  # one of each group of two
    masked = models.forward(model.params, model.config, tokens, expert_mask=jnp.asarray(mask)).logits
    params, config = keep_experts(model.params, model.config, mask)
    np.testing.assert_allclose(models.forward(params, config, tokens).logits, masked, atol=1e-4)
    with pytest.raises(ValueError, match="0 to 2 experts of each of the 4 groups"):
        keep_experts(model.params, model.config, np.tile([True, True, False, False], (3, 2)))


def test_a_mask_of_deepseek_v3s_size(key):
    """58 of 61 layers with 256 experts in 8 groups, half of them kept: the form of EASY-EP's published masks."""
    config = group_config(
        layers=61, first_dense=3, dense_ffn_dim=8, experts=256, top_k=8, groups=8, top_groups=4, init_std=0.3
    )
    mask = np.zeros((58, 256), bool)
    np.put_along_axis(
        mask, np.random.default_rng(0).permuted(np.tile(np.arange(256), (58, 1)), axis=1)[:, :128], True, 1
    )
    check_expert_mask(mask, config)
    params = models.init(config, key)
    run = jax.jit(
        lambda m: models.forward(params, config, jnp.ones((1, 8), jnp.int32), record=("moe.index",), expert_mask=m)
    )
    index = np.asarray(run(jnp.asarray(mask)).records["moe.index"])
    chex.assert_shape(index, (58, 8, 8))
    assert np.take_along_axis(mask[:, None], index, axis=2).all()


def test_taps_of_a_model_whose_first_layers_have_no_experts():
    model = models.load(FIXTURES / "deepseek_v3")
    config, tokens = model.config, jnp.asarray([[5, 6, 7, 8]])
    out = models.forward(model.params, config, tokens, record=sites(config))
    rows = {name: value.shape[0] for name, value in out.records.items() if name not in ("embed", "final")}
    assert {n for n, count in rows.items() if count == 1} == {"mlp.gate", "mlp.act"}
    assert {n for n, count in rows.items() if count == 2} == {n for n in rows if n.startswith("moe.")}
    assert set(rows.values()) == {1, 2, 3}
    r = out.records
    np.testing.assert_array_equal(r["resid.pre"][1:], r["resid.post"][:-1])
    ones = jnp.ones((3, 1, 1, config.dim))
    edited = models.forward(
        model.params, config, tokens, record=("mlp.out",), edit={"mlp.out": Scale(ones.at[2].set(0.0))}
    )
    assert np.asarray(edited.records["mlp.out"][:2]).any()
    assert not np.asarray(edited.records["mlp.out"][2]).any()
    cut = models.forward(
        model.params, config, tokens, edit={"mlp.act": Scale(jnp.zeros((1, 1, 1, 80)))}, record=("mlp.out",)
    )
    assert not np.asarray(cut.records["mlp.out"][0]).any()
    assert np.asarray(cut.records["mlp.out"][1]).any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((3, 7), bool), r"\[3, 8\]"),
        (np.ones((3, 8), np.float32), "float32"),
        (np.eye(3, 8, dtype=bool), "layer 0, fewer than the 3"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    config = CONFIG.replace(layers=3, experts=8, top_k=3)
    with pytest.raises(ValueError, match=message):
        check_expert_mask(mask, config)


def test_a_checkpoint_has_one_number_of_experts():
    model = models.load(FIXTURES / "qwen3_moe")
    uneven = MASK.copy()
    uneven[2, 5] = True
    with pytest.raises(ValueError, match="4 to 6 experts"):
        keep_experts(model.params, model.config, uneven)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "needs experts"),
        ({"family": "llama"}, "has no experts"),
        ({"top_k": 7}, "top_k=7"),
        ({"moe_form": "sparse"}, "dense, block, ragged, kernel"),
        ({"groups": 4}, "groups=4 must divide experts=6"),
        ({"groups": 3, "top_groups": 4}, "top_groups=4"),
        ({"groups": 6}, "hold fewer than top_k=2"),
        ({"first_dense": 2, "dense_ffn_dim": 8}, "first_dense=2"),
        ({"kv_lora": 4}, "has no kv_lora"),
        ({"router_score": "tanh"}, "router_score"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes)


def test_sites_are_those_of_the_model(key):
    params, tokens = models.init(CONFIG, key), jnp.asarray([[3, 4, 5]])
    records = models.forward(params, CONFIG, tokens, record=sites(CONFIG)).records
    L, M, E, k = CONFIG.layers, 3, CONFIG.experts, CONFIG.top_k
    chex.assert_shape(records["moe.logits"], (L, M, E))
    chex.assert_shape([records["moe.index"], records["moe.weights"]], (L, M, k))
    chex.assert_shape(records["moe.expert_out"], (L, M, k, CONFIG.dim))
    together = jnp.einsum("lmkd,lmk->lmd", records["moe.expert_out"], records["moe.weights"])
    np.testing.assert_allclose(together[:, None], records["moe.routed"], atol=1e-6)
    chex.assert_shape([records["moe.routed"], records["mlp.out"]], (L, 1, M, CONFIG.dim))
    np.testing.assert_allclose(records["moe.weights"].sum(-1), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"mlp\.act.*moe\.index"):
        models.forward(params, CONFIG, tokens, record=("mlp.act",))


@pytest.mark.parametrize("name", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_samplers_routing_can_be_repeated(name):
    """A trainer whose router has moved since takes the sampler's experts where it is told to."""
    model = models.load(FIXTURES / name)
    config = model.config.replace(eos_ids=())
    tokens, lengths = np.array([[5, 7, 11, 2], [9, 3, 0, 0]], np.int32), np.array([4, 2], np.int32)
    weights = decode_weights(model.params, config)
    session = prefill(weights, config, tokens, lengths, size=32, repeat=2, routing=True)
    out, session = decode(weights, config, session, jax.random.key(0), np.array([6, 4, 0, 3], np.int32))
    more, counts = np.array([[8, 9]] * 4, np.int32), np.array([2, 0, 1, 2], np.int32)
    session = extend(weights, config, session, more, counts, 16)

    rows = [list(t[:n]) for t, n in zip(np.repeat(tokens, 2, 0), np.repeat(lengths, 2))]
    rows = [r + out.tokens[i, : out.counts[i]].tolist() + more[i, : counts[i]].tolist() for i, r in enumerate(rows)]
    whole, lens = pad_rows(rows)
    np.testing.assert_array_equal(lens, session.lens)
    routing = routing_of(session, whole.shape[1])
    real = np.arange(whole.shape[1]) < lens[:, None]
    chex.assert_shape(routing, (config.moe_layers, *whole.shape, config.top_k))
    assert (np.asarray(routing)[:, ~real] == -1).all()

    def run(params, routing):
        return models.forward(params, config, jnp.asarray(whole), record=("moe.index",), routing=routing)

    own = run(model.params, None)
    index = np.asarray(own.records["moe.index"]).reshape(routing.shape)
    np.testing.assert_array_equal(np.sort(index[:, real]), np.sort(np.asarray(routing)[:, real]))
    np.testing.assert_allclose(run(model.params, routing).logits[real], own.logits[real], atol=1e-4)
    moved = {**model.params, "layers": {**model.params["layers"], "router": -model.params["layers"]["router"]}}
    assert (np.sort(np.asarray(run(moved, None).records["moe.index"]).reshape(routing.shape)) != np.sort(index)).any()
    again = np.asarray(run(moved, routing).records["moe.index"]).reshape(routing.shape)
    np.testing.assert_array_equal(again[:, real], np.asarray(routing)[:, real])
    grads = jax.grad(lambda p: jnp.sum(jnp.where(real[..., None], run(p, routing).logits, 0.0) ** 2))(moved)
    assert np.asarray(grads["layers"]["router"]).any()


def test_routing_is_kept_only_where_there_is_any(key):
    config = Config(vocab_size=20, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=12, qk_norm=True)
    weights = decode_weights(models.init(config, key), config)
    with pytest.raises(ValueError, match="a qwen3 has none"):
        prefill(weights, config, np.array([[3]]), np.array([1]), 8, routing=True)
