"""`jaxrec chat`: what its help says, and how a finished run becomes a conversation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxrec import config as config_lib
from jaxrec.config import UsageError

USAGE = "chat --config=FILE[:variant] [--workdir=DIR] [--user=NAME] [--seed=N] [--config.FIELD=VALUE ...]"
LINE = "talk to a conversational recommender, and see what the simulated user thinks of its lists"
DETAILS = """  --config=FILE[:variant]   a config of GRSU: grsu, grsu:small, ...
  --workdir=DIR             folder of its run (default: runs/<system>-<variant>); its stages synthesize and sft must
                            have run
  --user=NAME               the simulated user: sft, or base, the model before training, or endpoint; default: the one
                            that config.user.kind names
  --seed=N                  of lists and critiques (default 0)
  --config.FIELD=VALUE      sets a field of the config

/critique lets the simulated user answer for you, /why N tells about item N, /quit or an empty line ends."""


def define(values: flags.FlagValues) -> None:
    """The command's options."""
    flags.DEFINE_string("config", None, "the config", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_enum("user", None, ["sft", "base", "endpoint"], "the simulated user", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of lists and critiques", flag_values=values)


def run(values: Any, overrides: Sequence[str]) -> None:
    """Talk in the terminal. Raises UsageError for a config of another system, and without a run of it."""
    config = config_lib.resolve_config(values.config, overrides)
    if config.system != "grsu":
        raise UsageError(f"chat --config={values.config}: {config.system} holds no conversations; take grsu")
    folder = Path(values.workdir or f"runs/{config.system}-{config.variant}")
    if not config_lib.check_workdir(folder, config):
        raise UsageError(
            f"{folder} holds no run: jaxrec run --config={values.config} --workdir={folder} --stages=synthesize,sft"
        )
    flags.FLAGS.mark_as_parsed()

    from jaxrec.systems import grsu
    from jaxrec.talk import chat

    grsu.check(config)
    one = grsu.Run(
        config, config.seeds[0], folder / f"seed{config.seeds[0]}" if len(config.seeds) > 1 else folder, None
    )
    chat(one.recommender, one.user(values.user or one.player), one.task.catalogue, ask=input, seed=values.seed)
