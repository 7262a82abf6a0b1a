"""Rewards of the search systems: R1-Searcher++ (arXiv 2505.17005), its predecessor, SimpleDeepSearcher.

They read policy text and tool text by provenance: a result that the policy types itself is a fault, a tag inside a real
result is nothing. How well an answer fits is asked of a callable, since metrics belong to a higher floor.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rl.envs.recommend import cjk
from rl.envs.search import State
from rl.envs.tags import BOX, TOOL, TagStyle, answers, marked
from rl.trajectory import Status

KINDS = ("r1_searcher_pp", "r1_searcher", "simple_deep_searcher")
REFLECTION = re.compile(r"\b(?:alternatively|wait|hmm+)\b", re.IGNORECASE)
_ROLE = re.compile(r"(?im)^[ \t]*(?:assistant|user|system|human)[ \t]*(?::|$)|<\|(?:im_start|start_header_id)\|>")
_PLAIN = frozenset(".,;:!?'\"()-")


@dataclasses.dataclass(frozen=True)
class SearchRewardConfig:
    """kind: whose reward. penalty: of a row with any fault, once. max_answer_words: a longer answer earns nothing
    (r1_searcher: is a fault). eta: bound of the group bonus; 0 leaves it out. ddof: 1 takes the sample variance.
    max_retrievals, max_reflections, max_analysis (tokens between two results) are simple_deep_searcher's limits.
    role_word: r1_searcher's code refuses the word "assistant" anywhere."""

    kind: str = "r1_searcher_pp"
    penalty: float = -2.0
    max_answer_words: int = 10
    eta: float = 2.0
    ddof: int = 0
    max_retrievals: int = 8
    max_reflections: int = 5
    max_analysis: int = 8096
    role_word: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.penalty > 0:
            raise ValueError(f"penalty must be at most 0, not {self.penalty}")
        for name in ("eta", "max_retrievals", "max_reflections"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, not {self.ddof}")


# --- form -------------------------------------------------------------------------------------------------------------


def trigram_share(text: str, least_words: int = 30) -> float:
    """Share of the most frequent word 3-gram among all of them; 0 for texts of fewer than ``least_words`` words."""
    words = text.split()
    if len(words) < max(least_words, 3):
        return 0.0
    grams = Counter(zip(words, words[1:], words[2:]))
    return max(grams.values()) / (len(words) - 2)


def gibberish(text: str, question: str = "", *, symbols: bool = False, least_words: int = 30) -> str:
    """What makes policy text garbled, "" when it is not.

    cjk: Chinese characters though the question has none. replacement: U+FFFD. repetition: a word 3-gram above 0.3 of
    all, in 30 words or more. symbols (only when asked for): above 20 % of the characters of a text of 50 or more are
    neither letters, digits, blanks nor everyday punctuation.
    """
    if cjk(text) and not cjk(question):
        return "cjk"
    if "\ufffd" in text:
        return "replacement"
    if trigram_share(text, least_words) > 0.3:
        return "repetition"
    if symbols and len(text) >= 50:
        odd = sum(not (c.isalnum() or c.isspace() or c in _PLAIN) for c in text)
        if odd > 0.2 * len(text):
            return "symbols"
    return ""


def _span_faults(text: str, style: TagStyle, unanswered: bool) -> tuple[set[str], int]:
    """Faults of queries, internal spans and results in marked policy text, and where the last tag ends.

    unanswered: the last query need not be followed by a result (the environment refused it).
    """
    spans = {"query": (style.query_open, style.query_close), "internal": (style.internal_open, style.internal_close)}
    opens = {pair[0]: kind for kind, pair in spans.items() if pair[0]}
    closes = {pair[1]: kind for kind, pair in spans.items() if pair[1]}
    results = (style.result_open, style.result_close)
    tags = sorted((*opens, *closes, *results, TOOL), key=len, reverse=True)
    events = [(m.start(), m.end(), m[0]) for m in re.finditer("|".join(map(re.escape, tags)), text)]
    faults, inside, begin = set(), "", 0
    for at, (start, end, tag) in enumerate(events):
        if tag in results:
            faults.add("result")
        elif tag in opens:
            if inside:
                faults.add(inside)
            inside, begin = opens[tag], end
        elif tag in closes:
            kind = closes[tag]
            follows = events[at + 1][2] if at + 1 < len(events) else ""
            if inside != kind:
                faults |= {kind, inside} - {""}
            elif kind == "query" and not text[begin:start].strip("\"' \t\r\n"):
                faults.add("query")
            if kind == "query" and follows != TOOL and not (unanswered and not follows):
                faults.add("query")
            inside = ""
        elif inside:  # a tool's text in the middle of a span
            faults.add(inside)
            inside = ""
    if inside:
        faults.add(inside)
    return faults, events[-1][1] if events else 0


def format_faults(state: State, *, role_word: bool = False) -> list[str]:
    """Names of the format rules that a conversation breaks, sorted; [] when well formed (R1-Searcher++, section 4).

    query: every query is closed, not nested, not empty, and answered. internal: those spans are closed, not nested, and
    hold no query. result: the policy wrote no result tag. think: the style's close tag occurs once, before the answer.
    answer: exactly one answer, not empty, behind the last tag. stop: the policy ended the conversation itself.
    garbled: see :func:`gibberish`. role: a chat role as a line's head (role_word: the word "assistant" anywhere).
    """
    style, text = state.style, marked(state.segments)
    faults, last = _span_faults(text, style, state.finish == "max_retrieval")
    found = answers(text, style)
    if style.think_close:
        closes = [m.end() for m in re.finditer(re.escape(style.think_close), text)]
        if len(closes) != 1 or (style.think_open and style.think_open in text):
            faults.add("think")
        last = max([last, *closes])
    opened = text.count(style.answer_open or BOX)
    if opened != 1 or len(found) != 1 or not found[0][1] or found[0][0] < last:
        faults.add("answer")
    if state.finish not in ("answer", "eos_no_answer"):
        faults.add("stop")
    if gibberish(text.replace(TOOL, " "), state.example.question):
        faults.add("garbled")
    if _ROLE.search(text) or (role_word and "assistant" in text.lower()):
        faults.add("role")
    return sorted(faults)


def deep_searcher_faults(
    state: State, config: SearchRewardConfig, count_tokens: Callable[[str], int] | None = None
) -> list[str]:
    """Names of SimpleDeepSearcher's violations (section 8.2; the bounds are its paper's), [] where there are none.

    count_tokens: tokens of a text; white-space words without it.
    """
    text, style = marked(state.segments), state.style
    bare = re.sub("|".join(map(re.escape, (*style.tags, BOX, TOOL))), " ", text)  # tags are made of symbols
    count = count_tokens or (lambda text: len(text.split()))
    rules = {
        "result": style.result_open in text or style.result_close in text,
        "garbled": bool(gibberish(bare, state.example.question, symbols=True)),
        "reflection": len(REFLECTION.findall(text)) > config.max_reflections,
        "answer": not state.answer,
        "retrievals": len(state.calls) > config.max_retrievals,
        "analysis": any(count(part) > config.max_analysis for part in text.split(TOOL)),
    }
    return sorted(name for name, broken in rules.items() if broken)


# --- outcome ----------------------------------------------------------------------------------------------------------


def retrieval_bonus(correct: jax.Array, counts: jax.Array, eta: float = 2.0, ddof: int = 0) -> jax.Array:
    """Group bonus of R1-Searcher++ (arXiv 2505.17005, section 4): min(2 var, eta) for correct rows with fewest calls.

    correct: bool [Q, G], right and well formed; counts: int [Q, G], retrievals. The variance and the least count are
    those of the correct rows; every tied row is paid. With fewer than 1 + ddof correct rows it is 0. float32 [Q, G].
    """
    correct, counts = jnp.asarray(correct, bool), jnp.asarray(counts, jnp.float32)
    weight = correct.astype(jnp.float32)
    n = weight.sum(axis=-1, keepdims=True)
    mean = (weight * counts).sum(axis=-1, keepdims=True) / jnp.maximum(n, 1.0)
    variance = (weight * (counts - mean) ** 2).sum(axis=-1, keepdims=True) / jnp.maximum(n - ddof, 1.0)
    fewest = jnp.where(correct, counts, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(correct & (counts == fewest), jnp.minimum(2.0 * variance, eta), 0.0)


def group_bonus(
    correct: np.ndarray, counts: np.ndarray, groups: np.ndarray, eta: float = 2.0, ddof: int = 0
) -> np.ndarray:
    """:func:`retrieval_bonus` for rows [B] in any order: rows with one id of ``groups`` belong together, float32 [B].

    Raises ValueError when groups differ in size.
    """
    ids, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(set(sizes.tolist())) > 1:
        raise ValueError(f"groups have {sizes.min()} to {sizes.max()} rows; the bonus needs all of one size")
    order = np.argsort(inverse.reshape(-1), kind="stable").reshape(len(ids), -1)
    bonus = np.zeros(len(order.reshape(-1)), np.float32)
    bonus[order] = retrieval_bonus(np.asarray(correct)[order], np.asarray(counts)[order], eta, ddof)
    return bonus


class SearchReward:
    """All parts of a system's reward for a batch of final states.

    fit: (answer, right answers) -> [0, 1]: a cover match for r1_searcher_pp, token F1 for the other two.
    count_tokens: for simple_deep_searcher's bound on analysis.
    """

    def __init__(
        self, fit: Callable[[str, Sequence[str]], float], config: SearchRewardConfig = SearchRewardConfig(), *,
        count_tokens: Callable[[str], int] | None = None,
    ):  # fmt: skip
        self.fit, self.config, self.count_tokens = fit, config, count_tokens

    def faults(self, state: State) -> list[str]:
        """Names of the rules that a conversation breaks under this reward."""
        c = self.config
        if c.kind == "simple_deep_searcher":
            return deep_searcher_faults(state, c, self.count_tokens)
        found = format_faults(state, role_word=c.role_word)
        too_long = len(state.answer.split()) > c.max_answer_words
        return sorted({*found, "length"}) if c.kind == "r1_searcher" and too_long else found

    def answer(self, state: State) -> float:
        """How well the answer fits. Raises ValueError for a question without a right answer."""
        gold = state.example.answers
        if isinstance(gold, str) or not gold:
            raise ValueError(f"question {state.example.id}: answers must be a list of at least one text, not {gold!r}")
        said = state.answer
        if not said or (self.config.kind == "r1_searcher_pp" and len(said.split()) > self.config.max_answer_words):
            return 0.0
        return float(self.fit(said, gold))

    def __call__(self, states: Sequence[State], groups: np.ndarray) -> dict[str, np.ndarray]:
        """{"format", "answer" and, for r1_searcher_pp, "group": float32 [B]}; the reward is their sum.

        groups: int [B], the question of each row. Rows whose tool failed (``Status.ENV_ERROR``) get 0 and take no part
        in the bonus. Raises FloatingPointError naming question and part for a value that is not finite.
        """
        valid = np.array([s.status != Status.ENV_ERROR for s in states], bool)
        well = np.array([not self.faults(s) for s in states], bool)
        parts = {
            "format": np.where(valid & ~well, self.config.penalty, 0.0),
            "answer": np.array([self.answer(s) if ok else 0.0 for s, ok in zip(states, valid, strict=True)]),
        }
        if self.config.kind == "r1_searcher_pp":
            right = valid & well & (parts["answer"] >= 1.0)
            counts = np.array([s.searches for s in states])
            parts["group"] = group_bonus(right, counts, groups, self.config.eta, self.config.ddof)
        for name, values in parts.items():
            if (bad := np.flatnonzero(~np.isfinite(values))).size:
                raise FloatingPointError(
                    f"reward part {name!r} of question {states[bad[0]].example.id} is {values[bad[0]]}"
                )
        return {name: np.asarray(values, np.float32) for name, values in parts.items()}


# --- answers that hedge -----------------------------------------------------------------------------------------------


def named_candidates(answer: str, candidates: Sequence[str]) -> set[str]:
    """Which of ``candidates`` an answer names as whole words, in small letters; the longest name wins where two
    overlap."""
    words = lambda text: re.findall(r"\w+", text.casefold())  # noqa: E731
    left, found = f" {' '.join(words(answer))} ", set()
    for name in sorted({" ".join(words(c)) for c in candidates} - {""}, key=len, reverse=True):
        if f" {name} " in left:
            found.add(name)
            left = left.replace(f" {name} ", " | ")
    return found


def reward_hacks(states: Sequence[State], candidates: Sequence[str] = ()) -> list[int]:
    """Rows whose answer names two or more different candidates: a cover match pays whoever lists them all.

    candidates: further names that could be answers. Known are all right answers of the batch and the titles of what
    the row retrieved; alternatives put side by side ("A or B", "A / B", "A; B") count as well.
    """
    gold = {text for state in states for text in state.example.answers}
    rows = []
    for row, state in enumerate(states):
        titles = {p.title for call in state.calls for p in call.passages}
        listed = [x for x in re.split(r"\s+or\s+|\s*[;/|]\s*", state.answer.casefold()) if x.strip()]
        named = named_candidates(state.answer, [*candidates, *gold, *titles])
        own = named_candidates(" ; ".join(state.example.answers), state.example.answers)  # aliases are one candidate
        if len(set(listed)) > 1 or len(named - own) + bool(named & own) > 1:
            rows.append(row)
    return rows
