"""Everything that defines weights: language models, recommenders, encoders, sharding, Hugging Face folders, sampling.

Names are resolved on first use, so that importing the package costs nothing.
"""

import importlib

_EXPORTS = {
    "Config": "config",
    "Edit": "taps",
    "Generation": "generation",
    "Model": "hf",
    "Output": "transformer",
    "Reduced": "taps",
    "Session": "sample",
    "abstract": "params",
    "build_word_tokenizer": "tokenizer",
    "decode": "sample",
    "decode_weights": "layout",
    "extend": "sample",
    "forward": "transformer",
    "generate": "generation",
    "generate_tokens": "generation",
    "init": "params",
    "load": "hf",
    "load_tokenizer": "tokenizer",
    "make_mesh": "sharding",
    "prefill": "sample",
    "routing_of": "sample",
    "save": "hf",
    "shardings": "params",
    "stop_table": "stops",
    "unembed": "transformer",
    "use_mesh": "sharding",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"models.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'models' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
