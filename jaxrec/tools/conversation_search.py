"""Beam search over conversations between a recommender and a simulated user (GRSU, arXiv 2504.20458; the tree and its
order of steps follow the released code).

A node is a list that the recommender gave. The user scores its items, which gives the node's reward, and criticises
the lists that are kept, and the recommender revises them. All dialogues are searched side by side, level by level, so
that a level asks the user for one batch of critiques, the recommender for one of lists, and the user for one of scores.
What is drawn depends on a dialogue and the place in its tree alone: not on what else is searched, in which order, or
with how many beams.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn
from jaxrec.tools.conversation import Ask, Criticise, Recommender, Reply, User, seed_of

REWARDS = ("relevance", "relevance-max", "random")
FEEDBACK = ("negative", "none")

# Why a level has fewer lists than beams.
SHORT = (
    "fewer first lists than beams", "no critique could be had", "too few lists to revise", "the search had ended",
)  # fmt: skip

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """beams, depth: nodes that are kept of each level, and levels. expand: new lists for each kept node. init: lists of
    the first level; 0 for ``expand**2``, or ``expand`` with a single beam. k: items of a list.

    reward: mean or greatest score of a list's items, or a random number (items are scored all the same, for the
    ranking). diversity: weight of the share of a list's items that no list on the way to it had, added to the reward.
    feedback: "none" draws new first lists in place of revised ones. allow_shrink: go on where a level has fewer lists
    than beams. extend_dialogue: lists and critiques of earlier rounds stand in the dialogue that the recommender and
    the critic see; scores are always given for the real one. patience: stop after so many levels in which the best
    reward has not risen; 0 for never.

    Raises ValueError for a number that is out of range and for an unknown name.
    """

    beams: int = 4
    depth: int = 5
    expand: int = 4
    init: int = 0
    k: int = 10
    reward: str = "relevance"
    diversity: float = 0.0
    feedback: str = "negative"
    allow_shrink: bool = False
    extend_dialogue: bool = False
    patience: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, least in {"beams": 1, "depth": 1, "expand": 1, "k": 1, "init": 0, "patience": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} of a search must be a whole number of at least {least}")
        for name, known in {"reward": REWARDS, "feedback": FEEDBACK}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} of a search must be one of {', '.join(known)}")
        if not (math.isfinite(self.diversity) and self.diversity >= 0):
            raise ValueError(f"diversity={self.diversity!r} of a search must be finite and not negative")
        if self.first < self.beams and not self.allow_shrink:
            raise ValueError(f"init={self.init} lists cannot give {self.beams} beams; raise it, or set allow_shrink")
        if self.extend_dialogue and self.feedback == "none":
            raise ValueError("extend_dialogue needs feedback: without critiques there are no rounds to extend it by")

    @property
    def first(self) -> int:
        """Lists of the first level."""
        return self.init or (self.expand**2 if self.beams > 1 else self.expand)

    @property
    def lists(self) -> int:
        """Lists that a search asks for where no critique is missing and nothing stops it early."""
        total = level = self.first
        for _ in range(self.depth - 1):
            level = min(self.beams, level) * self.expand
            total += level
        return total


@dataclasses.dataclass(frozen=True)
class Node:
    """path: numbers of the samples that lead here; () is the root, which is no node. items: the list, best first. text:
    as the recommender wrote it. critique: of the parent's list, from which this one was made. scores: one for each
    item, in [0, 1], NaN where there is none. tries, unsure: see :class:`jaxrec.tools.conversation.Reply`."""

    path: Path
    items: tuple[int, ...]
    text: str
    critique: str
    scores: tuple[float, ...]
    reward: float
    kept: bool
    tries: int = 1
    unsure: int = 0

    @property
    def parent(self) -> Path:
        return self.path[:-1]

    @property
    def depth(self) -> int:
        return len(self.path)

    @property
    def sample(self) -> int:
        return self.path[-1]


@dataclasses.dataclass(frozen=True)
class Costs:
    """lists: that were asked for. tries: how often, until they were well formed. critiques: that were asked for; empty:
    those that could not be had. scored: different items; unscored: those without a score. unscored_nodes: lists without
    any. unsure: names that matched no title well."""

    lists: int
    tries: int
    critiques: int
    empty: int
    scored: int
    unscored: int
    unscored_nodes: int
    unsure: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """What was found for one dialogue. nodes: in order of depth, then path. skipped: places of lists that were never
    asked for, since their critique could not be had. unexpanded: of a replay, see there."""

    dialogue: str
    config: SearchConfig
    nodes: tuple[Node, ...]
    skipped: tuple[Path, ...] = ()
    unexpanded: int = 0

    @property
    def depth(self) -> int:
        """Levels; fewer than the config's where the search stopped early."""
        return self.nodes[-1].depth

    @property
    def final(self) -> tuple[Node, ...]:
        """Kept nodes of the last level."""
        return tuple(node for node in self.nodes if node.kept and node.depth == self.depth)

    def costs(self) -> Costs:
        scores = {item: score for node in self.nodes for item, score in zip(node.items, node.scores)}
        revised = sum(bool(node.critique) for node in self.nodes)
        return Costs(
            lists=len(self.nodes), tries=sum(node.tries for node in self.nodes),
            critiques=revised + len(self.skipped), empty=len(self.skipped),
            scored=len(scores), unscored=sum(map(math.isnan, scores.values())),
            unscored_nodes=sum(all(map(math.isnan, node.scores)) for node in self.nodes),
            unsure=sum(node.unsure for node in self.nodes),
        )  # fmt: skip

    def short_levels(self) -> dict[str, int]:
        """Levels with fewer lists than beams, by reason (one of :data:`SHORT`). Those behind a level without any list
        count too, but not those that ``patience`` left out."""
        made = collections.Counter(node.depth for node in self.nodes)
        missing = {len(path) for path in self.skipped}
        ended = max(missing, default=0)  # above self.depth where no critique at all was to be had there
        found: collections.Counter[str] = collections.Counter()
        for depth in range(1, (self.config.depth if ended > self.depth else self.depth) + 1):
            if made[depth] >= self.config.beams:
                continue
            if depth == 1:
                found["fewer first lists than beams"] += 1
            elif depth in missing:
                found["no critique could be had"] += 1
            elif depth > self.depth:
                found["the search had ended"] += 1
            else:
                found["too few lists to revise"] += 1
        return dict(found)


