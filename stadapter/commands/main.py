"""The front door: one parser for every command.

Heavy libraries load when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys

from stadapter.ablation.exit_codes import DONE, exit_code_of
from stadapter.ablation.flags import add_output
from stadapter.commands import data, models, report, submit, sweeps
from stadapter.commands.parsers import Commands, add_parser
from stadapter.commands.train import add_train
from stadapter.tuning import tune
from stadapter.version import __version__

EPILOG = """\
one way through:
  stadapter train --recipe embedded --output runs/one   train on the videos in the package
  stadapter evaluate runs/one                           test it again
  stadapter predict runs/one clips/                     ask it about videos
  stadapter export runs/one --output model.pt2          take it elsewhere
a sweep is started by its script, such as: python experiments/ablate_kernel.py

exit codes: 0 done; 1 failed, in whole or for some clip, trial or video; 2 the input cannot work, nothing was started;
130 stopped (a training or sweep goes on with the same command). `stadapter COMMAND --help` explains each."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: _run(words))


def _run(words: list[str]) -> int:
    if words[:1] in (["sweep"], ["data"]):  # groups that the commands stood in before
        print(f"note: `stadapter {' '.join(words[:2])}` is now `stadapter {' '.join(words[1:2])}`", file=sys.stderr)
        words = words[1:]
    if words[:1] == ["submit"]:  # has a grammar of its own: a script's flags stand behind --
        return submit.main(words[1:])
    options = make_parser().parse_args(words)
    return int(options.run(options))


# The first command of each group in `stadapter --help`, and the group's heading.
HEADINGS = {"train": "one model", "plan": "sweeps", "check": "data, clusters and shells"}


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """A help text with a heading above each group of commands."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        heading = HEADINGS.get(action.dest)
        return f"\n  {heading}:\n{text}" if heading else text


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every command, in the order in which a newcomer meets them."""
    parser = argparse.ArgumentParser(
        prog="stadapter",
        description="Finding out what matters when a frozen image transformer is adapted to video.",
        epilog=EPILOG,
        formatter_class=_Grouped,
    )
    parser.add_argument("--version", action="version", version=f"stadapter {__version__}")
    each: Commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    add_train(each)
    models.add_evaluate(each)
    models.add_predict(each)
    models.add_export(each)
    models.add_convert(each)
    sweeps.add_plan(each)
    sweeps.add_status(each)
    sweeps.add_table(each)
    report.add_report(each)
    sweeps.add_ui(each)
    sweeps.add_sync(each)
    add_tune(each)
    data.add_check(each)
    each.add_parser("submit", help="run a script on Slurm, Ray or Kubernetes", add_help=False)
    add_completion(each)
    return parser


def add_tune(commands: Commands) -> None:
    """Add `tune`."""
    parser = commands.add_parser(
        "tune",
        help="search for optimiser settings",
        description="Search learning rate, weight decay, warm-up and dropout on the validation split with Optuna. "
        "Trials of the --output that finished before are known to the search.",
    )
    tune.add_arguments(parser)
    add_output(parser)
    parser.set_defaults(run=tune.run)


def add_completion(commands: Commands) -> None:
    """Add `completion`."""
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
    return DONE
