"""A model of ours as a teacher, batched on its device."""

import queue
import sys
import threading
from collections.abc import Sequence

import jax

from jaxrec.chat import chat_ids
from jaxrec.progress import progress
from jaxrec.serve_engine import Engine, Job, Part
from jaxrec.tools.teacher.base import Answer, Done, Failure, Reply, Request, TokenLogprob, Usage
from models.hf import Model


class LocalTeacher:
    """Asks a loaded model through the batching engine of `jaxrec serve`, so that a reply depends on its own request and
    seed, not on the others of the batch (up to rounding); a greedy reply equals that of ``models.generate``.

    id: names the weights, for instance the path that they were read from. max_batch: replies made at a time. max_len:
    tokens of prompt and reply (None: the model's context). mesh: that the weights lie on, or None. Messages go through
    the model's chat template; a tokenizer that has none gets their texts alone, a blank line apart. Without a seed it
    is 0. Raises ValueError for a model without tokenizer.
    """

    def __init__(
        self, model: Model, id: str, *, max_batch: int = 16, max_len: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):  # fmt: skip
        self.id, self._tokenizer = id, model.tokenizer
        self._engine = Engine(model, max_batch=max_batch, max_len=max_len, max_waiting=sys.maxsize, mesh=mesh)
        self._one_at_a_time = threading.Lock()

    def ask(self, requests: Sequence[Request], done: Done | None = None) -> list[Answer]:
        """An answer per request, in order; a prompt that does not fit the context is a Failure "refused"."""
        out: list[Answer | None] = [None] * len(requests)
        items: queue.SimpleQueue[tuple[int, Part | Exception]] = queue.SimpleQueue()
        parts: list[list[Part]] = [[] for _ in requests]
        prompts: list[int] = [0] * len(requests)

        def finish(number: int, answer: Answer) -> None:
            out[number] = answer
            if done is not None:
                done(number, answer)
            step()

        with progress(len(requests), f"asking {self.id}") as step, self._one_at_a_time, self._engine as engine:
            for number, request in enumerate(requests):
                try:
                    job = self._job(request)
                    prompts[number] = len(job.prompt)
                    engine.submit(job, lambda item, number=number: items.put((number, item)))
                except ValueError as error:
                    finish(number, Failure("refused", str(error)))
            while any(answer is None for answer in out):
                number, item = items.get()
                if isinstance(item, Exception):
                    finish(number, Failure("server", f"{type(item).__name__}: {item}"))
                    continue
                parts[number].append(item)
                if sum(part.finish is not None for part in parts[number]) == requests[number].n:
                    finish(number, _reply(parts[number], requests[number], prompts[number], self._engine))
        return out

    def _job(self, request: Request) -> Job:
        sampling = request.sampling
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        return Job(
            tuple(chat_ids(self._tokenizer, messages)), sampling.max_tokens, request.n,
            sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed or 0, sampling.stop, sampling.logprobs,
        )  # fmt: skip


def _reply(parts: Sequence[Part], request: Request, prompt: int, engine: Engine) -> Reply:
    own = [[part for part in parts if part.choice == choice] for choice in range(request.n)]
    name = engine.pieces.name
    logprobs = None
    if request.sampling.logprobs is not None:
        logprobs = tuple(
            tuple(
                TokenLogprob(name(token.id), token.logprob, tuple((name(id), logprob) for id, logprob in token.top))
                for part in choice for token in part.tokens
            )
            for choice in own
        )  # fmt: skip
    return Reply(
        tuple("".join(part.text for part in choice) for choice in own), tuple(choice[-1].finish for choice in own),
        Usage(prompt, sum(choice[-1].made for choice in own)), logprobs,
    )  # fmt: skip
