"""Bigger models that write, judge, sum up, rewrite, annotate and converse, behind one protocol.

Ask a teacher a batch of :class:`Request` and get a :class:`Reply` or a :class:`Failure` for each. Teachers:
:class:`EndpointTeacher` (an OpenAI-compatible address), :class:`LocalTeacher` (a model of ours),
:class:`ScriptedTeacher` (functions, for the embedded world), :class:`StoredTeacher` (another one, with its replies kept
on disk). Replies that must fit a form are asked for by :func:`ask_checked`.
"""

import importlib

_EXPORTS = {
    "ROLES": "base", "FAILURES": "base", "Answer": "base", "Failure": "base", "Message": "base", "Reply": "base",
    "Request": "base", "Sampling": "base", "Teacher": "base", "TokenLogprob": "base", "Usage": "base",
    "ask_text": "base", "request_hash": "base", "EndpointTeacher": "endpoint", "Limits": "endpoint",
    "LocalTeacher": "local", "ScriptedTeacher": "scripted", "Counts": "store", "StoredTeacher": "store",
    "Checked": "schema", "Field": "schema", "Misfit": "schema", "after_marker": "schema", "ask_checked": "schema",
    "json_fields": "schema", "parse_json": "schema", "true_or_false": "schema", "without_thinking": "schema",
}  # fmt: skip
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"jaxrec.tools.teacher.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jaxrec.tools.teacher' has no attribute {name!r}; public names: {', '.join(__all__)}")
