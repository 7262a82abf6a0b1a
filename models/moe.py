"""Mixture-of-experts layers: routing with experts that can be masked, and five dropless ways to run the experts.

``dense`` runs every expert on every token and is the reference. ``block`` sorts the (token, choice) pairs by expert and
runs them in blocks of one expert each: its work grows with top-k, not with the number of experts; the default on CPU.
``ragged`` is the same with ``lax.ragged_dot``, ``kernel`` with a Pallas kernel for TPUs, ``triton`` with one for GPUs;
the last two are the defaults there. All agree to rounding in values and gradients. Under a mesh each device runs its
own experts by any of them.

Letters: M tokens, E experts, k choices per token, D width, F feed-forward width of one expert.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from models.config import Config
from models.grouped import grouped_product
from models.linear import Adapted, Quantized, dense
from models.mlp import mlp
from models.params import Params
from models.platform import platform
from models.sharding import axes_of, spec_for
from models.taps import Taps

_FAR = 1e4  # more than scores and their biases can differ by, little enough to keep their order in float32


def check_expert_mask(mask: np.ndarray, config: Config) -> None:
    """Raise ValueError unless ``mask`` is bool [L, E] and keeps at least top_k experts in every layer.

    Where its values are not at hand (inside a program that is being traced, on devices of other processes) only its
    form is checked.
    """
    if not config.experts:
        raise ValueError(f"expert_mask is for models with experts, a {config.family} has none: leave it out")
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape != (config.moe_layers, config.experts) or mask.dtype != bool:
        raise ValueError(
            f"expert_mask must be bool [layers with experts, experts] = [{config.moe_layers}, {config.experts}], got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if isinstance(mask, jax.core.Tracer) or not getattr(mask, "is_fully_addressable", True):
        return
    mask = np.asarray(mask)
    kept = mask.sum(axis=1)
    if (kept < config.top_k).any():
        layer = int(np.argmin(kept))
        raise ValueError(
            f"expert_mask keeps {int(kept[layer])} experts in layer {layer}, fewer than the {config.top_k} that each "
            "token is sent to"
        )
    if config.mask_mode in ("group_then_mask", "official_zero_fill") and config.groups > 1:
        _check_groups(mask, config)


def _check_groups(mask: np.ndarray, config: Config) -> None:
    """Where groups are chosen without the mask, any of them may be the chosen ones: the emptiest must do."""
    kept = np.sort(mask.reshape(len(mask), config.groups, -1).sum(axis=-1))[:, : config.top_groups].sum(axis=-1)
    if (kept < config.top_k).any():
        layer = int(np.argmin(kept))
        raise ValueError(
            f"mask_mode {config.mask_mode!r} chooses {config.top_groups} groups before the mask, and the emptiest of "
            f"layer {layer} keep {int(kept[layer])} experts together, fewer than the {config.top_k} that each token is "
            "sent to; take mask_mode='mask_first'"
        )


def route(
    x: jax.Array, layer: Params, config: Config, taps: Taps, rows: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Chosen experts int32 [M, k] and their weights float32 [M, k] for tokens x [M, D].

    Scores are a softmax over the experts that are not masked, or their sigmoids; the best k are chosen, from the best
    ``top_groups`` groups where experts are in groups. A group counts by its best expert, with sigmoids by its best two
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, and V3, arXiv 2412.19437, section 2.1.2). With ``norm_topk`` the
    weights of a token sum to 1, before ``routed_scale``.
    layer: "router" [D, E]; "router_bias" [E] float32, added to sigmoids for the choice alone; "expert_mask" bool [E] if
    some are masked: those are never chosen; "routing" int [M, k], experts that are taken in place of the best ones
    (where it is not -1), as when a trainer repeats a sampler's choices. rows: mesh axes that tokens are split over.

    ``mask_mode`` says what a mask does. "mask_first": what is masked does not exist, for groups and probabilities
    either, so that the masked model is the one without those experts. "group_then_mask": groups are chosen as if
    nothing were masked. "official_zero_fill": EASY-EP's released routine (arXiv 2504.06792, its repository), in which
    scores of other groups and of masked experts become 0, so that a masked expert can be chosen after all. "drop": as
    without a mask, but what masked experts make is left out, without normalising anew (its appendix F.3).
    """
    logits = jnp.einsum("md,de->me", x, dense(layer["router"]).astype(x.dtype), preferred_element_type=jnp.float32)
    mask, mode = layer.get("expert_mask"), config.mask_mode
    if mask is not None and mode == "mask_first":
        logits = jnp.where(mask, logits, -jnp.inf)
    logits = taps("moe.logits", logits)
    if config.router_score == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        choice = scores + layer["router_bias"]
        if mask is not None and mode == "mask_first":
            choice = jnp.where(mask, choice, -jnp.inf)
    else:
        scores, choice = jax.nn.softmax(logits, axis=-1), logits  # logits order alike, and none underflows to a tie
        if mask is not None and mode == "official_zero_fill":
            choice = scores
    late = mask if mode in ("group_then_mask", "official_zero_fill") else None
    choose = functools.partial(_choose, config=config)
    if rows:  # the compiler would gather all tokens for a top-k, so each device is told to look at its own
        specs = (PartitionSpec(rows), PartitionSpec()) if late is not None else PartitionSpec(rows)
        choose = jax.shard_map(choose, in_specs=specs, out_specs=PartitionSpec(rows))
    index = choose(choice) if late is None else choose(choice, late)
    if "routing" in layer:
        index = jnp.where(layer["routing"] >= 0, layer["routing"].astype(index.dtype), index)
    weights = jnp.take_along_axis(scores, index, axis=-1)
    if config.norm_topk:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if mask is not None and mode == "drop":
        weights = jnp.where(mask[index], weights, 0.0)
    return taps("moe.index", index), taps("moe.weights", weights * config.routed_scale)


