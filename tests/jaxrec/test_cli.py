"""The command line: what it prints, its exit codes, and its answers to mistakes."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxrec import cli
from jaxrec.config import UsageError
from jaxrec.systems import SYSTEMS, System

CONFIG = """
from ml_collections import ConfigDict

VARIANTS = ("demo", "small")

def get_config(variant):
    config = ConfigDict()
    config.system = "deeprec"
    config.variant = variant
    config.rl = ConfigDict({
        "group_size": 8,  # answers per prompt
    })
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CONFIG)
    return "mine.py"


@dataclass
class Recipe:
    """Stands in for a system: records its calls, writes a result, or fails."""

    calls: list
    error: BaseException | None = None

    def run(self, config, workdir: Path, stages: list[str]) -> dict:
        self.calls.append((config, workdir, stages))
        if self.error is not None:
            raise self.error
        result = {
            "system": config.system,
            "variant": config.variant,
            "seed": 0,
            "protocol": {"split": "test", "users": 3},
            "rows": [{"name": "before", "ndcg@10": 0.1}, {"name": "after", "ndcg@10": 0.25}],
            "comparisons": [{"name": "after - before", "metric": "ndcg@10", "difference": 0.15, "low": 0.1,
                             "high": 0.2, "criterion": "low > 0", "met": True}],
        }  # fmt: skip
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "result.json").write_text(json.dumps(result))
        return result


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    stand_in = Recipe([])
    monkeypatch.setattr(System, "built", property(lambda self: self.name == "deeprec"))
    monkeypatch.setattr(System, "load", lambda self: stand_in)
    return stand_in


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_run_calls_the_recipe_and_shows_table_and_report(config_file: str, recipe: Recipe, capsys):
    code, out, err = answer(capsys, "run", f"--config={config_file}:small", "--config.rl.group_size=4")
    assert code == cli.OK, err
    ((config, workdir, stages),) = recipe.calls
    assert (config.variant, config.rl.group_size) == ("small", 4)
    assert workdir == Path("runs/deeprec-small")
    assert tuple(stages) == SYSTEMS["deeprec"].stages
    assert json.loads((workdir / "config.json").read_text())["rl"] == {"group_size": 4}
    assert "0.2500" in out
    assert "met: after - before" in out
    assert (workdir / "report.html").is_file()


def test_run_again_continues_and_another_config_is_refused(config_file: str, recipe: Recipe, capsys):
    words = ["run", f"--config={config_file}", "--workdir=w"]
    assert answer(capsys, *words)[0] == cli.OK
    code, out, _ = answer(capsys, *words)
    assert code == cli.OK
    assert "Continuing w" in out
    code, _, err = answer(capsys, *words, "--config.rl.group_size=2")
    assert code == cli.USAGE
    assert "rl.group_size: 8 there, 2 now" in err
    assert len(recipe.calls) == 2


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("--distributed", (None, None, None)),
        ("--distributed=10.0.0.1:84,1,2", ("10.0.0.1:84", 1, 2)),
        ("--distributed=[::1]:84,0,2", ("[::1]:84", 0, 2)),
    ],
)
def test_processes_join_before_the_recipe_and_the_first_one_writes(
    word, where, config_file: str, recipe: Recipe, capsys, monkeypatch: pytest.MonkeyPatch
):
    import jax

    from models import sharding

    joined = []
    monkeypatch.setattr(sharding, "join", lambda address=None, process=None, count=None: joined.append(
        (address, process, count, len(recipe.calls))
    ))  # fmt: skip
    monkeypatch.setattr(jax, "process_index", lambda: where[1] or 0)
    code, out, err = answer(capsys, "run", f"--config={config_file}", word, "--workdir=w")
    assert joined == [(*where, 0)]
    if where[1]:  # another process writes the folder
        assert (code, out) == (cli.OK, ""), err
        assert not Path("w/config.json").exists()
    else:
        assert code == cli.OK, err
        assert Path("w/report.html").is_file()


def test_without_a_pod_the_processes_must_be_named(config_file: str, recipe: Recipe, capsys, monkeypatch):
    from models import sharding

    def join():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(sharding, "join", join)
    code, _, err = answer(capsys, "run", f"--config={config_file}", "--distributed")
    assert code == cli.USAGE
    assert "--distributed=host:port,process,count" in err
    assert not recipe.calls


