"""Dense retrieval: unit vectors of all passages by an encoder, exact search by inner product on JAX's devices.

An index is a folder of chunks ``00000.npy`` [rows, D], rows in the order of the passages' ids, so that the lower row of
two equal scores, which ``lax.top_k`` prefers, is the lower id. A chunk is written at once: a build that was killed goes
on behind the last whole one.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.config import write_atomic
from jaxrec.progress import track
from jaxrec.tools.search.base import Result, answer_valid, check_request
from jaxrec.tools.search.corpus import PassageStore, read_facts

_VERSION = 1
_FORMAT = "dense index"
_BLOCK = 65_536  # rows scored at a time: [queries, block] floats are what a search needs beside the index
_MAX_BATCH = 256
DTYPES = ("float32", "float16")
BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Texts to vectors, and what their values depend on.

    id: names encoder and weights; an index made with another one is refused. embed: texts -> float32 [n, D], of any
    length. instruction: put before queries, never before passages.
    """

    id: str
    embed: Callable[[Sequence[str]], np.ndarray]
    instruction: str = ""

    def unit(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, D], L2-normalised. Raises ValueError for another shape, or a vector that is 0 or not finite."""
        vectors = np.asarray(self.embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"the encoder {self.id} gave shape {vectors.shape} for {len(texts)} texts, not [n, D]")
        lengths = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            raise ValueError(
                f"the encoder {self.id} gave a vector of length {lengths[bad[0]]} for {texts[bad[0]]!r:.80}"
            )
        return vectors / lengths[:, None]


def encoder_embedder(
    folder: str | Path, *, instruction: str = "", pooling: str | None = None, max_length: int = 300,
    batch_size: int = 64,
) -> Embedder:  # fmt: skip
    """An :class:`Embedder` of a BERT-family folder (``models.encoder``), its id made from the files' bytes.

    instruction: e.g. :data:`BGE_INSTRUCTION`. max_length: tokens kept per text (300 in R1-Searcher's code), at most
    what the encoder has positions for.
    """
    from models.encoder import load_encoder

    encoder = load_encoder(folder, pooling=pooling)
    kept = min(max_length, encoder.module.config.max_len)
    digest = hashlib.sha256(json.dumps([encoder.module.config.pooling, kept]).encode())
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json", "vocab.txt"):
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    embed = functools.partial(encoder.encode, max_length=kept, batch_size=batch_size)
    return Embedder(f"{Path(folder).resolve().name}:{digest.hexdigest()[:32]}", embed, instruction)


def build_dense(
    store: PassageStore, folder: str | Path, embedder: Embedder, *, chunk: int = 16_384, dtype: str = "float32",
    progress: bool = False,
) -> None:  # fmt: skip
    """Encode all passages of a store, ``title text``, into an index; the same call again goes on where it was stopped.

    chunk: passages per file, what a kill costs at most. dtype: of the files; "float16" halves disk and device memory
    and rounds the vectors. Raises ValueError for a folder that was begun with another corpus, encoder or setting.
    """
    if dtype not in DTYPES or chunk < 1:
        raise ValueError(f"dtype={dtype!r} is one of {', '.join(DTYPES)}, and chunk={chunk} at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": _FORMAT, "version": _VERSION, "corpus": store.hash, "passages": len(store), "encoder": embedder.id,
        "chunk": chunk, "dtype": dtype,
    }  # fmt: skip
    path = folder / "index.json"
    if path.exists():
        found = read_facts(path, _FORMAT, _VERSION)
        for name, value in facts.items():
            if found[name] != value:
                raise ValueError(f"{folder} was begun with {name} {found[name]!r}, not {value!r}; use another folder")
    else:
        facts["dim"] = embedder.unit([_text(store, 0)]).shape[1]
        write_atomic(path, json.dumps(facts, indent=1) + "\n")
        found = facts
    count = math.ceil(len(store) / chunk)
    for number in track(range(count), "chunks", count) if progress else range(count):
        _build_chunk(store, folder, embedder, found, number)


def _text(store: PassageStore, row: int) -> str:
    passage = store[int(store.order[row])]
    return f"{passage.title} {passage.text}" if passage.title else passage.text


def _build_chunk(store: PassageStore, folder: Path, embedder: Embedder, facts: dict, number: int) -> None:
    rows = range(number * facts["chunk"], min((number + 1) * facts["chunk"], len(store)))
    path = _chunk_path(folder, number)
    if path.exists():
        return
    vectors = embedder.unit([_text(store, row) for row in rows])
    if vectors.shape[1] != facts["dim"]:
        raise ValueError(
            f"the encoder {embedder.id} gave {vectors.shape[1]} numbers per text, {folder} has {facts['dim']}"
        )
    temporary = folder / f".{path.name}.{os.getpid()}"
    with temporary.open("wb") as stream:
        np.save(stream, vectors.astype(facts["dtype"]))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _chunk_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


class DenseSearch:
    """Exact search over all vectors, which stand on the devices: rows over all devices of ``mesh``, or on one.

    approximate: let ``lax.approx_max_k`` choose (fast on TPUs, where it may miss a few of the best; elsewhere it is
    exact). Raises FileNotFoundError, ValueError for an unfinished index, or one of another corpus or encoder.
    """

    def __init__(
        self, store: PassageStore, folder: str | Path, embedder: Embedder, *, mesh: Mesh | None = None,
        approximate: bool = False,
    ):  # fmt: skip
        folder = Path(folder)
        facts = read_facts(folder / "index.json", _FORMAT, _VERSION)
        for name, value in (("corpus", store.hash), ("encoder", embedder.id)):
            if facts[name] != value:
                raise ValueError(f"{folder} was built with {name} {facts[name]}, not {value}; build another index")
        self.store, self.size, self.dim = store, len(store), facts["dim"]
        self.embedder, self.approximate, self.mesh = embedder, approximate, mesh
        key = json.dumps(
            [_VERSION, store.hash, embedder.id, embedder.instruction, facts["dtype"], approximate], sort_keys=True
        )
        self.id = f"dense:{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        chunks = _open_chunks(folder, facts)
        devices = mesh.size if mesh is not None else 1
        per_device = math.ceil(self.size / devices)
        block = min(_BLOCK, per_device)
        self._shape = (devices * math.ceil(per_device / block) * block, self.dim)
        self._block = block
        read = functools.partial(_read_rows, chunks, facts["chunk"], self._shape[0], self.dim, np.dtype(facts["dtype"]))
        if mesh is None:
            self._vectors = jnp.asarray(read((slice(None), slice(None))))
        else:
            sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._vectors = jax.make_array_from_callback(self._shape, sharding, read)

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        """The ``k`` passages of largest inner product per query, equal ones by id. Raises ValueError for a k larger
        than the corpus."""
        check_request(queries, k, self.size)
        return answer_valid(queries, lambda asked: self._answer(asked, k))

    def _answer(self, queries: list[str], k: int) -> list[Result]:
        prefixed = [self.embedder.instruction + query for query in queries]
        vectors = self.embedder.unit(prefixed)
        if vectors.shape[1] != self.dim:
            raise ValueError(f"queries have {vectors.shape[1]} numbers, the index {self.dim}: another encoder?")
        scores, rows = self.top_k(vectors, k)
        return [Result(self.store.hits(self.store.order[r], s)) for r, s in zip(rows, scores)]

    def top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [B, D] -> (scores float32 [B, k], rows of the index int32 [B, k]), best first.

        Batches are padded to powers of two, so that new sizes compile nothing but the first of their bucket.
        """
        parts = []
        for start in range(0, len(queries), _MAX_BATCH):
            part = queries[start : start + _MAX_BATCH]
            padded = np.zeros((1 << (len(part) - 1).bit_length(), self.dim), np.float32)
            padded[: len(part)] = part
            found = _search(
                self._vectors, padded, k=k, size=self.size, block=self._block, mesh=self.mesh,
                approximate=self.approximate,
            )  # fmt: skip
            parts.append([np.asarray(array)[: len(part)] for array in found])
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])


