"""Text vectors without a neural encoder: for machines with no encoder weights, tests and the embedded world.

A text is a bag of words. A word's vector is a fixed random sign vector derived from the word itself (SHAKE-256, so the
same on every machine and Python version) plus those of its character trigrams, which brings "comedy" and "comedies"
together; adjacent word pairs add a hashed vector each. Words are weighted by their inverse document frequency in the
catalogue. This is a random projection of hashed TF-IDF features: cosine between two texts estimates their lexical
overlap. It knows no synonyms.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

_TOKEN = re.compile(r"\w+|[;\n]", re.UNICODE)
_PAIRS = 8192  # rows of hashed word pairs


class TextFeatures:
    """``fit`` on the catalogue's texts, then ``encode``. Same interface as ``models.encoder.Encoder``.

    ``;`` separates phrases: the vector of "a; b" is the unit mean of the vectors of "a" and "b", so preference texts
    can also be put together from phrase vectors on the device.
    """

    def __init__(self, dim: int = 256, *, seed: int = 0, document_frequency: dict[str, int] | None = None, documents=0):
        if dim < 8 or dim % 8:
            raise ValueError(f"dim must be a positive multiple of 8, got {dim}")
        self.dim, self.seed, self.documents = dim, seed, documents
        self._frequency = dict(document_frequency or {})
        self._index: dict[str, int] = {}
        self._words = np.zeros((1024, dim), np.float32)  # idf-weighted word vectors, grown by doubling
        self._hashes = np.zeros((1024,), np.uint32)
        self._pairs = self._random([f"pair:{i}" for i in range(_PAIRS)]) * np.float32(0.5)

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 256, *, seed: int = 0) -> TextFeatures:
        """Count in how many of the texts each word occurs. Content only: no interaction is looked at."""
        if not len(texts):
            raise ValueError("cannot fit text features on no text")
        frequency: Counter[str] = Counter()
        for text in texts:
            frequency.update(set(_TOKEN.findall(text.casefold())) - {";", "\n"})
        return cls(dim, seed=seed, document_frequency=frequency, documents=len(texts))

    def encode(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """float32 [n, dim], L2-normalised; a text without a word gives the zero vector.

        ``prefix`` (an instruction some neural encoders need) is accepted and ignored.
        """
        del prefix
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, got one string")
        # one scan over all texts; a line break inside a text is only white space
        tokens = _TOKEN.findall("\n".join(t.replace("\n", " ") for t in texts).casefold())
        index = self._index
        fresh = dict.fromkeys(t for t in tokens if t not in index)
        self._add([t for t in fresh if t not in (";", "\n")])
        ids = np.array([-2 if t == "\n" else -1 if t == ";" else index[t] for t in tokens], np.int64)
        breaks = ids < 0
        phrase = np.cumsum(breaks)  # phrase number of each token, over all texts
        text_of_phrase = np.concatenate([[0], np.cumsum(ids[breaks] == -2)]).astype(np.int64)
        words = ~breaks
        phrases = _sum_rows(self._words, ids[words], phrase[words], len(text_of_phrase))
        left, right = ids[:-1], ids[1:]
        pairs = (left >= 0) & (right >= 0)
        mixed = self._hashes[left[pairs]] * np.uint32(0x9E3779B1) ^ self._hashes[right[pairs]] * np.uint32(0x85EBCA6B)
        buckets = ((mixed ^ (mixed >> np.uint32(15))) % np.uint32(_PAIRS)).astype(np.int64)
        phrases += _sum_rows(self._pairs, buckets, phrase[:-1][pairs], len(text_of_phrase))
        phrases = _unit(phrases)
        if len(phrases) == len(texts):
            return phrases
        rows = np.arange(len(phrases))
        return _unit(_sum_rows(phrases, rows, text_of_phrase, len(texts)))

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted state as a compressed ``.npz`` (no pickle)."""
        words = sorted(self._frequency)
        counts = np.array([self._frequency[w] for w in words], np.int64)
        text = np.frombuffer("\n".join(words).encode(), np.uint8)
        np.savez_compressed(path, words=text, counts=counts, meta=np.array([self.dim, self.seed, self.documents]))

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextFeatures:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as f:
            words = f["words"].tobytes().decode().split("\n")
            dim, seed, documents = (int(x) for x in f["meta"])
            frequency = dict(zip(words, f["counts"].tolist(), strict=True)) if len(f["counts"]) else {}
        return cls(dim, seed=seed, document_frequency=frequency, documents=documents)

    def _add(self, words: list[str]) -> None:
        """Cache the weighted vectors of new words."""
        if not words:
            return
        grams = [[f"#{w}#"[i : i + 3] for i in range(len(w))] for w in words]
        known = {g: i for i, g in enumerate(dict.fromkeys(g for row in grams for g in row))}
        table = self._random([f"gram:{g}" for g in known])
        owner = np.repeat(np.arange(len(words)), [len(row) for row in grams])
        flat = np.fromiter((known[g] for row in grams for g in row), np.int64, len(owner))
        vectors = self._random([f"word:{w}" for w in words]) + _unit(_sum_rows(table, flat, owner, len(words)))
        count = np.array([self._frequency.get(w, 0) for w in words], np.float64)
        idf = np.log((1.0 + self.documents) / (1.0 + count)) + 1.0
        start, stop = len(self._index), len(self._index) + len(words)
        if stop > len(self._words):
            size = 1 << (stop - 1).bit_length()
            self._words = np.concatenate([self._words, np.zeros((size - len(self._words), self.dim), np.float32)])
            self._hashes = np.concatenate([self._hashes, np.zeros((size - len(self._hashes),), np.uint32)])
        self._words[start:stop] = _unit(vectors) * idf[:, None].astype(np.float32)
        self._hashes[start:stop] = [zlib.crc32(w.encode()) for w in words]
        self._index.update(zip(words, range(start, stop), strict=True))

    def _random(self, names: list[str]) -> np.ndarray:
        """Unit sign vectors [n, dim], a function of (seed, name) only."""
        size = self.dim // 8
        raw = b"".join(hashlib.shake_256(f"{self.seed}:{name}".encode()).digest(size) for name in names)
        bits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(len(names), size), axis=1)
        return (2.0 * bits.astype(np.float32) - 1.0) / np.float32(self.dim**0.5)


def _sum_rows(table: np.ndarray, ids: np.ndarray, owner: np.ndarray, rows: int) -> np.ndarray:
    """Sum of table[ids] per owner (ascending): float32 [rows, dim]."""
    from scipy.sparse import csr_matrix  # scipy comes with jax; imported on use to keep the module light

    offsets = np.searchsorted(owner, np.arange(rows + 1))
    weights = np.ones(len(ids), np.float32)
    return np.asarray(csr_matrix((weights, ids, offsets), shape=(rows, len(table))) @ table, np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
