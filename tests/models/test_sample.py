"""The sampler against full forwards: log-probs, greedy tokens, several turns, stops, compile counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config, draw
from models import sample as sampling
from models.layout import decode_weights
from models.sample import FINISH_EOS, FINISH_STOP, decode, extend, prefill
from models.sharding import make_mesh, use_mesh
from models.stops import stop_table

CONFIG = Config(
    vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=24, qk_norm=True, init_std=0.3,
)  # fmt: skip
LENGTHS = np.array([9, 4], np.int32)


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(2, 64, (2, 9), dtype=np.int32)


def conversation(params, prompts, seed: int = 1, config: Config = CONFIG, **options):
    """Prefill in pairs, write, read, write; returns what every row holds and the log-probs of the last segment."""
    rng = np.random.default_rng(seed)
    weights = decode_weights(params, config, **options)
    session = prefill(weights, config, prompts, LENGTHS, 64, repeat=2)
    key = jax.random.key(seed)
    first, session = decode(weights, config, session, key, np.array([5, 0, 7, 7]), longest=9)
    new, counts = rng.integers(2, 64, (4, 6), dtype=np.int32), np.array([6, 0, 1, 3], np.int32)
    session = extend(weights, config, session, new, counts, 40)
    second, session = decode(weights, config, session, jax.random.fold_in(key, 1), np.full(4, 6), longest=40)
    rows = []
    for b in range(4):
        row = list(prompts[b // 2][: LENGTHS[b // 2]])
        row += list(np.asarray(first.tokens)[b][: first.counts[b]]) + list(new[b][: counts[b]])
        rows.append([*row, *np.asarray(second.tokens)[b][: second.counts[b]]])
    return rows, jax.tree.map(np.asarray, second), session


def test_log_probs_equal_a_full_forward_after_several_ragged_turns(params, prompts):
    rows, last, session = conversation(params, prompts)
    assert np.asarray(session.lens).tolist() == [len(row) for row in rows]
    for b, row in enumerate(rows):
        logp = jax.nn.log_softmax(models.forward(params, CONFIG, jnp.asarray([row])).logits[0])
        start = len(row) - last.counts[b]
        expected = [logp[start + i - 1, row[start + i]] for i in range(last.counts[b])]
        chex.assert_trees_all_close(last.logprobs[b][: last.counts[b]], np.array(expected), atol=1e-4)


def test_group_members_differ_and_waiting_rows_stay(params, prompts):
    weights = decode_weights(params, CONFIG)
    session = prefill(weights, CONFIG, prompts, LENGTHS, 64, repeat=2)
    before = np.asarray(session.logits)
    np.testing.assert_array_equal(before[0], before[1])
    out, session = decode(weights, CONFIG, session, jax.random.key(3), np.array([8, 8, 0, 8]))
    assert not np.array_equal(out.tokens[0], out.tokens[1])
    assert out.counts[2] == 0
    assert np.asarray(session.lens)[2] == LENGTHS[1]
    np.testing.assert_array_equal(np.asarray(session.logits)[2], before[2])


def test_greedy_is_argmax_of_full_forwards(params, prompts):
    out = models.generate_tokens(params, CONFIG, [list(prompts[0]), list(prompts[1][:4])], 6)
    for b, start in enumerate((list(prompts[0]), list(prompts[1][:4]))):
        row = list(start)
        for _ in range(6):
            row.append(int(models.forward(params, CONFIG, jnp.asarray([row])).logits[0, -1].argmax()))
        assert out.tokens[b][:6].tolist() == row[len(start) :]


def test_a_second_conversation_compiles_nothing_new(params, prompts):
    conversation(params, prompts)
    programs = (sampling._prefill, sampling._extend, sampling._decode)
    before = [program._cache_size() for program in programs]
    shorter = np.array([[5, 6, 7, 0, 0, 0, 0, 0, 0], [8, 9, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    conversation(params, shorter, seed=2)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(("place", "views"), [("cpu", [128, 128, 256, 512, 600]), ("tpu", [512, 512, 512, 512, 600])])
def test_attention_reads_a_power_of_two_of_the_slots(monkeypatch, place, views):
    monkeypatch.setattr(sampling, "platform", lambda: place)
    assert [sampling.view_of(longest, 600) for longest in (1, 128, 129, 400, 513)] == views
    assert sampling.view_of(3, 96) == 96


def test_slots_that_no_row_has_reached_change_nothing(params, prompts, monkeypatch):
    weights, long = decode_weights(params, CONFIG), np.random.default_rng(3).integers(2, 64, (2, 140), dtype=np.int32)

    def play():
        session = prefill(weights, CONFIG, prompts, LENGTHS, 512)
        first, session = decode(weights, CONFIG, session, jax.random.key(0), np.full(2, 6), longest=9)
        session = extend(weights, CONFIG, session, long, np.array([140, 90]), 155)
        second, _ = decode(weights, CONFIG, session, jax.random.key(1), np.full(2, 6), longest=155)
        return first, second

    seen = []
    view_of = sampling.view_of
    monkeypatch.setattr(sampling, "view_of", lambda *args: seen.append(view_of(*args)) or seen[-1])
    near = play()
    monkeypatch.setattr(sampling, "least_view", lambda: 512)
    far = play()
    assert seen == [128, 256, 256, 512, 512, 512]
    for one, other in zip(near, far, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_the_session_is_donated(params, prompts):
    weights = decode_weights(params, CONFIG)
    session = prefill(weights, CONFIG, prompts, LENGTHS, 32)
    decode(weights, CONFIG, session, jax.random.key(0), np.full(2, 4))
    assert session.keys[0].is_deleted()


def test_eos_and_early_exit(params, prompts):
    greedy = models.generate_tokens(params, CONFIG, [list(prompts[0])], 8)
    eos = int(greedy.tokens[0][2])
    config = CONFIG.replace(eos_ids=(eos,))
    out = models.generate_tokens(params, config, [list(prompts[0])], 8)
    at = greedy.tokens[0].tolist().index(eos)
    assert out.counts[0] == at + 1
    assert out.finish[0] == FINISH_EOS
    assert (out.tokens[0][at + 1 :] == config.pad_id).all()


def test_picking_inverts_the_distribution():
    rng = np.random.default_rng(0)
    probs = rng.random(300) * (rng.random(300) < 0.5)
    grid = (np.arange(200_000) + 0.5) / 200_000
    index = np.asarray(jax.jit(draw._pick)(jnp.broadcast_to(probs, (len(grid), 300))[:, :], jnp.asarray(grid)))
    share = np.bincount(index, minlength=300) / len(grid)
    np.testing.assert_allclose(share, probs / probs.sum(), atol=3e-5)
    assert not share[probs == 0].any()


def test_a_sharded_session_equals_one_device(params, prompts):
    whole, _, _ = conversation(params, prompts, fuse=False)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, models.shardings(CONFIG, mesh))
    with use_mesh(mesh):
        split, _, _ = conversation(placed, prompts, fuse=False)
    assert split == whole


def test_bfloat16_runs_and_stays_close(params, prompts):
    out = models.generate_tokens(params, CONFIG.replace(dtype="bfloat16"), [list(prompts[0])], 4)
    assert np.isfinite(out.logprobs).all()


def test_errors(params, prompts):
    weights = decode_weights(params, CONFIG)
    with pytest.raises(ValueError, match="at least one token"):
        prefill(weights, CONFIG, prompts, np.array([0, 4]), 32)
    with pytest.raises(ValueError, match="does not fit"):
        prefill(weights, CONFIG, prompts, LENGTHS, 4)
    session = prefill(weights, CONFIG, prompts, LENGTHS, 16)
    with pytest.raises(ValueError, match="lower the limit"):
        decode(weights, CONFIG, session, jax.random.key(0), np.full(2, 40), longest=9)


STRINGS = ("ab", "</q>", "bb>")
PIECES = tuple(s.encode() for s in ("a", "b", "ab", "</", "q", ">", "q>b", "x", "<", "/q>", "bb", "abx", "</q>", ""))


@pytest.mark.parametrize("seed", range(5))
def test_stop_automaton_equals_a_search_in_the_text(seed):
    table = stop_table(STRINGS, PIECES)
    rng = np.random.default_rng(seed)
    for _ in range(200):
        state, text = 0, b""
        for token in rng.integers(0, len(PIECES), 12):
            state, text = int(table.next_state[state, token]), text + PIECES[token]
            found = [s for s in STRINGS if s.encode() in text]
            assert bool(found) == (state >= table.first_accept)
            if found:
                assert table.strings[state - table.first_accept] in found
                break


def test_decoding_stops_on_a_string_inside_tokens(params, prompts):
    greedy = models.generate_tokens(params, CONFIG, [list(prompts[0])], 8).tokens[0]
    pieces = tuple(bytes([97 + i % 26]) + bytes([97 + i // 26]) for i in range(64))
    text = b"".join(pieces[t] for t in greedy)
    wanted = text[3:6].decode()  # begins and ends in the middle of tokens
    out = models.generate_tokens(params, CONFIG, [list(prompts[0])], 8, stops=stop_table((wanted,), pieces))
    count = -(-(text.index(wanted.encode()) + 3) // 2)
    assert out.finish[0] == FINISH_STOP
    assert out.counts[0] == count


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        stop_table(("",), PIECES)
