"""The console command: every command in one place, light `--help`, and the exit codes that the help names."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import pytest

from stadapter import __version__
from stadapter.commands.main import main, make_parser
from stadapter.trials import record, status

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "mlflow", "pandas", "shtab", "onnx")
COMMANDS = (
    *("train", "evaluate", "predict", "export", "convert", "plan", "status", "table", "ui", "sync", "report"),
    *("tune", "submit", "check", "completion"),
)


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command with its parser."""
    (deeper,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
    if deeper is None:
        yield name, parser
    for word, below in deeper.choices.items() if deeper else ():
        yield from parsers(below, f"{name} {word}".strip())


def test_help_names_every_command_and_exit_code_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from stadapter.commands.main import main\n"
        "try: main(['--help'])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert re.search(r"exit codes: 0 done; 1 failed.*; 2 the input.*\n130 stopped", done.stdout)
    assert all(command.split()[0] in done.stdout for command in COMMANDS)
    assert {name for name, _ in parsers(make_parser())} == set(COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "submit"])
def test_every_command_explains_itself_and_each_of_its_flags(command: str) -> None:
    parser = dict(parsers(make_parser()))[command]
    assert parser.prog == f"stadapter {command}" and parser.description
    assert not [action.dest for action in parser._actions if not action.help]


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "stadapter", "--version"], capture_output=True, text=True)
    assert done.stdout == f"stadapter {__version__}\n"
    assert 'stadapter = "stadapter.commands.main:main"' in (ROOT / "pyproject.toml").read_text()


def test_plan_runs_the_script_with_its_flags_and_gives_its_exit_code(tmp_path: Path, capfd: Any) -> None:
    script = tmp_path / "ask.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    assert main(["plan", str(script), "--num-gpus", "8"]) == 3
    assert capfd.readouterr().out == "['--num-gpus', '8', '--plan']\n"
    assert main(["plan", str(tmp_path / "gone.py")]) == 2
    assert "there is no such script" in capfd.readouterr().err


def test_sweep_status_counts_what_is_done_failed_resumable_and_to_do(tmp_path: Path, capsys: Any) -> None:
    sweep = made_up.kernel_sweep()
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    to_do, failed, resumable = (trial.folder(tmp_path) for trial in sweep.trials[:3])
    shutil.rmtree(to_do)
    for folder in (failed, resumable):
        (folder / record.RESULT).unlink()
    status.count_failure(failed, 2, "out of memory")
    (resumable / record.CHECKPOINT).touch()
    assert main(["status", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kernel-embedded: 5 done, 1 failed, 1 resumable, 1 to do"
    assert len(lines) == 9
    for line, trial, expected in zip(
        lines[1:], sweep.trials, ["to do", "failed once", "resumable (0 of 4 epochs done)", *["done"] * 5], strict=True
    ):
        assert line.split(trial.id) == [f"  {trial.name}  ", f"  {expected}"]


@pytest.mark.parametrize(
    ("old", "new"), [(["stadapter.ablation", "status"], "status"), (["stadapter.data", "check"], "check")]
)
def test_an_old_front_door_still_answers_and_says_what_to_type(old: list[str], new: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *old, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: stadapter {new} ")
    assert done.stderr == f"note: `python -m {old[0]}` is now `stadapter {new}`\n"


@pytest.mark.parametrize(("old", "new"), [(["sweep", "table"], "table"), (["data", "check"], "check")])
def test_a_command_in_its_old_group_answers_and_says_what_to_type(old: list[str], new: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*old, "--help"])
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: stadapter {new} ")
    assert said.err == f"note: `stadapter {' '.join(old)}` is now `stadapter {new}`\n"


def test_sync_submit_and_data_check_are_the_functions_of_the_modules(tmp_path: Path, capsys: Any) -> None:
    assert main(["sync", "--output", str(tmp_path)]) == 2
    assert "there is no sweep in this folder" in capsys.readouterr().err
    words = ["submit", "slurm", "--dry-run", "--", "experiments/ablate_kernel.py", "--output", "/shared/runs"]
    assert main(words) == 0
    assert "ablate_kernel.py --output /shared/runs" in capsys.readouterr().out
    assert main(["check", "folder", "--data-root", str(tmp_path)]) == 2
    assert "train: the folder is missing" in capsys.readouterr().err


def test_bash_completes_commands_and_flags(tmp_path: Path, capsys: Any) -> None:
    assert main(["completion", "zsh"]) == 0
    assert "#compdef stadapter" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=(%s); COMP_CWORD=%d; _shtab_stadapter; echo "${COMPREPLY[@]}"\n'
    script += ask % ("stadapter ev", 1) + ask % ("stadapter stat", 1) + ask % ("stadapter predict --cl", 2)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    assert done.stdout.split() == ["evaluate", "status", "--clips-per-pass"], done.stderr


def test_the_wheel_carries_the_backbone_the_types_and_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "stadapter", source / "stadapter", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / f"stadapter-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        points = wheel.read(f"stadapter-{__version__}.dist-info/entry_points.txt").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "stadapter").rglob("*.py")}
    others = {
        "py.typed",
        "backbone/embedded_vit.safetensors",
        "results/paper.toml",
        "results/report.html.j2",
        "cluster/submit/slurm_job.sh",
    }
    assert modules | {f"stadapter/{name}" for name in others} <= names
    assert "stadapter = stadapter.commands.main:main" in points
