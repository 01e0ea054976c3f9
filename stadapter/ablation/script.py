"""The command line that every ablation script shares: from a question to a table.

    from stadapter.ablation import Arm, main

    if __name__ == "__main__":
        main(__doc__, name="kernel", values=("1", "3"), make_arm=...)

Importing this, and `--help`, stay light. So does a sweep that has finished: torch and Ray load when a trial is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from stadapter import config, recipes
from stadapter.ablation.exit_codes import DONE, exit_code_of
from stadapter.ablation.flags import Values, make_parser, sweep_options
from stadapter.ablation.options import SweepOptions
from stadapter.ablation.prepare import count_gpus, missing_trials
from stadapter.ablation.progress import Terminal, conclusion
from stadapter.ablation.run import run_sweep
from stadapter.config import ConfigError, Recipe
from stadapter.training.flags import changed_fields
from stadapter.trials import status
from stadapter.trials.sweep import Arm, Axis, Sweep, make_sweep


def main(
    doc: str,
    name: str,
    values: Values,
    make_arm: Callable[[Recipe, str], Arm],
    arguments: list[str] | None = None,
    axis: Axis | None = None,
) -> None:
    """Run the ablation script's command line and exit.

    `doc` is the script's docstring, its first paragraph the question, the one after 'Expected:' what should come out.
    `make_arm` turns the recipe and one of `values` (or of the words given to --values) into an arm, and raises
    ConfigError for a word that it cannot read. `values` may be a function of the recipe, where the arms worth comparing
    depend on it. Arms with an `x` lie on `axis`.
    """
    given = make_parser(doc, values).parse_args(arguments)

    def run() -> int:
        options = sweep_options(given)
        recipe = _recipe(given, options)
        words = given.values or (values(recipe) if callable(values) else values)
        arms = [make_arm(recipe, word) for word in words]
        question, expected = _question_of(doc)
        sweep = make_sweep(name, question, recipe, arms, given.seeds, expected, axis=axis)
        return _plan(sweep, options) if given.plan else _launch(sweep, options)

    sys.exit(exit_code_of(run, "stopped at once; the same command goes on from there"))


def _plan(sweep: Sweep, options: SweepOptions) -> int:
    # Late: torch takes seconds to load, and neither --help nor a finished sweep needs it.
    from stadapter.ablation.plan.show import make_plan, to_text

    selected = status.select(sweep.trials, options.only)
    entries = status.entries(sweep, options.output.resolve())
    todo = missing_trials(selected, entries, force=options.force)
    print(to_text(make_plan(sweep, selected, todo, entries, options), options))
    return DONE


def _launch(sweep: Sweep, options: SweepOptions) -> int:
    terminal = Terminal()
    try:
        outcome = run_sweep(sweep, options, terminal)
    finally:
        terminal.close()
    print("\n".join(conclusion(outcome, options)))
    return outcome.exit_code


def _recipe(given: argparse.Namespace, options: SweepOptions) -> Recipe:
    fields = changed_fields(given)
    if "seed" in fields:
        raise ConfigError("--set seed: seeds are 0 ... N - 1 of --seeds N")
    name = given.recipe
    if name is None:
        # Without --recipe or --num-gpus the GPUs are counted, by torch, which takes seconds to load.
        num_gpus = count_gpus(options, join=not given.plan) if options.num_gpus is None else options.num_gpus
        name = "ssv2_clip_b16" if num_gpus else "embedded"
    return recipes.with_weights(config.replace(recipes.get(name), **fields), given.weights)


def _question_of(doc: str) -> tuple[str, str]:
    """Return a script's question, its first paragraph, and the text of its paragraph 'Expected:'."""
    paragraphs = [paragraph.replace("\n", " ") for paragraph in doc.strip().split("\n\n")]
    expected = next((p.removeprefix("Expected: ") for p in paragraphs if p.startswith("Expected: ")), "")
    return paragraphs[0], expected