def _open_chunks(folder: Path, facts: dict) -> list[np.ndarray]:
    """Maps of all chunks, checked."""
    chunks = []
    for number in range(math.ceil(facts["passages"] / facts["chunk"])):
        path = _chunk_path(folder, number)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the index is unfinished; call build_dense again, it goes on")
        chunk = np.load(path, mmap_mode="r")
        rows = min(facts["chunk"], facts["passages"] - number * facts["chunk"])
        if chunk.shape != (rows, facts["dim"]) or chunk.dtype != facts["dtype"]:
            raise ValueError(
                f"{path} is {chunk.dtype} {chunk.shape}, not {facts['dtype']} {(rows, facts['dim'])}: remove it and "
                "call build_dense again"
            )
        chunks.append(chunk)
    return chunks


def _read_rows(chunks, size: int, total: int, dim: int, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Rows [n, D] of the padded matrix, 0 past the last passage; only these are read."""
    start, stop, _ = index[0].indices(total)
    out = np.zeros((stop - start, dim), dtype)
    for number, chunk in enumerate(chunks):
        low, high = max(start, number * size), min(stop, number * size + len(chunk))
        if low < high:
            out[low - start : high - start] = chunk[low - number * size : high - number * size]
    return out


@functools.partial(jax.jit, static_argnames=("k", "size", "block", "mesh", "approximate"))
def _search(vectors, queries, *, k: int, size: int, block: int, mesh: Mesh | None, approximate: bool):
    """vectors [N, D], padded to whole blocks, queries float32 [B, D] -> scores float32 [B, k], rows int32 [B, k]."""
    local = functools.partial(_local, k=k, size=size, block=block, approximate=approximate)
    if mesh is None:
        return local(vectors, queries, jnp.int32(0))
    axes = mesh.axis_names

    def on_device(vectors, queries):
        place = jax.lax.axis_index(axes) * vectors.shape[0]
        return local(vectors, queries, place.astype(jnp.int32))

    split = jax.shard_map(
        on_device, mesh=mesh, in_specs=(PartitionSpec(axes), PartitionSpec()),
        out_specs=(PartitionSpec(None, axes), PartitionSpec(None, axes)), check_vma=False,
    )  # fmt: skip
    # Candidates of all devices side by side, in the order of their rows: equal scores stay in it.
    return _merge(*split(vectors, queries), k)


def _local(vectors, queries, first, *, k: int, size: int, block: int, approximate: bool):
    """The best of the rows of one device, the first of which is row ``first`` of the index: [B, min(k, rows)] each."""
    kept = min(k, vectors.shape[0])
    choose = jax.lax.approx_max_k if approximate else jax.lax.top_k

    def step(best, part):
        number, rows = part
        start = first + number * block
        scores = jax.lax.dot_general(
            queries, rows.astype(jnp.float32), (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        scores = jnp.where(start + jnp.arange(block) < size, scores, -jnp.inf)
        values, places = choose(scores, min(kept, block))
        merged = jnp.concatenate([best[0], values], 1), jnp.concatenate([best[1], start + places], 1)
        return _merge(*merged, kept), None

    shape = (queries.shape[0], kept)
    empty = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    blocks = vectors.reshape(-1, block, vectors.shape[1])
    return jax.lax.scan(step, empty, (jnp.arange(len(blocks), dtype=jnp.int32), blocks))[0]


def _merge(scores, rows, k: int):
    """The best ``k`` of candidates [B, C]; equal ones in their order."""
    scores, places = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(rows, places, axis=1)
