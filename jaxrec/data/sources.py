"""One door for every kind of user-item data on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxrec.data.amazon import find_amazon, load_amazon
from jaxrec.data.atomic import find_atomic, load_atomic
from jaxrec.data.interactions import Interactions
from jaxrec.data.movielens import load_movielens_1m, load_movielens_100k, load_movielens_csv


def _amazon(path: Path) -> Interactions:
    if path.is_dir():
        return load_amazon(*find_amazon(path))
    meta = path.with_name(f"meta_{path.name}")
    return load_amazon(path, meta if meta.is_file() else None)


def _prepared(path: Path) -> Interactions:
    from jaxrec.data.tfds_sources import load_prepared  # tensorflow_datasets is slow to import

    return load_prepared(path)


def _is_atomic(path: Path) -> bool:
    return path.suffix == ".inter" or path.with_name(path.name + ".inter").is_file() or _has(path, "*.inter")


def _has(path: Path, *patterns: str) -> bool:
    return path.is_dir() and any(True for pattern in patterns for _ in path.glob(pattern))


def _is_amazon(path: Path) -> bool:
    if path.is_file():
        return path.name.removesuffix(".gz").endswith((".jsonl", ".csv"))
    return _has(path, "*.jsonl", "*.jsonl.gz") or (_has(path, "*.csv", "*.csv.gz") and not _has(path, "ratings.csv"))


# name: (what a folder of this kind holds, test, loader)
_KINDS: dict[str, tuple[str, Callable[[Path], bool], Callable[[Path], Interactions]]] = {
    "atomic": ("X.inter (RecBole)", _is_atomic, lambda path: load_atomic(find_atomic(path))),
    "ml-100k": ("u.data and u.item", lambda path: _has(path, "u.data"), load_movielens_100k),
    "ml-1m": ("ratings.dat and movies.dat", lambda path: _has(path, "ratings.dat"), load_movielens_1m),
    "ml-25m": ("ratings.csv and movies.csv", lambda path: _has(path, "ratings.csv"), load_movielens_csv),
    "amazon-2023": ("reviews *.jsonl[.gz] or *.csv[.gz], meta_*.jsonl[.gz]", _is_amazon, _amazon),
    "prepared": ("jaxrec_interactions/ (prepare_interactions)", lambda p: _has(p, "jaxrec_interactions"), _prepared),
}
KINDS = tuple(_KINDS)


def load_interactions(path: str | Path, kind: str = "auto") -> Interactions:
    """Load user-item events from a folder, a RecBole prefix or a file.

    kind "auto" looks for the layouts of RecBole atomic files, MovieLens 100K / 1M / 20M-32M, Amazon Reviews 2023 and
    data prepared with ``prepare_interactions``; or name one of ``KINDS``. Raises FileNotFoundError that lists what was
    looked for, ValueError when several layouts fit.
    """
    path = Path(path)
    if kind != "auto":
        if kind not in _KINDS:
            raise ValueError(f"unknown kind {kind!r}; choose auto, {', '.join(KINDS)}")
        return _KINDS[kind][2](path)
    fitting = [name for name, (_, fits, _) in _KINDS.items() if fits(path)]
    if not fitting:
        looked = "; ".join(f"{name}: {holds}" for name, (holds, _, _) in _KINDS.items())
        state = "holds none of the known layouts" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {state}. Looked for {looked}")
    if len(fitting) > 1:
        raise ValueError(f"{path} fits several layouts ({', '.join(fitting)}); say which with kind=")
    return _KINDS[fitting[0]][2](path)
