"""Supervised rows: provenance decides what is learned; the worked numbers of arXiv 2505.16834."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import params as model_params
from models.config import Config
from models.transformer import forward
from rl import losses, rows
from rl.finetune import SFTConfig, sft_loss
from rl.trajectory import append, empty

RESULT = "<|begin_search_result|>x<|end_search_result|>"


class Pairs:
    """Two letters are one token where they stand together, so what is tokenised as one piece matters."""

    def encode(self, text):
        return [sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]


SEGMENTS = [("policy", "abc"), ("tool", RESULT), ("policy", RESULT + "d")]


def test_the_author_decides_and_segments_are_tokenised_apart():
    ids, mask = rows.encode_segments("pro", SEGMENTS, Pairs(), 7)
    texts = [("prompt", "pro"), *SEGMENTS]
    encoded = [Pairs().encode(text) for _, text in texts]
    assert ids == [*itertools.chain(*encoded), 7]
    # The policy's own "result" is learned, the tool's is not.
    assert mask == [*[author == "policy" for (author, _), x in zip(texts, encoded) for _ in x], True]
    assert ids != [*Pairs().encode("".join(text for _, text in texts)), 7]


def test_long_rows_are_counted_and_nothing_to_learn_is_an_error():
    short, long = ("p", [("policy", "ab")]), ("p", [("policy", "ab" * 9)])
    arrays, dropped = rows.encode_rows([short, long, short], Pairs(), 7, 5)
    assert dropped == 1
    np.testing.assert_array_equal(arrays["tokens"], [[112, 195, 7]] * 2)
    np.testing.assert_array_equal(arrays["mask"], [[False, True, True]] * 2)
    np.testing.assert_array_equal(arrays["lengths"], [3, 3])
    with pytest.raises(ValueError, match="no row of 1 fits max_len=5; the shortest has 11 tokens"):
        rows.encode_rows([long], Pairs(), 7, 5)
    with pytest.raises(ValueError, match="row 1: a row must end with a segment of the policy"):
        rows.encode_rows([short, ("p", SEGMENTS[:2])], Pairs(), 7, 5)
    with pytest.raises(ValueError, match="row 1 of 2 has no token to learn"):
        rows.stack_rows([([1, 2], [False, True]), ([1, 2], [True, False])])


def test_rows_of_a_rollout_are_the_sampled_ids():
    trajectory = empty(np.array([[1, 2], [3, 0]], np.int32), np.array([2, 1], np.int32), 1, 8)
    both = np.arange(2)
    append(trajectory, both, np.array([[5, 6], [7, 0]]), np.array([2, 1]), 1, np.zeros((2, 2), np.float32))
    append(trajectory, both, np.array([[8, 9], [9, 0]]), np.array([2, 1]), 1)
    append(trajectory, both, np.array([[4], [4]]), np.array([1, 1]), 2, np.zeros((2, 1), np.float32))
    out = rows.trajectory_rows(trajectory, [1, 0])
    np.testing.assert_array_equal(out["tokens"], [[3, 7, 9, 4, 0, 0, 0], [1, 2, 5, 6, 8, 9, 4]])
    np.testing.assert_array_equal(out["mask"], np.array([[0, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1]], bool))
    np.testing.assert_array_equal(out["lengths"], [4, 7])


def test_padding():
    out = rows.pad_rows(rows.stack_rows([([1, 2], [False, True])]), 3, 4)
    np.testing.assert_array_equal(out["tokens"], [[1, 2, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(out["mask"].sum(axis=1), [1, 0, 0])
    np.testing.assert_array_equal(out["lengths"], [2, 0, 0])
    with pytest.raises(ValueError, match="3 rows of 4 tokens do not fit 2 rows of 4"):
        rows.pad_rows(out, 2, 4)


def test_the_worked_loss():
    """Log-probs of .5, .25, .01 (a tool's) and .5: 0.924196; with the tool's it would be 1.844440."""
    logp = jnp.log(jnp.array([[0.5, 0.25, 0.01, 0.5]]))
    for mask, expected in ((jnp.array([[1.0, 1.0, 0.0, 1.0]]), 0.924196), (jnp.ones((1, 4)), 1.844440)):
        assert float(losses.cross_entropy(logp, mask) / mask.sum()) == pytest.approx(expected, abs=1e-6)


def test_labels_of_tools_change_nothing_and_their_logits_get_no_gradient():
    """The label of a target is changed, the context is not: what the model reads stays as it is."""
    config = Config(vocab_size=300, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)
    params = model_params.init(config, jax.random.key(0))
    ids, mask = rows.encode_segments("pro", SEGMENTS, Pairs(), 7)
    ids, mask = jnp.array([ids]) % 300, jnp.array([mask])
    logits = forward(params, config, ids).logits

    def loss(logits, labels):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), labels[:, 1:, None], -1)[..., 0]
        return losses.cross_entropy(logp, mask[:, 1:].astype(jnp.float32)) / mask[:, 1:].sum()

    value, gradient = jax.value_and_grad(loss)(logits, ids)
    other = jnp.where(mask, ids, (ids + 5) % 300)
    assert float(loss(logits, other)) == float(value)
    predicts_tool = ~np.asarray(mask[0, 1:])
    np.testing.assert_array_equal(np.asarray(gradient)[0, :-1][predicts_tool], 0.0)
    assert (np.abs(np.asarray(gradient)[0, :-1][~predicts_tool]).max(-1) > 0).all()
    batch = {"tokens": ids, "mask": mask}
    ours, _ = sft_loss(params, batch, SFTConfig(), config, mask[:, 1:].sum())
    np.testing.assert_allclose(ours, value, rtol=1e-5)