def _choose(choice: jax.Array, mask: jax.Array | None = None, *, config: Config) -> jax.Array:
    """The experts int32 [M, k] with the best scores [M, E]; one with -inf is never among them. mask: bool [E], applied
    when groups have been chosen."""
    fill = mask is not None and config.mask_mode == "official_zero_fill"
    if config.groups > 1:
        grouped = _best_groups(choice, config)
        choice = jnp.where(grouped == choice, choice, 0.0) if fill else grouped
    if mask is not None:
        choice = jnp.where(mask, choice, 0.0 if fill else -jnp.inf)
    return jax.lax.top_k(choice, config.top_k)[1]


def _best_groups(choice: jax.Array, config: Config) -> jax.Array:
    """Scores [M, E] with those outside the best groups moved below all others: where a mask leaves the best groups
    fewer than k experts, others fill up."""
    groups = choice.reshape(*choice.shape[:-1], config.groups, -1)
    best = jax.lax.top_k(groups, 2 if config.router_score == "sigmoid" else 1)[0]
    # A masked expert adds nothing to its group, and a group without any other comes last.
    total = jnp.where(jnp.isfinite(best[..., 0]), jnp.where(jnp.isfinite(best), best, 0.0).sum(-1), -jnp.inf)
    order = jax.lax.top_k(total, config.top_groups)[1]
    inside = jax.nn.one_hot(order, config.groups, dtype=bool).any(axis=-2)
    return jnp.where(inside[..., None], groups, groups - _FAR).reshape(choice.shape)


def _expert(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, product) -> jax.Array:
    """One feed-forward network, or a group of them; ``product`` says how rows meet matrices."""
    return product(jax.nn.silu(product(x, gate)) * product(x, up), down)


# Each form takes tokens x [M, D], matrices [E, D, F], [E, D, F], [E, F, D] and index [M, k], and returns what each
# chosen expert makes of the token, [M, k, D]. An index of E means that the expert is elsewhere: its output is 0.


def _dense(x, gate, up, down, index):
    act = jax.nn.silu(jnp.einsum("md,edf->mef", x, gate)) * jnp.einsum("md,edf->mef", x, up)
    return _rows_of(jnp.einsum("mef,efd->med", act, down), index)


def _rows_of(out: jax.Array, index: jax.Array) -> jax.Array:
    """out [M, E, D] at index [M, k] -> [M, k, D], 0 where the index is E."""
    return out.at[jnp.arange(len(out))[:, None], index].get(mode="fill", fill_value=0)


