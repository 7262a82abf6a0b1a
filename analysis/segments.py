"""The parts of a prompt between which information flows: passage, key (the answer in it), question and answer cue.

Labels are int32 [B, T], a number of ``SEGMENTS`` per token, -1 for none. Spans are half-open (start, end). The four
parts are those that summaries of arXiv 2505.11995 name; how a key is found is our reading.
"""

import itertools
from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
SEGMENTS = ("context", "key", "query", "answer")


def prompt_segments(length: int, passage: Span, keys: Sequence[Span], query: Span, answer: Span) -> np.ndarray:
    """Labels int32 [length] of one prompt: context is the passage without the keys (arXiv 2505.11995, our reading).

    Token spans, in the order passage, question, answer cue, which causal attention needs for information to flow from
    the key to the other two. An empty span makes a flow absent, no keys likewise. Raises ValueError naming the segment
    where spans overlap, leave the prompt, or come in another order.
    """
    spans = [("passage", passage), ("query", query), ("answer", answer)]
    for name, (start, end) in [*spans, *(("key", key) for key in keys)]:
        if not 0 <= start <= end <= length:
            raise ValueError(f"{name} span {(start, end)} does not lie in a prompt of {length} tokens")
    for key in keys:
        if key[0] == key[1]:
            raise ValueError(f"key span {key} is empty; leave it out")
        if key[1] > query[0] and query[0] < query[1]:
            raise ValueError(f"key {key} ends behind the start of query {query}: the question must follow the passage")
        if not passage[0] <= key[0] < key[1] <= passage[1]:
            raise ValueError(f"key {key} does not lie in passage {passage}")
    filled = [(name, span) for name, span in spans if span[0] < span[1]]
    for (before, a), (after, b) in itertools.pairwise(filled):
        if a[1] > b[0]:
            raise ValueError(f"{before} {a} must end before {after} {b} begins")
    for a, b in itertools.pairwise(sorted(keys)):
        if a[1] > b[0]:
            raise ValueError(f"keys {a} and {b} overlap")
    labels = np.full(length, -1, np.int32)
    named = [("context", passage), ("query", query), ("answer", answer), *(("key", key) for key in keys)]
    for name, (start, end) in named:
        labels[start:end] = SEGMENTS.index(name)
    return labels


def pad_labels(labels: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Labels of several prompts, int32 [t] each, as int32 [B, width], -1 behind their ends."""
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in labels]).astype(np.int32)


def find_key(
    text: str, passage: Span, aliases: Sequence[str], offsets: Sequence[Span], every: bool = False
) -> tuple[list[Span], str | None]:
    """Where the answer stands in the passage, in tokens (our reading: an exact match of an alias).

    passage: span of characters of ``text``. offsets: span of characters of each token, as tokenizers give them (an
    empty one for special tokens). Returns spans of tokens, of the first occurrence or of every one, and None; or an
    empty list and the reason: the sample is then to be skipped (see :func:`check_skipped`).
    """
    found = _occurrences(text, passage, [alias for alias in aliases if alias])
    if not found:
        return [], "key not in the passage"
    spans = [span for span in (_token_span(text, key, offsets) for key in found) if span]
    if not spans:
        return [], "key split by tokenization"
    return spans if every else spans[:1], None


def _occurrences(text: str, passage: Span, aliases: Sequence[str]) -> list[Span]:
    """Character spans of any alias in the passage, from left to right, the longest where several begin."""
    out, at = [], passage[0]
    while at < passage[1]:
        starts = [(text.find(alias, at, passage[1]), -len(alias)) for alias in aliases]
        starts = [pair for pair in starts if pair[0] >= 0]
        if not starts:
            break
        start, length = min(starts)
        out.append((start, start - length))
        at = start - length
    return out


def _token_span(text: str, key: Span, offsets: Sequence[Span]) -> Span | None:
    """The tokens of a span of characters; None where one of them holds more than the key and white space."""
    inside = []
    for i, (start, end) in enumerate(offsets):
        piece = text[start:end]
        start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
        if start < end and start < key[1] and end > key[0]:
            if start < key[0] or end > key[1]:
                return None
            inside.append(i)
    return (inside[0], inside[-1] + 1) if inside else None


def check_skipped(reasons: Sequence[str | None], most: float = 0.2) -> None:
    """Raise ValueError where more than the share ``most`` of samples has a reason to be skipped (None: it has none)."""
    skipped = [reason for reason in reasons if reason is not None]
    if len(skipped) > most * len(reasons):
        counts = ", ".join(f"{skipped.count(reason)} {reason}" for reason in sorted(set(skipped)))
        raise ValueError(
            f"{len(skipped)} of {len(reasons)} samples would be skipped ({counts}), more than {most:.0%}: check the "
            "aliases and the offsets"
        )
