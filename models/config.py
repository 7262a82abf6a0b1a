"""The configuration of one decoder-only language model.

One dataclass covers the families; a family is a set of switches and a name table, never a code path of its own.
"""

import dataclasses

# What a family fixes: its transformers class leaves no choice about these switches.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"norm_topk": True},
    "qwen3_moe": {"qk_norm": True},
    "olmoe": {"qk_norm_whole": True},
    "gemma2": {"norm_offset": True, "post_norms": True, "scale_embed": True, "activation": "gelu_tanh"},
    "gemma3_text": {
        "norm_offset": True, "post_norms": True, "scale_embed": True, "activation": "gelu_tanh", "qk_norm": True,
    },
}  # fmt: skip
MOE_FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
MOE_FORMS = ("auto", "dense", "block", "ragged")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched beyond the trained context.

    kind "linear": all divided by ``factor``. "llama3": long wavelengths divided by ``factor``, short ones kept, a
    ramp between ``low_freq`` and ``high_freq`` turns per ``original_len`` (Llama 3.1). "yarn" (arXiv 2309.00071): the
    ramp runs between ``beta_slow`` and ``beta_fast`` turns, and scores are multiplied by ``attention_factor`` squared
    (None: 0.1 ln(factor) + 1); ``truncate`` rounds the ramp's ends to whole dimensions.
    """

    kind: str
    factor: float
    original_len: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope scaling must be linear, llama3 or yarn, not {self.kind!r}")
        if self.factor < 1 or (self.kind != "linear" and self.original_len < 1):
            raise ValueError(f"rope scaling {self.kind!r} needs factor >= 1 and original_len >= 1, got {self}")


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
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of the layers that slide, unscaled; None: as all others
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False  # of every head by itself
    qk_norm_whole: bool = False  # of all heads together (OLMoE)
    tie_embeddings: bool = True
    sliding_window: int | None = None  # keys a query sees, itself included
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window; empty: all of them
    activation: str = "silu"  # of the gate: "silu" or "gelu_tanh"
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    post_norms: bool = False  # a norm behind attention and one behind the MLP too (Gemma)
    scale_embed: bool = False  # embeddings times sqrt(D) (Gemma)
    experts: int = 0  # E; 0 is a dense model. ``ffn_dim`` is then the width of one expert
    top_k: int = 0  # experts per token
    norm_topk: bool = False  # the chosen experts' weights sum to 1
    moe_form: str = "auto"  # how experts are run, see models.moe; "auto" goes by the backend
    query_scalar: int | None = None  # scores are divided by its root; None: H
    attn_softcap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)
    final_softcap: float | None = None  # logits likewise
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
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.moe_form not in MOE_FORMS:
            raise ValueError(f"moe_form must be one of {', '.join(MOE_FORMS)}, not {self.moe_form!r}")
        if (self.experts > 0) != (self.family in MOE_FAMILIES):
            raise ValueError(f"a {self.family} model {'has no' if self.experts else 'needs'} experts")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and experts={self.experts}")
        if self.sliding_layers and (len(self.sliding_layers) != self.layers or self.sliding_window is None):
            raise ValueError(
                f"sliding_layers says for each of the {self.layers} layers whether sliding_window applies; got "
                f"{len(self.sliding_layers)} values and a window of {self.sliding_window}"
            )
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

    @property
    def slides(self) -> tuple[bool, ...]:
        """Per layer, whether it has the sliding window."""
        return self.sliding_layers or (self.sliding_window is not None,) * self.layers

    def num_params(self) -> int:
        """Number of weights, tied embeddings counted once."""
        d, n, k, h, f = self.dim, self.heads, self.kv_heads, self.head_dim, self.ffn_dim
        block = d * h * (n + 2 * k) + n * h * d + 2 * d
        block += d * self.experts + self.experts * 3 * d * f if self.experts else 3 * d * f
        block += h * (n + 2 * k) if self.qkv_bias else 0
        block += 2 * h if self.qk_norm else 0
        block += h * (n + k) if self.qk_norm_whole else 0
        block += 2 * d if self.post_norms else 0
        return self.layers * block + self.vocab_size * d * (1 if self.tie_embeddings else 2) + d
