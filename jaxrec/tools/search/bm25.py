"""BM25 over a passage store: bm25s builds and keeps the matrix of scores, queries read the columns of their words.

score(q, d) = sum over the words t of q of  idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |d| / avgdl)),
idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)),

with Lucene's idf, never negative (Robertson and Zaragoza, 2009; Kamphuis et al., 2020). bm25s' own "lucene" leaves the
factor k1 + 1 out, which changes scores and no ranking; its "atire" with Lucene's idf is the formula above. |d| counts
the words that are left after stop words, avgdl is its mean.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxrec.config import write_atomic
from jaxrec.progress import track
from jaxrec.tools.search.base import Result, answer_valid, check_request
from jaxrec.tools.search.corpus import PassageStore, read_facts

_VERSION = 1
_FORMAT = "BM25 index"


@dataclasses.dataclass(frozen=True)
class BM25Settings:
    """k1, b: the defaults are those of passages of 100 words (Anserini's), not bm25s'. stemmer: a language of Snowball,
    "" for none. stopwords: a list of bm25s ("en"), "" for none. titles: whether words of titles count as the text's."""

    k1: float = 0.9
    b: float = 0.4
    stemmer: str = "english"
    stopwords: str = "en"
    titles: bool = True

    def __post_init__(self):
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"k1={self.k1} must not be negative and b={self.b} must lie between 0 and 1")


def tokenizer(settings: BM25Settings) -> Callable[[str], list[str]]:
    """Text -> words: runs of letters, digits and underscores (Unicode), lower case, without stop words, stemmed."""
    import bm25s.stopwords
    import Stemmer

    if settings.stemmer and settings.stemmer not in Stemmer.algorithms():
        raise ValueError(f"no stemmer {settings.stemmer!r}; stemmers: {', '.join(Stemmer.algorithms())}")
    stem = Stemmer.Stemmer(settings.stemmer).stemWord if settings.stemmer else str
    lists = {name[10:].lower(): words for name, words in vars(bm25s.stopwords).items() if name[:10] == "STOPWORDS_"}
    if settings.stopwords and settings.stopwords not in lists:
        raise ValueError(f"no list of stop words {settings.stopwords!r}; lists: {', '.join(sorted(lists))}")
    stopped = frozenset(lists[settings.stopwords] if settings.stopwords else ())

    @functools.lru_cache(maxsize=1 << 20)
    def word(raw: str) -> str:
        return "" if raw in stopped else stem(raw)

    return lambda text: [w for w in map(word, re.findall(r"\w+", text.lower())) if w]


