"""Judge an agent that answers questions with searches: one row a question in a file that grows, then a summary with
its protocol, and paired comparisons (arXiv 2505.16834 and 2505.17005, section 9 of either).

Every question gives exactly one row, whatever became of its search; one without an answer is wrong and stays in the
denominator.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import write_atomic
from jaxrec.data.lines import cut_torn_line, json_lines
from jaxrec.data.qa import Question, check_ids
from jaxrec.evaluate.answers import Protocol, cover_em, parse_verdict, score_answer
from jaxrec.evaluate.ranking import paired_interval
from jaxrec.tools.curation import count_reflections
from jaxrec.tools.rollouts import Rollout

METRICS = ("em", "cover", "f1")
STAGES = ("plan", "pages", "summaries")

Row = Mapping[str, Any]
Play = Callable[[Sequence[Question]], Sequence[Rollout]]
# (question, prediction) -> the judge's replies, None where there is none
Judge = Callable[[Sequence[tuple[Question, str]]], Sequence[str | None]]


def contained(question: Question, rollout: Rollout) -> dict[str, bool]:
    r"""Whether a right answer stands, as words in a row, in any turn of the policy ("plan"), in any page that searches
    found ("pages"), in any text that was put in for them ("summaries"). For yes and no this says little.

    Punctuation parts words here, whatever the protocol: "\boxed{Ann}" holds Ann.
    """
    texts = {
        "plan": rollout.policy,
        "pages": [passage for search in rollout.searches for passage in search.passages],
        "summaries": [text for author, text in rollout.segments if author == "tool"],
    }
    return {
        stage: any(cover_em(text, question.answers, "run", "r1_searcher") for text in parts)
        for stage, parts in texts.items()
    }


def score_question(question: Question, rollout: Rollout, protocol: Protocol) -> dict[str, Any]:
    """The row of a question: its scores, both cover forms by words, the searches that were made ("searches") and how
    many of these the tool failed to answer ("failed_searches"), words and reflections of the policy, why the rollout
    ended, and the place of the judge's reply, see :func:`judge_rows`."""
    said = rollout.prediction
    cover = lambda form: cover_em(said, question.answers, form, protocol.normalization)  # noqa: E731
    return {
        "id": question.id, "dataset": question.dataset, "kind": question.kind, "level": question.level,
        "question": question.text, "answers": list(question.answers), "prediction": said,
        **score_answer(said, question.answers, protocol), "cover_run": cover("run"), "cover_tokens": cover("tokens"),
        "searches": rollout.search_count, "failed_searches": sum(search.failed for search in rollout.searches),
        "words": sum(len(turn.split()) for turn in rollout.policy),
        "alternatively": sum(count_reflections(turn)["alternatively"] for turn in rollout.policy),
        "reason": rollout.reason, "contained": contained(question, rollout), "judge": None,
        "protocol": dataclasses.asdict(protocol),
    }  # fmt: skip


def read_rows(path: str | Path, protocol: Protocol) -> dict[str, Row]:
    """Rows of a file by id; empty where there is no file. A last line without its end, left by a kill, is cut off.

    Raises ValueError for other lines that are no rows, an id that stands there twice, and rows of another protocol.
    """
    path = Path(path)
    if not path.exists():
        return {}
    with open(path, "r+b") as file:
        cut_torn_line(file)
    rows: dict[str, Row] = {}
    for where, row in json_lines(path):
        if not isinstance(row.get("id"), str) or not all(isinstance(row.get(m), int | float) for m in METRICS):
            raise ValueError(f"{where}: no row of a question: 'id' or one of {', '.join(METRICS)} is missing")
        if row["id"] in rows:
            raise ValueError(f"{where}: id {row['id']!r} was there before")
        if row.get("protocol") != dataclasses.asdict(protocol):
            raise ValueError(f"{where}: scored by another protocol, {row.get('protocol')}: remove {path} to score anew")
        rows[row["id"]] = row
    return rows


def evaluate_questions(
    questions: Sequence[Question], play: Play, path: str | Path, protocol: Protocol, *, judge: Judge | None = None,
    batch_size: int = 64, progress: Callable[[int], None] | None = None,
) -> list[Row]:  # fmt: skip
    """One row for each question, in their order.

    Rows that are in the file are taken from there; the other questions are played in batches and their rows appended
    after each. ``progress(n)`` is called with the questions done. The judge is asked when all are played, see
    :func:`judge_rows`; without one the rows that come back hold no replies, whatever the file holds. Raises ValueError
    for ids that occur twice, for rows of other questions in the file, and for rollouts that are not those of the batch,
    one each and in its order.
    """
    check_ids(questions)
    path = Path(path)
    rows = dict(read_rows(path, protocol))
    if foreign := rows.keys() - {q.id for q in questions}:
        raise ValueError(
            f"{path}: holds {len(foreign)} rows of other questions, e.g. {min(foreign)!r}; remove the file"
        )
    left = [q for q in questions if q.id not in rows]
    for low in range(0, len(left), batch_size):
        batch = left[low : low + batch_size]
        rollouts = list(play(batch))
        if [rollout.id for rollout in rollouts] != [q.id for q in batch]:
            raise ValueError(f"{len(rollouts)} rollouts came back for {len(batch)} questions, or in another order")
        new = [score_question(q, r, protocol) for q, r in zip(batch, rollouts)]
        _append(path, new)
        rows |= {row["id"]: row for row in new}
        if progress is not None:
            progress(len(questions) - len(left) + low + len(batch))
    made = [rows[q.id] for q in questions]
    return [{**row, "judge": None} for row in made] if judge is None else judge_rows(questions, made, judge, path)


