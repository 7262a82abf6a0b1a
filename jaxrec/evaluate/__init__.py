"""Evaluation: full-ranking and list metrics, and intervals for paired comparisons."""

from jaxrec.evaluate.ranking import (
    METRICS,
    RankingResult,
    evaluate_ranking,
    list_metrics,
    list_values,
    paired_interval,
    rank_metrics,
    rank_values,
    ranks,
)

__all__ = [
    "METRICS",
    "RankingResult",
    "evaluate_ranking",
    "list_metrics",
    "list_values",
    "paired_interval",
    "rank_metrics",
    "rank_values",
    "ranks",
]
