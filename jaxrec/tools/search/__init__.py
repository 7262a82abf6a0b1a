"""Search tools: a local corpus by BM25 or by an encoder, the live web, and what makes any of them a tool of rollouts.

The backends are not imported here, because bm25s, jax and httpx are slow to import: ``bm25.BM25Search``,
``dense.DenseSearch``, ``web.WebSearch``.
"""

from jaxrec.tools.search.base import KINDS, Backend, Passage, Result, Search, failure
from jaxrec.tools.search.corpus import PassageStore, Report, build_store, read_passages, split_article
from jaxrec.tools.search.formatting import Caps, format_passages
from jaxrec.tools.search.wrappers import Counts, Recorded, ResultCache, SearchTool

__all__ = [
    "KINDS",
    "Backend",
    "Caps",
    "Counts",
    "Passage",
    "PassageStore",
    "Recorded",
    "Report",
    "Result",
    "ResultCache",
    "Search",
    "SearchTool",
    "build_store",
    "failure",
    "format_passages",
    "read_passages",
    "split_article",
]
