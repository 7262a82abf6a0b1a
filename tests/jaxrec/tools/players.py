"""A recommender and users that answer by the seeds they are given, for tests of searches over conversations."""

import math
import random

import numpy as np

from jaxrec.data.dialogues import USER, Dialogue, Turn
from jaxrec.tools.conversation import Reply, seed_of
from jaxrec.tools.conversation_search import SearchConfig, search

ITEMS, K = 60, 5
CONFIG = SearchConfig(k=K)
SMALL = SearchConfig(beams=2, depth=3, expand=2, k=K)


class Drawn:
    """Draws lists by an ask's seed, and remembers what was asked."""

    def __init__(self, k=K):
        self.k, self.calls = k, []

    @property
    def asks(self):
        return [ask for call in self.calls for ask in call]

    def recommend(self, asks):
        self.calls.append(list(asks))
        return [self.reply(ask) for ask in asks]

    def reply(self, ask):
        items = random.Random(ask.seed).sample(range(ITEMS), self.k)
        return Reply(tuple(items), f"list {ask.seed}", tries=2, unsure=1)


class Judge:
    """Scores by dialogue and item, criticises by seed, and remembers what was asked."""

    def __init__(self):
        self.scored, self.criticised, self.judged = [], [], set()

    def score(self, dialogues, items):
        self.judged.update(dialogues)
        self.scored.append([(d.id, item) for d, some in zip(dialogues, items) for item in some])
        return [np.array([self.value(d, item) for item in some]) for d, some in zip(dialogues, items)]

    def value(self, dialogue, item):
        return seed_of(dialogue.id, item) / 2**31

    def criticise(self, requests):
        self.criticised.append(list(requests))
        return [self.critique(request) for request in requests]

    def critique(self, request):
        return f"no, {request.seed}"


def dialogue(number=0):
    return Dialogue(f"d{number}", (Turn(USER, f"something like {number}?"),))


def one(config, recommender=None, user=None):
    return search([dialogue()], recommender or Drawn(config.k), user or Judge(), config)[0]


def level(tree, depth):
    return [node for node in tree.nodes if node.depth == depth]


class Partly(Judge):
    """Has no score for even items, and none at all for those up to 9."""

    def value(self, dialogue, item):
        return math.nan if item < 10 or item % 2 == 0 else 0.5


class Speechless(Judge):
    """Says something only of every n-th list, or of none."""

    def __init__(self, every):
        super().__init__()
        self.every, self.asked = every, 0

    def critique(self, request):
        self.asked += 1
        return "no" if self.every and self.asked % self.every == 0 else "  "
