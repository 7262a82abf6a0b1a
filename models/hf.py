"""Hugging Face folders: read straight into (sharded) arrays, written back as transformers and vLLM read them.

Names, shapes and transposes come from :func:`models.params.declare` alone. Nothing is ever held twice: a device's piece
of a parameter is read from the file, handed to the device and forgotten.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import lora
from models.config import Config
from models.hf_config import config_from_hf, config_to_hf, text_part
from models.params import Param, Params, declare
from models.sharding import barrier, sharding_for, to_host
from models.tokenizer import FILES, Tokenizer, load_tokenizer

# Eight-bit weights are multiplied by the scales of their blocks as they are read, and are bfloat16 from there on.
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "F8_E4M3": jnp.bfloat16}
_SCALES = "_scale_inv"  # the tensor with the scales of the one without this ending
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Present in some files, computed by us: rotary frequencies, and the second name of tied embeddings.
_TEXT_PREFIX = re.compile(r"(model\.)?language_model\.(model\.)?")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DERIVED = re.compile(r".*rotary_emb\.inv_freq")
# What a model folder may hold; anything else keeps `save` from replacing the folder.
_OWN = re.compile(
    r"(config|generation_config|model\.safetensors\.index)\.json|.*\.safetensors|README\.md|LICENSE.*|NOTICE.*|"
    r"\.gitattributes|" + "|".join(map(re.escape, FILES))
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model: ``config``, ``params`` (tree of ``models.params.declare``) and ``tokenizer`` (or None).

    hf_config, generation_config: the JSON fields it was loaded with, so that saving keeps what we do not interpret.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer | None = None
    hf_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None

    def replace(self, **changes) -> "Model":
        """A copy with other weights, config or tokenizer."""
        return dataclasses.replace(self, **changes)


def load(path: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None) -> Model:
    """Read a checkpoint of Llama 2 and 3, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text), Mixtral, Qwen3-MoE, OLMoE,
    DeepSeek-V2 or DeepSeek-V3 (R1).

    path: a folder with config.json and safetensors (one file, or shards with an index), or the id of a model on the
    Hugging Face hub ("Qwen/Qwen3-0.6B"), which is downloaded.
    mesh: each device reads its own slices of the files; without one the weights go to the default device.
    dtype: "float32" or "bfloat16" for weights and activations; None keeps every tensor's own type, and computes in
    bfloat16 if the embedding is stored in it, else in float32 (float16 has too small a range for training). Weights of
    eight bits with a scale per block (DeepSeek-V3) become bfloat16. Of a Gemma 3 with images the language model is
    read. What is no part of that (images, modules that predict more than the next token) is left out, with a warning
    that counts its tensors.
    A folder without tokenizer files gives ``tokenizer=None``.

    Raises FileNotFoundError (no such folder or file) and ValueError (something not implemented; tensors missing,
    unexpected or of the wrong shape, by name and file).
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32', 'bfloat16' or None (as stored), not {dtype!r}")
    folder = _find(path)
    fields = text_part(_read_json(folder / "config.json"), folder / "config.json")
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = _read_json(folder / "generation_config.json")
    config = config_from_hf(fields, folder / "config.json", generation)
    block = tuple((fields.get("quantization_config") or {}).get("weight_block_size") or (1, 1))
    with _Checkpoint(folder, config, block) as checkpoint:
        read = lambda param: checkpoint.read(param, mesh, dtype)  # noqa: E731
        params = jax.tree.map(read, declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))
    compute = "bfloat16" if params["embed"].dtype == jnp.bfloat16 else "float32"
    return Model(config.replace(dtype=compute), params, load_tokenizer(folder), fields, generation)