def search(dialogues: Sequence[Dialogue], recommender: Recommender, user: User, config: SearchConfig) -> list[Tree]:
    """A tree for each dialogue, in order. An item is scored once for each dialogue.

    Raises ValueError for a dialogue without turns, ids that occur twice, a recommender of another k, and answers that
    break the protocols (:mod:`jaxrec.tools.conversation`); RuntimeError where a level has fewer lists than beams, since
    critiques are missing. With ``allow_shrink`` such levels are counted (:meth:`Tree.short_levels`), and a search that
    has no new list ends.
    """
    check_dialogues(dialogues)
    if recommender.k != config.k:
        raise ValueError(f"the recommender gives lists of {recommender.k} items, but the search has k={config.k}")
    growing = [_Growing(dialogue, config) for dialogue in dialogues]
    for depth in range(1, config.depth + 1):
        active = [tree for tree in growing if not tree.ended]
        for tree in active:
            tree.plan()
        if depth > 1 and config.feedback != "none":
            _criticise(active, user)
        _recommend(active, recommender)
        _score(active, user)
        for tree in active:
            tree.prune(depth)
    return [tree.finish() for tree in growing]


def replay(tree: Tree, beams: int | None = None, depth: int | None = None, released: bool = False) -> Tree:
    """The tree that a search with fewer beams or levels, and as many first lists, would have made; nothing is asked.

    Exact for depth. Of fewer beams, a list may be needed whose parent the larger search had pruned: such parents are
    counted as ``unexpanded``, and the next level is chosen from what is there. released: as the released code does it,
    all lists of these levels stay, those of parents that the smaller search would have pruned too. Raises ValueError
    for more beams or levels than the tree was made with, and for fewer beams where it may have stopped early.
    """
    config = tree.config
    beams, depth = config.beams if beams is None else beams, config.depth if depth is None else depth
    if beams > config.beams or depth > config.depth:
        raise ValueError(
            f"a tree of {config.beams} beams and {config.depth} levels holds none of {beams} and {depth}; search again"
        )
    if config.patience and beams < config.beams:
        raise ValueError(f"patience={config.patience}: fewer beams may have stopped later than this tree; search again")
    nodes: list[Node] = []
    skipped: list[Path] = []
    parents: set[Path] = {()}
    unexpanded = 0
    levels = min(depth, tree.depth)
    for level in range(1, depth + 1):
        children = [n for n in tree.nodes if n.depth == level and (n.parent in parents or released)]
        skipped += [path for path in tree.skipped if len(path) == level and (path[:-1] in parents or released)]
        kept = _kept(children, beams)
        nodes += [dataclasses.replace(node, kept=node.path in kept) for node in children]
        if level < levels:
            unexpanded += sum(node.path in kept and not node.kept for node in children)
        parents = kept
    smaller = dataclasses.replace(config, beams=beams, depth=depth, init=config.first)
    return Tree(tree.dialogue, smaller, tuple(nodes), tuple(skipped), unexpanded)


