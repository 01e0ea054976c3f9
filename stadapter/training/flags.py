"""The flags that every command which trains or tests shares. They change a number by rounding at most."""

from __future__ import annotations

import argparse
import math
from typing import Any, get_args

from stadapter.config import ConfigError
from stadapter.data.lists.storage import DEFAULT_LOCAL_COPIES_GB
from stadapter.data.reader import DEFAULT_TIME_LIMIT_S
from stadapter.data.video.decoding import Backend, check_backend
from stadapter.training.options import DEFAULT_MAX_BAD_SHARE


def add_speed_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
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
    """As fields of `TrainOptions`."""
    return {"recompute": options.recompute, "compile": options.compile}


def add_reading_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
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
    """As fields of `TrainOptions`; ConfigError for a value that cannot work."""
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
