"""BERT-family text encoders (bge, MiniLM, e5, ...) from their Hugging Face folders: texts in, unit vectors out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.recsys.blocks import PostNormBlock, key_mask, normal_param, ones, zeros
from models.recsys.functional import layer_norm, unit

_BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a BERT encoder and how its states become one vector (``pooling``: "cls" or "mean")."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    ffn_dim: int
    max_len: int = 512
    token_types: int = 2
    eps: float = 1e-12
    pooling: str = "mean"

    def __post_init__(self):
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', got {self.pooling!r}")


class BertEncoder(nnx.Module):
    """arXiv:1810.04805: token + position + type embeddings, LN, bidirectional post-LN blocks with exact GELU."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.tokens = normal_param(rngs, c.vocab_size, c.dim)
        self.positions = normal_param(rngs, c.max_len, c.dim)
        self.types = normal_param(rngs, c.token_types, c.dim)
        self.scale, self.bias = ones(c.dim), zeros(c.dim)
        self.blocks = nnx.List(
            [PostNormBlock(c.dim, c.heads, c.ffn_dim, eps=c.eps, rngs=rngs) for _ in range(c.layers)]
        )

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """tokens int32 [B, T] right-padded, lengths [B] -> states float32 [B, T, D] (all of type 0)."""
        x = self.tokens[...][tokens] + self.positions[: tokens.shape[1]] + self.types[0]
        x = layer_norm(x, self.scale[...], self.bias[...], self.config.eps)
        mask = key_mask(lengths, tokens.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pool(self, states: jax.Array, lengths: jax.Array) -> jax.Array:
        """States [B, T, D] -> unit vectors [B, D]: the first token's, or the mean over real tokens."""
        if self.config.pooling == "cls":
            return unit(states[:, 0], eps=1e-24)
        real = (jnp.arange(states.shape[1]) < lengths[:, None])[..., None]
        return unit((states * real).sum(1) / lengths[:, None], eps=1e-24)


@partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    module = nnx.merge(graphdef, state)
    return module.pool(module(tokens, lengths), lengths)


class Encoder:
    """A loaded encoder with its tokenizer. Texts are grouped by length and padded to a few fixed shapes."""

    def __init__(self, module: BertEncoder, tokenizer: Any, *, max_length: int = 256):
        self.module, self.tokenizer = module, tokenizer
        self.dim, self.max_length = module.config.dim, min(max_length, module.config.max_len)
        self._graphdef, self._state = nnx.split(module)

    def encode(
        self,
        texts: Sequence[str],
        prefix: str = "",
        *,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> np.ndarray:
        """float32 [n, D], L2-normalised. ``prefix`` is put before every text (e.g. bge's query instruction).

        max_length: tokens kept per text, with the special tokens; default what the folder says, at most 256.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, got one string")
        limit = self.max_length if max_length is None else max_length
        if not 3 <= limit <= self.module.config.max_len:
            raise ValueError(f"max_length must be in 3..{self.module.config.max_len}, got {limit}")
        out = np.zeros((len(texts), self.dim), np.float32)
        if not len(texts):
            return out
        ids = self.tokenizer([prefix + t for t in texts], truncation=True, max_length=limit)["input_ids"]
        lengths = np.fromiter((len(row) for row in ids), np.int32, len(ids))
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = int(lengths[rows].max())
            width = min(next((b for b in _BUCKETS if b >= longest), longest), self.module.config.max_len)
            size = min(1 << (len(rows) - 1).bit_length(), batch_size)
            tokens, counts = np.zeros((size, width), np.int32), np.ones(size, np.int32)
            counts[: len(rows)] = lengths[rows]
            tokens[np.arange(width) < counts[:, None] * (np.arange(size) < len(rows))[:, None]] = np.concatenate(
                [np.asarray(ids[r], np.int32) for r in rows]
            )
            out[rows] = np.asarray(_embed(self._graphdef, self._state, tokens, counts))[: len(rows)]
        return out


def load_encoder(path: str | os.PathLike, *, pooling: str | None = None) -> Encoder:
    """Load a BERT-family folder: config.json, model.safetensors, tokenizer files.

    Pooling comes from sentence-transformers' ``1_Pooling/config.json`` when there is one, else from ``pooling``,
    else it is the mean. Raises FileNotFoundError, ValueError (another family or activation, a tensor that is missing
    or of another shape, a pooling that is not supported).
    """
    folder = Path(path)
    config = _read_config(folder, pooling)
    module = nnx.eval_shape(lambda: BertEncoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    module = nnx.merge(graphdef, _fill(state, config, _read_tensors(folder), folder))
    from transformers import AutoTokenizer  # heavy: only when an encoder is loaded

    limit = 256
    if (folder / "sentence_bert_config.json").exists():
        limit = min(limit, int(_json(folder / "sentence_bert_config.json").get("max_seq_length") or limit))
    return Encoder(module, AutoTokenizer.from_pretrained(str(folder)), max_length=limit)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: an encoder folder holds config.json and model.safetensors")
    return json.loads(path.read_text())


def _read_config(folder: Path, pooling: str | None) -> EncoderConfig:
    raw = _json(folder / "config.json")
    if raw.get("model_type") != "bert":
        raise ValueError(f"{folder}/config.json: model_type {raw.get('model_type')!r}, only 'bert' is supported")
    if raw.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{folder}/config.json: hidden_act {raw['hidden_act']!r}, only 'gelu' (exact) is supported")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder}/config.json: only absolute position embeddings are supported")
    found = folder / "1_Pooling" / "config.json"
    if found.exists():
        modes = [
            k.removeprefix("pooling_mode_") for k, v in _json(found).items() if k.startswith("pooling_mode_") and v
        ]
        names = {"cls_token": "cls", "mean_tokens": "mean"}
        if len(modes) != 1 or modes[0] not in names:
            raise ValueError(f"{found}: pooling {modes} is not supported, one of {sorted(names)} is")
        if pooling is not None and pooling != names[modes[0]]:
            raise ValueError(f"pooling={pooling!r} contradicts {found} ({names[modes[0]]}): leave the argument out")
        pooling = names[modes[0]]
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        ffn_dim=raw["intermediate_size"],
        max_len=raw["max_position_embeddings"],
        token_types=raw.get("type_vocab_size", 2),
        eps=raw.get("layer_norm_eps", 1e-12),
        pooling=pooling or "mean",
    )


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: convert the weights to safetensors first")
        tensors |= load_file(folder / name)
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


# our name -> (HF name, stored transposed); blocks get the prefix encoder.layer.{i}.
_TOP = {
    "tokens": ("embeddings.word_embeddings.weight", False),
    "positions": ("embeddings.position_embeddings.weight", False),
    "types": ("embeddings.token_type_embeddings.weight", False),
    "scale": ("embeddings.LayerNorm.weight", False),
    "bias": ("embeddings.LayerNorm.bias", False),
}
_BLOCK = {
    "wq": ("attention.self.query.weight", True),
    "bq": ("attention.self.query.bias", False),
    "wk": ("attention.self.key.weight", True),
    "bk": ("attention.self.key.bias", False),
    "wv": ("attention.self.value.weight", True),
    "bv": ("attention.self.value.bias", False),
    "wo": ("attention.output.dense.weight", True),
    "bo": ("attention.output.dense.bias", False),
    "attn_scale": ("attention.output.LayerNorm.weight", False),
    "attn_bias": ("attention.output.LayerNorm.bias", False),
    "w1": ("intermediate.dense.weight", True),
    "b1": ("intermediate.dense.bias", False),
    "w2": ("output.dense.weight", True),
    "b2": ("output.dense.bias", False),
    "ffn_scale": ("output.LayerNorm.weight", False),
    "ffn_bias": ("output.LayerNorm.bias", False),
}


def _fill(state: Any, config: EncoderConfig, tensors: Mapping[str, np.ndarray], folder: Path) -> Any:
    """The abstract state with every leaf replaced by its tensor, float32."""

    def leaf(path: tuple, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        parts = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
        parts = [p for p in parts if p not in ("value", "raw_value")]
        hf, transposed = _TOP[parts[0]] if len(parts) == 1 else _BLOCK[parts[2]]
        hf = hf if len(parts) == 1 else f"encoder.layer.{parts[1]}.{hf}"
        if hf not in tensors:
            raise ValueError(f"{folder}: the tensor {hf} is missing")
        tensor = tensors[hf].T if transposed else tensors[hf]
        if tensor.shape != abstract.shape:
            raise ValueError(f"{folder}: {hf} has shape {tensors[hf].shape}, the config asks for {abstract.shape}")
        return jnp.asarray(tensor, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, state)
