"""RecBole's pre-split ("benchmark") atomic files: ``X.train.inter``, ``X.valid.inter`` and ``X.test.inter``.

Each row is one sample: user_id:token, item_id_list:token_seq (the history, oldest first), item_id:token (the target).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxrec.data.assemble import ItemTexts
from jaxrec.data.atomic import column_index, read_header, read_item_texts
from jaxrec.data.delimited import Vocabulary, read_blocks
from jaxrec.data.splits import SPLITS, Samples


@dataclass(frozen=True, eq=False)
class PreSplit:
    """Samples by part ("train", "valid", "test") and the names behind their ids, as in ``Interactions``."""

    samples: dict[str, Samples]
    user_tokens: np.ndarray
    item_tokens: np.ndarray
    titles: tuple[str, ...]
    categories: tuple[str, ...]
    report: dict[str, int]

    @property
    def num_items(self) -> int:
        return len(self.item_tokens) - 1


def _parts(
    path: Path, max_len: int, users: Vocabulary, items: Vocabulary, report: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    fields = read_header(path)
    user, target = column_index(path, fields, "user_id", "token"), column_index(path, fields, "item_id", "token")
    past = column_index(path, fields, "item_id_list", "token_seq")
    for block in read_blocks(path, "\t", len(fields), skip_lines=1):
        owners, targets = block.tokens(user), block.tokens(target)
        spans = zip(block.starts[:, past].tolist(), block.ends[:, past].tolist())
        raw = block.data.tobytes()
        lists = [raw[start:end].split() for start, end in spans]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        keep = (owners != b"") & (targets != b"") & (counts > 0)
        report["missing_user_id"] += int((owners == b"").sum())
        report["missing_item_id"] += int(((targets == b"") & (owners != b"")).sum())
        report["empty_history"] += int(((counts == 0) & (owners != b"") & (targets != b"")).sum())
        if not keep.any():
            continue
        ids = items.add([token for row, kept in zip(lists, keep.tolist()) if kept for token in row])
        counts = counts[keep]
        lengths = np.minimum(counts, max_len)
        inside = np.arange(max_len) < lengths[:, None]
        position = (np.cumsum(counts) - lengths)[:, None] + np.arange(max_len)
        history = np.where(inside, ids[np.where(inside, position, 0)], 0)
        yield users.add(owners[keep]), history, lengths.astype(np.int32), items.add(targets[keep])


def load_presplit(prefix: str | Path, max_len: int) -> PreSplit:
    """Read ``<prefix>.train.inter``, ``.valid.inter`` and ``.test.inter``, and ``<prefix>.item`` where it exists.

    Histories keep their last ``max_len`` items. Ids follow first appearance in ``.item``, then in the parts. Rows
    without user, target or history are dropped and counted. Raises FileNotFoundError for a missing part, KeyError for a
    missing column, ValueError naming file and line for malformed rows and for a part without usable rows.
    """
    if max_len < 1:
        raise ValueError(f"max_len={max_len}: a history needs at least 1 item")
    prefix = Path(prefix)
    report = {"missing_user_id": 0, "missing_item_id": 0, "empty_history": 0}
    texts, users, items = ItemTexts(), Vocabulary(), Vocabulary()
    if (item_file := prefix.with_name(prefix.name + ".item")).is_file():
        texts, report["item_rows_without_id"] = read_item_texts(item_file)
        items.add(list(texts.titles))
    samples = {}
    for part in SPLITS:
        path = prefix.with_name(f"{prefix.name}.{part}.inter")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; pre-split data needs .train.inter, .valid.inter and .test.inter"
            )
        columns = list(_parts(path, max_len, users, items, report))
        if not columns:
            raise ValueError(f"{path}: no interactions left after dropping unusable rows ({report})")
        samples[part] = Samples(*(np.concatenate(arrays) for arrays in zip(*columns)))
    tokens = items.tokens()
    keys = [b"", *(token.encode() for token in tokens[1:].tolist())]
    return PreSplit(
        samples=samples,
        user_tokens=users.tokens(),
        item_tokens=tokens,
        titles=tuple(texts.titles.get(key, "") for key in keys),
        categories=tuple(texts.categories.get(key, "") for key in keys),
        report=report,
    )
