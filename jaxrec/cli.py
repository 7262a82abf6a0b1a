"""The `jaxrec` command. Everything that can be wrong with a command line is found before JAX is imported."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from jaxrec import __version__, chat_command, serve_command
from jaxrec import config as config_lib
from jaxrec.config import UsageError, nearest
from jaxrec.config_docs import config_tree
from jaxrec.machine import join, optional_parts, wait
from jaxrec.systems import RECIPES, SYSTEMS, System, built

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
_HELP = {"-h", "--help", "-help", "--helpfull"}
# Errors whose message is written for the user. Anything else is a defect here, and its traceback is shown.
_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
# What glibc must know before a process begins: large arrays go on huge pages, and freed memory is kept for the next
# step. Without it a training step on CPU takes a fifth to a half longer.
_ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824"
_COMPUTING = ("run", "demo", "generate", "serve")


@dataclass(frozen=True)
class _Command:
    run: Callable[[list[str]], int | None]  # returns an exit code, None for OK
    usage: str
    line: str
    details: str


def entry() -> int:
    """The console script: ``main`` on the process's arguments, in a process whose allocator suits large arrays."""
    known = os.environ.get("GLIBC_TUNABLES")  # a user's own setting stays
    if known is None and sys.platform == "linux" and sys.argv[1:2] and sys.argv[1] in _COMPUTING:
        os.environ["GLIBC_TUNABLES"] = _ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxrec ARGV...` and returns its exit code: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    _leave_working_directory_out()
    show_traceback = os.environ.get("JAXREC_TRACEBACK", "") not in ("", "0")
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("\njaxrec: stopped; the same command continues the run", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"jaxrec: {error}", file=sys.stderr)
        return USAGE
    except _EXPECTED as error:
        if show_traceback:
            traceback.print_exc()
        hint = "" if show_traceback else " (JAXREC_TRACEBACK=1 shows where)"
        print(f"jaxrec: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return FAILURE


def _leave_working_directory_out() -> None:
    """Takes the working directory off sys.path, so that a user's own `models/` is not imported instead of ours."""
    home = Path(__file__).resolve().parent.parent
    here = Path.cwd()
    if here != home:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in (*_HELP, "help"):
        print(_overview())
        return OK if words else USAGE
    if words[0] == "--version":
        print(f"jaxrec {__version__}")
        return OK
    command = _COMMANDS.get(words[0])
    if command is None:
        raise UsageError(
            f"no command '{words[0]}'{nearest(words[0], _COMMANDS)}. Commands: {', '.join(_COMMANDS)}; "
            "`jaxrec COMMAND --help` explains one."
        )
    return command.run(words[1:]) or OK


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:{width}}  {command.line}" for name, command in _COMMANDS.items()]
    return "\n".join(
        ["usage: jaxrec COMMAND [options]", "", *lines, "", "`jaxrec COMMAND --help` explains a command."]
        + ["Set JAXREC_TRACEBACK=1 to see the traceback of an error."]
    )


def _help(name: str, *more: str) -> None:
    command = _COMMANDS[name]
    print("\n".join([f"usage: jaxrec {command.usage}", "", command.line + ".", "", command.details, *more]).rstrip())


def _parse(name: str, words: Sequence[str], define: Callable[[flags.FlagValues], None]) -> tuple[Any, list[str]]:
    """Flag values and positional words of one command; every mistake is a UsageError that shows the usage line."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    define(values)
    try:
        left = values(["jaxrec", *words])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(
            f"{name}: no option --{error.flagname}{nearest(error.flagname, list(values))}. "
            f"usage: jaxrec {_COMMANDS[name].usage}"
        ) from error
    except flags.Error as error:
        raise UsageError(f"{name}: {error}. usage: jaxrec {_COMMANDS[name].usage}") from error
    return values, left


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.x=value` overrides (either with `=` or with the value as the next word) from the rest."""
    overrides: list[str] = []
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        bare = word.lstrip("-")
        if word.startswith("-") and bare.startswith(("config.", "noconfig.")):
            overrides.append(word)
            if "=" not in word and pending and not pending[0].startswith("--"):
                overrides.append(pending.pop(0))
        else:
            rest.append(word)
    return overrides, rest


def _define_run(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "the config", flag_values=values)
    flags.DEFINE_string("stages", None, "stages to run", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("distributed", None, "one of several processes", flag_values=values)


def _define_demo(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)


def _run(words: list[str]) -> None:
    overrides, rest = _split([word for word in words if word not in _HELP])
    rest = ["--distributed=" if word.lstrip("-") == "distributed" else word for word in rest]  # the value is optional
    values, left = _parse("run", rest, _define_run)
    if len(words) != len(overrides) + len(rest):
        _help("run", *(config_tree(values.config, overrides) if values.config else ()))
        return
    if left:
        raise UsageError(f"run: unexpected argument '{left[0]}'. usage: jaxrec {_COMMANDS['run'].usage}")
    if not values.config:
        names = ", ".join(config_lib.packaged_configs()) or "none"
        raise UsageError(f"run needs --config=FILE[:variant] or --config=NAME[:variant]; packaged configs: {names}")
    _execute(values.config, overrides, values.stages, values.workdir, values.distributed)


def _demo(words: list[str]) -> None:
    overrides, rest = _split([word for word in words if word not in _HELP])
    values, left = _parse("demo", rest, _define_demo)
    if len(words) != len(overrides) + len(rest):
        _help("demo", *config_tree("deeprec:demo", overrides))
        return
    if left:
        raise UsageError(f"demo: unexpected argument '{left[0]}'. usage: jaxrec {_COMMANDS['demo'].usage}")
    _execute("deeprec:demo", overrides, None, values.workdir)


def _stages(system: System, text: str | None) -> list[str]:
    """The stages to run, in the system's order whatever the order on the command line."""
    if text is None:
        return list(system.stages)
    asked = [name.strip() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in system.stages:
            raise UsageError(
                f"--stages={text}: {system.title} has no stage '{name}'{nearest(name, system.stages)}. "
                f"Stages: {', '.join(system.stages)}."
            )
    if not asked:
        raise UsageError(f"--stages is empty; stages of {system.title}: {', '.join(system.stages)}")
    return [name for name in system.stages if name in asked]


def _execute(
    spec: str, overrides: Sequence[str], stages: str | None, workdir: str | None, distributed: str | None = None
) -> None:
    config = config_lib.resolve_config(spec, overrides)
    known = {**SYSTEMS, **RECIPES}
    if config.system not in known:
        raise UsageError(
            f"--config={spec}: no system '{config.system}'{nearest(config.system, known)}. Systems: {', '.join(known)}."
        )
    system = known[config.system]
    if not system.built:
        raise UsageError(f"{system.title} is not built yet; these are: {', '.join(built())}")
    chosen = _stages(system, stages)
    folder = Path(workdir or f"runs/{config.system}-{config.variant}")
    failure = folder / "error.txt"
    first = True if distributed is None else join(distributed)  # before anything asks for a device
    resumed = config_lib.check_workdir(folder, config)
    wait(distributed, "all have looked at the work folder")
    if first:
        config_lib.save_config(folder, config)
        failure.unlink(missing_ok=True)
    wait(distributed, "the work folder is ready")
    flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags, which only absl.app would parse
    if first:
        print(f"{system.title} ({config.variant}), stages {', '.join(chosen)}")
        print(f"{'Continuing' if resumed else 'Writing to'} {folder}", flush=True)
    try:
        system.load().run(config, folder, chosen)
    except UsageError:  # for instance a stage whose forerunner has not run: nothing to trace
        raise
    except Exception as error:
        # Hours may lie behind this error: the traceback is kept even where only its last line is shown.
        config_lib.write_atomic(failure, traceback.format_exc())
        if isinstance(error, _EXPECTED):
            print(f"jaxrec: the run failed; full traceback in {failure}", file=sys.stderr)
        raise
    if first:
        _show_results(folder)


def _show_results(folder: Path) -> None:
    from rich.console import Console

    from jaxrec import report

    page = report.build(folder)
    run = report.read_run(folder)
    if run.result is not None:
        console = Console()
        console.print(*report.result_tables(run.result, console.width))
        for comparison in run.result.get("comparisons", ()):
            console.print(report.comparison_line(comparison), highlight=False, markup=False)
    for note in run.notes:
        print(f"note: {note}")
    print(f"Report: {page}")


def _report(words: list[str]) -> None:
    if _HELP & set(words):
        _help("report")
        return
    _, left = _parse("report", words, lambda values: None)
    if len(left) != 1:
        raise UsageError(f"report needs one WORKDIR. usage: jaxrec {_COMMANDS['report'].usage}")
    folder = Path(left[0])
    if not folder.is_dir():
        raise UsageError(f"report: no folder {folder}")
    config_lib.read_config(folder)
    _show_results(folder)


def _check_model(command: str, name: str) -> None:
    """Raises UsageError for what is neither a model folder nor the id of one on the hub."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{command}: {path} has no config.json, so it is not a model folder")
    if not path.exists() and name.count("/") > 1:
        raise UsageError(f"{command}: no folder {path} (a hub id has the form owner/name)")


def _define_generate(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", None, "the text to continue", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "tokens at most", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "nucleus", lower_bound=0.0, upper_bound=1.0, flag_values=values)
    flags.DEFINE_multi_string("stop", [], "stop texts", flag_values=values)
    flags.DEFINE_integer("seed", 0, "random seed", flag_values=values)


def _generate(words: list[str]) -> None:
    if _HELP & set(words):
        _help("generate")
        return
    values, left = _parse("generate", words, _define_generate)
    if len(left) != 1:
        raise UsageError(f"generate needs one MODEL. usage: jaxrec {_COMMANDS['generate'].usage}")
    if not values.prompt:
        raise UsageError('generate needs --prompt="..." with some text')
    _check_model("generate", left[0])

    import models

    model = models.load(left[0])
    if model.tokenizer is None:
        raise UsageError(f"generate: {left[0]} has no tokenizer files, so text cannot be turned into tokens")
    (answer,) = models.generate(
        model,
        [values.prompt],
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        seed=values.seed,
        stop=list(values.stop),
    )
    print(answer.text)
    print(f"[{len(answer.tokens)} tokens, {answer.finish_reason}]", file=sys.stderr)


def _serve(words: list[str]) -> None:
    if _HELP & set(words):
        _help("serve")
        return
    values, left = _parse("serve", words, serve_command.define)
    if len(left) != 1:
        raise UsageError(f"serve needs one MODEL. usage: jaxrec {_COMMANDS['serve'].usage}")
    _check_model("serve", left[0])
    serve_command.run(left[0], values)


def _chat(words: list[str]) -> None:
    overrides, rest = _split([word for word in words if word not in _HELP])
    values, left = _parse("chat", rest, chat_command.define)
    if len(words) != len(overrides) + len(rest):
        _help("chat", *(config_tree(values.config, overrides) if values.config else ()))
        return
    if left or not values.config:
        raise UsageError(f"chat needs --config and nothing without a name. usage: jaxrec {_COMMANDS['chat'].usage}")
    chat_command.run(values, overrides)


def _define_convert(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the weights", flag_values=values)
    flags.DEFINE_string("keep_experts", None, "JSON file with the experts to keep", flag_values=values)


def _convert(words: list[str]) -> None:
    if _HELP & set(words):
        _help("convert")
        return
    values, left = _parse("convert", words, _define_convert)
    if len(left) != 2:
        raise UsageError(f"convert needs SOURCE and TARGET. usage: jaxrec {_COMMANDS['convert'].usage}")
    source, target = left
    if Path(source).is_dir() and Path(target).is_dir() and Path(source).samefile(target):
        raise UsageError("convert: SOURCE and TARGET are one folder; name another target")
    if values.keep_experts and not Path(values.keep_experts).is_file():
        raise UsageError(f"convert: --keep_experts={values.keep_experts}: no such file")

    from jaxrec.convert import convert

    print(convert(source, target, values.dtype, values.keep_experts))


def _define_plan(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "the config", flag_values=values)
    flags.DEFINE_string("topology", None, "slice of a TPU pod", flag_values=values)
    flags.DEFINE_string("json", None, "file to write the figures to", flag_values=values)
    flags.DEFINE_list("programs", [], "what to compile", flag_values=values)
    flags.DEFINE_boolean("split_axes", False, "cut axes of the torus in pieces", flag_values=values)


def _plan(words: list[str]) -> int:
    overrides, rest = _split([word for word in words if word not in _HELP])
    values, left = _parse("plan", rest, _define_plan)
    if len(words) != len(overrides) + len(rest):
        _help("plan", *(config_tree(values.config, overrides) if values.config else ()))
        return OK
    if left:
        raise UsageError(f"plan: unexpected argument '{left[0]}'. usage: jaxrec {_COMMANDS['plan'].usage}")
    for flag, example in (("config", "plan:qwen3_8b_grpo"), ("topology", "v5e:16x16")):
        if not values[flag].value:
            raise UsageError(f"plan needs --{flag}, for instance --{flag}={example}")
    if values.json and not Path(values.json).absolute().parent.is_dir():
        raise UsageError(f"plan: --json={values.json}: no such folder")
    config = config_lib.resolve_config(values.config, overrides)

    from jaxrec import plan, plan_report

    plan.prepare()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags, which only absl.app would parse
    out = plan.plan(config, values.config, values.topology, values.programs, values.split_axes)
    plan_report.show(out)
    if values.json:
        config_lib.write_atomic(Path(values.json).absolute(), json.dumps(out, indent=2) + "\n")
    return OK if out["fits"] else FAILURE


def _systems(words: list[str]) -> None:
    if _HELP & set(words):
        _help("systems")
        return
    values, left = _parse("systems", words, lambda v: flags.DEFINE_boolean("devices", False, "", flag_values=v))
    if left:
        raise UsageError(f"systems: unexpected argument '{left[0]}'. usage: jaxrec {_COMMANDS['systems'].usage}")
    packaged = config_lib.packaged_configs()
    for system in SYSTEMS.values():
        status = "" if system.built else "  [not built yet]"
        print(f"{system.title}{status}\n    {system.line}\n    stages: {', '.join(system.stages)}")
        if system.built:
            print(f"    config: {f'--config=configs/{system.name}.py' if system.name in packaged else 'none'}")
    print("\nData recipes")
    for recipe in RECIPES.values():
        print(f"{recipe.title}\n    {recipe.line}\n    config: --config=configs/{recipe.name}.py")
    print("\nOptional parts of this machine")
    for part, state in optional_parts():
        print(f"    {part:<14} {state}")
    if values.devices:
        import jax

        print(f"    {'devices':<14} {', '.join(f'{d.device_kind} ({d.platform})' for d in jax.devices())}")


_COMMANDS = {
    "run": _Command(
        _run,
        "run --config=FILE[:variant] [--stages=a,b] [--workdir=DIR] [--distributed] [--config.FIELD=VALUE ...]",
        "run a system, or continue its run: the same command again goes on where it stopped",
        """  --config=FILE[:variant]   a config file, or the name of a packaged one (deeprec:demo);
                            without a variant, the first one of the file
  --stages=a,b              only these stages, in the system's order (default: all; `jaxrec systems` lists them)
  --workdir=DIR             folder of the run (default: runs/<system>-<variant>)
  --distributed             this process is one of several that train together, each given the same command and a
                            folder that all of them see; alone on a pod of TPUs, elsewhere
                            --distributed=host:port,process,count (address of process 0, own number, how many)
  --config.FIELD=VALUE      sets a field of the config

`jaxrec run --config=... --help` lists the fields of that config with their values and meaning.
The folder then holds config.json metrics.jsonl result.json trajectories.jsonl checkpoints/ plots/ report.html.""",
    ),
    "demo": _Command(
        _demo,
        "demo [--workdir=DIR] [--config.FIELD=VALUE ...]",
        "DeepRec end to end on the embedded world, in minutes on two CPU cores",
        """  --workdir=DIR             folder of the run (default: runs/deeprec-demo)
  --config.FIELD=VALUE      sets a field of the config

The same as `jaxrec run --config=deeprec:demo`. It ends with a table and report.html.""",
    ),
    "systems": _Command(
        _systems,
        "systems [--devices]",
        "the ten systems, their stages and configs, and the optional parts of this machine",
        "  --devices                 also start JAX and list its devices",
    ),
    "generate": _Command(
        _generate,
        'generate MODEL --prompt="..." [--max_new_tokens=N] [--temperature=T] [--top_p=P] [--stop=TEXT] [--seed=N]',
        "continue a text with a language model",
        """  MODEL                     a Hugging Face model folder, or a hub id
  --prompt=TEXT             the text to continue
  --max_new_tokens=N        at most N tokens (default 128)
  --temperature=T           0 takes the likeliest token, 1 samples from the model (default 1)
  --top_p=P                 samples from the likeliest tokens that hold this much probability (default 1: all)
  --stop=TEXT               ends where this text appears; may be given several times
  --seed=N                  the same seed gives the same text (default 0)""",
    ),
    "serve": _Command(_serve, serve_command.USAGE, serve_command.LINE, serve_command.DETAILS),
    "chat": _Command(_chat, chat_command.USAGE, chat_command.LINE, chat_command.DETAILS),
    "convert": _Command(
        _convert,
        "convert SOURCE TARGET [--dtype=bfloat16] [--keep_experts=MASK.json]",
        "write a model folder anew: in another dtype, or without some of its experts",
        """  SOURCE                    a Hugging Face model folder, or a hub id
  TARGET                    the folder to write; an existing model folder is replaced
  --dtype=float32|bfloat16  of the weights (default: as they are stored)
  --keep_experts=FILE       JSON, a row per layer of 1.0 (kept) and 0.0 (removed) per expert, equally many in each""",
    ),
    "plan": _Command(
        _plan,
        "plan --config=FILE[:variant] --topology=v5e:16x16 [--programs=a,b] [--json=FILE] [--split_axes] "
        "[--config.FIELD=VALUE ...]",
        "what one chip of a TPU pod would hold and do, compiled ahead of time; no TPU is needed",
        """  --config=FILE[:variant]   a config of a run, or one of published models (plan:qwen3_8b_grpo)
  --topology=CHIP:AxB[xC]   a slice of a pod: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4
  --programs=a,b            of score, update, prefill, decode (default: config.programs, else update and decode)
  --json=FILE               also write the figures there
  --split_axes              allow axes of the mesh that are no products of the torus' axes
  --config.FIELD=VALUE      sets a field of the config

It needs the TPU compiler, pip install 'jaxrec[tpu]', and minutes of one core. Exit code 1: something does not fit.""",
    ),
    "report": _Command(
        _report,
        "report WORKDIR",
        "make plots/ and report.html of a run anew, finished or not",
        "  WORKDIR                   the folder of a run",
    ),
}


if __name__ == "__main__":  # python -m jaxrec.cli
    sys.exit(main())
