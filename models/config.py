"""The configuration of one decoder-only language model.

One dataclass covers the families; a family is a set of switches and a name table, never a code path of its own.
"""

import dataclasses

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and switches of a decoder. Frozen and hashable, so that it can be a static argument of ``jit``.

    Sizes: ``dim`` D, ``layers`` L, ``heads`` N, ``kv_heads`` K, ``head_dim`` H, ``ffn_dim`` F, ``vocab_size`` V.
    ``max_len`` is the longest position the weights were made for; it sizes no buffer.
    ``dtype`` is the dtype of activations ("float32" or "bfloat16"); norms, softmax and logits are float32 always.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    family: str = "qwen3"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    sliding_window: int | None = None
    max_len: int = 4096
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int = 0
    dtype: str = "float32"
    init_std: float = 0.02
    remat: bool = False  # recompute each block in the backward pass: memory of one block instead of L

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', not {self.dtype!r}")
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed; the result is validated again."""
        return dataclasses.replace(self, **changes)

    def num_params(self) -> int:
        """Number of weights, tied embeddings counted once."""
        d, n, k, h, f = self.dim, self.heads, self.kv_heads, self.head_dim, self.ffn_dim
        block = d * h * (n + 2 * k) + n * h * d + 3 * d * f + 2 * d
        block += h * (n + 2 * k) if self.qkv_bias else 0
        block += 2 * h if self.qk_norm else 0
        return self.layers * block + self.vocab_size * d * (1 if self.tie_embeddings else 2) + d