@dataclasses.dataclass
class _Draft:
    """A list that is on its way: where it will stand, what it is made from, and what came back."""

    path: Path
    talk: Dialogue  # what the recommender and the critic see
    past: tuple[int, ...]  # items of all lists on the way
    shown: tuple[int, ...]
    name: str
    critique: str = ""
    reply: Reply | None = None


class _Growing:
    """The tree of one dialogue while it is searched."""

    def __init__(self, dialogue: Dialogue, config: SearchConfig):
        self.dialogue, self.config = dialogue, config
        self.nodes: dict[Path, Node] = {}
        self.skipped: list[Path] = []
        self.scores: dict[int, float] = {}
        self.drafts: list[_Draft] = []
        self.ended = False
        self._frontier: list[Node] = []  # in order of their paths
        self._best: list[float] = []

    def seed(self, what: str, path: Path) -> int:
        return seed_of(self.config.seed, self.dialogue.id, what, path)

    def plan(self) -> None:
        """Drafts of the next level, in order of their paths."""
        if self._frontier:
            self.drafts = [draft for node in self._frontier for draft in self._revisions(node)]
        else:
            self.drafts = [
                _Draft((sample,), self.dialogue, (), (), self._name((sample,))) for sample in range(self.config.first)
            ]

    def _revisions(self, node: Node) -> list[_Draft]:
        before = [self.nodes[node.path[:depth]] for depth in range(1, node.depth + 1)]
        past = tuple(dict.fromkeys(item for earlier in before for item in earlier.items))
        talk = self._talk(before)
        paths = [(*node.path, sample) for sample in range(self.config.expand)]
        return [_Draft(path, talk, past, node.items, self._name(path)) for path in paths]

    def _name(self, path: Path) -> str:
        return f"dialogue {self.dialogue.id}, node {'.'.join(map(str, path))}"

    def _talk(self, before: Sequence[Node]) -> Dialogue:
        """The dialogue, with the rounds that came before the last list if it grows."""
        if not self.config.extend_dialogue:
            return self.dialogue
        rounds = [
            turn
            for shown, revised in itertools.pairwise(before)
            for turn in (Turn(SYSTEM, shown.text, shown.items), Turn(USER, revised.critique))
        ]
        return Dialogue(self.dialogue.id, (*self.dialogue.turns, *rounds))

    def prune(self, depth: int) -> None:
        """Turn drafts into nodes and keep the best of all of them, whoever their parents are."""
        beams = self.config.beams
        if len(self.drafts) < beams and not self.config.allow_shrink:
            planned = len(self._frontier) * self.config.expand if self._frontier else self.config.first
            raise RuntimeError(
                f"dialogue {self.dialogue.id}: {len(self.drafts)} lists at depth {depth} are fewer than {beams} beams; "
                f"{planned - len(self.drafts)} of {planned} were left out for want of a critique; raise expand, or set "
                f"allow_shrink"
            )
        if not self.drafts:
            self.ended = True
            return
        made = [self._node(draft) for draft in self.drafts]
        kept = _kept(made, beams)
        self.nodes |= {node.path: dataclasses.replace(node, kept=node.path in kept) for node in made}
        self._frontier = [self.nodes[path] for path in sorted(kept)]
        self._best.append(max(node.reward for node in made))
        self.ended = _stalled(self._best, self.config.patience)

    def _node(self, draft: _Draft) -> Node:
        items = tuple(map(int, draft.reply.items))
        scores = tuple(self.scores[item] for item in items)
        reward = self._reward(scores, draft.path)
        new = len(set(items).difference(draft.past)) / len(items)
        return Node(
            draft.path, items, draft.reply.text, draft.critique, scores, reward + self.config.diversity * new, False,
            draft.reply.tries, draft.reply.unsure,
        )  # fmt: skip

    def _reward(self, scores: Iterable[float], path: Path) -> float:
        if self.config.reward == "random":
            return self.seed("reward", path) / 2**31
        known = [score for score in scores if not math.isnan(score)]
        if not known:
            return 0.0
        if self.config.reward == "relevance-max":
            return max(known)
        return math.fsum(known) / len(known)  # exact, so that lists of the same items are equal in any order

    def finish(self) -> Tree:
        return Tree(self.dialogue.id, self.config, tuple(self.nodes.values()), tuple(self.skipped))


