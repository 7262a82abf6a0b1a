"""A trained recommender as the tool a language model calls: preference texts in, item ids out, once per batch."""

from collections.abc import Callable, Sequence

import numpy as np

from models.generation import pad_rows
from models.recsys import Recommender
from rl.envs.recommend import OPEN_QUERY, Example


class RecommenderTool:
    """Callable ``(examples, texts, k, seen) -> ids int32 [n, k]`` over a preference-aware recommender.

    encode: texts -> unit vectors [n, D]. exclude_history and exclude_seen leave out what the user already chose and
    what earlier calls returned (the released tool does neither). A query that is ``OPEN_QUERY`` gets the zero vector,
    a recommendation from the history alone. edit_text replaces each query before it is encoded,
    and blank drops it: controls that show whether the words matter.
    """

    def __init__(
        self,
        recommender: Recommender,
        encode: Callable[[Sequence[str]], np.ndarray],
        *,
        exclude_history: bool = False,
        exclude_seen: bool = False,
        edit_text: Callable[[str], str] | None = None,
        blank: bool = False,
    ):
        self.recommender, self.encode = recommender, encode
        self.exclude_history, self.exclude_seen = exclude_history, exclude_seen
        self.edit_text, self.blank = edit_text, blank

    def __call__(
        self, examples: Sequence[Example], texts: Sequence[str], k: int, seen: Sequence[np.ndarray]
    ) -> np.ndarray:
        history, lengths = pad_rows([example.history for example in examples])
        # A fixed width: the history of one user must not decide which program runs.
        history = np.pad(history, ((0, 0), (0, -history.shape[1] % 64)))
        if self.edit_text is not None:
            texts = [self.edit_text(text) for text in texts]
        vectors = None
        if not self.blank:
            is_open = np.array([text == OPEN_QUERY for text in texts])
            vectors = np.where(is_open[:, None], 0.0, np.asarray(self.encode(texts)))
        shown = None
        if self.exclude_seen:
            shown, _ = pad_rows(seen)
            shown = np.pad(shown, ((0, 0), (0, -shown.shape[1] % 64)))
        ids, _ = self.recommender.recommend(
            history, lengths, vectors, k=k, exclude_history=self.exclude_history, exclude_seen=shown
        )
        return ids


def random_words(vocabulary: Sequence[str], seed: int) -> Callable[[str], str]:
    """Replace every phrase of a query by one drawn from ``vocabulary``, as many as there were."""
    rng = np.random.Generator(np.random.PCG64(seed))
    words = sorted(set(vocabulary))
    return lambda text: "; ".join(words[i] for i in rng.integers(0, len(words), text.count(";") + 1))
