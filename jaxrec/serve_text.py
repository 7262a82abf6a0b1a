"""From tokens to text while they are made: whole characters only, and nothing of a stop string.

Joined, the parts that :class:`Stream` gives equal ``tokenizer.decode`` of all tokens, cut before the stop string that
ends first. What may still change is held back: bytes that are no whole character yet, and a beginning of a stop string.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from models.tokenizer import Tokenizer


class Pieces:
    """What the tokens of one tokenizer add to a text.

    bytes: of every id. loose: ids of single bytes that are decoded as a run: where a run is no UTF-8, such tokenizers
    (``ByteFallback``) show U+FFFD for each of its bytes; others show what can be read.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.bytes: tuple[bytes, ...] = tuple(tokenizer.token_bytes())
        self._decode = tokenizer.decode
        self.loose: frozenset[int] = frozenset()
        single = {piece[0]: index for index, piece in enumerate(self.bytes) if len(piece) == 1}
        lead, tail = single.get(0xC3), single.get(0xA9)  # together "é"
        if lead is not None and tail is not None and tokenizer.decode([lead, tail, tail]) == "\ufffd" * 3:
            self.loose = frozenset(
                index for index, piece in enumerate(self.bytes)  # "<0x6A>" and "j" are two tokens of one byte
                if len(piece) == 1 and (piece[0] >= 0x80 or tokenizer.decode([index, tail]) == "\ufffd" * 2)
            )  # fmt: skip

    def bytes_of(self, index: int) -> bytes:
        """What a token adds; nothing for the ids behind the tokenizer's last one, which a model may have."""
        return self.bytes[index] if index < len(self.bytes) else b""

    def name(self, index: int) -> str:
        """The token as text; one that is no UTF-8 as "bytes:\\xe2\\x9c"."""
        try:
            return self.bytes_of(index).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes_of(index))

    def drops_space(self, first: int) -> bool:
        """Whether decoding leaves out the space that a text's first token begins with (SentencePiece's)."""
        return self.bytes[first].startswith(b" ") and not self._decode([first]).startswith(" ")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A token of the shown text: ``index`` of all tokens of the answer, ``offset`` in characters of the text."""

    index: int
    offset: int


class Stream:
    """The text of one answer. :meth:`push` tokens until :attr:`stopped`; :meth:`take` what can be shown."""

    def __init__(self, pieces: Pieces, stops: Sequence[str] = ()):
        self._pieces = pieces
        self._stops = [stop.encode() for stop in stops]
        self._raw = bytearray()
        self._loose = bytearray()  # a flag per byte
        self._starts: list[int] = []  # of each token, in bytes
        self._shown = 0  # bytes
        self._characters = 0  # of the shown text
        self._placed = 0  # tokens given with what was shown
        self._drops = False  # the space that the text begins with
        self._end: int | None = None  # where the stop string begins
        self.stopped: str | None = None

    def push(self, token: int) -> None:
        """One more token; ``stopped`` names the stop string that it completes."""
        piece = self._pieces.bytes_of(token)
        before = len(self._raw)
        if not before and piece:
            self._drops = self._pieces.drops_space(token)
        self._starts.append(before)
        self._raw += piece
        self._loose += (b"\1" if token in self._pieces.loose else b"\0") * len(piece)
        self._stop(before)

    def _stop(self, before: int) -> None:
        """The match that ends first wins, of those the longest: as ``models.stops`` has it."""
        found = []
        for stop in self._stops:
            at = self._raw.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at, stop))
        if found:
            _, self._end, stop = min(found)
            self.stopped = stop.decode()

    def _safe(self) -> int:
        """How many bytes will stay as they are, whatever follows."""
        raw, safe = self._raw, len(self._raw)
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(raw)), 0, -1):
                if raw.endswith(stop[:size]):
                    safe = min(safe, len(raw) - size)
                    break
        while safe and self._loose[safe - 1]:
            safe -= 1
        return safe - _unfinished(raw[max(0, safe - 3) : safe])

    def take(self, last: bool = False) -> tuple[str, list[Placed]]:
        """New text, and the tokens that begin in it. last: no token follows, so that everything is given."""
        end = self._end if self._end is not None else len(self._raw) if last else self._safe()
        end = max(end, self._shown)
        placed = []
        while self._placed < len(self._starts):
            start = self._starts[self._placed]
            if start >= end and not (last and self._end is None):
                break
            placed.append(Placed(self._placed, self._characters + self._before(start, end)))
            self._placed += 1
        text = self._render(self._shown, end)
        self._shown, self._characters = end, self._characters + len(text)
        return text, placed

    def _render(self, start: int, end: int) -> str:
        return "".join(self._text(run, flag, begin) for begin, run, flag in self._runs(start, end))

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, bytes, int]]:
        """(where it begins, bytes, whether loose) of what is decoded together."""
        while start < end:
            flag, stop = self._loose[start], start
            while stop < end and self._loose[stop] == flag:
                stop += 1
            yield start, bytes(self._raw[start:stop]), flag
            start = stop

    def _text(self, run: bytes, loose: int, begin: int) -> str:
        text = run.decode(errors="replace")
        if loose and not _readable(run):
            return "\ufffd" * len(run)
        return text[1:] if begin == 0 and self._drops else text

    def _before(self, at: int, end: int) -> int:
        """Of the characters from ``_shown`` to ``end``, how many come before the one that byte ``at`` belongs to."""
        count = 0
        for begin, run, loose in self._runs(self._shown, end):
            if begin + len(run) <= at:
                count += len(self._text(run, loose, begin))
                continue
            if loose and not _readable(run):
                return count + max(at - begin, 0)
            whole = self._text(run[: max(at - begin, 0) + 1], 0, begin)
            return count + max(len(whole) - 1, 0)
        return count


def _readable(run: bytes) -> bool:
    try:
        run.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unfinished(tail: bytes) -> int:
    """How many of the last three bytes may begin a character that is not complete."""
    for back in range(1, len(tail) + 1):
        byte = tail[-back]
        if byte & 0xC0 != 0x80:
            needs = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 4 if 0xF0 <= byte < 0xF5 else 1
            return back if back < needs else 0
    return 0
