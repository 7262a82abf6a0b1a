"""Vectorised reading of delimited text: cells are found and numbers parsed with numpy, a block of lines at a time.

The reader knows nothing of users or items. It exists because interaction files reach tens of millions of rows, where a
Python loop per row takes minutes, and because every complaint about a file must name its file, line and column.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO

import numpy as np

BLOCK_BYTES = 1 << 20  # the working arrays of a block stay in cache
_INT64 = np.iinfo(np.int64)
_EXACT_FLOAT = 2**53
_MAX_DIGITS = 18  # every number of this many digits fits int64
_NEWLINE, _RETURN, _DOT, _PLUS, _MINUS = (ord(c) for c in "\n\r.+-")
_BOM = b"\xef\xbb\xbf"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; names ending in ``.gz`` are unpacked on the fly."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def decode_line(path: Path, line: int, raw: bytes, encoding: str = "utf-8") -> str:
    """Decode one line without its line end. Raises ValueError naming file and line."""
    try:
        return raw.rstrip(b"\r\n").decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {line}: not valid {encoding} ({error.reason})") from error


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without line end); a byte-order mark at the top is removed."""
    with open_bytes(path) as stream:
        for line, raw in enumerate(stream, start=1):
            yield line, decode_line(path, line, raw.removeprefix(_BOM) if line == 1 else raw, encoding)


