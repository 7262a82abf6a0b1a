"""Text in, text out: the plain use of the sampler."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from models.config import Config
from models.layout import decode_weights
from models.params import Params
from models.sample import FINISH_EOS, FINISH_STOP, decode, prefill
from models.sharding import to_host
from models.stops import stop_table


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer. ``tokens`` and ``logprobs`` include the token that ended it; ``finish_reason`` is "eos", "length"
    or "stop: <string>"."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def pad_rows(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad lists of ids: (int32 [B, T], lengths int32 [B])."""
    lengths = np.array([len(row) for row in rows], np.int32)
    out = np.full((len(rows), max(int(lengths.max(initial=0)), 1)), pad, np.int32)
    mask = np.arange(out.shape[1])[None, :] < lengths[:, None]
    out[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows]) if mask.any() else []
    return out, lengths


def generate_tokens(
    params: Params, config: Config, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, stops=None,
):  # fmt: skip
    """Ids in, :class:`models.sample.Decoded` (as numpy) out.

    Raises ValueError when a prompt and what may follow are longer than the model's context, and as ``prefill`` does.
    """
    ids, lengths = pad_rows(prompts, config.pad_id)
    if lengths.max(initial=0) + max_new_tokens > config.max_len:
        worst = int(lengths.argmax())
        raise ValueError(
            f"prompt {worst} has {lengths[worst]} tokens, with max_new_tokens={max_new_tokens} more than the model's "
            f"context, max_len={config.max_len}: shorten it or lower max_new_tokens"
        )
    weights = decode_weights(params, config)
    longest = int(lengths.max())
    session = prefill(weights, config, ids, lengths, longest + max_new_tokens)
    limits = np.full(len(lengths), max_new_tokens, np.int32)
    out, _ = decode(
        weights, config, session, jax.random.key(seed), limits, stops=stops, longest=longest,
        temperature=temperature, top_p=top_p, top_k=top_k,
    )  # fmt: skip
    return to_host(out)


def generate(
    model, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
    top_k: int = 0, seed: int = 0, stop: Sequence[str] = (),
) -> list[Generation]:  # fmt: skip
    """Continue each prompt with a loaded ``Model``; greedy by default.

    Raises ValueError when the model has no tokenizer, a prompt encodes to nothing or is too long for its context.
    """
    if model.tokenizer is None:
        raise ValueError("this model folder has no tokenizer files; use models.generate_tokens with token ids")
    if len(prompts) == 0:
        return []
    rows = [model.tokenizer.encode(prompt) for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} encodes to no token; give it some text")
    stops = stop_table(tuple(stop), tuple(model.tokenizer.token_bytes())) if stop else None
    out = generate_tokens(
        model.params, model.config, rows, max_new_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stops=stops,
    )  # fmt: skip
    results = []
    for tokens, logprobs, count, finish in zip(out.tokens, out.logprobs, out.counts, out.finish, strict=True):
        ids = tokens[:count].tolist()
        reason = "length"
        if finish == FINISH_EOS:
            reason = "eos"
        elif finish >= FINISH_STOP:
            reason = f"stop: {stop[finish - FINISH_STOP]}"
        shown = ids[:-1] if reason == "eos" else ids
        results.append(Generation(model.tokenizer.decode(shown), tuple(ids), tuple(logprobs[:count].tolist()), reason))
    return results
