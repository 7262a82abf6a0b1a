"""config.json of Llama, Qwen2 and Qwen3 <-> :class:`models.config.Config`.

What the decoder cannot do is an error that names it, never a silent difference in the numbers.
"""

from pathlib import Path
from typing import Any

from models.config import Config

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Our field -> config.json field, where the value is the same.
_SAME = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings", "max_len": "max_position_embeddings", "bos_id": "bos_token_id",
}  # fmt: skip


def _refuse(source: str | Path, what: str) -> ValueError:
    return ValueError(f"{source}: {what} is not implemented")


def _ids(value: Any) -> tuple[int, ...]:
    """eos_token_id and the like: a number, a list or null."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _rope_theta(fields: dict[str, Any], source: str | Path) -> float:
    """transformers 5 writes ``rope_parameters``; older files ``rope_theta`` and ``rope_scaling``."""
    theta = fields.get("rope_theta", 10_000.0)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if any(isinstance(value, dict) for value in rope.values()):
            raise _refuse(source, f"{name} by layer type ({', '.join(rope)})")
        if kind != "default":
            raise _refuse(source, f"{name}.rope_type {kind!r} (rotary positions scaled to longer contexts)")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refuse(source, f"{name}.partial_rotary_factor {rope['partial_rotary_factor']}")
        theta = rope.get("rope_theta", theta)
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _refuse(source, f"partial_rotary_factor {fields['partial_rotary_factor']}")
    return float(theta)


def _window(fields: dict[str, Any], family: str, layers: int, source: str | Path) -> int | None:
    """Sliding window of all layers, or None. Qwen uses its window only where ``use_sliding_window`` says so."""
    if family == "llama":
        return None
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    kinds = fields.get("layer_types")
    if kinds is None and window is not None:
        first = fields.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    distinct = set(kinds or ["full_attention"])
    if distinct == {"full_attention"}:
        return None
    if distinct == {"sliding_attention"} and window is not None:
        return int(window)
    raise _refuse(
        source, f"layer_types {sorted(distinct)} with sliding_window {window} (attention that differs by layer)"
    )


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
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(fields.get(name), int):
            raise ValueError(f"{source}: field {name!r} is missing or no whole number (found {fields.get(name)!r})")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refuse(source, f"hidden_act {fields['hidden_act']!r}")
    for name in ("attention_bias", "mlp_bias"):  # Qwen2's q, k, v biases are fixed and have no field
        if fields.get(name) and not (name == "attention_bias" and family == "qwen2"):
            raise _refuse(source, f"{name} true")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method")
        raise _refuse(source, f"quantization_config ({method}); convert the weights to bfloat16 first")
    dim, heads, layers = (fields[n] for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # A file that predates a field means the default of its class, which for Qwen3 is 128, not hidden / heads.
    head_dim = fields.get("head_dim") or (128 if family == "qwen3" and "head_dim" not in fields else dim // heads)
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
        ffn_dim=fields["intermediate_size"],
        rope_theta=_rope_theta(fields, source),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        sliding_window=_window(fields, family, layers, source),
        max_len=fields.get("max_position_embeddings", 4096),
        eos_ids=eos,
        bos_id=bos,
        # Right padding is never attended to, so any id is a valid pad; end of text is the usual choice.
        pad_id=pad if pad is not None and pad >= 0 else (eos[0] if eos else 0),
    )


def config_to_hf(
    config: Config, dtype: str, original: dict[str, Any] | None = None, generation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of a config.json for ``config`` with weights of ``dtype``.

    original: the fields the model was loaded with. All of them are kept, known to us or not; only those whose meaning
    changed since are written anew. Raises ValueError when HF's class of the family cannot express the config.
    """
    if config.qkv_bias != (config.family == "qwen2") or config.qk_norm != (config.family == "qwen3"):
        raise ValueError(
            f"a {config.family} checkpoint has qkv_bias={config.family == 'qwen2'} and "
            f"qk_norm={config.family == 'qwen3'}, the config says {config.qkv_bias} and {config.qk_norm}; "
            "choose the family that matches"
        )
    if config.sliding_window is not None and config.family == "llama":
        raise ValueError("transformers' Llama has no sliding window; use family 'qwen2' or 'qwen3'")
    same_family = original is not None and original.get("model_type") == config.family
    fields = dict(original) if same_family else {}
    before = config_from_hf(original, generation=generation) if same_family else None

    def changed(name: str) -> bool:
        return before is None or getattr(before, name) != getattr(config, name)

    if before is None:
        fields |= {
            "architectures": [_CLASSES[config.family]], "model_type": config.family, "hidden_act": "silu",
            "attention_bias": False, "attention_dropout": 0.0, "initializer_range": config.init_std, "use_cache": True,
        }  # fmt: skip
        fields |= {"mlp_bias": False} if config.family == "llama" else {}
    for ours, theirs in _SAME.items():
        if changed(ours):
            fields[theirs] = getattr(config, ours)
    if changed("rope_theta"):
        if before is None or "rope_parameters" in fields:
            fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if before is None or "rope_theta" in fields or "rope_parameters" not in fields:
            fields["rope_theta"] = config.rope_theta  # what transformers before 5, vLLM and others read
    if changed("sliding_window") and config.family != "llama":
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        fields["use_sliding_window"] = config.sliding_window is not None
        fields["sliding_window"] = config.sliding_window
        fields["max_window_layers"] = config.layers if config.sliding_window is None else 0
        fields["layer_types"] = [kind] * config.layers
    elif changed("layers") and fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1] * config.layers
    if changed("eos_ids"):
        fields["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    if changed("pad_id"):
        fields["pad_token_id"] = config.pad_id
    known = next((name for name in ("dtype", "torch_dtype") if name in fields), None)
    if fields.get(known, "float32" if before else None) != dtype:  # a file that says nothing means float32
        fields[known or "dtype"] = dtype
    return fields
