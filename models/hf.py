"""Hugging Face folders: read straight into (sharded) arrays, written back as transformers and vLLM read them.

Names, shapes and transposes come from :func:`models.params.declare` alone. Nothing is ever held twice, see
:mod:`models.hf_read`.
"""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import lora
from models.config import Config
from models.hf_config import config_from_hf, config_to_hf, text_part
from models.hf_read import INDEX, SINGLE, Checkpoint, read_json, some
from models.params import Param, Params, check_mesh, declare
from models.sharding import barrier, to_host
from models.tokenizer import FILES, Tokenizer, load_tokenizer

# What a model folder may hold; anything else keeps `save` from replacing the folder.
_OWN = re.compile(
    r"(config|generation_config|model\.safetensors\.index)\.json|.*\.safetensors|README\.md|LICENSE.*|NOTICE.*|"
    r"\.gitattributes|" + "|".join(map(re.escape, FILES))
)

_DESCRIPTION = ("config.json", "generation_config.json")
_PARTS = (*_DESCRIPTION, "*.safetensors", INDEX, *FILES)  # what is fetched from the hub


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
    unexpected or of the wrong shape, by name and file; a mesh whose ``tensor`` does not divide the heads).
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32', 'bfloat16' or None (as stored), not {dtype!r}")
    folder = _find(path)
    config, fields, generation = _described(folder)
    check_mesh(config, mesh)
    block = tuple((fields.get("quantization_config") or {}).get("weight_block_size") or (1, 1))
    with Checkpoint(folder, config, block) as checkpoint:
        read = lambda param: checkpoint.read(param, mesh, dtype)  # noqa: E731
        params = jax.tree.map(read, declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))
    compute = "bfloat16" if params["embed"].dtype == jnp.bfloat16 else "float32"
    return Model(config.replace(dtype=compute), params, load_tokenizer(folder), fields, generation)


def read_config(path: str | Path) -> Config:
    """What :func:`load` would give for the model's config, but for ``dtype``; no weight is read or downloaded.

    Raises FileNotFoundError and ValueError as ``load`` does.
    """
    return _described(_find(path, _DESCRIPTION))[0]


def _described(folder: Path) -> tuple[Config, dict[str, Any], dict[str, Any] | None]:
    """The config that a folder's JSON files describe, and their fields."""
    fields = text_part(read_json(folder / "config.json"), folder / "config.json")
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json")
    return config_from_hf(fields, folder / "config.json", generation), fields, generation


def _find(path: str | Path, parts: Sequence[str] = _PARTS) -> Path:
    """The folder of a checkpoint: ``path`` itself, or a snapshot of the hub with the files that ``parts`` name."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{name} is not a folder; give a folder with config.json, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(parts)))
    except Exception as error:  # the hub's client raises types of its own, which change with its HTTP library
        raise FileNotFoundError(
            f"{name} is no folder here and could not be downloaded from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); on a machine without network give the path of a local folder"
        ) from error


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
            f"{path} holds things that are no part of a model ({some(foreign)}); choose another folder"
        )
    config = path / "config.json"
    if config.is_file() and "model_type" not in read_json(config):
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
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: fetch() for name, fetch, _ in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
