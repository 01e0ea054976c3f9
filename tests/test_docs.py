"""The commands in the documentation work as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import BLOCK, ROOT

from stadapter.commands.main import main, make_parser


def as_a_user(words: list[str]) -> list[str]:
    """Return the words of a command as this environment runs them."""
    assert words[0] in ("python", "stadapter")
    return [sys.executable, *(["-m", "stadapter"] if words[0] == "stadapter" else []), *words[1:]]


def test_every_command_is_tested_or_says_what_it_needs() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for tested, block in BLOCK.findall(page.read_text()):
            assert tested or block.startswith("# needs "), block


def test_the_readmes_commands_are_ones_that_there_are() -> None:
    """These commands take longer than a test may: their flags are parsed, and nothing starts."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    words = [shlex.split(line, comments=True) for line in lines]
    trained = [line[1:] for line in words if line[:1] == ["stadapter"]]
    trained += [line[5:] for line in words if line[:1] == ["torchrun"]]
    assert len(trained) >= 6
    for line in trained:
        if line[0] == "submit":
            line = [*line[: line.index("--")], "--dry-run", *line[line.index("--") :]]
            assert main(line) == 0
        else:
            make_parser().parse_args(line)  # exits where it cannot read it
    scripts = [line[1] for line in words if line[:1] == ["python"] and line[1] != "-m"]
    assert len(scripts) >= 10 and all((ROOT / script).exists() for script in scripts)
    targets = [line[1] for line in words if line[:1] == ["make"]]
    assert set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_way_from_a_folder_to_a_training_works_as_written(clip_folder: Path, tmp_path: Path) -> None:
    blocks = [block for tested, block in BLOCK.findall((ROOT / "docs" / "data.md").read_text()) if tested]
    for block in blocks:
        words = shlex.split(block.replace("\\\n", " ").replace("/data/mine", str(clip_folder)))
        done = subprocess.run(as_a_user(words), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checked" / "report.csv").exists()
    assert (tmp_path / "runs" / "first" / "result.json").exists()


def test_the_commands_about_an_idea_of_ones_own_work_as_written() -> None:
    blocks = [block for tested, block in BLOCK.findall((ROOT / "docs" / "own_idea.md").read_text()) if tested]
    assert blocks
    for block in blocks:
        words = shlex.split(block)
        done = subprocess.run(as_a_user(words), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dry_runs_of_the_page_on_clusters_work_as_written() -> None:
    blocks = [block for tested, block in BLOCK.findall((ROOT / "docs" / "clusters.md").read_text()) if tested]
    assert len(blocks) == 3
    for block in blocks:
        words = shlex.split(block)
        done = subprocess.run(as_a_user(words), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "/shared/ssv2" in done.stdout, done.stdout + done.stderr


def test_the_hours_of_the_papers_tables_are_those_of_the_plan() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    (command,) = [block for tested, block in BLOCK.findall(page) if tested]
    done = subprocess.run(as_a_user(shlex.split(command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    hours = dict(re.findall(r"^(\d+) frames .* (\S+)$", done.stdout, re.MULTILINE))
    assert hours.keys() == {"8", "16", "32"}
    for frames in ("8", "32"):
        assert f"| {hours[frames]} |" in page


def test_the_commands_about_trained_models_work_as_written(
    undisturbed: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(undisturbed)
    (tmp_path / "clips").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path)
    blocks = [block for tested, block in BLOCK.findall((ROOT / "docs" / "library.md").read_text()) if tested]
    assert blocks
    for line in "".join(blocks).splitlines():
        command, *words = shlex.split(line.replace("/data/mine", str(clip_folder)))
        assert (command, main(words)) == ("stadapter", 0), line
