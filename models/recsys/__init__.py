"""Recommenders: floors, SASRec, GRU4Rec and DeepRec's preference-aware TRM, with one server for all of them."""

from models.recsys.base import Recommender, SequenceModel, get_params, set_params
from models.recsys.floors import Markov, Popularity
from models.recsys.functional import UnknownItemError, pad_histories
from models.recsys.gru4rec import GRU4Rec, GRU4RecConfig
from models.recsys.preference import PhraseMixer, mean_vectors, phrase_mixer
from models.recsys.sasrec import SASRec, SASRecConfig
from models.recsys.trm import TRM, TRMConfig, recommend

__all__ = [
    "TRM",
    "GRU4Rec",
    "GRU4RecConfig",
    "Markov",
    "PhraseMixer",
    "Popularity",
    "Recommender",
    "SASRec",
    "SASRecConfig",
    "SequenceModel",
    "TRMConfig",
    "UnknownItemError",
    "get_params",
    "mean_vectors",
    "pad_histories",
    "phrase_mixer",
    "recommend",
    "set_params",
]
