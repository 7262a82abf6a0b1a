"""What `jaxrec serve` takes from the command line. Imports nothing heavy, as the command line does not."""

import importlib.util

from absl import flags

from jaxrec.config import UsageError

USAGE = "serve MODEL [--host=ADDRESS] [--port=N] [--name=NAME] [--max_batch=N] [--max_len=N] [--dtype=bfloat16] ..."
LINE = "offer a language model over HTTP, in the OpenAI protocol"
DETAILS = """  MODEL                     a Hugging Face model folder, or a hub id
  --host=ADDRESS            where to listen (default 127.0.0.1: this machine alone; there is no login)
  --port=N                  (default 8000; 0 takes a free one)
  --name=NAME               of the model in requests (default: the folder's name, or the hub id)
  --dtype=float32|bfloat16  of the weights (default: as they are stored)
  --max_batch=N             answers made at a time (default 16); more requests wait
  --max_len=N               tokens of a prompt with its answer (default: the model's context)
  --slice_tokens=N          tokens made between two looks at the queue, and between parts of a stream (default 8)
  --max_waiting=N           requests that wait at most; then status 429 (default 256)
  --max_body=N              bytes of a request at most (default 4000000)
  --grace=N                 seconds that running answers get after Ctrl+C or SIGTERM (default 30)

POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health. It needs pip install 'jaxrec[serve]'.
Programs are compiled for each size of batch and length when it first occurs."""
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
    for name, default, low, high in _NUMBERS:
        flags.DEFINE_integer(name, default, name, lower_bound=low, upper_bound=high, flag_values=values)


def run(model: str, values: flags.FlagValues) -> None:
    """Serve until a signal. Raises UsageError where what it needs is not installed."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve: {' and '.join(missing)} not installed: pip install 'jaxrec[serve]'")

    from jaxrec.serve import serve

    numbers = {name: values[name].value for name, *_ in _NUMBERS}
    serve(model, host=values.host, name=values.name, dtype=values.dtype, **numbers)
