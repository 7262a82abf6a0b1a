"""Attention: what a query may look at, and four ways to compute it with the same result.

``whole`` makes all scores at once and serves short sequences, the sampler's steps, and hooks on scores. ``blocks``
takes the queries in blocks, so that a long prompt never has a [T, T] buffer, also in the backward pass. ``cudnn`` (GPU)
and ``splash`` (TPU) are the fused kernels of JAX; they are taken where they can do what is asked for.

Letters: B batch, T query time, S key time, N heads, K key-value heads, G queries per key-value head, H head width,
X width of values.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from models.config import Config
from models.platform import platform
from models.sharding import spec_for
from models.taps import Taps

_LONGEST_WHOLE = 1024  # queries; with more, scores would be the largest buffer of a layer
_BLOCK = 256  # queries of a block
_SITES = ("attn.logits", "attn.probs")


@struct.dataclass
class Look:
    """What each query may look at: keys at or before its own slot, the last ``window`` of them, of its own segment.

    slots: int32 [B or 1, T], where the queries stand among the S keys. window: int32 scalar, or None for all.
    segments: int32 [B, S], or None. straight: query t stands at slot t, and S = T. sliding: the window where it is
    known while tracing (None: there is none, or it differs by layer).
    """

    slots: jax.Array
    window: jax.Array | None = None
    segments: jax.Array | None = None
    straight: bool = struct.field(pytree_node=False, default=False)
    sliding: int | None = struct.field(pytree_node=False, default=None)

    @property
    def varies(self) -> bool:
        """Whether there is a window that is not known while tracing."""
        return self.window is not None and self.sliding is None

    def mask(self, keys: int) -> jax.Array:
        """bool [B or 1, T, S], True where a query may look."""
        back = self.slots[:, :, None] - jnp.arange(keys)[None, None, :]
        mask = back >= 0
        if self.window is not None:
            mask = mask & (back < self.window)
        if self.segments is not None:
            own = jnp.take_along_axis(self.segments, jnp.maximum(self.slots, 0), axis=1)
            mask = mask & (own[:, :, None] == self.segments[:, None, :])
        return mask


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), or x itself."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, look: Look, config: Config, taps: Taps) -> jax.Array:
    """Grouped-query attention without repeating keys.

    q [B,T,N,H]; k [B,K,S,H] and v [B,K,S,X], heads in front of time, as batched matrix products want them. Scores and
    softmax in float32. Returns [B,T,N,X] in q's dtype. Hooks on "attn.logits" and "attn.probs" take the form ``whole``,
    or ``blocks`` if they can work on blocks (``models.taps.Reduced``).
    """
    hooked = any(taps.wants(site) for site in _SITES)
    blocked = any(taps.wants_blocks(site) for site in _SITES)
    if not hooked and not blocked and look.straight and q.shape[1] > 1:
        if platform() == "tpu" and _splash_fits(q, look):
            return _splash(q, k, v, look, config)
        if platform() == "gpu" and _cudnn_fits(q, v, look, config):
            return _cudnn(q, k, v, look, config)
    if hooked or q.shape[1] <= _LONGEST_WHOLE:
        heads, reduced = _whole(q, k, v, look, config, taps)
    else:
        heads, reduced = _blocks(q, k, v, look, config, taps)
    taps.values.update(reduced)
    return heads


def _whole(q, k, v, look: Look, config: Config, taps: Taps):
    """Heads [B,T,N,X], and what hooks make of this block."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * config.score_scale
    scores = softcap(scores, config.attn_softcap)
    scores = jnp.where(look.mask(S)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    scores = taps("attn.logits", scores, look.slots)
    probs = taps("attn.probs", jax.nn.softmax(scores, axis=-1), look.slots)
    heads = jnp.einsum("bkgts,bksx->bkgtx", probs.astype(v.dtype), v)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1]), taps.reduce_block(look.slots)


def _blocks(q, k, v, look: Look, config: Config, taps: Taps):
    B, T, N, H = q.shape
    count = -(-T // _BLOCK)
    q = jnp.pad(q, ((0, 0), (0, count * _BLOCK - T), (0, 0), (0, 0)))
    slots = jnp.pad(look.slots, ((0, 0), (0, count * _BLOCK - T)), constant_values=-1)  # looks at nothing
    split = lambda x: x.reshape(x.shape[0], count, _BLOCK, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731

    @jax.checkpoint
    def one(q, slots):
        return _whole(q, k, v, look.replace(slots=slots), config, taps.for_block())

    shapes = jax.eval_shape(lambda q, s: one(q, s)[1], q[:, :_BLOCK], slots[:, :_BLOCK])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def step(total, block):
        heads, reduced = one(*block)
        return jax.tree.map(jnp.add, total, reduced), heads

    reduced, heads = jax.lax.scan(step, zeros, (split(q), split(slots)))
    return heads.swapaxes(0, 1).reshape(B, count * _BLOCK, N, -1)[:, :T], reduced


def _cudnn_fits(q, v, look: Look, config: Config) -> bool:
    """cuDNN has half precision, heads of at most 128, no cap on scores; packed sequences would need a [T, T] bias."""
    H = q.shape[-1]
    plain = config.attn_softcap is None and look.segments is None and not look.varies
    return plain and q.dtype in (jnp.bfloat16, jnp.float16) and v.shape[-1] == H and H <= 128 and H % 8 == 0


def _cudnn(q, k, v, look: Look, config: Config) -> jax.Array:
    window = None if look.sliding is None else (look.sliding - 1, 0)
    return jax.nn.dot_product_attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=True, scale=config.score_scale, local_window_size=window,
        implementation="cudnn",
    )  # fmt: skip


def _splash_fits(q, look: Look) -> bool:
    """The kernel works on tiles of 128 positions."""
    return q.shape[1] % 128 == 0 and not look.varies


def _splash(q, k, v, look: Look, config: Config, interpret: bool = False) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (B, T, N, H), K = q.shape, k.shape[1]
    size = math.gcd(T, 512)
    one = splash.CausalMask((T, T)) if look.sliding is None else splash.LocalMask((T, T), (look.sliding - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )

    def local(q, k, v, segments):
        kernel = splash.make_splash_mqa_single_device(
            splash.MultiHeadMask([one] * q.shape[2]), block_sizes=sizes, attn_logits_soft_cap=config.attn_softcap,
            interpret=interpret,
        )  # fmt: skip
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        by_head = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids), in_axes=(0, 0, 0, None))
        return jax.vmap(by_head, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)

    q = (q * config.score_scale).astype(q.dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:  # a kernel is one device's program, which the compiler cannot split
        rows, heads = spec_for(mesh, k.shape[:2], ("batch", "kv_heads"))
        specs = PartitionSpec(rows, heads), PartitionSpec(rows, heads), PartitionSpec(rows, heads), PartitionSpec(rows)
        specs = specs[:3] + ((None,) if look.segments is None else specs[3:])
        local = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(rows, heads), check_vma=False)
    out = local(q, k, v, look.segments)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
