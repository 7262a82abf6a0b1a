"""A prompted language model recommends titles, which are mapped to the catalogue (arXiv 2504.20458, section 3)."""

import collections
import dataclasses
from collections.abc import Sequence

from jaxrec.data.item_catalogue import UNSURE, ItemCatalogue
from jaxrec.tools.conversation import Ask, Reply
from jaxrec.tools.crs.prompts import RecommenderPrompts, bold_titles, without_speaker
from jaxrec.tools.crs.retry import until_usable
from jaxrec.tools.teacher.base import Answer, Failure, Request, Sampling, Teacher, ask_text


def check_ratio(ratio: float) -> None:
    """Raises ValueError for a ratio outside 0 to 100."""
    if not 0 <= ratio <= 100:
        raise ValueError(f"min_ratio={ratio} must lie between 0 and 100")


@dataclasses.dataclass(frozen=True)
class PromptedConfig:
    """k, temperature, max_tokens: the released code's. tries: replies until one is well formed. min_ratio: names that
    are less like every title (RapidFuzz's ratio, 0 to 100) stand for no item, and the reply is no list; 0 maps whatever
    is named, as released."""

    k: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    tries: int = 5
    min_ratio: float = 0.0

    def __post_init__(self):
        if self.tries < 1:
            raise ValueError(f"tries={self.tries} must be at least 1")
        check_ratio(self.min_ratio)


class PromptedRecommender:
    """Asks a teacher (role "recommender") for k titles in bold, and again, with another seed, for a reply that has not
    exactly k.

    ``counts`` holds what :func:`until_usable` counts, failures of the teacher by kind, replies with a "wrong number of
    titles", and of the "names" in the others: "duplicates", whose item the list has already and another one stands in
    for; those "without a close title", most of them invented; and those "unmapped", which ``min_ratio`` leaves out.
    """

    def __init__(
        self, teacher: Teacher, catalogue: ItemCatalogue, config: PromptedConfig = PromptedConfig(), *,
        prompts: RecommenderPrompts | None = None,
    ):  # fmt: skip
        """prompts: of the same catalogue and k. Raises ValueError for a catalogue of fewer than k items."""
        self.teacher, self.catalogue, self.config, self.k = teacher, catalogue, config, config.k
        self.prompts = prompts or RecommenderPrompts(catalogue, config.k)
        if self.prompts.k != self.k:
            raise ValueError(f"the prompts ask for {self.prompts.k} items, but k={self.k}")
        self.counts: collections.Counter[str] = collections.Counter()

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list each, in order; all that are still wanted are asked for in one call of the teacher.

        Raises RuntimeError for an ask without a well-formed reply after ``config.tries``, with its last one.
        """
        texts = [self.prompts.titles(ask) for ask in asks]

        def step(numbers: list[int], seeds: list[int]) -> list[tuple[tuple[tuple[int, ...], str, int] | None, str]]:
            requests = [self._request(texts[i], seed) for i, seed in zip(numbers, seeds, strict=True)]
            return [self._read(answer) for answer in self.teacher.ask(requests)]

        what = f"has exactly {self.k} titles in bold that match the catalogue"
        found = until_usable(asks, step, self.config.tries, what, self.counts)
        return [Reply(items, text, tries, unsure) for (items, text, unsure), tries in found]

    def _request(self, text: str, seed: int) -> Request:
        c = self.config
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, max_tokens=c.max_tokens, seed=seed)
        return ask_text("recommender", text, sampling=sampling)

    def _read(self, answer: Answer) -> tuple[tuple[tuple[int, ...], str, int] | None, str]:
        if isinstance(answer, Failure):
            self.counts[f"failed_{answer.kind}"] += 1
            return None, f"({answer.kind}: {answer.message})"
        text = without_speaker(answer.text)
        items, unsure = self._mapped(bold_titles(text))
        return (None if items is None else (items, text, unsure)), text

    def _mapped(self, names: Sequence[str]) -> tuple[tuple[int, ...] | None, int]:
        """Items of exactly k names (None for another number, or too few that match), and how many of these match no
        title well."""
        if len(names) != self.k:
            self.counts["wrong number of titles"] += 1
            return None, 0
        found = self.catalogue.match(names, self.config.min_ratio)
        unsure = [match for match in found if match.ratio < UNSURE]
        self.counts["names"] += len(names)
        self.counts["duplicates"] += sum(match.repeated for match in found)
        self.counts["without a close title"] += sum(not match.repeated for match in unsure)
        self.counts["unmapped"] += len(names) - len(found)
        return (tuple(match.item for match in found) if len(found) == self.k else None), len(unsure)
