"""The configuration of one decoder-only language model.

One dataclass covers the families; a family is a set of switches and a name table, never a code path of its own.
"""

import dataclasses
import math

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
    "deepseek_v2": {},
    "deepseek_v3": {"router_score": "sigmoid"},
}  # fmt: skip
MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "olmoe", *MLA_FAMILIES)
MOE_FORMS = ("auto", "dense", "block", "ragged", "kernel", "triton")
MASK_MODES = ("mask_first", "group_then_mask", "official_zero_fill", "drop")
ACTIVATIONS = ("silu", "gelu_tanh")
REMAT = ("none", "block", "products")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched beyond the trained context.

    kind "linear": all divided by ``factor``. "llama3": long wavelengths divided by ``factor``, short ones kept, a
    ramp between ``low_freq`` and ``high_freq`` turns per ``original_len`` (Llama 3.1). "yarn" (arXiv 2309.00071): the
    ramp runs between ``beta_slow`` and ``beta_fast`` turns, and scores are multiplied by ``attention_factor`` squared
    (None: 0.1 ln(factor) + 1, or with ``mscale`` m and ``mscale_all`` a, DeepSeek's, the same of 0.1 m ln(factor) + 1
    over 0.1 a ln(factor) + 1, whose latent attention multiplies scores by the latter squared); ``truncate`` rounds the
    ramp's ends to whole dimensions.
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
    mscale: float = 0.0
    mscale_all: float = 0.0

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
    router_score: str = "softmax"  # "softmax", or "sigmoid" with a bias that counts for the choice alone (DeepSeek-V3)
    groups: int = 1  # the experts of a token come from ``top_groups`` of so many groups of neighbours
    top_groups: int = 1
    routed_scale: float = 1.0  # the chosen experts' weights times this
    shared_dim: int = 0  # width of a network that every token passes beside its experts; 0: none
    first_dense: int = 0  # so many leading layers are without experts
    dense_ffn_dim: int = 0  # their F
    # Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values come from a latent of width
    # ``kv_lora`` (0: ordinary attention), queries from one of ``q_lora`` (0: from D). The last ``rope_dim`` of a head's
    # H turn, and their keys are shared by all heads; values are ``value_dim`` wide.
    kv_lora: int = 0
    q_lora: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    rope_interleaved: bool = False  # pairs that turn are (0, 1), (2, 3), ... instead of (i, i + half)
    # What an expert mask does (see models.moe.route): "mask_first", or for comparison with published figures
    # "group_then_mask", "official_zero_fill" or "drop".
    mask_mode: str = "mask_first"
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
    # Low-rank changes beside matrices, all else being frozen (LoRA, arXiv 2106.09685), see models.lora: their rank
    # (0: none), the names of the matrices in ``models.params.declare``, and alpha: a change counts alpha / rank.
    lora_rank: int = 0
    lora_on: tuple[str, ...] = ("wq", "wk", "wv", "wo")
    lora_alpha: float = 16.0
    # What the backward pass recomputes instead of keeping it: "none"; "block", all of a block: memory of one block
    # instead of L; "products", all but the results of products with weights: between the two in work and memory.
    remat: str = "none"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        self._check_ranges()
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {', '.join(REMAT)}, not {self.remat!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.moe_form not in MOE_FORMS:
            raise ValueError(f"moe_form must be one of {', '.join(MOE_FORMS)}, not {self.moe_form!r}")
        if self.mask_mode not in MASK_MODES:
            raise ValueError(f"mask_mode must be one of {', '.join(MASK_MODES)}, not {self.mask_mode!r}")
        if (self.experts > 0) != (self.family in MOE_FAMILIES):
            raise ValueError(f"a {self.family} model {'has no' if self.experts else 'needs'} experts")
        if self.experts:
            self._check_experts()
        if (self.kv_lora > 0) != (self.family in MLA_FAMILIES):
            raise ValueError(
                f"a {self.family} model {'has no' if self.kv_lora else 'needs'} kv_lora, a latent for keys"
            )
        if self.kv_lora and not (0 < self.rope_dim < self.head_dim and self.value_dim > 0 and self.rope_dim % 2 == 0):
            raise ValueError(
                f"latent attention needs an even rope_dim below head_dim={self.head_dim} and a value_dim, got "
                f"{self.rope_dim} and {self.value_dim}"
            )
        if self.kv_lora and (self.kv_heads != self.heads or self.sliding_window is not None or self.qkv_bias):
            raise ValueError("latent attention has as many kv_heads as heads, no sliding window and no biases")
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
        if self.lora_rank < 0 or (self.lora_rank and not self.lora_on):
            raise ValueError(f"lora_rank must be at least 0, with matrices in lora_on, not {self.lora_rank}")

    def _check_ranges(self) -> None:
        """Every number by itself."""
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("experts", "top_k", "shared_dim", "first_dense", "dense_ffn_dim", "kv_lora", "q_lora", "norm_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        positive = ("rope_theta", "local_rope_theta", "sliding_window", "query_scalar", "attn_softcap", "final_softcap")
        for name in positive:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name, ids in (("eos_ids", self.eos_ids), ("pad_id", (self.pad_id,))):
            if not all(0 <= i < self.vocab_size for i in ids):
                raise ValueError(f"{name}={getattr(self, name)} must lie below vocab_size={self.vocab_size}")

    def _check_experts(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and experts={self.experts}")
        if self.router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score must be 'softmax' or 'sigmoid', not {self.router_score!r}")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"groups={self.groups} must divide experts={self.experts}, and top_groups={self.top_groups} lie "
                "between 1 and groups"
            )
        if self.top_groups * self.experts // self.groups < self.top_k:
            raise ValueError(f"top_groups={self.top_groups} of {self.groups} groups hold fewer than top_k={self.top_k}")
        if not 0 <= self.first_dense < self.layers or (self.first_dense and self.dense_ffn_dim < 1):
            raise ValueError(
                f"first_dense={self.first_dense} must be less than layers={self.layers}, and its layers need a "
                f"dense_ffn_dim, got {self.dense_ffn_dim}"
            )

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed; the result is validated again."""
        return dataclasses.replace(self, **changes)

    @property
    def slides(self) -> tuple[bool, ...]:
        """Per layer, whether it has the sliding window."""
        return self.sliding_layers or (self.sliding_window is not None,) * self.layers

    @property
    def moe_layers(self) -> int:
        """Layers with experts: the last ones."""
        return self.layers - self.first_dense if self.experts else 0

    @property
    def values_dim(self) -> int:
        """Head width of values."""
        return self.value_dim or self.head_dim

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        scale, s = (self.query_scalar or self.head_dim) ** -0.5, self.rope_scaling
        if self.kv_lora and s is not None and s.mscale_all and s.factor > 1:
            scale *= (0.1 * s.mscale_all * math.log(s.factor) + 1.0) ** 2
        return scale

    def num_params(self) -> int:
        """Number of weights, tied embeddings counted once."""
        from models.params import count  # the declaration of parameters builds on this module

        return count(self)
