"""config.json of the supported families <-> :class:`models.config.Config`.

What the decoder cannot do is an error that names it, never a silent difference in the numbers.
"""

from pathlib import Path
from typing import Any

from models.config import FAMILIES, MLA_FAMILIES, MOE_FAMILIES, Config, RopeScaling

_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
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


_GEMMA3 = {  # what its published files with images leave to the class of the text part
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def text_part(fields: dict[str, Any], source: str | Path = "config.json") -> dict[str, Any]:
    """The fields of the language model in a config.json of a model with images too; any other comes back as it is."""
    if fields.get("model_type") != "gemma3":
        return fields
    inner = fields.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"{source}: a gemma3 file needs the object 'text_config'")
    outer = {name: fields[name] for name in ("dtype", "torch_dtype", "eos_token_id") if name in fields}
    return {**_GEMMA3, **outer, **inner, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


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
        "beta_slow": "beta_slow", "attention_factor": "attention_factor", "truncate": "truncate", "mscale": "mscale",
        "mscale_all": "mscale_all_dim",
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
    if family in ("llama", *MLA_FAMILIES) or (family in _QWEN and not fields.get("use_sliding_window", False)):
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
    return "moe_intermediate_size" if family in ("qwen3_moe", *MLA_FAMILIES) else "intermediate_size"


def _experts_name(fields: dict[str, Any], family: str) -> str:
    """The field with the number of experts: transformers 5 has renamed it for Qwen3-MoE, and reads both."""
    if family in MLA_FAMILIES:
        return "n_routed_experts"
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
    fields = {**_DEEPSEEK.get(family, {}), **fields}
    for ours, theirs in (("experts", _experts_name(fields, family)), ("top_k", "num_experts_per_tok")):
        if not isinstance(fields.get(theirs), int):
            raise ValueError(f"{source}: field {theirs!r} is missing or no whole number (found {fields.get(theirs)!r})")
        out[ours] = fields[theirs]
    if family != "mixtral":
        out["norm_topk"] = bool(fields.get("norm_topk_prob", False))
    return out


# What transformers' classes assume where a file does not say.
_DEEPSEEK = {
    "deepseek_v2": {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "rope_interleave": True,
    },
}  # fmt: skip
_DEEPSEEK_SAME = {  # our field -> theirs, where the value is the same
    "kv_lora": "kv_lora_rank", "rope_dim": "qk_rope_head_dim", "value_dim": "v_head_dim",
    "first_dense": "first_k_dense_replace", "routed_scale": "routed_scaling_factor",
}  # fmt: skip


def _deepseek(fields: dict[str, Any], family: str, source: str | Path) -> dict[str, Any]:
    """Our fields that only DeepSeek's files have: latent attention, and the layout of its mixture."""
    if family not in MLA_FAMILIES:
        return {}
    fields = {**_DEEPSEEK[family], **fields}
    if fields.get("moe_layer_freq", 1) != 1:
        raise _refuse(source, f"moe_layer_freq {fields['moe_layer_freq']}")
    method, score = fields.get("topk_method"), fields.get("scoring_func")
    known = ("greedy", "group_limited_greedy") if family == "deepseek_v2" else ("noaux_tc",)
    if method not in (None, *known):
        raise _refuse(source, f"topk_method {method!r}")
    if score not in (None, "softmax" if family == "deepseek_v2" else "sigmoid"):
        raise _refuse(source, f"scoring_func {score!r}")
    if family == "deepseek_v2" and fields.get("norm_topk_prob"):
        raise _refuse(source, "norm_topk_prob true (transformers ignores it for this family)")
    grouped = method != "greedy"
    return {
        **{ours: fields[theirs] for ours, theirs in _DEEPSEEK_SAME.items()},
        "q_lora": fields["q_lora_rank"] or 0,
        "groups": (fields.get("n_group") or 1) if grouped else 1,
        "top_groups": (fields.get("topk_group") or 1) if grouped else 1,
        "shared_dim": fields["moe_intermediate_size"] * (fields["n_shared_experts"] or 0),
        "dense_ffn_dim": fields.get("intermediate_size", 0) if fields["first_k_dense_replace"] else 0,
        "rope_interleaved": bool(fields.get("rope_interleave", True)),
    }


def _deepseek_to_hf(config: Config) -> dict[str, Any]:
    if config.shared_dim % config.ffn_dim:
        raise ValueError(
            f"a {config.family} checkpoint counts shared experts: shared_dim={config.shared_dim} must be a multiple of "
            f"ffn_dim={config.ffn_dim}"
        )
    out = {theirs: getattr(config, ours) for ours, theirs in _DEEPSEEK_SAME.items()}
    out |= {
        "q_lora_rank": config.q_lora or None, "qk_nope_head_dim": config.head_dim - config.rope_dim,
        "n_shared_experts": config.shared_dim // config.ffn_dim, "n_group": config.groups,
        "topk_group": config.top_groups,
    }  # fmt: skip
    if config.first_dense:
        out["intermediate_size"] = config.dense_ffn_dim
    if config.family == "deepseek_v2":
        return out | {"topk_method": "greedy" if config.groups == 1 else "group_limited_greedy"}
    return out | {"rope_interleave": config.rope_interleaved}


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
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise ValueError(
                f"{source}: field {name!r} is missing or no whole number above 0 (found {fields.get(name)!r})"
            )
    fixed = FAMILIES[family]
    wanted = _ACTIVATIONS[fixed.get("activation", "silu")]
    name = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    if (fields.get(name) or wanted[0]) not in wanted:
        raise _refuse(source, f"{name} {fields[name]!r}")
    for name in ("attention_bias", "mlp_bias"):  # Qwen2's q, k, v biases are fixed and have no field
        if fields.get(name) and not (name == "attention_bias" and family == "qwen2"):
            raise _refuse(source, f"{name} true")
    if quantized := fields.get("quantization_config"):
        method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
        if method != "fp8" or not (isinstance(block, list | tuple) and len(block) == 2):
            raise _refuse(
                source, f"quantization_config ({method}, blocks {block}); convert the weights to bfloat16 first"
            )
    dim, heads, layers = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # A file that predates a field means the default of its class, which need not be hidden / heads.
    head_dim = fields.get("head_dim") or ("head_dim" not in fields and _HEAD_DIM.get(family)) or dim // heads
    if family in MLA_FAMILIES:  # here the field holds the part that turns
        known = {**_DEEPSEEK[family], **fields}
        head_dim = known["qk_nope_head_dim"] + known["qk_rope_head_dim"]
    generation = generation or {}
    eos = _ids(fields.get("eos_token_id"))
    eos = tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + eos))
    pad = fields.get("pad_token_id")
    pad = generation.get("pad_token_id") if pad is None else pad
    bos = fields.get("bos_token_id")
    kv_heads = fields.get("num_key_value_heads")
    values = dict(
        family=family,
        vocab_size=fields["vocab_size"],
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        ffn_dim=fields[_width_name(family)],
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(fields.get("tie_word_embeddings", family.startswith("gemma"))),
        max_len=fields.get("max_position_embeddings", 4096),
        eos_ids=eos,
        bos_id=bos,
        # Right padding is never attended to, so any id is a valid pad; end of text is the usual choice.
        pad_id=pad if pad is not None and 0 <= pad < fields["vocab_size"] else (eos[0] if eos else 0),
        **fixed,
        **_rope(fields, family, source),
        **_windows(fields, family, layers, source),
        **_experts(fields, family, source),
        **_gemma(fields, family, source),
        **_deepseek(fields, family, source),
    )
    try:
        return Config(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


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
        if changed(ours) and not (ours == "head_dim" and config.kv_lora):
            fields[theirs] = getattr(config, ours)
    if config.kv_lora:
        new, old = _deepseek_to_hf(config), _deepseek_to_hf(before) if before else {}
        fields |= {name: value for name, value in new.items() if name not in old or old[name] != value}
    fields.pop("quantization_config", None)  # what is written is not quantised
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
    if config.family in ("llama", *MLA_FAMILIES):
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
