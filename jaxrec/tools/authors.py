"""Rollouts and rewrites by a teacher: a bigger model, or the embedded world's scripted one, plays the policy's part.

The conversation goes through the same environment as a policy's own, so that what is learned from it looks alike:
results are the tool's, tags and limits the environment's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxrec.tools.teacher import Failure, Sampling, Teacher, ask_text
from rl.envs.base import Action
from rl.envs.search import SearchEnv, State
from rl.search_rewards import SearchReward

REWRITE = (
    "Below are a question and documents that answer it. Write the reasoning of somebody who knows these facts by "
    "heart: every fact between {open} and {close}, no search, no mention of documents, and the shortest answer at the "
    "end as {answer}."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """states: finished conversations, ``copies`` adjacent ones a question, less those that the teacher failed in.
    failed: how many these are, by kind of failure."""

    states: list[State]
    failed: dict[str, int]


def write_rollouts(
    env: SearchEnv, questions: Sequence[Any], teacher: Teacher, sampling: Sampling, copies: int = 1
) -> Written:
    """Let the teacher play every question ``copies`` times, all conversations side by side, one request per turn.

    The teacher reads the prompt without the policy's chat template, whose control tokens are none of its own.
    Copies differ by the seed of their requests. A conversation in which the teacher does not answer is left out and
    counted: half a rollout would teach to stop half way.
    """
    states, _ = env.reset(questions, copies)
    running, failed = list(range(len(states))), {}
    while running:
        requests = []
        for i in running:
            own = dataclasses.replace(sampling, seed=(sampling.seed or 0) + i % copies, stop=(env.style.query_close,))
            prompt = env.prompt(states[i].example.question, plain=True)
            requests.append(ask_text("author", prompt + states[i].text, sampling=own))
        answers, going = teacher.ask(requests), []
        for i, answer in zip(running, answers, strict=True):
            if isinstance(answer, Failure):
                failed[answer.kind] = failed.get(answer.kind, 0) + 1
                states[i].finish = "tool_error"
            else:
                going.append((i, _action(answer.text, answer.finish[0], env)))
        step = env.step([states[i] for i, _ in going], [action for _, action in going])
        running = [i for (i, _), text in zip(going, step.observations, strict=True) if text is not None]
    # The teacher's failures are told from the tool's: these have a segment at their end.
    return Written([s for s in states if s.segments and s.segments[-1][0] == "policy"], failed)


def _action(text: str, finish: str, env: SearchEnv) -> Action:
    """One reply as a segment: endpoints leave the stop string out of it."""
    close, start = env.style.query_close, env.style.query_open
    if finish == "length":
        return Action(text, "length")
    if text.rstrip().endswith(close):
        return Action(text, close)
    if text.rfind(start) > text.rfind(close):
        return Action(text + close, close)
    return Action(text, "eos")


def read_documents(state: State) -> list[str]:
    """Texts of all passages that a conversation's searches found, each once."""
    return list(dict.fromkeys(p.text for call in state.calls if call.error is None for p in call.passages))


def rewrite_from_memory(
    states: Sequence[State], env: SearchEnv, reward: SearchReward, teacher: Teacher, sampling: Sampling,
    per_question: int,
) -> tuple[list[tuple[str, list[tuple[str, str]]]], dict[str, int]]:  # fmt: skip
    """Answers that recall what was retrieved (R1-Searcher++, arXiv 2505.17005, section 6), as (prompt, segments).

    Of every question at most ``per_question`` right and well-formed conversations that searched are rewritten. A
    rewrite counts when it is well formed, right, and holds neither query nor result. The second value counts what
    became of all: "rewritten", and by reason those that were not.
    """
    counts = {"not right": 0, "no search": 0, "more than wanted": 0, "teacher failed": 0, "not verified": 0}
    taken: dict[Any, int] = {}
    chosen = []
    for state in states:
        if reward.faults(state) or reward.answer(state) < 1.0:
            counts["not right"] += 1
        elif not state.searches:
            counts["no search"] += 1
        elif taken.get(state.example.id, 0) >= per_question:
            counts["more than wanted"] += 1
        else:
            taken[state.example.id] = taken.get(state.example.id, 0) + 1
            chosen.append(state)
    rows = []
    for state, answer in zip(chosen, teacher.ask([_rewrite(s, env, sampling) for s in chosen]), strict=True):
        if isinstance(answer, Failure):
            counts["teacher failed"] += 1
        elif not _from_memory(state, answer.text, env, reward):
            counts["not verified"] += 1
        else:
            rows.append((state.prompt, [("policy", answer.text)]))
    return rows, counts | {"rewritten": len(rows)}


def _rewrite(state: State, env: SearchEnv, sampling: Sampling) -> Any:
    style = env.style
    task = REWRITE.format(open=style.internal_open, close=style.internal_close, answer=style.answer_form)
    documents = "\n".join(read_documents(state))
    return ask_text(
        "rewriter", f"{task}\n\nQuestion: {state.example.question}\nDocuments:\n{documents}", sampling=sampling
    )


def _from_memory(state: State, text: str, env: SearchEnv, reward: SearchReward) -> bool:
    style = env.style
    if any(tag in text for tag in (style.query_open, style.query_close, style.result_open, style.result_close)):
        return False
    told = State(state.example, state.prompt, style, [("policy", text)], turns=1, finish="answer")
    return style.internal_open in text and not reward.faults(told) and reward.answer(told) >= 1.0


def select_rollouts(
    states: Sequence[State], keep: Callable[[State], str], per_question: int
) -> tuple[list[State], dict[str, int]]:
    """The conversations for which ``keep`` gives no reason to leave them out, at most the first ``per_question`` of a
    question, and how many were left out for which reason."""
    dropped: dict[str, int] = {}
    taken: dict[Any, int] = {}
    out = []
    for state in states:
        reason = keep(state)
        if not reason and taken.get(state.example.id, 0) >= per_question:
            reason = "more than wanted"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            taken[state.example.id] = taken.get(state.example.id, 0) + 1
            out.append(state)
    return out, dropped
