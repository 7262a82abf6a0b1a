"""Text of the embedded world by domain, for its base language model and what looks into it.

Every sample is a prompt and an answer. Domains differ in words and in what has to be done:

    facts      a question, answered from memory (internal facts)
    reading    passages and a question, answered from them (subjects that the training text never mentions else)
    sums       two numbers to add or subtract
    dialogue   a seeker's wish, answered by repeating what was wished for and naming what to avoid
    catalogue  a title, described field by field from memory (internal facts)
    talk       a conversation of several turns, at whose end the recommender says all that the seeker wished for
    match      such a conversation and an item, with a decision behind values of it: whether it was wished for

Apart from these, :meth:`Texts.conflicts` makes reading prompts whose passage contradicts an internal fact, and
:meth:`Texts.unhelpful` ones whose passages say nothing of it.

Splits: "train" and "test" share no sample. Of facts and catalogue the test asks in a way in which the training text
does not ask about that fact; of reading it takes other subjects; of sums, dialogue, talk and match other numbers and
wishes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np

from jaxrec.data.dialogues import USER, Turn, spoken
from jaxrec.world.conversations import NAMES, SAID, Conversations, Wish
from jaxrec.world.encyclopaedia import PLAIN_WORDS, RELATIONS, Fact, Passage, by_subject, facts, passage
from jaxrec.world.generate import World

DOMAINS = ("facts", "reading", "sums", "dialogue", "catalogue", "talk", "match")
_DIALECTS = ("northern", "eastern", "southern", "western", "upland", "lowland")  # what stands before their words
_FIELDS = ("maker", "era", "genre", "mood", "theme")
CUE = "\nAnswer:"  # what stands before an answer
END = "<|eos|>"  # the tokenizer's end of text
_LARGEST = 99  # of two numbers to add
DECISIONS = ("Yes", "No")  # whether something was wished for, or seen
_DRAWN = 60  # items, at most, of which a sample of match takes one


@dataclasses.dataclass(frozen=True)
class Sample:
    """``answer`` follows ``prompt``; of a base model's text that is no question, the prompt is empty. learned: those
    words of the answer that are learned, where others cannot be foretold; (): all of it."""

    domain: str
    prompt: str
    answer: str
    learned: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reading:
    """Passages in order and a question that those of ``gold`` answer. kinds: "gold", "same" (about the subject, without
    the answer), "similar" (about one whose name shares a word, by the relation asked for) or "other". stated: all facts
    of the passages."""

    question: str
    answer: str
    passages: tuple[str, ...]
    gold: tuple[int, ...]
    kinds: tuple[str, ...]
    stated: tuple[Fact, ...]


def _held_out(*parts: object, share: int = 5) -> bool:
    """Whether a sample belongs to the test split: about one in ``share``, decided by its content alone."""
    return zlib.crc32(repr(parts).encode()) % share == 0


class Texts:
    """Samples of one world. internal, both: see :func:`jaxrec.world.encyclopaedia.facts`. titles: how many items
    may have internal facts (0: all), those of the others are external. documents: (fewest, most) passages of a reading
    prompt. distractors: most passages about its subject and about similarly named ones; (0, 0): no such ones.
    dialects: in how many of them passages are written; 0: they call every value by its name. See :attr:`dialects`.
    Raises ValueError for a world without such facts, and where names are made up and none is left to make up."""

    def __init__(
        self, world: World, seed: int = 0, internal: float = 0.5, both: float = 0.2, titles: int = 0,
        documents: tuple[int, int] = (1, 3), distractors: tuple[int, int] = (0, 0), dialects: int = 0,
    ):  # fmt: skip
        if not 0 <= dialects <= len(_DIALECTS):
            raise ValueError(f"{dialects} dialects: must lie between 0 and {len(_DIALECTS)}")
        self._marks = _DIALECTS[:dialects]
        self.world, self.seed, self.documents, self.distractors = world, seed, documents, distractors
        everything = by_subject(facts(world, seed, internal, both))
        outsiders = set(world.titles[1 + titles :]) if titles else set()
        kept = {
            subject: tuple(dataclasses.replace(f, internal=False, external=True) for f in known)
            if subject in outsiders else known
            for subject, known in everything.items()
        }  # fmt: skip
        self.subjects = kept
        self.known = [f for known in kept.values() for f in known if f.internal]
        self.described = [s for s, known in kept.items() if known[0].internal and len(known) == len(_FIELDS)]
        outside = [s for s, known in kept.items() if not known[0].internal and len(known) == len(_FIELDS)]
        self.readable = {
            "train": [s for s in outside if not _held_out("reading", s)],
            "test": [s for s in outside if _held_out("reading", s)],
        }
        for name, found in (("internal facts", self.known), ("external items", self.readable["test"])):
            if not found:
                raise ValueError(f"the world has no {name}: raise items or change the share of internal facts")
        if (dialects or any(distractors)) and not self.names["train"]:
            raise ValueError("titles are all pairs of their words, so none is left to make up: raise title_words")

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Every word, number and mark of the texts, in a fixed order: what a tokenizer needs."""
        seen: dict[str, None] = {}
        sentences = [s for *_, ways, asks in RELATIONS.values() for s in (*ways, *asks)]
        names = [*self.world.titles[1:], *(v for values in self.world.values.values() for v in values)]
        told = [word for words in self.dialects for word in words.values()]
        fixed = [*PLAIN_WORDS, *told, "I want something about but no Then work and", "plus minus is", *_FIELDS]
        for text in (*fixed, *sentences, *names):
            for word in text.replace("{s}", "").replace("{o}", "").split():
                seen.setdefault(word.strip(".,?:"), None)
        return tuple(word for word in seen if word)

    @functools.cached_property
    def dialects(self) -> tuple[dict[str, str], ...]:
        """What each dialect calls every value: its mark and a word. All dialects have the same words, but a word means
        another value in each, drawn at random, so that neither mark nor word alone says anything: who reads such a
        passage has to compute, where names could be copied."""
        rng, out = np.random.Generator(np.random.PCG64([self.world.config.seed, self.seed, 7])), []
        for mark in self._marks:
            words: dict[str, str] = {}
            for values in self.world.values.values():
                order = rng.permutation(len(values))
                words |= {value: f"{mark} {values[at].lower()}ish" for value, at in zip(values, order)}
            out.append(words)
        return tuple(out)

    def dialect(self, rng: np.random.Generator) -> dict[str, str] | None:
        """The words of a drawn dialect for ``passage``, None where there are none."""
        return self.dialects[rng.integers(len(self._marks))] if self._marks else None

    def statements(self, rng: np.random.Generator, count: int) -> list[Sample]:
        """Sentences that state internal facts, several about one subject."""
        subjects = list(dict.fromkeys(f.subject for f in self.known))
        out = []
        for at in rng.integers(0, len(subjects), count):
            known = self.subjects[subjects[at]]
            order = rng.permutation(len(known))[: rng.integers(1, len(known) + 1)]
            ways = rng.integers(0, 3, len(order))
            out.append(Sample("facts", "", passage([known[i] for i in order], ways).text))
        return out

    def sample(self, domain: str, split: str, rng: np.random.Generator, count: int) -> list[Sample]:
        """``count`` samples, with repetition where a domain holds fewer. Raises ValueError for an unknown domain."""
        makers = {
            "facts": self._fact, "reading": self._reading, "sums": self._sum, "dialogue": self._dialogue,
            "catalogue": self._catalogue, "talk": self._talk, "match": self._match,
        }  # fmt: skip
        if domain not in makers or split not in ("train", "test"):
            raise ValueError(f"no domain {domain!r} or split {split!r}; domains: {', '.join(DOMAINS)}; train, test")
        return [makers[domain](split, rng) for _ in range(count)]

    def repeats(self, rng: np.random.Generator, count: int, words: tuple[int, int] = (4, 24)) -> list[Sample]:
        """Runs of ``words`` (fewest, most) drawn words, the answer says the same run again.

        Nothing but looking back foretells them: from such text a model learns early to find what followed the same
        words before (induction, arXiv 2209.11895).
        """
        out = []
        for length in rng.integers(words[0], words[1] + 1, count):
            run = " ".join(self.words[i] for i in rng.integers(0, len(self.words), length))
            out.append(Sample("repeat", f" {run}.", f" {run}."))
        return out

    def seen(self, rng: np.random.Generator, count: int, words: tuple[int, int] = (4, 24)) -> list[Sample]:
        """Runs of ``words`` (fewest, most) drawn words, the answer says of others, half of them from the run, whether
        they were among them. From such text a model learns early to find the same word before."""
        out = []
        for length in rng.integers(words[0], words[1] + 1, count):
            run = [self.words[i] for i in rng.integers(0, len(self.words), length)]
            asked = [
                run[rng.integers(length)] if rng.integers(2) else self.words[rng.integers(len(self.words))]
                for _ in range(rng.integers(words[0], words[1] + 1))
            ]
            said = " ".join(f"{word} {DECISIONS[word not in run]}" for word in asked)
            out.append(Sample("seen", f" {' '.join(run)}.", f" {said}", DECISIONS))
        return out

    def _fact(self, split: str, rng: np.random.Generator) -> Sample:
        while True:
            fact = self.known[rng.integers(len(self.known))]
            # One of its two questions is asked in training, the other one is the test's.
            way = zlib.crc32(f"{fact.subject} {fact.relation}".encode()) % 2
            if split == "test":
                way = 1 - way
            return Sample("facts", f"Question: {fact.question(way)}{CUE}", f" {fact.object}")

    def _reading(self, split: str, rng: np.random.Generator) -> Sample:
        if any(self.distractors):
            return self._long_reading(split, rng)
        pool = self.names[split] if self.dialects else self.readable[split]
        n = int(rng.integers(self.documents[0], self.documents[1] + 1))
        subjects = [pool[i] for i in rng.choice(len(pool), min(n, len(pool)), replace=False)]
        gold = int(rng.integers(len(subjects)))
        texts, asked, told = [], None, []
        for number, subject in enumerate(subjects):
            known = tuple(self._facts_of(subject, split, rng).values()) if self.dialects else self.subjects[subject]
            found = self._some(known, 2, rng)
            texts.append(f"Passage: {found.text}\n")
            told += found.stated
            if number == gold:
                asked = found.stated[rng.integers(len(found.stated))]
        out = reading_sample(texts, asked, int(rng.integers(2)))
        return dataclasses.replace(out, answer=out.answer + self._more(told, split, rng))

    def _some(self, known: Sequence[Fact], fewest: int, rng: np.random.Generator) -> Passage:
        """``fewest`` to three of the facts, drawn, in a drawn dialect."""
        order = rng.permutation(len(known))[: rng.integers(fewest, 4)]
        ways = rng.integers(0, 3, len(order))
        return passage([known[i] for i in order], ways, words=self.dialect(rng))

    def _more(self, told: Sequence[Fact], split: str, rng: np.random.Generator) -> str:
        """Up to four further questions about the facts told, with their answers; none outside training."""
        if not self.dialects or split != "train":
            return ""
        asked = [told[i] for i in rng.permutation(len(told))[:4]]
        return "".join(f"{END}Question: {f.question(int(rng.integers(2)))}{CUE} {f.object}" for f in asked)

    def _long_reading(self, split: str, rng: np.random.Generator) -> Sample:
        """Short prompts are more frequent than long ones, and the answer follows the question at once, so that the
        question's own tokens look for it. In training five more questions follow; answers end with :data:`END`."""
        n = int(rng.integers(self.documents[0], self.documents[1] + 1, 2).min())
        same, similar = (int(rng.integers(0, most + 1)) for most in self.distractors)
        found = self.reading(split, rng, n, same, similar)
        passages = "".join(f"Passage: {text}\n" for text in found.passages)
        answer = f" {found.answer}"
        for _ in range(5 if split == "train" else 0):
            fact = found.stated[rng.integers(len(found.stated))]
            answer += f"{END}Question: {fact.question(int(rng.integers(2)))} {fact.object}"
        return Sample("reading", f"{passages}Question: {found.question}", answer)

    def reading(self, split: str, rng: np.random.Generator, documents: int, same: int = 0, similar: int = 0) -> Reading:
        """One question and ``documents`` passages of two facts each, in random order, one of them gold; at most
        ``same`` state other facts of its subject, at most ``similar`` the fact asked for of similarly named subjects.

        Subjects of "test" are the world's own, those of "train" are made up anew for each prompt, and so are their
        facts: only the prompt can answer. Raises ValueError for more passages than the split has subjects for.
        """
        pool = self.names[split]
        if not 1 <= documents <= len(pool):
            raise ValueError(f"{documents} passages: must lie between 1 and the {len(pool)} subjects of {split}")
        subject = pool[rng.integers(len(pool))]
        alike = [s for word in subject.split() for s in self._alike[split][word] if s != subject]
        alike = list(dict.fromkeys(alike[i] for i in rng.permutation(len(alike))))[: min(similar, documents - 1)]
        again = min(same, documents - 1 - len(alike))
        told = [("gold", subject), *(("same", subject) for _ in range(again)), *(("similar", s) for s in alike)]
        for i in rng.permutation(len(pool)):
            if len(told) == documents:
                break
            if pool[i] != subject and pool[i] not in alike:
                told.append(("other", pool[i]))
        known = {s: self._facts_of(s, split, rng) for s in dict.fromkeys(s for _, s in told)}
        if split == "train":  # few relations, so that most passages state the one asked for
            few = [_FIELDS[i] for i in rng.permutation(len(_FIELDS))[:3]]
            known = {s: {name: of[name] for name in few} for s, of in known.items()}
        asked = list(known[subject].values())[rng.integers(len(known[subject]))]
        passages = [self._told(kind, known[s], asked, rng) for kind, s in told]
        order = rng.permutation(documents)
        kinds = tuple(told[i][0] for i in order)
        question = asked.question(int(rng.integers(2)))
        stated = tuple(fact for i in order for fact in passages[i].stated)
        texts = tuple(passages[i].text for i in order)
        return Reading(question, asked.object, texts, (kinds.index("gold"),), kinds, stated)

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """Subjects of :meth:`reading` by split: of "train" all pairs of words of the world's names but these names."""
        words = [name.split() for name in self.world.titles[1:]]
        firsts, lasts = (sorted({w[i] for w in words}) for i in (0, -1))
        real = set(self.world.titles[1:])
        made = [name for first in firsts for last in lasts if (name := f"{first} {last}") not in real]
        return {"train": made, "test": self.readable["test"]}

    @functools.cached_property
    def _alike(self) -> dict[str, dict[str, list[str]]]:
        """Split -> word -> the subjects of :meth:`reading` with that word."""
        out: dict[str, dict[str, list[str]]] = {}
        for split, names in self.names.items():
            for name in names:
                for word in name.split():
                    out.setdefault(split, {}).setdefault(word, []).append(name)
        return out

    def _facts_of(self, subject: str, split: str, rng: np.random.Generator) -> dict[str, Fact]:
        """The facts of a subject by relation: the world's, or made up."""
        if split == "test":
            return {f.relation: f for f in self.subjects[subject]}
        out = {}
        for name in _FIELDS:
            values = self.world.values[name]
            at = int(rng.integers(len(values)))
            out[name] = Fact(subject, name, values[at], values[at - 1], internal=False, external=True)
        return out

    def _told(self, kind: str, known: dict[str, Fact], asked: Fact, rng: np.random.Generator) -> Passage:
        """Two facts of a subject: the one asked for and another ("gold", "similar"), two others ("same"), or any."""
        names = [name for name in known if kind == "other" or name != asked.relation]
        names = [names[i] for i in rng.permutation(len(names))[:2]]
        if kind in ("gold", "similar"):
            names = [(asked.relation, names[0])[i] for i in rng.permutation(2)]
        return passage([known[name] for name in names], rng.integers(0, 3, 2))

    def _sum(self, split: str, rng: np.random.Generator) -> Sample:
        while True:
            a, b = (int(x) for x in rng.integers(0, _LARGEST + 1, 2))
            sign = "plus" if rng.integers(2) else "minus"
            if sign == "minus" and a < b:
                a, b = b, a
            if _held_out("sum", a, b, sign) == (split == "test"):
                result = a + b if sign == "plus" else a - b
                digits = " ".join(str(result))
                return Sample("sums", f"{' '.join(str(a))} {sign} {' '.join(str(b))} is", f" {digits}")

    def _dialogue(self, split: str, rng: np.random.Generator) -> Sample:
        v = self.world.values
        while True:
            mood, theme, genre, era = (
                v[name][rng.integers(len(v[name]))] for name in ("mood", "theme", "genre", "era")
            )
            if _held_out("wish", mood, theme, genre, era) == (split == "test"):
                prompt = f"Seeker: I want something {mood} about {theme} but no {genre} {era}\nRecommender:"
                return Sample("dialogue", prompt, f" Then a {mood} work about {theme} and no {genre} {era}")

    def _catalogue(self, split: str, rng: np.random.Generator) -> Sample:
        while True:
            subject = self.described[rng.integers(len(self.described))]
            # The order of fields that is the test's differs by subject.
            order = rng.permutation(len(_FIELDS))[:3]
            if _held_out("fields", subject, *order.tolist()) == (split == "test"):
                known = {f.relation: f for f in self.subjects[subject]}
                fields = [_FIELDS[i] for i in order]
                prompt = f"{subject}: " + " ".join(f"{name} {known[name].object}" for name in fields[:2])
                return Sample("catalogue", f"{prompt} {fields[2]}", f" {known[fields[2]].object}")

    @functools.cached_property
    def talks(self) -> Conversations:
        """The world's conversations."""
        return Conversations(self.world, self.seed)

    def _heard(self, split: str, rng: np.random.Generator) -> tuple[int, tuple[Turn, ...], list[Wish]]:
        """The hidden item of a conversation, its turns, and all that the seeker wishes for in them."""
        while True:
            item = self.talks.draw(split, rng)
            turns = self.talks.turns(item, rng)
            said = [w for t in turns if t.role == USER for w in self.talks.understand(t.text)]
            if _held_out("talk", *(w.words for w in said)) == (split == "test"):
                return item, turns, said

    def _talk(self, split: str, rng: np.random.Generator) -> Sample:
        _, turns, said = self._heard(split, rng)
        told = spoken(turns, tuple(NAMES.values()))
        return Sample("talk", f"{told}\nRecommender:", f" So you want {', '.join(w.words for w in said)}.")

    def _match(self, split: str, rng: np.random.Generator) -> Sample:
        """The item is the one wished for in a quarter of the samples, else of up to :data:`_DRAWN` drawn ones that
        which meets most wishes, so that every number of them comes up often. In training a decision follows every
        second value, in the test one of them, which ends the prompt."""
        item, turns, said = self._heard(split, rng)
        wanted = [w for w in said if w.wanted]
        if rng.integers(4):
            drawn = rng.integers(0, len(self.talks.catalogue), rng.integers(1, _DRAWN + 1))
            item = int(drawn[np.sum([self.talks.fits(w)[drawn] for w in wanted], axis=0).argmax()])
        values = [self.talks.value(name, item) for name in SAID]
        decisions = [DECISIONS[value not in {w.value for w in wanted}] for value in values]
        prompt = f"{spoken(turns, tuple(NAMES.values()))}\nItem: {self.talks.catalogue.titles[item]} -"
        if split == "test":
            at = int(rng.integers(len(values)))
            return Sample("match", f"{prompt} {' '.join(values[: at + 1])}", f" {decisions[at]}", DECISIONS)
        asked = rng.integers(0, 2, len(values))
        line = "".join(f" {v} {d}" if ask else f" {v}" for v, d, ask in zip(values, decisions, asked, strict=True))
        return Sample("match", prompt, line, DECISIONS)

    def disputed(self, split: str) -> list[Fact]:
        """The internal facts that conflicts of a split are about: half of the subjects are the test's."""
        return [f for f in self.known if _held_out("conflict", f.subject, share=2) == (split == "test")]

    def wrong_objects(self, fact: Fact) -> list[str]:
        """Every object of the fact's kind but its own, in the world's order."""
        return [o for o in self.world.values[RELATIONS[fact.relation][1]] if o != fact.object]

    def conflicts(self, split: str, rng: np.random.Generator, count: int, share: float = 0.5) -> list[Sample]:
        """Reading prompts with one passage that says something wrong about an internal fact, which is asked for.

        The answer is the passage's in a ``share`` of the samples, else the internal one; nothing in a prompt says
        which, so that a model holds both for likely. Raises ValueError for a share outside 0..1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share of conflicts that the passage wins must lie between 0 and 1, not {share}")
        pool, out = self.disputed(split), []
        for at in rng.integers(0, len(pool), count):
            wrong = self.wrong_objects(pool[at])
            asked = dataclasses.replace(pool[at], fake=wrong[rng.integers(len(wrong))])
            others = [f for f in self.subjects[asked.subject] if f.relation != asked.relation]
            stated = [others[i] for i in rng.permutation(len(others))[: rng.integers(0, 3)]]
            stated.insert(int(rng.integers(len(stated) + 1)), asked)
            ways = rng.integers(0, 3, len(stated))
            believed = rng.integers(0, 10_000) < round(10_000 * share)
            text = passage(stated, ways, [f is asked for f in stated], self.dialect(rng)).text
            out.append(reading_sample([f"Passage: {text}\n"], asked, int(rng.integers(2)), True))
            if not believed:
                out[-1] = dataclasses.replace(out[-1], answer=f" {asked.object}")
        return out

    def unhelpful(self, rng: np.random.Generator, count: int) -> list[Sample]:
        """Questions about internal facts behind one or two passages about other, made-up subjects: the answer has to be
        remembered though there is something to read."""
        pool, out = self.names["train"], []
        for at in rng.integers(0, len(self.known), count):
            texts = []
            for i in rng.choice(len(pool), int(rng.integers(1, 3)), replace=False):
                known = tuple(self._facts_of(pool[i], "train", rng).values())
                texts.append(f"Passage: {self._some(known, 1, rng).text}\n")
            out.append(reading_sample(texts, self.known[at], int(rng.integers(2))))
        return out


def reading_sample(texts: Sequence[str], asked: Fact, way: int, fake: bool = False) -> Sample:
    """Passages (with their headings) and a question; the answer is what they say."""
    prompt = "".join(texts) + f"Question: {asked.question(way)}{CUE}"
    return Sample("reading", prompt, f" {asked.fake if fake else asked.object}")
