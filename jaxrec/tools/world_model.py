"""The base language model of the embedded world: its tokenizer, its training rows, and how well it does by domain.

It plays the part of "the pretrained model" wherever a system needs one and no network is at hand.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxrec.data.packing import pack
from jaxrec.world.encyclopaedia import RELATIONS
from jaxrec.world.texts import DOMAINS, Sample, Texts
from models.generation import pad_rows
from models.hf import Model
from rl.envs.tags import BOX, STYLES

_MARKS = (
    "Question:", "\nQuestion:", "\nAnswer:", "Passage:", "\nPassage:", "Seeker:", "\nRecommender:", "\n", ".", ",", "?",
)  # fmt: skip


def world_tokenizer(texts: Texts, more: Sequence[str] = ()):
    """Every word of the world with the space before it is one token, and so is every mark of its formats, and each of
    ``more``."""
    digits = [f" {d}" for d in range(10)]
    return models.build_word_tokenizer([*_MARKS, *digits, *(f" {word}" for word in texts.words), *more])


def search_phrases() -> list[str]:
    """What the tokenizer of a model that searches knows beside the world's words: tags, and words of its questions."""
    phrases = [f"{BOX}{{", f" {BOX}{{", " }"]
    for style in STYLES.values():
        phrases += [f" {tag}" for tag in style.tags if not tag.startswith(style.result_open)]
        gap = "\n" if style.lines else ""
        phrases += [f"\n\n{style.result_open}{gap}", f"{gap}{style.result_close}\n\n"]
    return [*phrases, *(f" {word}" for word in (*RELATIONS, "What", "is", "the", "of", "So"))]


def encode(tokenizer, sample: Sample) -> tuple[list[int], int]:
    """Ids of prompt and answer with the end-of-text token, and how many of them are the prompt's."""
    prompt = tokenizer.encode(sample.prompt) if sample.prompt else []
    answer = tokenizer.encode(sample.answer if sample.prompt else f" {sample.answer}")
    return [*prompt, *answer, tokenizer.eos_ids[0]], len(prompt)


