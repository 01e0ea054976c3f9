"""The command `train`: one recipe, in this process or in several under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stadapter import config, recipes
from stadapter.ablation.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from stadapter.commands.parsers import Commands, add_parser
from stadapter.config import Recipe
from stadapter.training.flags import (
    add_checkpoint_every,
    add_clips_per_pass,
    add_data_root,
    add_loader_processes,
    add_reading_flags,
    add_set,
    add_speed_flags,
    add_weights,
    changed_fields,
    complete_files,
    reading_flags,
    speed_flags,
)
from stadapter.training.options import TrainOptions
from stadapter.trials import lock
from stadapter.trials.files import WriteError
from stadapter.trials.record import Record, bad_clips_in_words
from stadapter.trials.stop import StopSignals, write

if TYPE_CHECKING:
    from stadapter.training.process_group import ProcessGroup

ONE_REQUEST_S = 2.0  # a terminal and torchrun both pass on one Ctrl-C


def add_train(commands: Commands) -> None:
    """Add `train`."""
    parser = add_parser(
        commands,
        "train",
        "train and test one recipe",
        "Train and test one recipe, in this process, or in several under torchrun:\n\n"
        "  torchrun --nproc-per-node 8 -m stadapter train --recipe ssv2_clip_b16 \\\n"
        "      --data-root /data/ssv2 --output runs/ssv2",
        recipes.listing(),
    )
    parser.add_argument("--recipe", default="embedded", metavar="NAME", help="which training (default: %(default)s)")
    add_set(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of data order, augmentation and initialisation (default: 0)"
    )
    complete_files(
        parser.add_argument(
            "--output", type=Path, required=True, metavar="FOLDER",
            help="the run folder; an unfinished run in it goes on",
        )
    )  # fmt: skip
    add_data_root(parser)
    add_weights(parser)
    add_loader_processes(parser)
    add_clips_per_pass(parser, "all")
    add_checkpoint_every(parser)
    add_speed_flags(parser)
    add_reading_flags(parser)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    import torch.distributed as dist

    from stadapter.data.bad_clips import BadClipsError
    from stadapter.training.loop import TrainingError
    from stadapter.training.process_group import join_process_group
    from stadapter.training.state import Stopped

    recipe = config.replace(recipes.get(options.recipe), **{"seed": options.seed, **changed_fields(options)})
    recipe = recipes.with_weights(recipe, options.weights)
    group = join_process_group()
    try:
        train_options = _train_options(options, group)
        if group.rank == 0:
            _print_setup(recipe, train_options, group)
        result = _train_as_only_writer(recipe, options.output, train_options, group)
    except lock.Busy as busy:
        print(f"error: --output {options.output}: {busy}; choose another folder, or wait for its end", file=sys.stderr)
        return BAD_INPUT
    except (TrainingError, BadClipsError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except Stopped as stopped:
        if group.rank == 0:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return STOPPED
    finally:
        if group.world_size > 1:
            dist.destroy_process_group()
    if group.rank == 0:
        _print_result(result, options.output)
    return DONE


def _train_options(options: argparse.Namespace, group: ProcessGroup) -> TrainOptions:
    workers = options.num_workers
    if workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, on this machine
        workers = max(0, (os.cpu_count() or 1) // sharing - 1) if group.device.type == "cuda" else 0
    return TrainOptions(
        options.data_root,
        options.weights,
        workers,
        options.clips_per_pass,
        checkpoint_every_s=options.checkpoint_every,
        **speed_flags(options),
        **reading_flags(options),
    )


def _train_as_only_writer(recipe: Recipe, output: Path, train_options: TrainOptions, group: ProcessGroup) -> Record:
    """Train while rank 0 holds the lock of the run folder; the first signal asks for an end with a checkpoint."""
    from stadapter.training.loop import train

    progress = _Progress(recipe, group.rank)
    with _only_writer(output, group.rank), StopSignals(_announce_stop, ONE_REQUEST_S) as signals:
        return train(recipe, output, train_options, group, progress.on_epoch, progress.on_step, signals.asked)


@contextlib.contextmanager
def _only_writer(output: Path, rank: int) -> Iterator[None]:
    folder = output.resolve()
    with lock.writing(folder, locks=folder.parent / "locks") if rank == 0 else contextlib.nullcontext():
        yield


def _announce_stop() -> None:
    write(2, "\nstopping after this step, with a checkpoint; once more to stop at once\n")


class _Progress:
    """The epochs of a training on standard output, and its steps on a terminal at standard error."""

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self.recipe, self.rank, self.live = recipe, rank, sys.stderr.isatty()

    def on_step(self, at: dict[str, Any]) -> None:
        if self.live:
            print("\r\033[K" + progress_line(self.recipe, at), end="", file=sys.stderr, flush=True)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        measured = "  ".join(f"{name} {metrics[name]:.2f}" for name in ("train_loss", "val_top1", "clips_per_s"))
        print(f"epoch {metrics['epoch']}/{self.recipe.optim.epochs}  {measured}", flush=True)


def _print_setup(recipe: Recipe, train_options: TrainOptions, group: ProcessGroup) -> None:
    from stadapter.training import hardware

    if train_options.token_cache_gb:
        from stadapter.training.token_cache import check_pixels, describe

        check_pixels(recipe)
        print("\n".join(describe([recipe], train_options.token_cache_gb)), flush=True)
    print(hardware.set_up(group.device, recipe.optim.precision), flush=True)


def _print_result(result: Record, output: Path) -> None:
    print("  ".join(f"{name} {value:.2f}" for name, value in result.metrics.items()) + f"  -> {output}")
    if bad := bad_clips_in_words(result):
        print(f"{bad}; see bad_clips in {output}/result.json")


def progress_line(recipe: Recipe, at: dict[str, Any]) -> str:
    """Return the live line of a training, at the step that `at` describes."""
    left = time.strftime("%H:%M:%S", time.gmtime(at["left_s"]))
    return (
        f"epoch {at['epoch']}/{recipe.optim.epochs}  loss {at['loss']:.3f}  "
        f"{at['clips_per_s']:.1f} clips/s  training left {left}"
    )
