"""Eight emulated CPU devices, quick compilation and a cache of it for the whole session, plus shared fixtures."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

_ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Set JAX up before any test module is imported: afterwards the backend is fixed for the process."""
    marks = config.option.markexpr or ""
    wants_accelerator = re.search(r"\bgpu\b", marks) and not re.search(r"\bnot gpu\b", marks)
    if not wants_accelerator:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    if not re.search(r"(?<!not )\b(slow|parity|real_data|gpu|tpu)\b", marks):
        # The default tests spend most of their time in the compiler; without its expensive passes they take two thirds
        # of it. The tests that a mark chooses (parity, real_data, slow) run what users run.
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(_ROOT / ".pytest_cache" / "jax")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Subprocesses that tests start (the command line, a killed and resumed run) share the cache.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Let go of a module's compiled programs behind it: each maps memory, a process may have 65530 maps, and XLA ends
    the process where it gets no further one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def key() -> jax.Array:
    """A typed JAX key with a fixed seed."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def run_pod() -> Callable[..., list[int]]:
    """``run_pod(words, logs, count=2, seconds=900, check=True)`` runs Python with ``words(address, process, count)`` in
    ``count`` processes on this machine at once, from the checkout's root; returns their exit codes. With ``check``,
    fails with the end of what they printed if one of them is not 0.
    """

    def run(
        words: Callable[[str, int, int], Sequence], logs: Path, count: int = 2, seconds: float = 900, check: bool = True
    ) -> list[int]:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {
            **os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(8 // count),
        }  # fmt: skip
        files = [logs / f"process{i}.log" for i in range(count)]
        processes = []
        try:
            for i, file in enumerate(files):
                command = [sys.executable, *map(str, words(address, i, count))]
                with file.open("w") as log:
                    processes.append(subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log))
            codes = [process.wait(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if check and any(codes):
            pytest.fail("\n".join([f"exit codes {codes}", *(file.read_text()[-3000:] for file in files)]))
        return codes

    return run


@pytest.fixture(scope="session")
def ml100k() -> Path:
    """Folder of the RecBole form of MovieLens-100K (`ml-100k.inter`, `.item`, `.user`), named by JAXREC_ML100K."""
    folder = os.environ.get("JAXREC_ML100K")
    if not folder:
        pytest.fail("set JAXREC_ML100K to the folder that holds ml-100k.inter (tests marked real_data need it)")
    path = Path(folder)
    if not (path / "ml-100k.inter").is_file():
        pytest.fail(f"JAXREC_ML100K={path} holds no ml-100k.inter")
    return path


@pytest.fixture(scope="session")
def easyep() -> Path:
    """Folder of expert masks as EASY-EP publishes them (`*.json`), named by JAXREC_EASYEP."""
    folder = os.environ.get("JAXREC_EASYEP")
    if not folder:
        pytest.fail("set JAXREC_EASYEP to a folder with EASY-EP's mask files (tests named easyep need it)")
    if not any(Path(folder).glob("*.json")):
        pytest.fail(f"JAXREC_EASYEP={folder} holds no *.json")
    return Path(folder)
