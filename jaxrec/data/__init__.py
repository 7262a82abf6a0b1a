"""Data: sources of user-item events, splits and batches.

``jaxrec.data.tfds_sources`` (prepared data sets) is not imported here because tensorflow_datasets is slow to import.
"""

from jaxrec.data.amazon import load_amazon
from jaxrec.data.atomic import load_atomic
from jaxrec.data.interactions import (
    Interactions,
    disambiguate_titles,
    drop_duplicates,
    drop_unused,
    filter_rating,
    k_core,
    require_titles,
    title_index,
)
from jaxrec.data.movielens import load_movielens_1m, load_movielens_100k, load_movielens_csv
from jaxrec.data.pipeline import batches
from jaxrec.data.presplit import PreSplit, load_presplit
from jaxrec.data.sources import load_interactions
from jaxrec.data.splits import LeaveOneOut, Samples, Split, global_time_split, leave_one_out, ratio_split

__all__ = [
    "Interactions",
    "LeaveOneOut",
    "PreSplit",
    "Samples",
    "Split",
    "batches",
    "disambiguate_titles",
    "drop_duplicates",
    "drop_unused",
    "filter_rating",
    "global_time_split",
    "k_core",
    "leave_one_out",
    "load_amazon",
    "load_atomic",
    "load_interactions",
    "load_movielens_1m",
    "load_movielens_100k",
    "load_movielens_csv",
    "load_presplit",
    "ratio_split",
    "require_titles",
    "title_index",
]