def build_bm25(
    store: PassageStore, folder: str | Path, settings: BM25Settings = BM25Settings(), *, progress: bool = False
) -> "BM25Search":
    """Write the index of a store to a folder, which appears when it is whole.

    Words of all passages are in memory meanwhile. Raises FileExistsError, ValueError for settings that do not exist or
    a corpus in which no word is left.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every step else

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: open it with BM25Search, or name another folder")
    words, vocabulary = _words(track(store, "words", len(store)) if progress else iter(store), settings)
    if not vocabulary:
        raise ValueError(f"{store.folder}: no passage has a word that is no stop word")
    index = bm25s.BM25(k1=settings.k1, b=settings.b, method="atire", idf_method="lucene")
    index.index((words, vocabulary), create_empty_token=False, show_progress=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        index.save(str(temporary), show_progress=False)
        facts = {
            "format": _FORMAT, "version": _VERSION, "corpus": store.hash, "passages": len(store),
            "settings": dataclasses.asdict(settings), "bm25s": bm25s.__version__,
        }  # fmt: skip
        write_atomic(temporary / "index.json", json.dumps(facts, indent=1) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return BM25Search(store, folder)


def _words(passages: Iterator, settings: BM25Settings) -> tuple[list[array], dict[str, int]]:
    """Numbers of the words of every passage, int32, and the number of each word, by first appearance."""
    split, vocabulary = tokenizer(settings), {}
    words = []
    for passage in passages:
        text = f"{passage.title}\n{passage.text}" if settings.titles else passage.text
        words.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in split(text)]))
    return words, vocabulary


class BM25Search:
    """Search over an index on disk; scores and places stay there, words' numbers are in memory."""

    def __init__(self, store: PassageStore, folder: str | Path, settings: BM25Settings | None = None):
        """Open an index. Raises FileNotFoundError, ValueError for the index of another corpus, of other settings
        (where they are given), or of another version."""
        import bm25s

        folder = Path(folder)
        facts = read_facts(folder / "index.json", _FORMAT, _VERSION)
        if facts["corpus"] != store.hash:
            raise ValueError(
                f"{folder} indexes the corpus {facts['corpus']} ({facts['passages']} passages), not {store.folder}'s "
                f"{store.hash} ({len(store)} passages); open it with its own store or build an index of this one"
            )
        self.settings = BM25Settings(**facts["settings"])
        if settings is not None and settings != self.settings:
            raise ValueError(f"{folder} was built with {self.settings}, not {settings}; build another index")
        self.store, self.size = store, len(store)
        key = json.dumps([_VERSION, store.hash, facts["settings"]], sort_keys=True)
        self.id = f"bm25:{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        self._tokenize, self._lock = tokenizer(self.settings), threading.Lock()
        index = bm25s.BM25.load(str(folder), mmap=True)
        self._vocabulary = index.vocab_dict
        # Plain views of the maps: numpy's memmap class makes every slice slower.
        self._scores, self._rows, self._starts = (
            np.asarray(index.scores[name]) for name in ("data", "indices", "indptr")
        )

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        """At most ``k`` passages per query that share a word with it, by score, equal ones by id.

        Fewer where fewer match, none where no word does. A word counts as often as it stands in the query. Raises
        ValueError for a k larger than the corpus.
        """
        check_request(queries, k, self.size)
        with self._lock:  # a stemmer is for one thread at a time
            words = {query: self._tokenize(query) for query in queries}
        sums = np.zeros(self.size, np.float32)  # one for all queries: each leaves it as it found it
        return answer_valid(
            queries, lambda asked: [Result(self.store.hits(*self._top(words[q], k, sums))) for q in asked]
        )

    def _top(self, words: list[str], k: int, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [<= k] and scores float32 [<= k]."""
        # In one order, so that the order of the words changes no rounding.
        numbers = sorted(self._vocabulary[word] for word in words if word in self._vocabulary)
        columns = [slice(self._starts[n], self._starts[n + 1]) for n in numbers]
        for column in columns:
            np.add.at(sums, self._rows[column], self._scores[column])
        if 4 * sum(column.stop - column.start for column in columns) < self.size:
            rows, scores = self._touched(columns, sums)
        else:
            rows = np.flatnonzero(sums >= (_lower_bound(sums, k) or np.finfo(np.float32).tiny))
            scores = sums[rows]
            sums.fill(0)
        if len(scores) > k:
            best = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]  # k, and all that tie with the last
            rows, scores = rows[best], scores[best]
        order = np.lexsort((self.store.ranks[rows], -scores))[:k]
        return rows[order].astype(np.int64), scores[order]

    def _touched(self, columns: Sequence[slice], sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows with a score, each once, and their scores, which are set to 0: cheaper than looking at all sums
        where words are rare."""
        found_rows, found = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        for column in columns:
            rows = self._rows[column]
            values = sums[rows]
            sums[rows] = 0  # what was read is not read again with the next word
            hit = values > 0
            found_rows.append(rows[hit])
            found.append(values[hit])
        return np.concatenate(found_rows), np.concatenate(found)


def _lower_bound(scores: np.ndarray, k: int) -> float:
    """A number that at least ``k`` of the scores reach: the k-th largest of a sample, found in a fraction of the
    time. About k times the stride of the sample reach it, so the stride balances both."""
    sample = scores[:: max(int(np.sqrt(len(scores) / k)), 1)]
    return float(np.partition(sample, len(sample) - k)[len(sample) - k]) if len(sample) >= k else 0.0
