"""AdamW against optax, schedules at their corners, learning rate 0, exact accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import params as model_params
from models.config import Config
from models.sharding import make_mesh
from rl import optimizer
from rl.optimizer import OptimizerConfig

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) - 2.5, "attn_norm": jnp.ones(3), "bq": jnp.array([-0.0, 0.0, 1.0])}
GRADS = {"w": jnp.full((2, 3), 3.0), "attn_norm": -jnp.ones(3), "bq": jnp.array([0.5, -0.5, 0.0])}


def test_steps_equal_optax():
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip=1.0)
    referee = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.1, mask={"w": True, "attn_norm": False, "bq": False}),
    )
    state, params = optimizer.init_state(PARAMS, config), PARAMS
    opt_state = referee.init(params)
    for _ in range(3):
        state, metrics = optimizer.apply_gradients(state, GRADS, config)
        updates, opt_state = referee.update(GRADS, opt_state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert float(metrics["grad_norm"][0]) == pytest.approx(np.sqrt(6 * 9 + 3 + 0.5), rel=1e-6)


def test_learning_rate_zero_leaves_every_bit():
    config = OptimizerConfig(lr=0.0, weight_decay=0.1)
    state = optimizer.init_state(PARAMS, config)
    for _ in range(3):
        state, _ = optimizer.apply_gradients(state, GRADS, config)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), jax.device_get(state.params), PARAMS))


@pytest.mark.parametrize("skip", [(), ("e_down",)])
def test_muon_steps_every_layer_as_optax_steps_its_matrix(skip):
    rng = np.random.default_rng(0)
    shapes = {"wq": (2, 8, 2, 4), "wo": (2, 2, 4, 8), "w_up": (2, 8, 16), "attn_norm": (2, 8), "embed": (12, 8)}
    shapes["e_down"] = (2, 3, 6, 8)  # every expert is a matrix of its own
    draw = lambda: {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}  # noqa: E731
    params, grads = draw(), draw()
    config = OptimizerConfig(lr=1e-2, muon_lr=0.03, muon_skip=skip, clip=None)
    state = optimizer.init_state(params, config)
    for _ in range(3):
        state, _ = optimizer.apply_gradients(state, grads, config)

    def matrices(tree):  # one plain [in, out] matrix per layer, which is all optax's Muon knows of
        flat = {"wq": (8, 8), "wo": (8, 8), "w_up": (8, 16)}
        experts = {f"expert{n}{e}": tree["e_down"][n, e] for n in range(2) for e in range(3) if not skip}
        return experts | {f"{name}{n}": tree[name][n].reshape(shape) for name, shape in flat.items() for n in range(2)}

    def run(referee, params, grads):
        opt_state = referee.init(params)
        for _ in range(3):
            updates, opt_state = referee.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = run(optax.contrib.muon(0.03), matrices(params), matrices(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), matrices(state.params), expected)
    rest = lambda tree: {name: tree[name] for name in ("attn_norm", "embed", *skip)}  # noqa: E731
    expected = run(optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.0), rest(params), rest(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), rest(state.params), expected)


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({}, {0: 1.0, 1000: 1.0}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 500: 1.0}),
        ({"schedule": "cosine", "horizon_steps": 100}, {0: 1.0, 50: 0.55, 100: 0.1, 1000: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 10, "horizon_steps": 110}, {10: 1.0, 60: 0.55, 110: 0.1}),
        ({"schedule": "linear", "horizon_steps": 100, "final_scale": 0.0}, {0: 1.0, 25: 0.75, 100: 0.0}),
    ],
)
def test_schedules(options, points):
    schedule = optimizer.learning_rate(OptimizerConfig(lr=1.0, **options))
    for step, value in points.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "step"),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("muon_lr", -0.1),
        ("muon_skip", ("e_dwon",)),
        ("schedule", "cosine"),
        ("clip", 0.0),
        ("warmup_steps", -1),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**{name: value})


def test_accumulation_is_exact_and_checks_the_split():
    weights, x = jnp.array([1.0, -2.0]), jnp.arange(12.0).reshape(6, 2)
    mask = jnp.array([1.0, 0, 0, 1, 1, 1])

    def loss(w, batch):
        x, mask = batch
        return (mask * (x @ w) ** 2).sum() / 4, {"n": (mask.sum(), jnp.ones(()))}

    value, grads, metrics = optimizer.accumulate_gradients(loss, weights, (x, mask), 1)
    for parts in (2, 3, 6):
        other = optimizer.accumulate_gradients(loss, weights, (x, mask), parts)
        np.testing.assert_allclose(other[0], value, rtol=1e-6)
        np.testing.assert_allclose(other[1], grads, rtol=1e-6)
        assert float(other[2]["n"][0]) == float(metrics["n"][0]) == 4
        assert float(other[2]["n"][1]) == parts
    with pytest.raises(ValueError, match="micro_batches=4"):
        optimizer.accumulate_gradients(loss, weights, (x, mask), 4)


@pytest.mark.parametrize("muon", [0.0, 0.03])
@pytest.mark.parametrize("axes", [None, {"fsdp": 4, "tensor": 2}])
def test_the_abstract_state_is_the_shape_and_place_of_a_fresh_one(axes, muon):
    model = Config(vocab_size=16, dim=8, layers=2, heads=2, kv_heads=2, head_dim=4, ffn_dim=16)
    config = OptimizerConfig(muon_lr=muon)
    mesh = None if axes is None else make_mesh(**axes)
    fresh = optimizer.init_state(model_params.init(model, jax.random.key(0), mesh=mesh), config)
    planned = optimizer.abstract_state(model_params.abstract(model, mesh=mesh), config)

    def same(struct, array):
        assert (struct.shape, struct.dtype) == (array.shape, array.dtype)
        assert mesh is None or struct.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(same, planned, fresh)
