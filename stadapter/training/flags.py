"""The flags that commands which train or test share: each is defined here, once, with its help text.

`add_*` puts flags into a parser; the function without `add` reads them. Those about speed and reading change a number
by rounding at most.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, get_args

from stadapter import config
from stadapter.config import ConfigError
from stadapter.data.lists.storage import DEFAULT_LOCAL_COPIES_GB, data_root
from stadapter.data.reader import DEFAULT_TIME_LIMIT_S
from stadapter.data.video.decoding import Backend, check_backend
from stadapter.training.options import DEFAULT_CHECKPOINT_EVERY_S, DEFAULT_MAX_BAD_SHARE, GPU_CLIPS_PER_PASS

Parser = argparse.ArgumentParser | argparse._ArgumentGroup
CHANGE_RECIPE = "change a field of the recipe, such as optim.epochs=1; repeatable"
WHERE_DATA_LIES = "where the data set lies, or its address (s3://...); the embedded one needs none"


def complete_files(action: argparse.Action) -> None:
    """Let shells complete names of files behind a flag."""
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # type: ignore[attr-defined]  # shtab reads it


def add_set(parser: Parser, help_text: str = CHANGE_RECIPE) -> None:
    """Add --set."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides", help=help_text
    )  # fmt: skip


def changed_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that --set changes, by dotted path. Raises ConfigError if one cannot be read."""
    return dict(config.parse_override(text) for text in options.overrides)


def add_data_root(parser: Parser, help_text: str = WHERE_DATA_LIES, *, required: bool = False) -> None:
    """Add --data-root."""
    parser.add_argument("--data-root", type=data_root, required=required, metavar="FOLDER", help=help_text)


def add_weights(parser: Parser) -> None:
    """Add --weights."""
    complete_files(
        parser.add_argument(
            "--weights", type=Path, metavar="FILE", help="backbone weights from this file instead of the hub"
        )
    )


def add_loader_processes(parser: Parser) -> None:
    """Add --num-workers of a training."""
    parser.add_argument(
        "--num-workers", type=int, metavar="N",
        help="loader processes per training process (default: 0 without GPUs; with GPUs, one less than its cores)",
    )  # fmt: skip


def add_clips_per_pass(parser: Parser, default: str = f"all, or {GPU_CLIPS_PER_PASS} on a GPU") -> None:
    """Add --clips-per-pass of a training."""
    parser.add_argument(
        "--clips-per-pass", type=int, metavar="N",
        help=f"clips in one pass of a process; more are accumulated (default: {default})",
    )  # fmt: skip


def add_checkpoint_every(parser: Parser) -> None:
    """Add --checkpoint-every."""
    parser.add_argument(
        "--checkpoint-every", type=float, default=DEFAULT_CHECKPOINT_EVERY_S, metavar="SECONDS",
        help="within an epoch; each epoch ends with a checkpoint as well (default: %(default)g)",
    )  # fmt: skip


def add_speed_flags(parser: Parser) -> None:
    """Add --recompute and --compile."""
    parser.add_argument(
        "--recompute", action="store_true",
        help="compute the MLPs again in the backward pass: less memory, more time, the same numbers",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="compile the model by torch.compile: a minute or more at the start of each training process, then faster "
        "steps; numbers differ by rounding",
    )  # fmt: skip


def speed_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_speed_flags` as fields of `TrainOptions`."""
    return {"recompute": options.recompute, "compile": options.compile}


def add_reading_flags(parser: Parser) -> None:
    """Add the flags on how clips are read and kept."""
    parser.add_argument(
        "--decoder", choices=get_args(Backend), default="auto",
        help="what reads video files; all give the same frames (default: %(default)s, the fastest that is exact)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-gb", type=float, default=0.0, metavar="GB",
        help="keep decoded frames on this much of each node's disk, in $STADAPTER_CACHE or ~/.cache/stadapter: the "
        "next trial of the same seed decodes nothing (default: 0, none)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-prefix", type=float, default=0.0, metavar="GB",
        help="keep the tokens that leave the frozen blocks below the first adapter on this much of each node's disk, "
        "in $STADAPTER_CACHE/prefix or ~/.cache/stadapter/prefix: for all epochs, seeds and arms of the same depth, a "
        "clip is decoded once and those blocks are computed once. For recipes whose clips look the same in every epoch "
        "(data.fixed_frames=true, no augmentation); recorded, and the same numbers to rounding (default: 0, none)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-share", type=float, default=DEFAULT_MAX_BAD_SHARE, metavar="SHARE",
        help="stop when more than this share of a list's clips cannot be read (default: %(default)s); fewer are "
        "replaced in training, counted as wrong in testing, and reported",
    )  # fmt: skip
    parser.add_argument(
        "--clip-time-limit", type=float, default=DEFAULT_TIME_LIMIT_S, metavar="SECONDS",
        help="give up reading a clip after this long (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--local-copies-gb", "--spill-gb", type=float, default=DEFAULT_LOCAL_COPIES_GB, metavar="GB",
        help="local disk for copies of clips that lie at an address such as s3://... (default: %(default)g)",
    )  # fmt: skip


def reading_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_reading_flags` as fields of `TrainOptions`. Raises ConfigError for a bad value."""
    if not 0 <= options.max_bad_share <= 1:
        raise ConfigError(f"--max-bad-share {options.max_bad_share}: must be in [0, 1]")
    if options.clip_time_limit <= 0:
        raise ConfigError(f"--clip-time-limit {options.clip_time_limit:g}: must be above 0 seconds")
    if options.local_copies_gb < 0:
        raise ConfigError(f"--local-copies-gb {options.local_copies_gb:g}: must be at least 0")
    if options.cache_gb < 0:
        raise ConfigError(f"--cache-gb {options.cache_gb:g}: must be at least 0")
    if not 0 <= options.cache_prefix < math.inf:
        raise ConfigError(f"--cache-prefix {options.cache_prefix:g}: must be a number of gigabytes, at least 0")
    check_backend(options.decoder)
    return {
        "decoder": options.decoder,
        "cache_gb": options.cache_gb,
        "token_cache_gb": options.cache_prefix,
        "max_bad_share": options.max_bad_share,
        "clip_time_limit_s": options.clip_time_limit,
        "local_copies_gb": options.local_copies_gb,
    }
