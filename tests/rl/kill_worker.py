"""Run in a subprocess by test_checkpoint.py: train the tiny model, saving every step, until done or killed.

python kill_worker.py WORKDIR STEPS
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

from rl.checkpoint import Checkpointer  # noqa: E402
from rl.metrics import MetricsWriter  # noqa: E402
from rl.optimizer import init_state  # noqa: E402
from rl.trainer import train  # noqa: E402


def main(workdir: Path, steps: int):
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.grpo_config(save_every=1)
    with (
        MetricsWriter(workdir, "rl", steps, console=False) as writer,
        Checkpointer(workdir / "checkpoints") as checkpointer,
    ):
        state = train(
            config, tiny.CONFIG, init_state(tiny.params(), config.optimizer), tiny.Prompts(), tiny.rollout,
            steps=steps, writer=writer, checkpointer=checkpointer,
        )  # fmt: skip
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    np.savez(workdir / "params.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