def _grouped(x, gate, up, down, index, multiply):
    """The pairs in order of their experts; ``multiply(a [M k, ..], w [E, .., ..], sizes [E])`` is a grouped product.

    Rows whose expert is elsewhere come last and belong to no group: they are set to 0 behind each product, and their
    gradients with them, whatever the product leaves there.
    """
    (M, k), E = index.shape, gate.shape[0]
    order = jnp.argsort(index.reshape(-1), stable=True)
    sizes = jnp.zeros(E, jnp.int32).at[index.reshape(-1)].add(1, mode="drop")
    real = (jnp.arange(M * k) < sizes.sum())[:, None]

    def product(a, w):
        return jnp.where(real, multiply(a, w, sizes), 0)

    out = _expert(jnp.where(real, x[order // k], 0), gate, up, down, product)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(M * k), unique_indices=True)
    return out[back].reshape(M, k, -1)


def _ragged(x, gate, up, down, index):
    return _grouped(x, gate, up, down, index, jax.lax.ragged_dot)


def _kernel(x, gate, up, down, index):
    """With the grouped product that JAX ships for TPUs: ``lax.ragged_dot`` has a dense gradient there. On other
    platforms it is interpreted, which is slow."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    side = min(1024, *gate.shape[1:])
    tiles = math.gcd(index.size, 512), side, side
    run = functools.partial(gmm, tiling=tiles, interpret=platform() != "tpu")
    return _grouped(x, gate, up, down, index, lambda a, w, sizes: run(a, w, sizes, a.dtype))


def _triton(x, gate, up, down, index):
    """With our own grouped product: on GPUs ``lax.ragged_dot`` multiplies every row with every expert."""
    return _grouped(x, gate, up, down, index, grouped_product)


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """Rows per block: about the pairs that an expert gets, between 8 and 128, a power of two."""
    share = max(1, tokens * top_k // experts)
    return min(128, max(8, 1 << (share - 1).bit_length()))


@jax.custom_vjp
def _run_blocks(rows, owner, used, matrices):
    """Blocks of rows [blocks, size, D], each through the expert that owns it; rows of an unused block are 0.

    Left to itself, the backward pass would add a gradient of all experts' matrices in every step of the loop.
    """

    def run(rows, e):
        return _expert(rows, *(w[e].astype(rows.dtype) for w in matrices), jnp.matmul)

    def step(_, block):
        rows, e, used = block
        return None, jax.lax.cond(used, run, lambda rows, e: rows, rows, e)

    return jax.lax.scan(step, None, (rows, owner, used))[1]


def _run_blocks_forward(rows, owner, used, matrices):
    return _run_blocks(rows, owner, used, matrices), (rows, owner, matrices)


def _run_blocks_backward(kept, g):
    rows, owner, matrices = kept

    def step(_, block):
        rows, e, g = block
        own = tuple(w[e].astype(rows.dtype) for w in matrices)
        return None, jax.vjp(lambda rows, *own: _expert(rows, *own, jnp.matmul), rows, *own)[1](g)

    d_rows, *d_own = jax.lax.scan(step, None, (rows, owner, g))[1]
    sums = (jax.ops.segment_sum(d, owner, len(w), indices_are_sorted=True) for d, w in zip(d_own, matrices))
    return d_rows, None, None, tuple(d.astype(w.dtype) for d, w in zip(sums, matrices))


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)


def _block(x, gate, up, down, index):
    (M, k), E = index.shape, gate.shape[0]
    size = block_size(M, k, E)
    blocks = M * k // size + min(E, M * k)  # an expert fills its blocks but for the last
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(E, jnp.int32).at[flat].add(1, mode="drop")
    ends = jnp.cumsum(-(-counts // size) * size)  # in slots: every expert's run is padded to whole blocks
    first = ends - -(-counts // size) * size
    owners = flat[order]
    rank = jnp.arange(M * k) - (jnp.cumsum(counts) - counts)[owners]
    outside = blocks * size + jnp.arange(M * k)  # the slot of an expert that is elsewhere: out of range, each its own
    slot_of_sorted = jnp.where(owners < E, first[owners] + rank, outside)
    slots = jnp.zeros(M * k, slot_of_sorted.dtype).at[order].set(slot_of_sorted, unique_indices=True)
    token = jnp.full(blocks * size, M)  # M: an empty slot
    token = token.at[slot_of_sorted].set(order // k, unique_indices=True, mode="drop")
    rows = jnp.where((token < M)[:, None], x[jnp.minimum(token, M - 1)], 0).reshape(blocks, size, -1)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks) * size, side="right"), E - 1)
    used = jnp.arange(blocks) * size < ends[-1]
    out = _run_blocks(rows, owner, used, (gate, up, down)).reshape(blocks * size, -1)
    return out.at[slots].get(mode="fill", fill_value=0).reshape(M, k, -1)


_FORMS = {"dense": _dense, "block": _block, "ragged": _ragged, "kernel": _kernel, "triton": _triton}


def _form(config: Config, pairs: int) -> str:
    """The form for so many (token, choice) pairs of a device; the kernel wants them in tiles of 128."""
    if config.moe_form != "auto":
        return config.moe_form
    if platform() == "tpu" and pairs % 128 == 0:
        return "kernel"
    return {"cpu": "block", "gpu": "triton"}.get(platform(), "ragged")


def moe(x: jax.Array, layer: Params, config: Config, taps: Taps) -> jax.Array:
    """The feed-forward part of a block with experts: x [B, T, D] -> [B, T, D].

    layer: "router" [D, E]; "e_gate", "e_up" [E, D, F], "e_down" [E, F, D]; "expert_mask" bool [E] if some are masked;
    "router_bias" and the shared network "s_gate", "s_up", "s_down" where the model has them.
    """
    flat = x.reshape(-1, x.shape[-1])
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    rows = () if alone else axes_of(spec_for(mesh, x.shape, ("batch", "time", "model"))[0])
    if "routing" in layer:
        layer = {**layer, "routing": layer["routing"].reshape(len(flat), -1)}
    index, weights = route(flat, layer, config, taps, rows)
    normed = taps.wants("moe.expert_norm")
    matrices = tuple(layer[name] for name in ("e_gate", "e_up", "e_down"))
    tapped = taps.wants("moe.expert_out")
    form = _form(config, index.size)
    if not (
        alone and form == "block" and isinstance(matrices[0], Quantized)
    ):  # that form makes an expert plain by need
        matrices = tuple(dense(w).astype(x.dtype) for w in matrices)
    if alone or tapped:
        out = _FORMS[form](flat, *matrices, index) if alone else _spread(x, matrices, index, None, config, mesh, rows)
        out = taps("moe.expert_out", out)
        if normed:
            taps("moe.expert_norm", _norms(out))
        out = jnp.einsum("mkd,mk->md", out, weights.astype(x.dtype))
    elif normed:
        out, norms = _spread(x, matrices, index, weights, config, mesh, rows, norms=True)
        taps("moe.expert_norm", norms)
    else:
        out = _spread(x, matrices, index, weights, config, mesh, rows)
    out = taps("moe.routed", out.reshape(x.shape))
    return out + mlp(x, layer, config, taps, shared=True) if config.shared_dim else out


def _norms(out: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """float32 lengths [M, k] of outputs [M, k, D], of which each device along the mesh axes ``axes`` has one summand:
    they are summed in pieces of D, so that no device receives all of them."""
    if axes and out.shape[-1] % jax.lax.axis_size(axes):
        return _norms(jax.lax.psum(out, axes))
    if axes:
        out = jax.lax.psum_scatter(out, axes, scatter_dimension=2, tiled=True)
    squares = jnp.sum(jnp.square(out.astype(jnp.float32)), axis=-1)
    squares = jax.lax.psum(squares, axes) if axes else squares
    # The slope of a root at 0 is infinite, and 0 times that is no number.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _spread(x, matrices, index, weights, config: Config, mesh, rows: tuple[str, ...], norms: bool = False):
    """The experts under a mesh: every device runs its own experts on its own tokens and those of its neighbours along
    the ``expert`` axis. Returns [M, D], or without ``weights`` what each expert made of each token, [M, k, D]. norms:
    also the lengths float32 [M, k] of what each made, measured where it was made.

    Tokens go round by an all-gather and results come back by a reduce-scatter, so none is ever dropped. Sorting stays
    on the device; left to the compiler, it would gather the tokens of all devices.
    """
    B, T, D = x.shape
    axes = ("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed")
    specs = [spec_for(mesh, w.shape, names) for w, names in zip(matrices, axes, strict=True)]
    by_token = PartitionSpec(rows or None, None, None)
    others = tuple(a for a in mesh.axis_names if a not in rows)
    split = {a for spec in specs for part in spec for a in axes_of(part) if a != "fsdp"}
    turns = "expert" in split and "expert" in rows
    here = math.prod(mesh.shape[a] for a in rows if not (turns and a == "expert"))  # so many parts of the tokens
    form = _form(config, index.size // here)
    extra = () if weights is None else (weights.reshape(B, T, -1),)
    parts = tuple(a for a in others if a in split and a != "expert")  # along these an expert's output is a sum

    def gathered(out, axes):
        """Results [m, ..] of all experts for a device's own tokens [b, T, ..], one summand per device."""
        if turns:
            out = jax.lax.psum_scatter(out, "expert", tiled=True)
        # Along an axis that splits neither tokens nor experts all devices have computed the same.
        out = jax.lax.psum(out, axes) if axes else out
        same = math.prod(mesh.shape[a] for a in axes if a not in split)
        return (out / same if same > 1 else out).reshape(-1, T, *out.shape[1:])

    def local(x, index, *rest):
        x = jax.lax.pcast(x, others, to="varying")
        *weights, gate, up, down = rest
        gate, up, down = (_whole(w, spec, mesh) for w, spec in zip((gate, up, down), specs, strict=True))
        if turns:
            x, index, *weights = (jax.lax.all_gather(v, "expert", tiled=True) for v in (x, index, *weights))
        if "expert" in split:
            here = index - jax.lax.axis_index("expert") * gate.shape[0]
            index = jnp.where((here >= 0) & (here < gate.shape[0]), here, gate.shape[0])
        k = index.shape[-1]
        out = _FORMS[form](x.reshape(-1, D), gate, up, down, index.reshape(-1, k))
        lengths = (_norms(out, parts),) if norms else ()
        if weights:
            out = jnp.einsum("mkd,mk->md", out, weights[0].reshape(-1, k).astype(x.dtype))
        out = gathered(out, others)
        if not norms:
            return out
        return out, gathered(*lengths, tuple(a for a in others if a not in parts))

    out_specs = PartitionSpec(rows or None, None, None, *([None] if weights is None else []))
    out_specs = (out_specs, by_token) if norms else out_specs
    in_specs = (*[by_token] * (2 + len(extra)), *specs)
    # A kernel does not say over which axes its results differ.
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=form not in ("kernel", "triton")
    )
    out = spread(x, index.reshape(B, T, -1), *extra, *matrices)
    return jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), out)


