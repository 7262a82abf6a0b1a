"""Checkpoints: weights, optimiser, random key, data iterator and notes in one atomic bundle, through Orbax.

A step is a folder that appears only when complete, so a run killed while saving goes on from the step before. On
restore every array is compared with a fingerprint taken when it was saved: a damaged step is reported, set aside and
the next older one used.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.sharding import place


class Resumable(Protocol):
    """An iterator whose position can be stored: Grain's, or any object with these two methods."""

    def get_state(self) -> dict[str, Any] | bytes: ...

    def set_state(self, state: dict[str, Any] | bytes) -> None: ...


class CheckpointError(RuntimeError):
    """No step of a checkpoint folder could be read; the message names the folder and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """state: the restored tree. step: its step. meta: the JSON notes given to ``save``."""

    state: Any
    step: int
    meta: dict[str, Any]


@jax.jit
def _bits(leaf: jax.Array) -> jax.Array:
    """Order-independent sum of a leaf's bits mod 2^32, weighted by position: the same on every mesh."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, width.get(leaf.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)


def fingerprint(tree: Any) -> dict[str, int]:
    """A 32-bit checksum per array, by its path in the tree; equal for equal bits however they are sharded."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # One after the other: with several processes on CPUs, sums that run side by side may wait for each other for ever.
    return {jax.tree_util.keystr(path): int(jax.device_get(_bits(leaf))) for path, leaf in leaves}


def _is_local(leaf: Any) -> bool:
    """Whether a process of several holds all of ``leaf`` itself: Orbax wants arrays that all of them share."""
    sharding = getattr(leaf, "sharding", None)
    return jax.process_count() > 1 and (sharding is None or sharding.is_fully_addressable)


def _everywhere() -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(jax.devices()), ("devices",)), PartitionSpec())


def _shared(leaf: Any) -> Any:
    """What Orbax saves for ``leaf``; of a local one, the first process's."""
    return place(leaf, _everywhere()) if _is_local(leaf) else leaf


def _own(leaf: jax.Array, like: Any) -> Any:
    """A restored leaf, where ``like`` lies."""
    if not _is_local(like):
        return leaf
    here = leaf.addressable_data(0)
    sharding = getattr(like, "sharding", None)
    return np.asarray(here) if sharding is None else jax.device_put(here, sharding)


def _abstract(leaf: Any) -> Any:
    if _is_local(leaf):
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=_everywhere())
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf  # Orbax restores arrays, not NumPy scalars


def _pack(state: dict[str, Any] | bytes) -> dict[str, Any]:
    return {"bytes": state.decode()} if isinstance(state, bytes) else {"json": state}


def _unpack(packed: Mapping[str, Any]) -> dict[str, Any] | bytes:
    return packed["bytes"].encode() if "bytes" in packed else packed["json"]


