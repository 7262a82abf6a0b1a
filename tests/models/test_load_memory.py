"""How much memory reading a checkpoint takes beside what it leaves: the arrays of the model.

A process of its own loads a folder while this one reads the size of its anonymous memory from /proc: mapped files do
not count there, neither do what earlier tests left behind and what JAX needs to begin with.
"""

import json
import select
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import Config, hf_read
from models.hf import Model

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000
# Of the interpreter, of threads and of compiled programs, whatever the size of the model.
CONSTANT = 30 * MEGABYTE
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
SIZES = {"vocab_size": 4096, "dim": 512, "layers": 6, "heads": 8, "kv_heads": 4, "head_dim": 64, "init_std": 0.3}
CONFIGS = {
    "dense": Config(**SIZES, ffn_dim=4096, family="qwen3", qk_norm=True, tie_embeddings=False),
    "experts": Config(
        **SIZES, ffn_dim=512, family="qwen3_moe", qk_norm=True, experts=8, top_k=2, tie_embeddings=False
    ),
}  # fmt: skip

CHILD = """
import json, sys
import jax
folder, mesh, dtype = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] or None
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8 if mesh else 1)
import safetensors, models, models.hf
jax.block_until_ready([jax.device_put(1.0, device) + 1 for device in jax.devices()])
mesh = models.make_mesh(**mesh) if mesh else None
print("ready", flush=True)
sys.stdin.readline()
params = jax.block_until_ready(models.load(folder, mesh, dtype).params)
buffers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards}
pieces = [s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards]
print(json.dumps({"buffers": sum(buffers.values()), "largest": max(pieces)}), flush=True)
sys.stdin.readline()
"""


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file stands behind."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    pytest.skip("this system does not say how much memory of a process is anonymous")


def measured(folder: Path, mesh: dict[str, int] | None = None, dtype: str = "") -> dict[str, int]:
    """{"peak": most memory while loading beyond that before, "buffers": of the arrays, "largest": of a piece}."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is read from /proc")
    words = [sys.executable, "-c", CHILD, str(folder), json.dumps(mesh or {}), dtype]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous(child.pid)
        print("go", file=child.stdin, flush=True)
        while not select.select([child.stdout], [], [], 0.001)[0]:
            peak = max(peak, anonymous(child.pid))
        found = json.loads(child.stdout.readline())
        peak = max(peak, anonymous(child.pid))
    return {"peak": peak - before, **found}


def written(config: Config, path: Path) -> Path:
    """A random checkpoint in float32."""
    models.save(Model(config, models.init(config, jax.random.key(0))), path, max_shard_bytes=60 * MEGABYTE)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(CONFIGS["dense"], tmp_path_factory.mktemp("dense") / "model")


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_device_takes_little_more_than_the_model(name, folder, tmp_path):
    folder = folder if name == "dense" else written(CONFIGS[name], tmp_path / "model")
    found = measured(folder)
    assert found["buffers"] == pytest.approx(stored(folder), rel=0.01)
    assert 150 * MEGABYTE < found["buffers"] < found["peak"] + CONSTANT  # what is measured is there
    assert found["peak"] <= 1.1 * found["buffers"] + CONSTANT, found


def test_another_dtype_takes_no_second_copy(folder):
    found = measured(folder, dtype="bfloat16")
    assert found["buffers"] == pytest.approx(stored(folder) / 2, rel=0.01)
    assert found["peak"] <= 1.1 * found["buffers"] + CONSTANT, found


def test_a_mesh_takes_less_than_a_piece_beside_its_buffers(folder):
    found = measured(folder, {"data": 2, "fsdp": 2, "tensor": 2})
    assert found["peak"] - found["buffers"] <= 1.3 * found["largest"] + CONSTANT, found


def test_eight_bit_weights_take_little_more_than_they_become(folder, tmp_path):
    block = 128
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        tensors = {}
        for key, value in load_file(folder / name).items():
            if key.endswith("_proj.weight"):
                scales = key + "_scale_inv"
                tensors[scales] = np.full([-(-n // block) for n in value.shape], 0.5, np.float32)
                index["weight_map"][scales] = name
            tensors[key] = value.astype(jnp.float8_e4m3fn if key.endswith("_proj.weight") else jnp.bfloat16)
        save_file(tensors, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = measured(tmp_path)
    assert found["buffers"] == pytest.approx(stored(folder) / 2, rel=0.01)  # bfloat16
    assert found["peak"] <= 1.2 * found["buffers"] + CONSTANT, found


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_only_blocks_lie_in_host_memory(axes, folder, monkeypatch):
    """With devices whose memory is not the host's, which a copy stands for here: NumPy's arrays are traced, and JAX's
    are not."""

    def send(x, device=None):
        return jax.block_until_ready(jnp.array(x, copy=True, device=device))

    mesh = models.make_mesh(**axes)
    monkeypatch.setattr(jax, "device_put", send)
    monkeypatch.setattr(hf_read, "_BLOCK", 500_000)
    tracemalloc.start()
    try:
        params = models.load(folder, mesh).params
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert largest > 5 * MEGABYTE
    assert peak <= 1.3 * largest + CONSTANT
    assert peak <= 4 * 2 * MEGABYTE + 2 * MEGABYTE, peak  # four blocks in float32, and Python's own objects


@pytest.mark.parametrize(
    ("name", "axes"),
    [("qwen2", None), ("llama", {"data": 2, "fsdp": 2, "tensor": 2}), ("deepseek_v3", {"fsdp": 4, "expert": 2})],
)
def test_blocks_come_together_to_the_same_arrays(name, axes, monkeypatch):
    mesh = None if axes is None else models.make_mesh(**axes)
    plain = models.load(FIXTURES / name, mesh)
    whole, read = hf_read._read_piece, []
    monkeypatch.setattr(hf_read, "_BLOCK", 900)
    monkeypatch.setattr(hf_read, "_read_piece", lambda *a: read.append(whole(*a)) or read[-1])
    found = models.load(FIXTURES / name, mesh).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(plain.params))
    assert max(x.size for x in read) <= 900
    if mesh is None:
        assert not any(x.committed for x in jax.tree.leaves(found))
    else:
        wanted = models.shardings(plain.config, mesh)
        assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), found, wanted))
