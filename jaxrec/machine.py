"""What takes part in a run: the processes of a pod, and the optional parts of this machine. JAX is imported late."""

import importlib.util
import re

from jaxrec.config import UsageError


def _place_among(text: str) -> tuple[str, int, int] | tuple[()]:
    """The value of --distributed as (address, process, count); empty where the machines themselves know."""
    if not text:
        return ()
    match = re.fullmatch(r"([^\s,:]+|\[[0-9a-fA-F:]+\]):(\d+),(\d+),(\d+)", text)
    if match is None:
        raise UsageError(
            f"--distributed={text}: expected host:port,process,count, for instance 10.0.0.1:8476,0,2 for the first of "
            "two processes; without a value on a pod of TPUs"
        )
    host, port, process, count = match[1], *map(int, match.groups()[1:])
    if not 0 < port < 65536:
        raise UsageError(f"--distributed={text}: port {port} lies outside 1 to 65535")
    if process >= count:
        raise UsageError(f"--distributed={text}: process {process} of {count}; processes count from 0 to {count - 1}")
    return f"{host}:{port}", process, count


def join(text: str) -> bool:
    """Makes this process one of several; whether it is the first one, which alone writes what the user reads."""
    where = _place_among(text)
    import jax

    from models import sharding

    try:
        sharding.join(*where)
    except ValueError as error:
        raise UsageError(
            f"--distributed finds no pod or cluster here ({error}); say who takes part: --distributed=host:port,"
            "process,count"
        ) from error
    return jax.process_index() == 0


def wait(distributed: str | None, name: str) -> None:
    """Waits for the other processes, if there are any; ``distributed`` is the flag's value."""
    if distributed is not None:
        from models.sharding import barrier

        barrier(name)


def optional_parts() -> list[tuple[str, str]]:
    """What is installed, found without importing any of it."""

    def state(module: str, present: str, absent: str) -> str:
        return present if importlib.util.find_spec(module) else absent

    return [
        (
            "GPU",
            state("jax_cuda13_plugin", "JAX's CUDA plugin installed", "no CUDA plugin: pip install 'jaxrec[cuda]'"),
        ),
        ("TPU", state("libtpu", "libtpu installed", "no libtpu: pip install 'jaxrec[tpu]'")),
        ("torch", state("torch", "installed (live parity tests)", "not installed: only `-m parity` tests need it")),
        ("trl", state("trl", "installed (live parity tests)", "not installed: only `-m parity` tests need it")),
    ]
