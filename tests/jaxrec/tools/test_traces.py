"""Cold-start traces: what the queries may know, how lists are merged, and what is trained on."""

import dataclasses

import numpy as np
import pytest

from jaxrec.tools.traces import TraceConfig, encode_traces, merge, write_traces
from rl.envs.recommend import ITEMS_OPEN, OPEN_QUERY, Catalogue, Example, PromptStyle, RecommendEnv, parse_query
from rl.rewards import broken_rules

ITEMS = 40
TITLES = ("", *(f"Title {i}" for i in range(1, ITEMS + 1)))
PHRASES = ((), *((f"maker{i}", f"era{i}", f"genre{i}") for i in range(1, ITEMS + 1)))
EXAMPLES = [Example(n, tuple(range(n + 1, n + 6)), n + 6) for n in range(30)]


def recommender(examples, texts, k, seen):
    """The k lowest ids not shown before."""
    return np.stack([[i for i in range(1, ITEMS + 1) if i not in set(shown.tolist())][:k] for shown in seen])


def environment(max_calls: int = 3) -> RecommendEnv:
    catalogue = Catalogue(TITLES, [" ".join(p) for p in PHRASES])
    style = PromptStyle(instructions=False, max_history=4)
    return RecommendEnv(catalogue, recommender, results=10, answers=10, max_calls=max_calls, style=style)


def queries(trace) -> list[list[str]]:
    texts = [parse_query(text) for author, text in trace.segments if author == "policy"]
    return [text.split("; ") for text in texts if text]


@pytest.mark.parametrize("hindsight", [0.0, 1.0])
def test_a_query_describes_one_item_in_the_catalogues_order(hindsight):
    config = TraceConfig(60, calls=(0, 0, 1), hindsight=hindsight, recent=3)
    examples = {environment().prompt(e): e for e in EXAMPLES}
    for trace in write_traces(environment(), EXAMPLES, PHRASES, config, 0):
        example, asked = examples[trace.prompt], queries(trace)
        assert len(asked) == 3
        allowed = [example.target] if hindsight else list(example.history[-3:])
        sources = []
        for words in asked:
            (source,) = [i for i in allowed if set(words) <= set(PHRASES[i])]
            assert words == sorted(words, key=PHRASES[source].index)
            sources.append(source)
        if not hindsight:
            assert len(set(sources)) == 3  # another item at each call


def test_later_calls_take_words_that_are_left():
    config = TraceConfig(60, calls=(0, 1), words=(1.0,), hindsight=1.0)
    for trace in write_traces(environment(), EXAMPLES, PHRASES, config, 0):
        first, second = queries(trace)
        assert not set(first) & set(second)


def test_open_queries_name_nothing_and():
    config = TraceConfig(400, calls=(0, 1), hindsight=1.0)
    some = write_traces(environment(), EXAMPLES, PHRASES, dataclasses.replace(config, open=0.3), 0)
    said = [words for trace in some for words in queries(trace)]
    share = sum(words == [OPEN_QUERY] for words in said) / len(said)
    assert 0.25 < share < 0.35
    assert all(words == [OPEN_QUERY] or OPEN_QUERY not in words for words in said)
    every = write_traces(environment(), EXAMPLES, PHRASES, dataclasses.replace(config, open=1.0), 0)
    assert all(queries(trace) == [[OPEN_QUERY]] * 2 for trace in every)


def test_a_trace_is_well_formed_and_its_list_is_the_merge():
    for trace in write_traces(environment(), EXAMPLES, PHRASES, TraceConfig(20, calls=(0, 1), merges=("halves",)), 0):
        state = environment().reset([EXAMPLES[0]])[0][0]
        state.segments, state.preferences = list(trace.segments), ["; ".join(words) for words in queries(trace)]
        state.retrieved = [np.arange(1, 11), np.arange(11, 21)]
        assert broken_rules(state, 10) == []
        # Two calls returned items 1-10 and 11-20: the better half of each, in the order of the calls.
        listed = trace.segments[-1][1].split("\n")[2:-1]
        wanted = [*range(1, 6), *range(11, 16)]
        assert listed == [f"{n}. Title {i}" for n, i in enumerate(wanted, start=1)]


def test_short_lists_are_completed_with_the_fill():
    """One call of five items and a list of ten: the results, then what ``fill`` has beside them."""
    env = RecommendEnv(environment().catalogue, recommender, results=5, answers=10, max_calls=2)
    fill = [40, 3, 39, 38, 37, 36, 35, 34, 33, 32]
    traces = write_traces(env, EXAMPLES, PHRASES, TraceConfig(20, calls=(0.5, 0.5), merges=("halves",)), 0, fill)
    wanted = {1: [1, 2, 3, 4, 5, 40, 39, 38, 37, 36], 2: list(range(1, 11))}
    assert {len(queries(trace)) for trace in traces} == {1, 2}
    for trace in traces:
        listed = trace.segments[-1][1].split("\n")[2:-1]
        assert listed == [f"{n}. Title {i}" for n, i in enumerate(wanted[len(queries(trace))], start=1)]


def test_merges_by_hand():
    calls = [np.array([1, 2, 3, 4]), np.array([5, 1, 6, 7])]
    assert merge(calls, "newest", 4) == [5, 1, 6, 7]
    assert merge(calls, "halves", 4) == [1, 2, 5, 3]
    three = [np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8]), np.array([9, 10, 11, 12])]
    assert merge(three, "halves", 10) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11]  # shares of 4, 3 and 3
    assert merge(calls, "interleave", 4) == [5, 1, 2, 6]
    assert merge(calls, "fused", 2) == [1, 5]  # 1/10 + 1/11 before 1/10
    with pytest.raises(ValueError, match="known: newest"):
        merge(calls, "best", 2)


class Letters:
    """One token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def test_only_what_the_policy_writes_is_trained_on():
    traces = write_traces(environment(), EXAMPLES, PHRASES, TraceConfig(20, calls=(0.5, 0.5)), 0)
    arrays, dropped = encode_traces(traces, Letters(), eos_id=1, max_len=5000)
    assert dropped == 0
    for row, trace in enumerate(traces):
        length = arrays["lengths"][row]
        ids, mask = arrays["tokens"][row, :length], arrays["mask"][row, :length]
        learned = "".join(chr(i) for i in ids[mask][:-1])
        assert learned == "".join(text for author, text in trace.segments if author == "policy")
        assert ITEMS_OPEN not in learned
        assert ids[mask][-1] == 1
        assert not arrays["mask"][row, length:].any()
    shortest = int(arrays["lengths"].min())
    kept, dropped = encode_traces(traces, Letters(), eos_id=1, max_len=shortest)
    assert len(kept["tokens"]) + dropped == len(traces)
    assert dropped == int((arrays["lengths"] > shortest).sum())
    with pytest.raises(ValueError, match="no row of 20 fits max_len=3"):
        encode_traces(traces, Letters(), eos_id=1, max_len=3)


@pytest.mark.parametrize(
    ("options", "message"), [({"merges": ("best",)}, "unknown merge 'best'"), ({"merges": ("newest",)}, "results=5")]
)
def test_bad_settings(options, message):
    env = environment()
    if options["merges"] == ("newest",):
        env = RecommendEnv(env.catalogue, recommender, results=5, answers=10)
    with pytest.raises(ValueError, match=message):
        write_traces(env, EXAMPLES, PHRASES, TraceConfig(4, **options), 0)