def training_rows(
    texts: Texts, tokenizer, per_domain: int, statements: int, length: int, seed: int,
    domains: Sequence[str] = DOMAINS, conflicts: int = 0, conflict_share: float = 0.5, prompt_weight: float = 0,
    repeats: int = 0, unhelpful: int = 0, seen: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Packed rows of ``per_domain`` questions of every domain, whose answers are learned, of ``statements`` of internal
    facts, which are learned whole, of ``conflicts``, ``unhelpful``, ``repeats`` and ``seen`` (see ``Texts``); in random
    order. prompt_weight: in the loss, of tokens of passages and questions, where an answer's count 1."""
    rng = np.random.Generator(np.random.PCG64([seed, 7]))
    samples = [s for domain in domains for s in texts.sample(domain, "train", rng, per_domain)]
    if statements and ("facts" in domains or "catalogue" in domains):
        samples += texts.statements(rng, statements)
    if conflicts:
        samples += texts.conflicts("train", rng, conflicts, conflict_share)
    samples += texts.unhelpful(rng, unhelpful)
    samples += texts.repeats(rng, repeats)
    samples += texts.seen(rng, seen)
    rows, cut, (asked,) = [], 0, tokenizer.encode("?")
    for i in rng.permutation(len(samples)):
        ids, start = encode(tokenizer, samples[i])
        marks = _learned(ids, start, prompt_weight, tokenizer.eos_ids[0], asked)
        marks[start:] = [mark * own for mark, own in zip(marks[start:], _own(tokenizer, samples[i], ids[start:]))]
        cut += len(ids) > length
        rows.append((ids[:length], marks[:length]))
    if cut:
        print(f"{cut} of {len(rows)} samples are longer than {length} tokens and are cut there: raise text.length")
    return pack(rows, length)


def rows_at_home(
    texts: Texts, tokenizer, per_domain: int, statements: int, length: int, seed: int, domains: Sequence[str],
    experts: int, home: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Training rows that hold one domain each, with "router_home" bool [B, experts]: the ``home`` experts that the
    domain's tokens should go to. Neighbouring domains share some."""
    parts = []
    for number, domain in enumerate(domains):
        sentences = statements if domain == "facts" else 0
        part = training_rows(texts, tokenizer, per_domain, sentences, length, seed + number, (domain,))
        own = np.zeros(experts, bool)
        own[(number * experts // len(domains) + np.arange(home)) % experts] = True
        parts.append({**part, "router_home": np.tile(own, (len(part["tokens"]), 1))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rows_by_source(
    texts: Texts, tokenizer, per_domain: int, statements: int, length: int, seed: int, domains: Sequence[str],
    units: int, width: int, **more: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Training rows that hold one kind of text each, with "unit_away" bool [B, width]: MLP units that are to be silent.

    The first ``units`` are for what is remembered (facts, catalogue, statements), the next ``units`` for reading, the
    others for all other text. Where both sources can answer (conflicts, unhelpful passages) both sets may act.
    more: of :func:`training_rows`.
    """
    place = np.arange(width)
    remember, read = place < units, (place >= units) & (place < 2 * units)
    own = {"facts": remember, "catalogue": remember, "reading": read}
    both = {name: more.pop(name) for name in ("conflicts", "conflict_share", "unhelpful") if name in more}
    looking = {name: more.pop(name) for name in ("repeats", "seen") if more.get(name)}
    kinds = [(name, (name,), {}, ~own.get(name, ~(remember | read))) for name in domains]
    kinds += [("both", (), both, ~(remember | read))] if both.get("conflicts") or both.get("unhelpful") else []
    kinds += [("looking back", (), looking, remember | read)] if looking else []
    parts = []
    for number, (name, kind, special, away) in enumerate(kinds):
        said = statements if name == "facts" else 0
        part = training_rows(texts, tokenizer, per_domain, said, length, seed + number, kind, **special, **more)
        parts.append({**part, "unit_away": np.tile(away, (len(part["tokens"]), 1))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _own(tokenizer, sample: Sample, answer: Sequence[int]) -> list[bool]:
    """Which tokens of an answer are of the words that are learned."""
    words = {x for word in sample.learned for x in tokenizer.encode(f" {word}")}
    return [not words or x in words for x in answer]


def _learned(ids: Sequence[int], start: int, weight: float, end: int, asked: int) -> list[float]:
    """How much each token counts: ``weight`` for a prompt's, and for those of further questions up to "?"."""
    out: list[float] = [weight] * start + [1] * (len(ids) - start)
    if end in ids[:-1]:
        asking = False
        for i in range(start, len(ids)):
            if asking:
                out[i] = weight
            asking = (asking or ids[i] == end) and ids[i] != asked
    return out


def new_model(texts: Texts, sizes: dict[str, Any], max_len: int, seed: int, more: Sequence[str] = ()) -> Model:
    """Random weights of the given sizes: a Qwen3, or with ``experts`` a Qwen3-MoE. A ``window`` is the number of tokens
    that the layers numbered in ``narrow`` see; where none are named, every other layer, the first one included. more:
    see :func:`world_tokenizer`."""
    tokenizer = world_tokenizer(texts, more)
    experts = {name: sizes[name] for name in ("experts", "top_k")} if sizes["experts"] else {}
    window: dict[str, Any] = {}
    if sizes.get("window"):
        narrow = sizes.get("narrow") or range(0, sizes["layers"], 2)
        window = {
            "sliding_window": sizes["window"],
            "sliding_layers": tuple(i in narrow for i in range(sizes["layers"])),
        }
    config = models.Config(
        family="qwen3_moe" if experts else "qwen3", vocab_size=tokenizer.vocab_size, dim=sizes["dim"],
        layers=sizes["layers"], heads=sizes["heads"], kv_heads=sizes["heads"], head_dim=sizes["head_dim"],
        ffn_dim=sizes["ffn_dim"], qk_norm=True, tie_embeddings=True, eos_ids=tuple(tokenizer.eos_ids), max_len=max_len,
        norm_topk=bool(experts), **experts, **window,
    )  # fmt: skip
    return Model(config, models.init(config, jax.random.key(seed)), tokenizer)


def arrays(tokenizer, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """ "tokens", "lengths", and "mask" bool [B, T]: the answers, with the token that ends them, or what of them is
    learned."""
    encoded = [encode(tokenizer, sample) for sample in samples]
    tokens, lengths = pad_rows([ids for ids, _ in encoded])
    width = -(-tokens.shape[1] // 32) * 32  # few shapes
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    starts = np.array([start for _, start in encoded])
    at = np.arange(width)
    mask = (at >= np.maximum(starts, 1)[:, None]) & (at < lengths[:, None])
    for row, sample in enumerate(samples):
        if sample.learned:
            mask[row, starts[row] : lengths[row]] &= _own(tokenizer, sample, encoded[row][0][starts[row] :])
    return {"tokens": tokens, "lengths": lengths, "mask": mask}


@functools.partial(jax.jit, static_argnames="config")
def _judge(params, config, tokens, lengths, mask, expert_mask, edit):
    logits = models.forward(params, config, tokens, expert_mask=expert_mask, edit=edit).logits[:, :-1]
    logp = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    wanted = mask[:, 1:]
    right = (logits.argmax(-1) == tokens[:, 1:]) | ~wanted
    return jnp.where(wanted, own, 0.0).sum(axis=1), wanted.sum(axis=1), right.all(axis=1)


def judge(
    params, config: models.Config, rows: dict[str, np.ndarray], expert_mask: np.ndarray | None = None, batch: int = 64,
    edit: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Per row: "nll" nats of its answer, "tokens" of it, and "right": whether greedy decoding would write it exactly
    (every token of the answer is the best one behind those before it).

    expert_mask: bool [layers with experts, E]; edit: of ``models.forward``, the same for every row. Both are runtime
    arguments: new numbers compile nothing.
    """
    out: dict[str, list[np.ndarray]] = {"nll": [], "tokens": [], "right": []}
    total = len(rows["tokens"])
    for low in range(0, total, batch):
        chosen = np.minimum(np.arange(low, low + batch), total - 1)  # the last batch is filled up, for one shape
        part = [rows[name][chosen] for name in ("tokens", "lengths", "mask")]
        found = [np.asarray(x)[: total - low] for x in _judge(params, config, *part, expert_mask, edit)]
        for name, values in zip(out, (-found[0], *found[1:])):
            out[name].append(values)
    return {name: np.concatenate(values) for name, values in out.items()}
