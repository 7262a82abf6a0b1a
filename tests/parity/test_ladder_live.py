"""The ladder: what every sub-layer of every layer makes, against hooks on transformers' modules; and a train step."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models

pytestmark = pytest.mark.parity

TESTS = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("make_models", TESTS / "fixtures" / "make_models.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def climbed(reference, tokens: np.ndarray, post_norms: bool) -> dict[str, list]:
    """Our names of sites -> one array per layer that has it, as transformers' modules compute them."""
    import torch

    found: dict[str, list] = {}

    def keep(name, value):
        found.setdefault(name, []).append(value.detach().float().numpy().copy())

    def after(name, at=None):
        return lambda module, args, out: keep(name, out[at] if isinstance(out, tuple) else out)

    def before(name):
        return lambda module, args: keep(name, args[0])

    def router(module, args, out):
        keep("moe.logits", out[0])
        keep("moe.index", out[-1])
        keep("moe.weights", out[-2])

    body = reference.model
    hooks = [body.embed_tokens.register_forward_hook(after("embed")), body.norm.register_forward_hook(after("final"))]
    for layer in body.layers:
        attended = layer.post_attention_layernorm if post_norms else layer.self_attn
        fed = layer.post_feedforward_layernorm if post_norms else layer.mlp
        middle = layer.pre_feedforward_layernorm if post_norms else layer.post_attention_layernorm
        hooks += [
            layer.register_forward_hook(after("resid.post", 0)),
            layer.input_layernorm.register_forward_pre_hook(before("resid.pre")),
            attended.register_forward_hook(after("attn.out", 0)),
            middle.register_forward_pre_hook(before("resid.mid")),
            fed.register_forward_hook(after("mlp.out", 0)),
        ]
        if hasattr(layer.mlp, "experts"):
            hooks.append(layer.mlp.experts.register_forward_hook(after("moe.routed", 0)))
            hooks.append(layer.mlp.gate.register_forward_hook(router))
        else:
            hooks.append(layer.mlp.gate_proj.register_forward_hook(after("mlp.gate")))
    with torch.no_grad():
        reference(torch.tensor(tokens, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", make.MODELS)
def test_every_rung_equals_transformers(name):
    kind, fields, _, _ = make.MODELS[name]
    model = models.load(TESTS / "fixtures" / "models" / name)
    config = model.config
    tokens, lengths = make.make_batch(config.vocab_size, lengths=(17, 9, 17), seed=3)
    theirs = climbed(make.make_model(kind, fields), tokens, config.post_norms)
    ours = models.forward(model.params, config, jnp.asarray(tokens), record=tuple(theirs)).records
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    rungs = {"embed": 1, "final": 1} | dict.fromkeys(("resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post"), 3)
    rungs |= dict.fromkeys(("moe.logits", "moe.index", "moe.weights", "moe.routed"), config.moe_layers)
    rungs |= {"mlp.gate": 3 - config.moe_layers}
    assert {site: len(values) for site, values in theirs.items()} == {s: n for s, n in rungs.items() if n}

    def by_token(x):
        return np.asarray(x, np.float32).reshape(*tokens.shape, -1)[real]

    errors = {}
    for layer in range(config.moe_layers):  # in any order: by the experts' numbers
        mine, other = by_token(ours["moe.index"][layer]), by_token(theirs["moe.index"][layer])
        np.testing.assert_array_equal(np.sort(mine), np.sort(other))
        weights = np.take_along_axis(by_token(ours["moe.weights"][layer]), np.argsort(mine), axis=1)
        wanted = np.take_along_axis(by_token(theirs["moe.weights"][layer]), np.argsort(other), axis=1)
        errors["moe.weights", layer] = np.abs(weights - wanted).max() / np.abs(wanted).max()
    for site in theirs.keys() - {"moe.index", "moe.weights"}:
        mine = [ours[site]] if site in ("embed", "final") else ours[site]
        for layer, (a, b) in enumerate(zip(mine, theirs[site], strict=True)):
            a, b = by_token(a), by_token(b)
            errors[site, layer] = np.abs(a - b).max() / np.abs(b).max()
    assert all(error <= 1e-4 for error in errors.values()), {k: e for k, e in errors.items() if not e <= 1e-4}


def test_gradients_of_deepseek_v3_equal_torch_autograd():
    """Of every parameter: the dense first layer, latent attention, router, experts, the shared network."""
    import torch

    from models.hf import _plan

    kind, fields, _, _ = make.MODELS["deepseek_v3"]
    reference = make.make_model(kind, fields)
    model = models.load(TESTS / "fixtures" / "models" / "deepseek_v3")
    tokens, _ = make.make_batch(300, lengths=(17, 17, 17, 17), seed=4)

    def loss(params):
        logits = models.forward(params, model.config, jnp.asarray(tokens)).logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    ids = torch.tensor(tokens, dtype=torch.long)
    theirs = torch.nn.functional.cross_entropy(reference(ids).logits[:, :-1].reshape(-1, 300), ids[:, 1:].reshape(-1))
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    ours = {name: fetch() for name, fetch, _ in _plan(model.replace(params=gradient))}
    named = {}
    for (
        name,
        p,
    ) in reference.named_parameters():  # transformers holds the experts of a layer in one tensor, files do not
        grad = p.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(np.split(pair, 2) for pair in grad):
                base = name.replace("gate_up_proj", str(e))
                named |= {base + ".gate_proj.weight": gate, base + ".up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            named |= {name.replace("down_proj", f"{e}.down_proj.weight"): down for e, down in enumerate(grad)}
        else:
            named[name] = grad
    biases = {name for name in ours if name.endswith("e_score_correction_bias")}
    assert ours.keys() - biases == named.keys()
    assert len(biases) == 2  # it decides choices alone, and transformers' is no parameter
    assert all(not ours[name].any() for name in biases)
    touched = [k for k in named if np.abs(named[k]).max() > 0]
    for kind in ("layers.0.mlp.gate_proj", "layers.2.mlp.gate.", "experts.5.up_proj", "shared_experts", "q_a_proj",
                 "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "kv_a_layernorm", "o_proj"):  # fmt: skip
        assert any(kind in name for name in touched), kind
    for name, other in named.items():
        scale = np.abs(other).max()
        np.testing.assert_allclose(ours[name], other, atol=1e-4 * scale, rtol=0, err_msg=name)
