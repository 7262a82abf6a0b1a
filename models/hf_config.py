"""config.json of the supported families <-> :class:`models.config.Config`.

What the decoder cannot do is an error that names it, never a silent difference in the numbers.
"""

from pathlib import Path
from typing import Any

from models.config import FAMILIES, MOE_FAMILIES, Config, RopeScaling

_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
}  # fmt: skip
# Names of activations in config.json, by ours.
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
_QWEN = ("qwen2", "qwen3", "qwen3_moe")  # their window has a switch of its own
# What the class of a family assumes where the file does not say.
_HEAD_DIM = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
_WINDOW = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096}
_THETA = {"gemma3_text": 1_000_000.0, "mixtral": 1_000_000.0}
_LOCAL_THETA = {"gemma3_text": 10_000.0}
# Our field -> config.json field, where the value is the same.
_SAME = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "max_len": "max_position_embeddings", "bos_id": "bos_token_id",
}  # fmt: skip


def _refuse(source: str | Path, what: str) -> ValueError:
    return ValueError(f"{source}: {what} is not implemented")


def _ids(value: Any) -> tuple[int, ...]:
    """eos_token_id and the like: a number, a list or null."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


_ROPE = {  # our field of RopeScaling -> the key in rope_parameters, by kind
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "original_len": "original_max_position_embeddings", "low_freq": "low_freq_factor",
        "high_freq": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor", "original_len": "original_max_position_embeddings", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow", "attention_factor": "attention_factor", "truncate": "truncate",
    },
}  # fmt: skip


def _rope(fields: dict[str, Any], family: str, source: str | Path) -> dict[str, Any]:
    """Our rotary fields. transformers 5 writes ``rope_parameters``, for Gemma 3 one per kind of layer; older files
    ``rope_theta``, ``rope_local_base_freq`` and ``rope_scaling``."""
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _refuse(source, f"partial_rotary_factor {fields['partial_rotary_factor']}")
    theta = fields.get("rope_theta", _THETA.get(family, 10_000.0))
    local = fields.get("rope_local_base_freq", _LOCAL_THETA.get(family))
    scaling = None
    for name in ("rope_scaling", "rope_parameters"):
        rope = dict(fields.get(name) or {})
        if any(isinstance(value, dict) for value in rope.values()):
            if set(rope) - {"full_attention", "sliding_attention"}:
                raise _refuse(source, f"{name} by layer type ({', '.join(rope)})")
            sliding = rope.get("sliding_attention") or {}
            if sliding.get("rope_type", "default") != "default":
                raise _refuse(source, f"{name}.sliding_attention.rope_type {sliding['rope_type']!r}")
            local = sliding.get("rope_theta", local)
            rope = dict(rope.get("full_attention") or {})
        theta = rope.get("rope_theta", theta)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refuse(source, f"{name}.partial_rotary_factor {rope['partial_rotary_factor']}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            continue
        if kind not in _ROPE:
            raise _refuse(source, f"{name}.rope_type {kind!r} (implemented: default, {', '.join(_ROPE)})")
        if rope.get("mscale") or rope.get("mscale_all_dim"):
            raise _refuse(source, f"{name}.mscale")
        values = {ours: rope[theirs] for ours, theirs in _ROPE[kind].items() if rope.get(theirs) is not None}
        if kind == "yarn":
            values.setdefault("original_len", fields.get("max_position_embeddings", 0))
        try:
            scaling = RopeScaling(kind, **values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name}: {error}") from error
    return {
        "rope_theta": float(theta),
        "local_rope_theta": None if local is None else float(local),
        "rope_scaling": scaling,
    }


def _windows(fields: dict[str, Any], family: str, layers: int, source: str | Path) -> dict[str, Any]:
    """Our fields of the sliding window. Qwen uses its window only where ``use_sliding_window`` says so; Gemma's layers
    take turns."""
    window, kinds = fields.get("sliding_window", _WINDOW.get(family)), fields.get("layer_types")
    if family == "llama" or (family in _QWEN and not fields.get("use_sliding_window", False)):
        if kinds and set(kinds) != {"full_attention"}:
            raise _refuse(source, f"layer_types {sorted(set(kinds))} without a sliding window")
        return {"sliding_window": None}
    if kinds is None:
        if family in _QWEN:
            slides = [i >= fields.get("max_window_layers", 28) for i in range(layers)]
        elif family in ("gemma2", "gemma3_text"):
            period = fields.get("sliding_window_pattern", 2 if family == "gemma2" else 6)
            slides = [(i + 1) % period != 0 for i in range(layers)]
        else:
            slides = [window is not None] * layers
    else:
        if set(kinds) - {"full_attention", "sliding_attention"}:
            raise _refuse(source, f"layer_types {sorted(set(kinds))}")
        slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return {"sliding_window": None}
    if window is None:
        raise ValueError(f"{source}: layers with sliding attention need the field 'sliding_window', which is missing")
    return {"sliding_window": int(window), "sliding_layers": () if all(slides) else tuple(slides)}


def _gemma(fields: dict[str, Any], family: str, source: str | Path) -> dict[str, Any]:
    """Our fields that only Gemma's files have."""
    if family not in ("gemma2", "gemma3_text"):
        return {}
    if fields.get("use_bidirectional_attention"):
        raise _refuse(source, "use_bidirectional_attention true")
    return {
        "query_scalar": fields.get("query_pre_attn_scalar", 256),
        "attn_softcap": fields.get("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
        "final_softcap": fields.get("final_logit_softcapping", 30.0 if family == "gemma2" else None),
    }


def _width_name(family: str) -> str:
    """The field that holds the width of a feed-forward network, or of one expert."""
    return "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"


def _experts_name(fields: dict[str, Any], family: str) -> str:
    """The field with the number of experts: transformers 5 has renamed it for Qwen3-MoE, and reads both."""
    return "num_local_experts" if family == "mixtral" or "num_local_experts" in fields else "num_experts"


def _experts(fields: dict[str, Any], family: str, source: str | Path) -> dict[str, Any]:
    """Our fields of a mixture of experts."""
    if family not in MOE_FAMILIES:
        return {}
    if fields.get("mlp_only_layers") or fields.get("decoder_sparse_step", 1) != 1:
        raise _refuse(source, "mlp_only_layers or decoder_sparse_step (layers without experts among those with)")
    if fields.get("clip_qkv") is not None:
        raise _refuse(source, f"clip_qkv {fields['clip_qkv']}")
    out = {}
    for ours, theirs in (("experts", _experts_name(fields, family)), ("top_k", "num_experts_per_tok")):
        if not isinstance(fields.get(theirs), int):
            raise ValueError(f"{source}: field {theirs!r} is missing or no whole number (found {fields.get(theirs)!r})")
        out[ours] = fields[theirs]
    if family != "mixtral":
        out["norm_topk"] = bool(fields.get("norm_topk_prob", False))
    return out


def config_from_hf(
    fields: dict[str, Any], source: str | Path = "config.json", generation: dict[str, Any] | None = None
) -> Config:
    """Our config from the fields of a config.json.

    source: named in errors. generation: fields of generation_config.json, whose end tokens are what sampling stops at.
    Raises ValueError naming the field for a missing field, an unknown architecture or anything not implemented.
    """
    family = fields.get("model_type")
    if family not in _CLASSES:
        raise ValueError(
            f"{source}: model_type {family!r} is not implemented; implemented: {', '.join(sorted(_CLASSES))}"
        )
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", _width_name(family))
    for name in sizes:
        if not isinstance(fields.get(name), int):
            raise ValueError(f"{source}: field {name!r} is missing or no whole number (found {fields.get(name)!r})")
    fixed = FAMILIES[family]
    wanted = _ACTIVATIONS[fixed.get("activation", "silu")]
    name = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    if (fields.get(name) or wanted[0]) not in wanted:
        raise _refuse(source, f"{name} {fields[name]!r}")
    for name in ("attention_bias", "mlp_bias"):  # Qwen2's q, k, v biases are fixed and have no field
        if fields.get(name) and not (name == "attention_bias" and family == "qwen2"):
            raise _refuse(source, f"{name} true")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method")
        raise _refuse(source, f"quantization_config ({method}); convert the weights to bfloat16 first")
    dim, heads, layers = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # A file that predates a field means the default of its class, which need not be hidden / heads.
    head_dim = fields.get("head_dim") or ("head_dim" not in fields and _HEAD_DIM.get(family)) or dim // heads
    generation = generation or {}
    eos = _ids(fields.get("eos_token_id"))
    eos = tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + eos))
    pad = fields.get("pad_token_id")
    pad = generation.get("pad_token_id") if pad is None else pad
    bos = fields.get("bos_token_id")
    return Config(
        family=family,
        vocab_size=fields["vocab_size"],
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_dim=fields[_width_name(family)],
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(fields.get("tie_word_embeddings", family.startswith("gemma"))),
        max_len=fields.get("max_position_embeddings", 4096),
        eos_ids=eos,
        bos_id=bos,
        # Right padding is never attended to, so any id is a valid pad; end of text is the usual choice.
        pad_id=pad if pad is not None and pad >= 0 else (eos[0] if eos else 0),
        **fixed,
        **_rope(fields, family, source),
        **_windows(fields, family, layers, source),
        **_experts(fields, family, source),
        **_gemma(fields, family, source),
    )


