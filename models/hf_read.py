"""The safetensors of a Hugging Face folder, read into (sharded) arrays block by block.

A parameter of :func:`models.params.declare` is a stack of tensors of the file, turned and with heads unfolded. Neither
it nor the piece of it that a device holds ever lies in host memory as a whole: blocks are read, handed to the devices,
and put into the array there.
"""

import contextlib
import functools
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.config import Config
from models.params import Param, declare
from models.sharding import sharding_for

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Eight-bit weights are multiplied by the scales of their blocks as they are read, and are bfloat16 from there on.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "F8_E4M3": jnp.bfloat16}
_SCALES = "_scale_inv"  # the tensor with the scales of the one without this ending
_TEXT_PREFIX = re.compile(r"(model\.)?language_model\.(model\.)?")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Present in some files, computed by us: rotary frequencies, and the second name of tied embeddings.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")
_BLOCK = 2_000_000  # numbers that are read at once, of all pieces together: with fewer, starting programs shows


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model folder holds config.json and safetensors") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def leaves(config: Config) -> list[Param]:
    return jax.tree.leaves(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))


class Checkpoint(contextlib.ExitStack):
    """The open safetensors files of one folder, checked against the declaration before anything is read."""

    def __init__(self, folder: Path, config: Config, block: tuple[int, int]):
        super().__init__()
        self._folder, self._block = folder, block
        self._starts: dict[str, dict[str, int]] = {}  # file -> tensor -> its first byte
        self._theirs: dict[str, str] = {}  # our name of a tensor -> the file's, where that is another
        self._files: dict[str, Any] = {}
        self._where = self._locate()
        try:
            self._check(config)
        except BaseException:
            self.close()
            raise

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name. In a model with images, without what precedes the language model's own names."""
        where = self._read_index()
        if not any(_TEXT_PREFIX.match(name) for name in where):
            return where
        others = [name for name in where if not _TEXT_PREFIX.match(name)]
        if others:
            warnings.warn(f"{self._folder}: {len(others)} tensors beside the language model are left out", stacklevel=5)
        for name in where.keys() - set(others):
            rest = name[_TEXT_PREFIX.match(name).end() :]
            self._theirs[rest if rest.startswith("lm_head.") else "model." + rest] = name
        return {ours: where[theirs] for ours, theirs in self._theirs.items()}

    def _read_index(self) -> dict[str, str]:
        if (self._folder / INDEX).is_file():
            where = read_json(self._folder / INDEX).get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(f"{self._folder / INDEX}: no object 'weight_map'")
            return where
        if (self._folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        hint = f"{self._folder} holds neither {SINGLE} nor {INDEX}"
        if any(self._folder.glob("pytorch_model*.bin")):
            hint += "; its pytorch_model.bin is a pickle, which is never read: convert it to safetensors"
        raise FileNotFoundError(hint)

    def _open(self, name: str):
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            try:
                self._files[name] = self.enter_context(safe_open(self._folder / name, framework="numpy"))
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self._folder / name} is named by {INDEX} but does not exist; fetch the folder again"
                ) from None
            except SafetensorError as error:
                raise ValueError(f"{self._folder / name}: damaged or no safetensors file: {error}") from error
        return self._files[name]

    def _advice(self) -> str:
        """What to do about missing tensors."""
        unnamed = sorted({file.name for file in self._folder.glob("*.safetensors")} - set(self._where.values()))
        if unnamed and (self._folder / INDEX).is_file():
            return f"{some(unnamed)} lies there, but {INDEX} does not name it: fetch the index again"
        return "fetch the folder again, or correct config.json"

    def _check(self, config: Config) -> None:
        expected = {name: p.hf_shape for p in leaves(config) for name in p.hf_names}
        missing = sorted(expected.keys() - self._where.keys())
        if missing:
            raise ValueError(f"{self._folder}: {len(missing)} tensors are missing: {some(missing)}; {self._advice()}")
        allowed = {"lm_head.weight"} if config.tie_embeddings else set()
        extra = [n for n in self._where.keys() - expected.keys() - allowed if not _DERIVED.fullmatch(n)]
        extra = [n for n in extra if not (n.endswith(_SCALES) and n.removesuffix(_SCALES) in expected)]
        # Modules for multi-token prediction stand behind the last layer, and are no part of the language model.
        behind = [n for n in extra if (found := _LAYER.match(n)) and int(found[1]) >= config.layers]
        if behind and config.kv_lora:
            warnings.warn(
                f"{self._folder}: {len(behind)} tensors of layers from {config.layers} on (multi-token prediction) are "
                "left out",
                stacklevel=4,
            )
            extra = sorted(set(extra) - set(behind))
        if extra:
            found = sorted(f"{n} (in {self._where[n]})" for n in extra)
            raise ValueError(
                f"{self._folder}: {len(extra)} tensors that a {config.family} has no place for: {some(found)}; is this "
                "config.json that of these files?"
            )
        for name, shape in expected.items():
            file = self._open(self._where[name])
            try:
                piece = file.get_slice(self._theirs.get(name, name))
            except Exception as error:  # the Rust library's own error type
                raise ValueError(f"{self._folder / self._where[name]}: cannot read tensor {name}: {error}") from error
            if tuple(piece.get_shape()) != shape:
                raise ValueError(
                    f"{self._folder / self._where[name]}: tensor {name} has shape {tuple(piece.get_shape())}, "
                    f"config.json asks for {shape}: they are not of one model"
                )
            if piece.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{self._folder / self._where[name]}: tensor {name} has type {piece.get_dtype()}; "
                    f"readable: {', '.join(_DTYPES)}"
                )
            if piece.get_dtype() == "F8_E4M3":
                self._slice(name)

    def _slice(self, name: str) -> Any:
        """A tensor of which parts can be read, with ``get_shape``, ``get_dtype`` and slices as safetensors has them."""
        file, theirs = self._folder / self._where[name], self._theirs.get(name, name)
        piece = self._open(self._where[name]).get_slice(theirs)
        if piece.get_dtype() != "F8_E4M3":
            return piece
        if name + _SCALES not in self._where:
            raise ValueError(f"{file}: tensor {name} has eight bits, but its scales {name + _SCALES} are missing")
        scales = self._open(self._where[name + _SCALES]).get_tensor(theirs + _SCALES)
        if file.name not in self._starts:
            self._starts[file.name] = _tensor_starts(file)
        shape, start = tuple(piece.get_shape()), self._starts[file.name][theirs]
        return _Scaled(file, name, shape, start, np.asarray(scales, np.float32), self._block)

    def read(self, param: Param, mesh: jax.sharding.Mesh | None, dtype: str | None) -> jax.Array:
        """One parameter as an array; each piece that devices share is read once."""
        slices = [self._slice(n) for n in param.hf_names]
        kinds = {_DTYPES[s.get_dtype()] for s in slices}
        kind = jnp.dtype(dtype) if dtype else jnp.result_type(*kinds)
        kind = jnp.dtype("float32") if param.exact else kind
        sharding = sharding_for(mesh, param.shape, param.axes)
        pieces = _pieces(param.shape, sharding)  # all of one size, since axes are split evenly
        sizes = [len(r) for r in next(iter(pieces))]
        # So many pieces at most are read here. The same number in every process, since all insert the same blocks.
        count = math.prod(param.shape) // math.prod(sizes)
        count = count if mesh is None else min(count, -(-mesh.size // jax.process_count()))
        blocks = list(_blocks(sizes, _reading_order(param), max(1, _BLOCK // count)))

        def put(block: tuple[range, ...]) -> jax.Array:
            """A block of every piece, on the devices."""
            parts = []
            for piece, devices in pieces.items():
                part = tuple(r[b.start : b.stop] for r, b in zip(piece, block, strict=True))
                host = _read_piece(param, slices, part, kind)
                parts += [jax.device_put(host, device) for device in devices]
            if sharding is None:
                return parts[0]
            shape = tuple(n // s * len(b) for n, s, b in zip(param.shape, sizes, block, strict=True))
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        if len(blocks) == 1:
            return put(blocks[0])
        whole = _zeros(param.shape, kind, sharding)
        for block in blocks:
            part = put(block)
            jax.block_until_ready(whole)  # at most two blocks are under way
            whole = _insert(whole, part, np.array([b.start for b in block], np.int32), sharding)
        return jax.block_until_ready(whole)


def _pieces(shape: tuple[int, ...], sharding: NamedSharding | None) -> dict[tuple[range, ...], list]:
    """The distinct parts of an array that this process's devices hold -> those devices (None: the default one)."""
    if sharding is None:
        return {tuple(map(range, shape)): [None]}
    out: dict[tuple[range, ...], list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        out.setdefault(tuple(range(*s.indices(n)) for s, n in zip(index, shape, strict=True)), []).append(device)
    return out


def _reading_order(param: Param) -> list[int]:
    """Axes to cut along, first those that change the tensor, then that of the rows in the file."""
    axes = param.axes[param.stacked :]
    last = len(param.axes) - 1 - (axes[-1] == "head_dim" and len(axes) > 1)
    return [*range(param.stacked), last if param.transpose else param.stacked]


def _blocks(sizes: list[int], order: list[int], limit: int) -> Iterator[tuple[range, ...]]:
    """Cut an array of these sizes into blocks of at most ``limit`` numbers, as far as cutting in this order allows."""
    if not order or math.prod(sizes) <= limit:
        yield tuple(map(range, sizes))
        return
    axis, *rest = order
    row = math.prod(sizes) // sizes[axis]
    step = max(1, limit // row)
    for start in range(0, sizes[axis], step):
        along = range(start, min(start + step, sizes[axis]))
        inner = [*sizes[:axis], len(along), *sizes[axis + 1 :]]
        for block in _blocks(inner, rest, limit):
            yield (*block[:axis], along, *block[axis + 1 :])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    zeros = jnp.zeros(shape, dtype)
    return zeros if sharding is None else jax.lax.with_sharding_constraint(zeros, sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _insert(whole: jax.Array, part: jax.Array, start: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """``whole`` with ``part`` at ``start`` of every device's piece. Donated, so that no second array is made."""

    def insert(whole, part, start):
        return jax.lax.dynamic_update_slice(whole, part, tuple(start))

    if sharding is None:
        return insert(whole, part, start)
    specs = sharding.spec, sharding.spec, PartitionSpec()
    return jax.shard_map(insert, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(whole, part, start)


def _tensor_starts(file: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, in bytes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class _Scaled:
    """A matrix of eight-bit floats in a safetensors file, multiplied by the scales of its blocks as parts are read.

    The library has no such type for NumPy, so the bytes are mapped from the file here.
    """

    def __init__(
        self, file: Path, name: str, shape: tuple[int, ...], start: int, scales: np.ndarray, block: tuple[int, int]
    ):
        self._bytes = np.memmap(file, jnp.float8_e4m3fn, "r", start, shape)
        self._scales, self._block = scales, block
        wanted = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
        if scales.shape != wanted:
            raise ValueError(
                f"{file}: the scales of {name} have shape {scales.shape}; blocks of {block} in {shape} need {wanted}"
            )

    def get_shape(self) -> list[int]:
        return list(self._bytes.shape)

    def get_dtype(self) -> str:
        return "F8_E4M3"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (np.arange(n)[part] for n, part in zip(self._bytes.shape, index, strict=True))
        out = self._bytes[index].astype(np.float32)
        out *= self._scales[np.ix_(rows // self._block[0], columns // self._block[1])]
        return out


def _read_piece(param: Param, slices: list, ranges: tuple[range, ...], dtype: np.dtype) -> np.ndarray:
    """Part ``ranges`` of a parameter, read from one tensor per layer (and expert), in our layout."""
    out = np.empty([len(r) for r in ranges], dtype)
    leading, rest = ranges[: param.stacked], list(ranges[param.stacked :])
    for row in np.ndindex(*map(len, leading)):
        at = [r[i] for r, i in zip(leading, row, strict=True)]
        number = int(np.ravel_multi_index(at, param.shape[: param.stacked])) if at else 0
        out[row] = _read_layer(param, slices[number], rest)
    return out


def _read_layer(param: Param, tensor, ranges: list[range]) -> np.ndarray:
    """Part ``ranges`` (in our axes, without the stacked ones) of one HF tensor, turned and with heads unfolded."""
    shape = [len(r) for r in ranges]
    axes = param.axes[param.stacked :]
    if "head_dim" in axes and len(axes) > 1:  # heads and head_dim are one axis in the file; head_dim is never split
        at, width = axes.index("head_dim"), param.shape[-len(axes) :][axes.index("head_dim")]
        folded = range(ranges[at - 1].start * width, ranges[at - 1].stop * width)
        ranges = [*ranges[: at - 1], folded, *ranges[at + 1 :]]
    if param.transpose:
        return tensor[tuple(slice(r.start, r.stop) for r in reversed(ranges))].T.reshape(shape)
    return tensor[tuple(slice(r.start, r.stop) for r in ranges)].reshape(shape)


def some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