def judge_rows(questions: Sequence[Question], rows: Sequence[Row], judge: Judge, path: str | Path) -> list[Row]:
    """The rows, one a question and in that order, with the judge's replies in them; the file is written anew where that
    changes a row.

    The judge is asked for all of them each time, so that another one's replies, and those that an earlier failure left
    out, are replaced: one that keeps its replies answers from there. None stands where the judge failed.
    """
    replies = list(judge([(question, row["prediction"]) for question, row in zip(questions, rows, strict=True)]))
    if len(replies) != len(rows):
        raise ValueError(f"the judge gave {len(replies)} replies to {len(rows)} questions")
    made = [{**row, "judge": reply} for row, reply in zip(rows, replies)]
    if made != list(rows):
        write_atomic(Path(path), _lines(made))
    return made


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def judge_score(rows: Sequence[Row]) -> dict[str, Any]:
    """LasJ: the share of replies that are exactly "True" among all replies, how many there are, how many of them are
    neither "True" nor "False", and how many questions have none. Without any reply the share is None, never 0."""
    replies = [row["judge"] for row in rows if row["judge"] is not None]
    verdicts = [parse_verdict(reply) for reply in replies]
    share = _mean(float(verdict is True) for verdict in verdicts)
    return {"lasj": share, "lasj_count": len(replies), "lasj_invalid": verdicts.count(None),
            "lasj_missing": len(rows) - len(replies)}  # fmt: skip


def summarize(rows: Sequence[Row], protocol: Protocol) -> dict[str, Any]:
    """Means over all questions, with 95 % bootstrap intervals of em, cover, f1; searches ("rc": calls made a
    question, failed ones included) over all, right and wrong ones, right being cover = 1; None for a mean over nothing;
    "failed_searches": how many calls failed in all."""
    if not rows:
        raise ValueError("no rows to summarise")
    right = [row for row in rows if row["cover"] == 1]
    wrong = [row for row in rows if row["cover"] != 1]
    intervals = {}
    for metric in METRICS:
        values = np.array([row[metric] for row in rows], np.float64)
        _, low, high = paired_interval(values, np.zeros_like(values))
        intervals[metric] = [low, high]
    return {
        "protocol": {
            "questions": len(rows), "datasets": dict(Counter(row["dataset"] for row in rows)),
            "normalization": protocol.normalization, "cover_form": protocol.cover, "yes_no_rule": protocol.yes_no,
            "prediction": r"last \boxed{} by the policy, none counts as wrong", "right": "cover",
        },
        **{metric: _mean(row[metric] for row in rows) for metric in (*METRICS, "cover_run", "cover_tokens")},
        "intervals": intervals,
        **judge_score(rows),
        "rc": _mean(row["searches"] for row in rows),
        "rc_right": _mean(row["searches"] for row in right), "rc_wrong": _mean(row["searches"] for row in wrong),
        "right": len(right), "wrong": len(wrong),
        "failed_searches": sum(row["failed_searches"] for row in rows),
        "no_answer": sum(not row["prediction"] for row in rows),
        "words": _mean(row["words"] for row in rows), "alternatively": _mean(row["alternatively"] for row in rows),
        "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
        "contained": {stage: _mean(float(row["contained"][stage]) for row in rows) for stage in STAGES},
    }  # fmt: skip


def summarize_by(rows: Sequence[Row], protocol: Protocol, field: str) -> dict[str, dict[str, Any]]:
    """:func:`summarize` for each value of a field, e.g. "dataset", "kind" or "level"."""
    values = sorted({row[field] for row in rows})
    return {value: summarize([row for row in rows if row[field] == value], protocol) for value in values}


def compare(a: Sequence[Row], b: Sequence[Row], metric: str) -> tuple[float, float, float]:
    """(mean of a - b, low, high) over the same questions: paired 95 % bootstrap interval, e.g. of "f1" or "searches".
    Raises ValueError where questions or protocols differ."""
    ours, theirs = ({row["id"]: row for row in rows} for rows in (a, b))
    if ours.keys() != theirs.keys() or len(ours) != len(a) or len(theirs) != len(b):
        raise ValueError(f"only the same questions can be compared: {len(a)} and {len(b)} rows differ in their ids")
    if any(ours[id]["protocol"] != theirs[id]["protocol"] for id in ours):
        raise ValueError("rows that were scored by different protocols cannot be compared")
    values = [np.array([float(rows[id][metric]) for id in ours]) for rows in (ours, theirs)]
    return paired_interval(*values)