def test_stages_run_in_the_systems_order(config_file: str, recipe: Recipe, capsys):
    assert answer(capsys, "run", f"--config={config_file}", "--stages=evaluate,trm")[0] == cli.OK
    assert recipe.calls[0][2] == ["trm", "evaluate"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rum"], ["no command 'rum'", "run", "Commands:"]),
        (["run"], ["--config=FILE"]),
        (["run", "--config=mine.py", "--stages=evaluat"], ["no stage 'evaluat'", "evaluate", "cold_start"]),
        (["run", "--config=mine.py", "--stages="], ["--stages is empty"]),
        (["run", "--config=mine.py:smal"], ["no variant 'smal'", "demo, small"]),
        (["run", "--config=mine.py", "--config.rl.gruop=1"], ["no field 'rl.gruop'", "rl.group_size"]),
        (["run", "--config=mine.py", "--config.rl.group_size=x"], ["rl.group_size", "expected int", "str"]),
        (["run", "--config=gone.py"], ["no file gone.py"]),
        (["run", "--config=mine.py", "--wrkdir=x"], ["no option --wrkdir", "workdir", "usage:"]),
        (["run", "--config=mine.py", "extra"], ["unexpected argument 'extra'"]),
        (["run", "--config=mine.py", "--workdir=mine.py"], ["is a file"]),
        (["run", "--config=mine.py", "--distributed=here"], ["--distributed=here", "host:port,process,count"]),
        (["run", "--config=mine.py", "--distributed=a:1,0"], ["host:port,process,count"]),
        (["run", "--config=mine.py", "--distributed=a:99999,0,2"], ["port 99999", "65535"]),
        (["run", "--config=mine.py", "--distributed=a:1,2,2"], ["process 2 of 2", "from 0 to 1"]),
        (["report"], ["one WORKDIR"]),
        (["report", "nothing"], ["no folder nothing"]),
        (["report", "."], ["not a run's folder"]),
        (["convert", "x"], ["SOURCE and TARGET"]),
        (["convert", ".", "."], ["one folder"]),
        (["convert", "x", "y", "--keep_experts=gone.json"], ["gone.json", "no such file"]),
        (["convert", "x", "y", "--dtype=int8"], ["dtype"]),
        (["generate"], ["one MODEL"]),
        (["generate", "x"], ["--prompt"]),
        (["generate", ".", "--prompt=a"], ["no config.json"]),
        (["generate", "a/b/c", "--prompt=a"], ["no folder a/b/c"]),
        (["generate", "x", "--prompt=a", "--top_p=2"], ["top_p"]),
        (["generate", "x", "--prompt=a", "--max_new_tokens=0"], ["max_new_tokens"]),
        (["serve"], ["one MODEL"]),
        (["serve", "."], ["no config.json"]),
        (["serve", "a/b/c"], ["no folder a/b/c"]),
        (["serve", "x", "--port=70000"], ["port", "70000"]),
        (["serve", "x", "--max_batch=0"], ["max_batch"]),
        (["serve", "x", "--hots=0.0.0.0"], ["did you mean host?"]),
        (["systems", "deeprec"], ["unexpected argument"]),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(words, expected, config_file: str, recipe: Recipe, capsys):
    code, out, err = answer(capsys, *words)
    assert code == cli.USAGE
    assert out == ""
    assert err.startswith("jaxrec: ")
    assert len(err.strip().splitlines()) == 1
    for word in expected:
        assert word in err
    assert not recipe.calls
    assert not Path("runs").exists()


def test_a_system_that_is_not_built_says_so(config_file: str, recipe: Recipe, capsys):
    Path("other.py").write_text(CONFIG.replace('"deeprec"', '"kape"'))
    code, _, err = answer(capsys, "run", "--config=other.py")
    assert code == cli.USAGE
    assert "KAPE is not built yet" in err
    Path("other.py").write_text(CONFIG.replace('"deeprec"', '"deprec"'))
    code, _, err = answer(capsys, "run", "--config=other.py")
    assert code == cli.USAGE
    assert "did you mean deeprec?" in err


def test_a_failing_run_keeps_its_traceback_in_the_folder(config_file: str, recipe: Recipe, capsys):
    recipe.error = FloatingPointError("non-finite loss at step 3")
    code, _, err = answer(capsys, "run", f"--config={config_file}", "--workdir=w")
    assert code == cli.FAILURE
    assert "non-finite loss at step 3" in err
    assert "Traceback" not in err
    assert "Traceback" in Path("w/error.txt").read_text()
    recipe.error = None
    assert answer(capsys, "run", f"--config={config_file}", "--workdir=w")[0] == cli.OK
    assert not Path("w/error.txt").exists()


def test_a_recipe_may_ask_for_other_usage(config_file: str, recipe: Recipe, capsys):
    recipe.error = UsageError("stage 'trm' has not finished: run --stages=trm first")
    code, _, err = answer(capsys, "run", f"--config={config_file}", "--workdir=w")
    assert code == cli.USAGE
    assert err == "jaxrec: stage 'trm' has not finished: run --stages=trm first\n"
    assert not Path("w/error.txt").exists()


def test_a_defect_is_shown_in_full(config_file: str, recipe: Recipe):
    recipe.error = AttributeError("a defect")
    with pytest.raises(AttributeError):
        cli.main(["run", f"--config={config_file}"])


def test_traceback_on_request(config_file: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXREC_TRACEBACK", "1")
    code, _, err = answer(capsys, "run", "--config=gone.py")
    assert code == cli.USAGE
    assert "Traceback" in err


def test_interrupt(config_file: str, recipe: Recipe, capsys):
    recipe.error = KeyboardInterrupt()
    code, _, err = answer(capsys, "run", f"--config={config_file}")
    assert code == cli.INTERRUPTED
    assert "continues the run" in err


@pytest.mark.parametrize("command", ["run", "demo", "systems", "generate", "convert", "report"])
def test_every_command_explains_itself(command: str, capsys):
    if command == "demo" and not SYSTEMS["deeprec"].built:
        pytest.fail("deeprec is not built")
    code, out, _ = answer(capsys, command, "--help")
    assert code == cli.OK
    assert out.startswith(f"usage: jaxrec {command}")


def test_overview(capsys):
    code, out, _ = answer(capsys, "--help")
    assert code == cli.OK
    for command in ("run", "demo", "systems", "generate", "convert", "report"):
        assert f"\n  {command} " in out
    assert answer(capsys)[0] == cli.USAGE
    assert answer(capsys, "--version")[1].startswith("jaxrec 0.")


def test_help_of_a_config_lists_fields_values_and_comments(config_file: str, capsys):
    code, out, _ = answer(capsys, "run", f"--config={config_file}", "--config.rl.group_size=2", "--help")
    assert code == cli.OK
    (line,) = [line for line in out.splitlines() if "group_size" in line and "=2" in line]
    assert line.rstrip().endswith("# answers per prompt")


def test_systems_lists_all_ten(capsys):
    code, out, _ = answer(capsys, "systems")
    assert code == cli.OK
    for system in SYSTEMS.values():
        assert system.title in out
        assert ", ".join(system.stages) in out
        assert (f"{system.title}  [not built yet]" in out) == (not system.built)
    assert len(SYSTEMS) == 10
    assert "torch" in out


def test_built_systems_agree_with_the_registry():
    for system in SYSTEMS.values():
        if system.built:
            assert callable(system.load().run)


def test_report_rebuilds_the_page(config_file: str, recipe: Recipe, capsys):
    answer(capsys, "run", f"--config={config_file}", "--workdir=w")
    page = Path("w/report.html")
    page.unlink()
    code, out, _ = answer(capsys, "report", "w")
    assert code == cli.OK
    assert page.is_file()
    assert str(page) in out


def test_generate_passes_its_options_on(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import models

    (tmp_path / "config.json").write_text("{}")
    asked = {}

    def generate(model, prompts, **options):
        asked.update(options, prompts=prompts)
        return [types.SimpleNamespace(text="and more", tokens=[1, 2], logprobs=[0.0, 0.0], finish_reason="stop")]

    monkeypatch.setattr(models, "load", lambda path: types.SimpleNamespace(tokenizer=object()), raising=False)
    monkeypatch.setattr(models, "generate", generate, raising=False)
    words = [
        "--prompt=once",
        "--max_new_tokens=5",
        "--temperature=0",
        "--top_p=0.5",
        "--stop=a",
        "--stop=b",
        "--seed=3",
    ]
    code, out, err = answer(capsys, "generate", str(tmp_path), *words)
    assert code == cli.OK, err
    assert out == "and more\n"
    assert asked == {
        "prompts": ["once"], "max_new_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 3, "stop": ["a", "b"],
    }  # fmt: skip


def test_generate_without_tokenizer_says_so(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import models

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(models, "load", lambda path: types.SimpleNamespace(tokenizer=None), raising=False)
    code, _, err = answer(capsys, "generate", str(tmp_path), "--prompt=once")
    assert code == cli.USAGE
    assert "no tokenizer" in err


def test_serve_passes_its_options_on(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from jaxrec import serve

    (tmp_path / "config.json").write_text("{}")
    asked = []
    monkeypatch.setattr(serve, "serve", lambda path, **options: asked.append((path, options)))
    code, _, err = answer(capsys, "serve", str(tmp_path), "--port=0", "--name=mine", "--max_len=64", "--dtype=bfloat16")
    assert (code, err) == (cli.OK, "")
    assert asked == [(str(tmp_path), {
        "host": "127.0.0.1", "port": 0, "name": "mine", "dtype": "bfloat16", "max_batch": 16, "max_len": 64,
        "slice_tokens": 8, "max_waiting": 256, "max_body": 4_000_000, "grace": 30, "mesh": None, "int8": False,
    })]  # fmt: skip


def test_serve_without_its_extra_says_so(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = answer(capsys, "serve", str(tmp_path))
    assert code == cli.USAGE
    assert "starlette and uvicorn" in err
    assert "pip install 'jaxrec[serve]'" in err


def test_computing_commands_start_anew_with_huge_pages(monkeypatch):
    started = []
    monkeypatch.setattr(cli.os, "execv", lambda program, words: started.append((program, words)))
    monkeypatch.setattr(cli, "main", lambda: 7)
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setattr(cli.sys, "orig_argv", ["python", "/bin/jaxrec", "demo", "--workdir=x"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for words, starts in ((["jaxrec", "systems"], 0), (["jaxrec"], 0), (["jaxrec", "demo", "--workdir=x"], 1)):
        monkeypatch.setattr(cli.sys, "argv", words)
        assert cli.entry() == 7
        assert len(started) == starts
    assert started == [(cli.sys.executable, [cli.sys.executable, "/bin/jaxrec", "demo", "--workdir=x"])]
    assert "hugetlb=1" in cli.os.environ["GLIBC_TUNABLES"]
    assert cli.entry() == 7  # the second process finds the setting, and goes on
    assert len(started) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")