class Checkpointer:
    """Saves to and restores from ``folder/<step>``.

    keep: newest steps kept. asynchronous: write in the background; leave it False where training donates buffers on
    CPU, since the background copy may still be reading them. Use as a context manager, or call :meth:`close`.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, asynchronous: bool = False):
        import orbax.checkpoint as ocp
        from absl import logging

        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, not {keep}")
        self.folder = Path(folder).absolute()
        # Orbax warns of every item it finds before it is told how to read it; what cannot be read is an error below.
        logging.set_verbosity(logging.ERROR)
        self._ocp, self._asynchronous = ocp, asynchronous
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Resumable | None = None, meta: Mapping[str, Any] | None = None):
        """Write ``state`` (a tree of arrays), the iterator's position and ``meta`` (JSON) as one step.

        Where there are several processes all must call this, and :meth:`restore`, with a folder that all of them see.
        """
        state = jax.tree.map(_shared, state)
        run = {
            "meta": dict(meta or {}),
            "iterator": _pack(iterator.get_state()) if iterator is not None else None,
            "fingerprint": fingerprint(state),
        }
        args = self._ocp.args
        items = args.Composite(state=args.StandardSave(state), run=args.JsonSave(run))
        self._manager.save(step, args=items)
        if not self._asynchronous:
            self._manager.wait_until_finished()

    def restore(self, target: Any, iterator: Resumable | None = None, step: int | None = None) -> Restored | None:
        """The newest step (or ``step``), placed like ``target``; None when the folder holds none.

        target: a tree of arrays or ``jax.ShapeDtypeStruct`` with shardings: it may lie on another mesh than the saved
        one. ``iterator`` is set to its stored position. A damaged step is named in a warning, renamed to
        ``damaged_<step>`` and the step before is tried. Raises CheckpointError when no step is readable, ValueError
        when shapes or names differ from ``target`` (the files are fine, the model is another one).
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        failures = []
        for candidate in steps:
            try:
                restored = self._read(candidate, jax.tree.map(_abstract, target))
            except ValueError as error:
                if isinstance(error, _DifferentTree):
                    raise
                failures.append((candidate, error))
            # Whatever a damaged file makes the reader raise is answered the same way, and is reported below.
            except Exception as error:
                failures.append((candidate, error))
            else:
                for bad, error in failures:
                    self._set_aside(bad, error, candidate)
                state, run = restored
                state = jax.tree.map(_own, state, target)
                self._set_position(iterator, run, candidate)
                return Restored(state, candidate, run["meta"])
        if not failures:
            return None
        listed = "; ".join(f"step {s}: {_brief(e)}" for s, e in failures)
        raise CheckpointError(
            f"no checkpoint in {self.folder} can be read ({listed}). Delete that folder to start over, "
            "or copy an intact <step> folder back into it"
        ) from failures[0][1]

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        args = self._ocp.args
        run = self._manager.restore(step, args=args.Composite(run=args.JsonRestore()))["run"]
        _check_same_tree(self.folder / str(step), run["fingerprint"], target, self._manager, step)
        items = args.Composite(state=args.StandardRestore(target))
        state = self._manager.restore(step, args=items)["state"]
        found = fingerprint(state)
        wrong = [name for name, value in run["fingerprint"].items() if found[name] != value]
        if wrong:
            raise CheckpointError(f"array {wrong[0]} is not what was saved ({len(wrong)} of {len(found)} differ)")
        return state, run

    def _set_position(self, iterator: Resumable | None, run: Mapping[str, Any], step: int) -> None:
        if iterator is None:
            return
        if run["iterator"] is None:
            raise ValueError(
                f"{self.folder / str(step)} was saved without a data iterator, so the data cannot go on where it was; "
                "restore with iterator=None"
            )
        iterator.set_state(_unpack(run["iterator"]))

    def _set_aside(self, step: int, error: Exception, used: int) -> None:
        warnings.warn(
            f"checkpoint {self.folder / str(step)} is damaged ({_brief(error)}); going on from step {used}. "
            f"It was renamed to damaged_{step}; delete it when you have seen it",
            stacklevel=3,
        )
        if jax.process_index() == 0:
            os.replace(self.folder / str(step), self.folder / f"damaged_{step}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for what is being written and free Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _DifferentTree(ValueError):
    """The checkpoint is intact but belongs to another model."""


def _brief(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def _check_same_tree(folder: Path, saved: Mapping[str, int], target: Any, manager: Any, step: int) -> None:
    leaves = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(target)[0]}
    missing, unknown = sorted(set(leaves) - set(saved)), sorted(set(saved) - set(leaves))
    if missing or unknown:
        raise _DifferentTree(
            f"{folder} holds another model: it lacks {missing[:3] or 'nothing'} and has in addition "
            f"{unknown[:3] or 'nothing'}; use the config it was made with, or another workdir"
        )
    shapes = {}
    with contextlib.suppress(KeyError, TypeError):
        metadata = manager.item_metadata(step)["state"]
        flat = jax.tree_util.tree_flatten_with_path(metadata)[0]
        shapes = {_plain(path): tuple(leaf.shape) for path, leaf in flat if getattr(leaf, "shape", None) is not None}
    for path, leaf in jax.tree_util.tree_flatten_with_path(target)[0]:
        found = shapes.get(_plain(path), tuple(leaf.shape))
        if found != tuple(leaf.shape) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise _DifferentTree(
                f"{folder}: {jax.tree_util.keystr(path)} has shape {found}, the model wants {tuple(leaf.shape)}; "
                "use the config it was made with, or another workdir"
            )


def _plain(path) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name in sorted(tree):
            yield from _flatten(tree[name], f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def check_config(workdir: str | os.PathLike, config: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> bool:
    """Compare ``config`` with ``workdir/config.json``, or write it there when the run is new.

    Returns True when the folder already held the same config (the run resumes). ignore: dotted names, or prefixes of
    them, that may change between runs. Raises ValueError listing every field that differs, with both values.
    """
    path = Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # the form it takes on disk: tuples become lists
    if not path.exists():
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            os.replace(draft, path)
        return False
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it, or choose another --workdir") from error
    old, new = dict(_flatten(stored)), dict(_flatten(config))
    absent = "(absent)"

    def differs(name):
        if any(name == skip or name.startswith(skip + ".") for skip in ignore):
            return False
        return old.get(name, absent) != new.get(name, absent)

    changed = [name for name in sorted({*old, *new}) if differs(name)]
    if changed:
        lines = "\n".join(f"  {name}: {old.get(name, absent)} -> {new.get(name, absent)}" for name in changed)
        raise ValueError(
            f"{workdir} was started with another config; differing fields (stored -> now):\n{lines}\n"
            f"Use the same values to resume, choose another --workdir, or delete {workdir} to start over"
        )
    return True
