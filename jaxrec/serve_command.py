"""What `jaxrec serve` takes from the command line. Imports nothing heavy, as the command line does not."""

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxrec.config import UsageError, nearest

USAGE = "serve MODEL [--host=ADDRESS] [--port=N] [--mesh=tensor=N,...] [--int8] [--max_batch=N] [--max_len=N] ..."
LINE = "offer a language model over HTTP, in the OpenAI protocol"
DETAILS = """  MODEL                     a Hugging Face model folder, or a hub id
  --host=ADDRESS            where to listen (default 127.0.0.1: this machine alone; there is no login)
  --port=N                  (default 8000; 0 takes a free one)
  --name=NAME               of the model in requests (default: the folder's name, or the hub id)
  --dtype=float32|bfloat16  of the weights (default: as they are stored)
  --mesh=AXIS=N,...         the devices that share the work, all there are, by axis (default: one device alone):
                            tensor (matrices, heads and their cache), expert (experts), fsdp (matrices, which are
                            gathered in every step), data (copies of the model); answers are split over the last
                            three. One N may be -1, the rest: --mesh=tensor=4,data=-1
  --int8                    matrices in eight bits, one scale per output: a quarter of float32's memory and half of
                            bfloat16's once they are loaded; answers differ a little from the exact weights'
  --max_batch=N             answers made at a time (default 16); more requests wait
  --max_len=N               tokens of a prompt with its answer (default: the model's context)
  --slice_tokens=N          tokens made between two looks at the queue, and between parts of a stream (default 8)
  --max_waiting=N           requests that wait at most; then status 429 (default 256)
  --max_body=N              bytes of a request at most (default 4000000)
  --grace=N                 seconds that running answers get after Ctrl+C or SIGTERM (default 30)

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health. It needs pip install 'jaxrec[serve]'.
Programs are compiled for each size of batch and length when it first occurs."""
_AXES = ("data", "fsdp", "expert", "tensor")  # models.sharding.AXES, which imports JAX
_NUMBERS = (  # name, default, least, most
    ("port", 8000, 0, 65535),
    ("max_batch", 16, 1, 4096),
    ("max_len", None, 2, None),
    ("slice_tokens", 8, 1, 1024),
    ("max_waiting", 256, 1, None),
    ("max_body", 4_000_000, 1, None),
    ("grace", 30, 0, None),
)


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("host", "127.0.0.1", "address", flag_values=values)
    flags.DEFINE_string("name", None, "of the model", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the weights", flag_values=values)
    flags.DEFINE_list("mesh", [], "axes and sizes", flag_values=values)
    flags.DEFINE_boolean("int8", False, "matrices in eight bits", flag_values=values)
    for name, default, low, high in _NUMBERS:
        flags.DEFINE_integer(name, default, name, lower_bound=low, upper_bound=high, flag_values=values)


def mesh_sizes(words: Sequence[str]) -> dict[str, int]:
    """{axis: size} of words "axis=size". Raises UsageError for anything else, and for two axes that take the rest."""
    sizes: dict[str, int] = {}
    for word in words:
        axis, _, size = word.partition("=")
        if axis not in _AXES:
            raise UsageError(
                f"serve: --mesh has no axis '{axis}'{nearest(axis, _AXES)}; write --mesh=AXIS=N,AXIS=N with axes of "
                f"{', '.join(_AXES)}"
            )
        if axis in sizes:
            raise UsageError(f"serve: --mesh names {axis} twice")
        if not re.fullmatch(r"-1|[1-9]\d{0,5}", size):
            raise UsageError(f"serve: --mesh has {axis}={size}; a size is a number from 1, or -1 for what is left")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UsageError("serve: in --mesh only one size may be -1, what the others leave")
    return sizes


def make_mesh(model: str, sizes: dict[str, int]) -> Any:
    """The mesh (a ``jax.sharding.Mesh``) that the sizes name, or None where that is one device.

    Raises UsageError where it does not fit the devices there are, or the heads and experts of the model, of which only
    config.json is read.
    """
    if set(sizes.values()) <= {1}:
        return None

    from models import sharding
    from models.hf import read_config
    from models.params import check_mesh

    config = read_config(model)
    try:
        mesh = sharding.make_mesh(**sizes)
        check_mesh(config, mesh)
    except ValueError as error:
        raise UsageError(f"serve: --mesh: {error}") from error
    expert = mesh.shape["expert"]
    if expert > 1 and (not config.experts or config.experts % expert):
        have = f"{config.experts} experts" if config.experts else "no experts: give these devices to data or tensor"
        raise UsageError(f"serve: --mesh: expert={expert} needs a model whose experts it divides; this one has {have}")
    return mesh


def run(model: str, values: flags.FlagValues) -> None:
    """Serve until a signal. Raises UsageError where what it needs is not installed and for a mesh that does not fit."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve: {' and '.join(missing)} not installed: pip install 'jaxrec[serve]'")
    sizes = mesh_sizes(values.mesh)

    from jaxrec.serve import serve

    numbers = {name: values[name].value for name, *_ in _NUMBERS}
    mesh = make_mesh(model, sizes)
    serve(model, host=values.host, name=values.name, dtype=values.dtype, mesh=mesh, int8=values.int8, **numbers)
