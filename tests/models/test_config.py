"""The configuration refuses what cannot be."""

import dataclasses

import pytest

from models import Config

SMALL = dict(vocab_size=50, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn_dim=24)  # noqa: C408


def test_config_is_frozen_hashable_and_validated_on_replace():
    config = Config(**SMALL)
    assert hash(config) == hash(Config(**SMALL))
    assert config.replace(layers=3).layers == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3
    with pytest.raises(ValueError, match="layers must be at least 1"):
        config.replace(layers=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"family": "gpt"}, "unknown family 'gpt'; known: llama"),
        ({"kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"head_dim": 5}, "must be even"),
        ({"dtype": "float16"}, "dtype"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"remat": True}, "remat must be one of none, block, products, not True"),
    ],
)
def test_bad_values_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        Config(**(SMALL | change))
