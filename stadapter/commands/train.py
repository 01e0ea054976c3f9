"""The command `stadapter train`: one recipe, in this process or in several under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.ablation.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from stadapter.commands.models import Commands, add_parser
from stadapter.config import Recipe
from stadapter.data.lists.storage import data_root
from stadapter.training.flags import add_reading_flags, add_speed_flags, reading_flags, speed_flags
from stadapter.training.options import DEFAULT_CHECKPOINT_EVERY_S
from stadapter.trials.files import WriteError
from stadapter.trials.record import bad_clips_in_words
from stadapter.trials.stop import StopSignals, write

ONE_REQUEST_S = 2.0  # a terminal and torchrun both pass on one Ctrl-C


def add_train(commands: Commands) -> None:
    train = add_parser(
        commands,
        "train",
        "train and test one recipe",
        "Train and test one recipe, in this process, or in several under torchrun:\n\n"
        "  torchrun --nproc-per-node 8 -m stadapter train --recipe ssv2_clip_b16 \\\n"
        "      --data-root /data/ssv2 --output runs/ssv2",
        recipes.listing(),
    )
    train.add_argument("--recipe", default="embedded", metavar="NAME", help="which training (default: %(default)s)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="change a field of the recipe, such as optim.epochs=1; repeatable",
    )
    train.add_argument(
        "--seed", type=int, default=0, help="of data order, augmentation and initialisation (default: 0)"
    )
    train.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="the run folder; an unfinished run in it goes on"
    )
    train.add_argument(
        "--data-root", type=data_root, metavar="FOLDER",
        help="where the data set lies, or its address (s3://...); the embedded one needs none",
    )  # fmt: skip
    train.add_argument(
        "--weights", type=Path, metavar="FILE", help="backbone weights from this file instead of the hub"
    )
    train.add_argument(
        "--num-workers", type=int, metavar="N",
        help="loader processes per training process (default: 0 without a GPU; with one, one less than its cores)",
    )  # fmt: skip
    train.add_argument(
        "--clips-per-pass", type=int, metavar="N", help="clips in one pass of a process; more are accumulated"
    )
    train.add_argument(
        "--checkpoint-every", type=float, default=DEFAULT_CHECKPOINT_EVERY_S, metavar="SECONDS",
        help="within an epoch; each epoch ends with a checkpoint as well (default: %(default)g)",
    )  # fmt: skip
    add_speed_flags(train)
    add_reading_flags(train)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    fields = dict(config.parse_override(text) for text in options.overrides)
    recipe = config.replace(recipes.get(options.recipe), **{"seed": options.seed, **fields})
    return _train_recipe(recipes.with_weights(recipe, options.weights), options)


def _train_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    import torch.distributed as dist

    from stadapter.data.bad_clips import BadClipsError
    from stadapter.training import hardware
    from stadapter.training.loop import TrainingError, train
    from stadapter.training.options import TrainOptions
    from stadapter.training.process_group import join_process_group
    from stadapter.training.state import Stopped
    from stadapter.trials import lock

    group = join_process_group()
    workers = options.num_workers
    if workers is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, on this machine
        workers = max(0, (os.cpu_count() or 1) // sharing - 1) if group.device.type == "cuda" else 0
    train_options = TrainOptions(
        options.data_root,
        options.weights,
        workers,
        options.clips_per_pass,
        checkpoint_every_s=options.checkpoint_every,
        **speed_flags(options),
        **reading_flags(options),
    )
    if options.cache_prefix and group.rank == 0:
        from stadapter.training.token_cache import check_pixels, describe

        check_pixels(recipe)
        print("\n".join(describe([recipe], options.cache_prefix)), flush=True)
    live = sys.stderr.isatty()
    if group.rank == 0:
        print(hardware.set_up(group.device, recipe.optim.precision), flush=True)

    def announce() -> None:
        write(2, "\nstopping after this step, with a checkpoint; once more to stop at once\n")

    def on_step(at: dict[str, Any]) -> None:
        if live:
            print("\r\033[K" + progress_line(recipe, at), end="", file=sys.stderr, flush=True)

    def on_epoch(metrics: dict[str, Any]) -> None:
        if group.rank == 0:
            if live:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            measured = "  ".join(f"{name} {metrics[name]:.2f}" for name in ("train_loss", "val_top1", "clips_per_s"))
            print(f"epoch {metrics['epoch']}/{recipe.optim.epochs}  {measured}", flush=True)

    locks = options.output.resolve().parent / "locks"
    try:
        with (
            lock.writing(options.output.resolve(), locks=locks) if group.rank == 0 else contextlib.nullcontext(),
            StopSignals(announce, ONE_REQUEST_S) as signals,
        ):
            result = train(recipe, options.output, train_options, group, on_epoch, on_step, signals.asked)
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
        print("  ".join(f"{name} {value:.2f}" for name, value in result.metrics.items()) + f"  -> {options.output}")
        if bad := bad_clips_in_words(result):
            print(f"{bad}; see bad_clips in {options.output}/result.json")
    return DONE


def progress_line(recipe: Recipe, at: dict[str, Any]) -> str:
    left = time.strftime("%H:%M:%S", time.gmtime(at["left_s"]))
    return (
        f"epoch {at['epoch']}/{recipe.optim.epochs}  loss {at['loss']:.3f}  "
        f"{at['clips_per_s']:.1f} clips/s  training left {left}"
    )
