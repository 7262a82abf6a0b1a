"""A language model of ours as a conversational recommender: it writes a query, a search answers.

It reads what it read in the environment of reinforcement learning (``rl.envs.user``): the same prompt, the same
observations, and its own earlier queries between them; lists come from the same callable. So a policy that was trained
there can be put into a beam search.
"""

import collections
import queue
import sys
from collections.abc import Callable, Sequence

import jax

from jaxrec.data.dialogues import Dialogue
from jaxrec.serve_engine import Engine, Job, Part
from jaxrec.tools.conversation import Ask, Reply
from jaxrec.tools.crs.prompts import QUERY, QueryPrompts
from jaxrec.tools.crs.retry import name_of, until_usable
from models.hf import Model
from rl.envs.user import ListRequest, Lists, Talk

# (conversations, each in the pieces that prompt, model and environment wrote; seeds) -> what the model writes next,
# without its stop string: one call for the whole batch.
Write = Callable[[Sequence[tuple[str, ...]], Sequence[int]], list[str]]
_REMEMBERED = 20_000  # conversations that may be gone on with


class QueryRecommender:
    """write: the model, see :func:`writer`. lists: turns its texts into items, e.g. ``retrieval.SearchedLists``. tries:
    texts until one can be used.

    What was written on the way to a list is remembered, since an ask holds no more than the list; of several ways to
    one list the latest is, so that an earlier search changes nothing. Where it is not known (a list that somebody else
    made, or of long ago) the dialogue and the list alone are gone on from, counted in ``counts["resumed"]``. ``counts``
    also holds what :func:`until_usable` and ``lists`` count.
    """

    def __init__(self, write: Write, prompts: QueryPrompts, lists: Lists, k: int, *, tries: int = 5):
        self.write, self.prompts, self.lists, self.k, self.tries = write, prompts, lists, k, tries
        self._counts: collections.Counter[str] = collections.Counter()
        self._said: dict[tuple[Dialogue, tuple[int, ...], tuple[int, ...]], tuple[str, ...]] = {}

    @property
    def counts(self) -> collections.Counter[str]:
        return self._counts + collections.Counter(getattr(self.lists, "counts", {}))

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list each, in order; all that are still wanted go through one call of the model and one of ``lists``.

        Raises RuntimeError for an ask without a usable text after the last try, and where ``lists`` found nothing.
        """
        before = [self._pieces(ask) for ask in asks]

        def step(numbers: list[int], seeds: list[int]) -> list[tuple[tuple[str, tuple[int, ...]] | None, str]]:
            texts = self.write([before[i] for i in numbers], seeds)
            requests = [
                ListRequest(Talk(i, asks[i].dialogue), text, asks[i].shown, asks[i].critique, asks[i].past, seed)
                for i, text, seed in zip(numbers, texts, seeds, strict=True)
            ]
            lists = self.lists(requests)
            return [
                (None if items is None else (text, tuple(map(int, items))), text)
                for text, items in zip(texts, lists, strict=True)
            ]

        found = until_usable(asks, step, self.tries, "can be used", self._counts)
        return [
            self._reply(ask, pieces, text, items, tries)
            for ask, pieces, ((text, items), tries) in zip(asks, before, found, strict=True)
        ]

    def _pieces(self, ask: Ask) -> tuple[str, ...]:
        if not ask.shown:
            return (self.prompts.prompt(ask.dialogue),)
        shown = self.prompts.show(ask.shown, ask.critique)
        pieces = self._said.get((ask.dialogue, ask.past, ask.shown))
        if pieces is None:
            self._counts["resumed"] += 1
            turns = self.prompts.prompt(ask.dialogue).removesuffix(QUERY)
            return (turns + shown,)
        return (*pieces, shown)

    def _reply(self, ask: Ask, before: tuple[str, ...], text: str, items: tuple[int, ...], tries: int) -> Reply:
        if not items:
            raise RuntimeError(f"{name_of(ask)}: no list was found for {text!r:.500}")
        past = tuple(dict.fromkeys((*ask.past, *items)))
        key = (ask.dialogue, past, items)
        self._said.pop(key, None)  # so that it is the youngest
        self._said[key] = (*before, text + self.prompts.stop[0])
        while len(self._said) > _REMEMBERED:
            del self._said[next(iter(self._said))]
        return Reply(items, text, tries)


def writer(
    model: Model, *, temperature: float = 1.0, max_new: int = 64, stop: Sequence[str] = QueryPrompts.stop,
    max_batch: int = 64, mesh: jax.sharding.Mesh | None = None,
) -> Write:  # fmt: skip
    """A :data:`Write` of a loaded model: pieces are turned into tokens apart, as in a rollout, and no chat template is
    applied. A text depends on its own pieces and seed, not on the batch (up to rounding). mesh: that the weights lie
    on, or None. Raises ValueError for a model without tokenizer and, when called, for a conversation that leaves no
    room in the model's context."""
    engine = Engine(model, max_batch=max_batch, max_waiting=sys.maxsize, mesh=mesh)
    encode = model.tokenizer.encode

    def write(conversations: Sequence[tuple[str, ...]], seeds: Sequence[int]) -> list[str]:
        if not conversations:
            return []
        items: queue.SimpleQueue[tuple[int, Part | Exception]] = queue.SimpleQueue()
        texts, left = [""] * len(conversations), len(conversations)
        with engine:
            for number, (pieces, seed) in enumerate(zip(conversations, seeds, strict=True)):
                ids = tuple(id for piece in pieces for id in encode(piece))
                job = Job(ids, max_new, 1, temperature, seed=seed, stop=tuple(stop))
                engine.submit(job, lambda item, number=number: items.put((number, item)))
            while left:
                number, item = items.get()
                if isinstance(item, Exception):
                    raise item
                texts[number] += item.text
                left -= item.finish is not None
        return texts

    return write
