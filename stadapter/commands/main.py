"""The front door: one parser for every command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from stadapter.ablation.exit_codes import exit_code_of
from stadapter.commands import data, models, report, submit, sweeps
from stadapter.commands.models import Commands, add_parser
from stadapter.commands.train import add_train
from stadapter.config import ConfigError
from stadapter.version import __version__

EPILOG = """\
one way through:
  stadapter train --recipe embedded --output runs/one   train on the videos in the package
  stadapter evaluate runs/one                           test it again
  stadapter predict runs/one clips/                     ask it about videos
  stadapter export runs/one --output model.pt2          take it elsewhere

exit codes: 0 done; 1 failed, in whole or for some clip, trial or video; 2 the input cannot work, nothing was started;
130 stopped (a training or sweep goes on with the same command). `stadapter COMMAND --help` explains each."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: _run(words))


def _run(words: list[str]) -> int:
    if words[:1] == ["submit"]:  # has a grammar of its own: a script's flags stand behind --
        return submit.main(words[1:])
    options = make_parser().parse_args(words)
    return int(options.run(options))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stadapter",
        description="Finding out what matters when a frozen image transformer is adapted to video.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stadapter {__version__}")
    each: Commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(each)
    models.add_evaluate(each)
    models.add_predict(each)
    models.add_export(each)
    models.add_convert(each)
    add_plan(each)
    for add in (sweeps.add_status, sweeps.add_table, sweeps.add_ui, sweeps.add_sync):
        add(each)
    report.add_report(each)
    sweeps.add_tune(each)
    each.add_parser("submit", help="run a script on Slurm, Ray or Kubernetes", add_help=False)
    data.add_check(each)
    add_completion(each)
    return parser


def add_plan(commands: Commands) -> None:
    parser = add_parser(
        commands,
        "plan",
        "say what a sweep would cost, and start nothing",
        "Say which trials of a script's sweep are done, and what the others will cost: the script with\n"
        "--plan. It needs neither GPUs nor data. The script's own flags follow it.",
        "examples:\n"
        "  stadapter plan experiments/ablate_kernel.py\n"
        "  stadapter plan experiments/ablate_kernel.py --recipe ssv2_clip_b16 --num-gpus 8 --gpu a100-80gb",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="an experiment's Python file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags; SCRIPT --help lists them")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    if not options.script.is_file():
        raise ConfigError(f"{options.script}: there is no such script; name one such as experiments/ablate_kernel.py")
    return subprocess.run([sys.executable, str(options.script), *options.flags, "--plan"]).returncode


def add_completion(commands: Commands) -> None:
    parser = add_parser(
        commands,
        "completion",
        "print what makes a shell complete these commands",
        "Print a script that makes bash or zsh complete commands and flags.",
        "examples:\n"
        '  eval "$(stadapter completion bash)"    # in ~/.bashrc\n'
        "  stadapter completion zsh > ~/.zfunc/_stadapter    # in a folder of zsh's $fpath",
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="bash or zsh")
    parser.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(make_parser(), options.shell))
    return 0