@dataclass(frozen=True, eq=False)
class Block:
    """Some complete lines of a file, cut into cells.

    data: uint8 [bytes]; starts, ends: int64 [rows, columns], positions in ``data``; first_line: line number of row 0.
    """

    path: Path
    first_line: int
    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts)

    def cell(self, row: int, column: int) -> str:
        return self.data[self.starts[row, column] : self.ends[row, column]].tobytes().decode("utf-8")

    def where(self, row: int, name: str) -> str:
        return f"{self.path}, line {self.first_line + row}, column {name!r}"

    def _characters(self, column: int, width: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        start, length = self.starts[:, column], self.ends[:, column] - self.starts[:, column]
        for j in range(width):
            yield j, self.data[np.minimum(start + j, len(self.data) - 1)], j < length

    def tokens(self, column: int) -> np.ndarray:
        """Cells as a bytes array ``S`` [rows] (UTF-8)."""
        width = max(int((self.ends[:, column] - self.starts[:, column]).max(initial=0)), 1)
        out = np.zeros((self.rows, width), np.uint8)
        for j, character, inside in self._characters(column, width):
            out[:, j] = np.where(inside, character, 0)
        return out.view(f"S{width}")[:, 0]

    def _plain(self, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parse ``[sign]digits[.digits]``: (signed digits int64, digits after the point int64, cell has this form)."""
        length = self.ends[:, column] - self.starts[:, column]
        value = np.zeros(self.rows, np.int64)
        digits, fraction = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int64)
        plain, point, negative = np.ones(self.rows, bool), np.zeros(self.rows, bool), np.zeros(self.rows, bool)
        width = min(int(length.max(initial=0)), _MAX_DIGITS + 2)
        for j, character, inside in self._characters(column, width):
            is_digit = inside & (character >= 48) & (character <= 57)
            is_point = inside & (character == _DOT)
            good = is_digit | (is_point & ~point)
            if j == 0:
                negative = inside & (character == _MINUS)
                good |= negative | (inside & (character == _PLUS))
            value = np.where(is_digit, value * 10 + (character.astype(np.int64) - 48), value)
            digits += is_digit
            fraction += is_digit & point
            plain &= good | ~inside
            point |= is_point
        plain &= (digits >= 1) & (digits <= _MAX_DIGITS) & (length <= width)
        return np.where(negative, -value, value), fraction, plain

    def _decimal(self, row: int, column: int, name: str) -> Decimal:
        text = self.cell(row, column)
        try:
            if "_" in text:  # Python's number syntax, not a file format's
                raise InvalidOperation
            number = Decimal(text)
        except InvalidOperation as error:
            raise ValueError(f"{self.where(row, name)}: {text!r} is not a number") from error
        if not number.is_finite():
            raise ValueError(f"{self.where(row, name)}: {text!r} is not a finite number")
        return number

    def floats(self, column: int, name: str) -> np.ndarray:
        """Cells as float64 [rows], correctly rounded. Raises ValueError naming file, line and column."""
        value, fraction, plain = self._plain(column)
        plain &= np.abs(value) <= _EXACT_FLOAT  # then both operands are exact and one division rounds once
        out = value / np.power(10.0, fraction)
        for row in np.flatnonzero(~plain):
            out[row] = float(self._decimal(row, column, name))
            if not np.isfinite(out[row]):
                raise ValueError(f"{self.where(row, name)}: {self.cell(row, column)!r} is too large for a float")
        return out

    def integers(self, column: int, name: str, scale: int = 1) -> np.ndarray:
        """Cells times ``scale`` as int64 [rows], without a rounding step in between.

        ``881250949``, ``881250949.0`` and ``8.8e8`` are whole numbers; ``0.5`` needs a ``scale``.
        Raises ValueError naming file, line and column.
        """
        value, fraction, plain = self._plain(column)
        plain &= np.abs(value) <= _INT64.max // scale
        value = np.where(plain, value, 0) * scale
        unit = np.power(np.int64(10), np.where(plain, fraction, 0))
        plain &= value % unit == 0
        out = value // unit
        for row in np.flatnonzero(~plain):
            number = self._decimal(row, column, name) * scale
            if abs(number) > _INT64.max or number != number.to_integral_value():
                raise ValueError(
                    f"{self.where(row, name)}: {self.cell(row, column)!r} times {scale} is not a whole 64-bit number; "
                    "pass time_scale (for example 1000 to keep milliseconds) so that times become whole"
                )
            out[row] = int(number)
        return out


def _cut(path: Path, first_line: int, raw: bytes, separator: bytes, columns: int) -> Block:
    data = np.frombuffer(raw, np.uint8)
    newline = np.flatnonzero(data == _NEWLINE)
    line_start = np.concatenate([[0], newline[:-1] + 1]).astype(np.int64)
    line_end = newline - ((newline > line_start) & (data[newline - 1] == _RETURN))
    if len(separator) == 1:
        cuts = np.flatnonzero(data == separator[0])
    else:
        cuts = np.flatnonzero((data[:-1] == separator[0]) & (data[1:] == separator[1]))
    counts = np.diff(np.searchsorted(cuts, newline), prepend=0) + 1
    wrong = np.flatnonzero(counts != columns)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{path}, line {first_line + row}: {counts[row]} cells where {columns} are expected")
    zero = np.flatnonzero(data == 0)
    if len(zero):
        row = int(np.searchsorted(newline, zero[0]))
        raise ValueError(f"{path}, line {first_line + row}: a NUL byte; the file is not plain text")
    if (data >= 128).any():
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            row = int(np.searchsorted(newline, error.start))
            raise ValueError(f"{path}, line {first_line + row}: not valid UTF-8 ({error.reason})") from error
    cuts = cuts.reshape(len(newline), columns - 1)
    starts = np.concatenate([line_start[:, None], cuts + len(separator)], axis=1)
    ends = np.concatenate([cuts, line_end[:, None]], axis=1)
    return Block(path, first_line, data, starts, ends)


def read_blocks(
    path: Path, separator: str, columns: int, *, skip_lines: int = 0, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Yield the lines of a file as blocks of cells.

    separator: one or two ASCII characters; no quoting. columns: cells every line must have. skip_lines: header lines.
    Raises ValueError naming file and line for a wrong number of cells, NUL bytes or bytes that are not UTF-8.
    """
    mark = separator.encode("ascii")
    if len(mark) not in (1, 2):
        raise ValueError(f"separator {separator!r} must have one or two characters")
    with open_bytes(path) as stream:
        for _ in range(skip_lines):
            stream.readline()
        line, rest = skip_lines + 1, b""
        while chunk := stream.read(block_bytes):
            head, found, tail = chunk.rpartition(b"\n")
            if not found:
                rest += chunk
                continue
            raw, rest = rest + head + found, tail
            block = _cut(path, line, raw, mark, columns)
            line += block.rows
            yield block
        if rest:
            yield _cut(path, line, rest + b"\n", mark, columns)


class Vocabulary:
    """Ids in order of first appearance, from 1; 0 is kept for padding."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def add(self, tokens: np.ndarray | Sequence[bytes]) -> np.ndarray:
        """Ids int32 [n] of non-empty tokens (bytes), giving new ids to new tokens."""
        if isinstance(tokens, np.ndarray) and tokens.itemsize <= 8 and len(tokens):
            # Short tokens compare as integers: sorting a block is faster than hashing every cell.
            keys = tokens.astype("S8").view(np.uint64)
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            order = np.argsort(first)
            ids = np.empty(len(first), np.int32)
            ids[order] = self._add(tokens[first[order]].tolist())
            return ids[inverse]
        return self._add(tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens))

    def _add(self, cells: list[bytes]) -> np.ndarray:
        index = self._index
        for token in dict.fromkeys(cells):  # distinct tokens, in order
            if token not in index:
                if not token or token == b"[PAD]":
                    raise ValueError(f"{token.decode()!r} cannot be an id: it stands for padding")
                index[token] = len(index) + 1
        return np.fromiter(map(index.__getitem__, cells), np.int32, len(cells))

    def get(self, token: bytes) -> int:
        """Id of a token, 0 when it has none."""
        return self._index.get(token, 0)

    def tokens(self) -> np.ndarray:
        """Tokens as a str array [n + 1], row 0 ``[PAD]``."""
        return np.array(["[PAD]", *(token.decode("utf-8") for token in self._index)])