def _kept(nodes: Sequence[Node], beams: int) -> set[Path]:
    """Paths of the nodes of the highest rewards; of equal ones, those that stand first."""
    return {node.path for node in sorted(nodes, key=lambda node: -node.reward)[:beams]}


def _stalled(best: Sequence[float], patience: int) -> bool:
    return 0 < patience < len(best) and max(best[-patience:]) <= max(best[:-patience])


def check_dialogues(dialogues: Sequence[Dialogue]) -> None:
    """Raises ValueError for a dialogue without turns and for ids that occur twice."""
    for dialogue in dialogues:
        if not dialogue.turns:
            raise ValueError(f"dialogue {dialogue.id}: at least one turn is needed to recommend from")
    twice = [id for id, count in collections.Counter(d.id for d in dialogues).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids of dialogues occur twice, e.g. {twice[0]!r}; seeds hang on them")


def _criticise(trees: Sequence[_Growing], user: User) -> None:
    """Critiques for all drafts; those for which there is none are taken out."""
    drafts = [(tree, draft) for tree in trees for draft in tree.drafts]
    critiques = user.criticise(
        [Criticise(draft.talk, draft.shown, tree.seed("critique", draft.path), draft.name) for tree, draft in drafts]
    ) if drafts else []  # fmt: skip
    if len(critiques) != len(drafts):
        raise ValueError(f"the user gave {len(critiques)} critiques where {len(drafts)} were asked for")
    for (tree, draft), critique in zip(drafts, critiques):
        draft.critique = critique
        if not critique.strip():
            tree.skipped.append(draft.path)
    for tree in trees:
        tree.drafts = [draft for draft in tree.drafts if draft.critique.strip()]


def _recommend(trees: Sequence[_Growing], recommender: Recommender) -> None:
    drafts = [(tree, draft) for tree in trees for draft in tree.drafts]
    replies = recommender.recommend([_ask(tree, draft) for tree, draft in drafts]) if drafts else []
    if len(replies) != len(drafts):
        raise ValueError(f"the recommender gave {len(replies)} lists where {len(drafts)} were asked for")
    for (tree, draft), reply in zip(drafts, replies):
        k = tree.config.k
        if len(reply.items) != k or len(set(reply.items)) != k:
            raise ValueError(
                f"{draft.name}: the recommender gave {len(reply.items)} items, {len(set(reply.items))} of them "
                f"different, where k={k} different ones are due"
            )
        if tree.config.extend_dialogue and not reply.text.strip():
            raise ValueError(f"{draft.name}: extend_dialogue needs a recommender that gives its lists' text too")
        draft.reply = reply


def _ask(tree: _Growing, draft: _Draft) -> Ask:
    seed = tree.seed("list", draft.path)
    if tree.config.feedback == "none":
        return Ask(tree.dialogue, seed=seed, name=draft.name)
    return Ask(draft.talk, draft.shown, draft.critique, draft.past, seed, draft.name)


def _score(trees: Sequence[_Growing], user: User) -> None:
    """Scores of the items that a tree has not seen before, each once."""
    asked = []
    for tree in trees:
        new = dict.fromkeys(
            item for draft in tree.drafts for item in draft.reply.items if item not in tree.scores
        )  # fmt: skip
        if new:
            asked.append((tree, list(new)))
    answers = user.score([tree.dialogue for tree, _ in asked], [items for _, items in asked]) if asked else []
    if len(answers) != len(asked):
        raise ValueError(f"the user scored items of {len(answers)} dialogues where {len(asked)} were asked for")
    for (tree, items), scores in zip(asked, answers):
        scores = [float(score) for score in scores]
        if len(scores) != len(items) or not all(0 <= score <= 1 or math.isnan(score) for score in scores):
            raise ValueError(
                f"dialogue {tree.dialogue.id}: {len(scores)} scores for {len(items)} items; one is due for each, in "
                f"[0, 1] or NaN"
            )
        tree.scores.update(zip(items, scores))