def config_to_hf(
    config: Config, dtype: str, original: dict[str, Any] | None = None, generation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a config.json for ``config`` with weights of ``dtype``.

    original: the fields the model was loaded with. All of them are kept, known to us or not; only those whose meaning
    changed since are written anew. Raises ValueError when HF's class of the family cannot express the config.
    """
    switches = ("qkv_bias", "qk_norm", "qk_norm_whole", "norm_offset", "post_norms", "scale_embed")
    fixed = {**dict.fromkeys(switches, False), "activation": "silu", **FAMILIES[config.family]}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"a {config.family} checkpoint has {name}={value}, the config says {getattr(config, name)}; choose the "
                "family that matches"
            )
    if config.sliding_window is not None and config.family == "llama":
        raise ValueError("transformers' Llama has no sliding window; use family 'mistral', 'qwen2' or 'qwen3'")
    gemma = config.family.startswith("gemma")
    for name in ("query_scalar", "attn_softcap", "final_softcap"):
        if getattr(config, name) is not None and not gemma:
            raise ValueError(f"a {config.family} checkpoint has no place for {name}={getattr(config, name)}")
    if config.local_rope_theta is not None and config.family != "gemma3_text":
        raise ValueError(f"a {config.family} checkpoint has no place for local_rope_theta={config.local_rope_theta}")
    if config.family == "olmoe" and config.heads * config.head_dim != config.dim:
        raise ValueError(f"transformers' OLMoE has heads x head_dim = dim, the config says {config.dim} = dim")
    if config.sliding_layers and config.family in ("mistral", "mixtral"):
        raise ValueError("transformers' Mistral has its sliding window in all layers or in none")
    same_family = original is not None and original.get("model_type") == config.family
    fields = dict(original) if same_family else {}
    before = config_from_hf(original, generation=generation) if same_family else None

    def changed(name: str) -> bool:
        return before is None or getattr(before, name) != getattr(config, name)

    if before is None:
        activation = _ACTIVATIONS[config.activation][0]
        fields |= {
            "architectures": [_CLASSES[config.family]], "model_type": config.family,
            "hidden_activation" if gemma else "hidden_act": activation, "attention_bias": False,
            "attention_dropout": 0.0, "initializer_range": config.init_std, "use_cache": True,
        }  # fmt: skip
        fields |= {"mlp_bias": False} if config.family == "llama" else {}
    for ours, theirs in _SAME.items():
        if changed(ours):
            fields[theirs] = getattr(config, ours)
    if changed("ffn_dim"):
        fields[_width_name(config.family)] = config.ffn_dim
    if config.experts:
        if changed("experts"):
            fields[_experts_name(fields, config.family)] = config.experts
        if changed("top_k"):
            fields["num_experts_per_tok"] = config.top_k
        if config.family != "mixtral" and changed("norm_topk"):
            fields["norm_topk_prob"] = config.norm_topk
        if before is None and config.family == "qwen3_moe":
            fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": config.ffn_dim}
    if any(map(changed, ("rope_theta", "rope_scaling", "local_rope_theta"))):
        fields |= _rope_to_hf(config, fields, new=before is None)
    if changed("sliding_window") or changed("sliding_layers"):
        fields |= _windows_to_hf(config)
    elif changed("layers") and fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1] * config.layers
    if gemma and changed("query_scalar"):
        fields["query_pre_attn_scalar"] = config.query_scalar or config.head_dim
    for ours, theirs in (("attn_softcap", "attn_logit_softcapping"), ("final_softcap", "final_logit_softcapping")):
        if gemma and changed(ours):
            fields[theirs] = getattr(config, ours)
    if changed("eos_ids"):
        fields["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    if changed("pad_id"):
        fields["pad_token_id"] = config.pad_id
    known = next((name for name in ("dtype", "torch_dtype") if name in fields), None)
    if fields.get(known, "float32" if before else None) != dtype:  # a file that says nothing means float32
        fields[known or "dtype"] = dtype
    return fields


def _rope_to_hf(config: Config, fields: dict[str, Any], new: bool) -> dict[str, Any]:
    """Rotary fields for transformers 5 and, where the file had them or is new, for what came before."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in _ROPE[scaling.kind].items()}
        rope = {k: v for k, v in rope.items() if v is not None} | {"rope_type": scaling.kind}
    out: dict[str, Any] = {}
    if config.family == "gemma3_text":
        local = config.local_rope_theta or config.rope_theta
        by_kind = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        if new or "rope_parameters" in fields:
            out["rope_parameters"] = by_kind
        if "rope_local_base_freq" in fields:
            out["rope_local_base_freq"] = local
    elif new or "rope_parameters" in fields:
        out["rope_parameters"] = rope
    if (new and config.family != "gemma3_text") or "rope_theta" in fields or "rope_parameters" not in fields | out:
        out["rope_theta"] = config.rope_theta  # what transformers before 5, vLLM and others read
        if scaling is not None or fields.get("rope_scaling"):
            out["rope_scaling"] = None if scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"}
    return out


def _windows_to_hf(config: Config) -> dict[str, Any]:
    window = config.sliding_window
    if config.family in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if config.family == "llama":
        return {}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in config.slides]
    if window is None and config.family.startswith("gemma"):
        window = config.max_len  # transformers' Gemma wants a number, also where layer_types say that no layer slides
    out: dict[str, Any] = {"sliding_window": window, "layer_types": kinds}
    if config.family in _QWEN:
        # max_window_layers is what readers without layer_types go by: the first layers are full.
        out["use_sliding_window"] = config.sliding_window is not None
        out["max_window_layers"] = config.slides.count(False)
    return out
