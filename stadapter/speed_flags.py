"""The flags that trade memory, time at the start and time per step. They change a number by rounding at most."""

from __future__ import annotations

import argparse
from typing import Any


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
    """As fields of `train.Operation`."""
    return {"recompute": options.recompute, "compile": options.compile}