def _find(path: str | Path) -> Path:
    """The folder of a checkpoint: ``path`` itself, or a snapshot of the hub."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{name} is not a folder; give a folder with config.json, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "generation_config.json", "*.safetensors", _INDEX, *FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises types of its own, which change with its HTTP library
        raise FileNotFoundError(
            f"{name} is no folder here and could not be downloaded from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); on a machine without network give the path of a local folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model folder holds config.json and safetensors") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _leaves(config: Config) -> list[Param]:
    return jax.tree.leaves(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))


class _Checkpoint(contextlib.ExitStack):
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
        if (self._folder / _INDEX).is_file():
            where = _read_json(self._folder / _INDEX).get("weight_map")
            if not isinstance(where, dict):
                raise ValueError(f"{self._folder / _INDEX}: no object 'weight_map'")
            return where
        if (self._folder / _SINGLE).is_file():
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        hint = f"{self._folder} holds neither {_SINGLE} nor {_INDEX}"
        if any(self._folder.glob("pytorch_model*.bin")):
            hint += "; its pytorch_model.bin is a pickle, which is never read: convert it to safetensors"
        raise FileNotFoundError(hint)

    def _open(self, name: str):
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            try:
                self._files[name] = self.enter_context(safe_open(self._folder / name, framework="numpy"))
            except FileNotFoundError:
                raise FileNotFoundError(f"{self._folder / name} is named by {_INDEX} but does not exist") from None
            except SafetensorError as error:
                raise ValueError(f"{self._folder / name}: damaged or no safetensors file: {error}") from error
        return self._files[name]

    def _check(self, config: Config) -> None:
        expected = {name: p.hf_shape for p in _leaves(config) for name in p.hf_names}
        missing = sorted(expected.keys() - self._where.keys())
        if missing:
            raise ValueError(f"{self._folder}: {len(missing)} tensors are missing: {_some(missing)}")
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
                f"{self._folder}: {len(extra)} tensors that a {config.family} has no place for: {_some(found)}"
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
                    f"config.json asks for {shape}"
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
        if sharding is None:
            return jax.device_put(_read_piece(param, slices, (slice(None),) * len(param.shape), kind))
        by_piece: dict[tuple, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(param.shape).items():
            by_piece.setdefault(tuple(s.indices(n)[:2] for s, n in zip(index, param.shape)), []).append(device)
        arrays = []
        for bounds, devices in by_piece.items():
            piece = _read_piece(param, slices, tuple(slice(*b) for b in bounds), kind)
            arrays += [jax.device_put(piece, device) for device in devices]
        return jax.make_array_from_single_device_arrays(param.shape, sharding, arrays)


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
        scales = self._scales[np.ix_(rows // self._block[0], columns // self._block[1])]
        return self._bytes[index].astype(np.float32) * scales


def _read_piece(param: Param, slices: list, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """Block ``index`` of a parameter, read from one tensor per layer (and expert), in our layout."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, param.shape)]
    out = np.empty([len(r) for r in ranges], dtype)
    leading, rest = ranges[: param.stacked], ranges[param.stacked :]
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


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def save(model: Model, path: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write ``model`` as a Hugging Face folder: config.json, safetensors (+ index when sharded), tokenizer files.

    What was loaded and not changed comes out bit for bit, config fields that we do not interpret included. Low-rank
    changes are merged. The folder
    appears complete or not at all: it is written beside its place and renamed. An existing model folder is replaced.

    max_shard_bytes: a new file is begun before this size is exceeded (a larger tensor has a file of its own).
    Where there are several processes all must call this; the first one writes, and it returns when the folder is there.
    Raises FileExistsError when ``path`` is a folder that holds other things, ValueError when the parameters are not
    those of the config or the family cannot express it.
    """
    path = Path(path).expanduser().resolve()
    params, config = lora.merge(model.params, model.config)
    model = model.replace(params=params, config=config)
    plan = _plan(model)
    dtypes = {array.dtype.name for array in jax.tree.leaves(model.params)}
    dtype = model.params["embed"].dtype.name
    if not dtypes <= {"float32", "float16", "bfloat16"}:
        raise ValueError(
            f"parameters of type {', '.join(sorted(dtypes))}: only float32, float16 and bfloat16 are written"
        )
    fields = config_to_hf(model.config, dtype, model.hf_config, model.generation_config)
    _refuse_foreign(path)
    barrier(f"before {path}")  # nobody may look at the folder while it is replaced
    if jax.process_index():
        for _, fetch, _ in plan:  # parts of it lie here
            fetch()
    else:
        _write(model, path, plan, fields, max_shard_bytes)
    barrier(f"after {path}")


def _write(model: Model, path: Path, plan: list, fields: dict[str, Any], max_shard_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        _write_tensors(temporary, plan, max_shard_bytes)
        _write_json(temporary / "config.json", fields)
        if model.generation_config is not None:
            _write_json(temporary / "generation_config.json", model.generation_config)
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _refuse_foreign(path: Path) -> None:
    """Only a model folder (or an empty one) may be replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; give the folder to write the model into")
    foreign = sorted(p.name for p in path.iterdir() if not (p.is_file() and _OWN.fullmatch(p.name)))
    if foreign:
        raise FileExistsError(
            f"{path} holds things that are no part of a model ({_some(foreign)}); choose another folder"
        )
    config = path / "config.json"
    if config.is_file() and "model_type" not in _read_json(config):
        raise FileExistsError(f"{config} is not a model's; choose another folder")


def _replace(temporary: Path, path: Path) -> None:
    """Put the finished folder in place; a reader sees the old folder or the new one."""
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        os.replace(path, old)  # onto an empty folder: allowed by POSIX
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)


def _plan(model: Model) -> list[tuple[str, Callable[[], np.ndarray], int]]:
    """(HF name, function that fetches the tensor in HF layout, its bytes) in the order of the network."""
    declared, tree = jax.tree.flatten(declare(model.config), is_leaf=lambda leaf: isinstance(leaf, Param))
    arrays, found = jax.tree.flatten(model.params)
    if found != tree:
        raise ValueError(f"the parameters are not those of the config: expected {tree}, found {found}")
    head, blocks, tail = [], [], []
    for param, array in zip(declared, arrays, strict=True):
        if tuple(array.shape) != param.shape:
            raise ValueError(
                f"parameter of {param.hf} has shape {tuple(array.shape)}, the config asks for {param.shape}"
            )
        for i, name in enumerate(param.hf_names):
            at = tuple(int(n) for n in np.unravel_index(i, param.shape[: param.stacked])) if param.stacked else ()
            entry = (name, _fetcher(param, array, at), array.nbytes // len(param.hf_names))
            if param.stacked:
                blocks.append((at, entry))
            else:
                (head if param.hf.endswith("embed_tokens.weight") else tail).append(entry)
    return head + [entry for _, entry in sorted(blocks, key=lambda pair: pair[0][0])] + tail


def _fetcher(param: Param, array: jax.Array, at: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        value = to_host(array[at])
        value = value.reshape(param.hf_shape[::-1] if param.transpose else param.hf_shape)
        return np.ascontiguousarray(value.T if param.transpose else value)

    return fetch


def _shards(plan, max_bytes: int) -> Iterator[list]:
    shard, size = [], 0
    for entry in plan:
        _, _, nbytes = entry
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard


def _write_tensors(folder: Path, plan, max_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards = list(_shards(plan, max_bytes))
    where, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: fetch() for name, fetch, _ in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