def _whole(w: jax.Array, spec: PartitionSpec, mesh) -> jax.Array:
    """A device's part of a matrix, gathered along the ``fsdp`` axis.

    It is declared to differ between all devices here, so that the sum of its gradients over devices happens here too:
    inside the loop over blocks, where devices take different branches, they would wait for each other for ever.
    """
    known = {a for part in spec for a in axes_of(part)}
    w = jax.lax.pcast(w, tuple(a for a in mesh.axis_names if a not in known), to="varying")
    for at, part in enumerate(spec):
        if "fsdp" in axes_of(part):
            w = jax.lax.all_gather(w, "fsdp", axis=at, tiled=True)
    return w


def keep_experts(params: Params, config: Config, mask: np.ndarray) -> tuple[Params, Config]:
    """The smaller model that holds only the experts where ``mask`` (bool [L, E]) is True; its outputs are those of the
    masked one.

    Raises ValueError for a mask that keeps too few, or not equally many in every layer: one checkpoint has one count.
    """
    if isinstance(params["layers"]["e_gate"], Adapted):
        raise ValueError("merge the low-rank changes first (models.lora.merge)")
    check_expert_mask(mask, config)
    kept = np.asarray(mask).sum(axis=1)
    if len(set(kept.tolist())) > 1:
        raise ValueError(
            f"the mask keeps {kept.min()} to {kept.max()} experts per layer, a checkpoint has one number for all; mask "
            "instead, or keep equally many"
        )
    chosen = jnp.asarray(np.stack([np.flatnonzero(row) for row in np.asarray(mask)]))  # [L, kept]
    layers = dict(params["layers"])
    size = config.experts // config.groups
    if config.groups > 1:
        by_group = np.asarray(mask).reshape(len(mask), config.groups, size).sum(axis=-1)
        if by_group.min() != by_group.max():
            raise ValueError(
                f"the mask keeps {by_group.min()} to {by_group.max()} experts of each of the {config.groups} groups "
                "that routing goes by, a checkpoint has one number for all; mask instead, or keep equally many of each"
            )
    for name in ("e_gate", "e_up", "e_down"):
        layers[name] = jnp.take_along_axis(layers[name], chosen[:, :, None, None], axis=1)
    layers["router"] = jnp.take_along_axis(layers["router"], chosen[:, None, :], axis=2)
    if "router_bias" in layers:
        layers["router_bias"] = jnp.take_along_axis(layers["router_bias"], chosen, axis=1)
    return {**params, "layers": layers}, config.replace(experts=int(kept[0]))
