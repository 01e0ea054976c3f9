"""The command `check`, which looks for damage in a data set."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from stadapter.ablation.exit_codes import DONE, FAILED
from stadapter.commands.parsers import Commands
from stadapter.config import ConfigError
from stadapter.data import check
from stadapter.data.lists.clip_list import ClipList
from stadapter.data.lists.formats import load_clips
from stadapter.data.reader import DEFAULT_TIME_LIMIT_S, Reading
from stadapter.training.flags import add_data_root

DEFAULT_MIN_FRAMES = 8  # as recipes sample: a shorter clip repeats frames
MOST_SHOWN = 10  # problems in the terminal; all of them are in the report

EXIT_CODES = "exit codes: 0 every clip is good; 1 some are not; 2 the input cannot work; 130 interrupted"


def add_check(commands: Commands) -> None:
    """Add `check`."""
    parser = commands.add_parser(
        "check",
        help="look at every clip of a data set",
        description="Open every clip of a data set and decode frames over its whole length. Prints what is missing, "
        "unreadable, too short or there twice, and the fingerprint that every result on this data carries. With "
        "--output, writes report.csv and the cleaned lists train.txt and val.txt: put these into the data root, where "
        "they win over the published lists.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "dataset", choices=["ssv2", "kinetics400", "epic_kitchens100", "list", "folder"], help="its layout"
    )
    add_data_root(parser, "where it lies, or its address (s3://...)", required=True)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write the report and the cleaned lists here; nothing there is "
        "overwritten",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per CPU core)"
    )
    parser.add_argument(
        "--min-frames", type=int, default=DEFAULT_MIN_FRAMES, metavar="N",
        help="a clip with fewer frames is too short (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="of a list: its labels must be below (default: any label is right)"
    )
    parser.add_argument(
        "--clip-time-limit", type=float, default=DEFAULT_TIME_LIMIT_S, metavar="SECONDS",
        help="a clip that takes longer is unreadable (default: %(default)g)",
    )  # fmt: skip
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    for name, least in {"workers": 1, "min_frames": 1, "num_classes": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    config = check.class_config(options.dataset, options.data_root, options.num_classes)
    train, val = (load_clips(config, options.data_root, split) for split in ("train", "val"))
    if options.output is not None:
        check.prepare_output(options.output)
    reading = Reading(time_limit_s=options.clip_time_limit)
    findings = _look_at_all(train, val, reading, options)
    for clips in (train, val):
        print(check.summary(clips, findings, reading.decoder))
    _print_findings(train, val, findings, is_written=options.output is not None)
    if options.output is not None:
        check.write_report(options.output, (train, val), findings)
        print(f"written to {options.output}: report.csv, train.txt, val.txt")
    return FAILED if findings else DONE


def _look_at_all(train: ClipList, val: ClipList, reading: Reading, options: argparse.Namespace) -> list[check.Finding]:
    """Return the problems of all clips, behind a progress bar."""
    from tqdm import tqdm

    findings: list[check.Finding] = []
    seen: dict[str, str] = {}
    with tqdm(total=len(train) + len(val), unit=" clips", smoothing=0.05, file=sys.stderr, disable=None) as bar:
        # Validation first: of a clip in both lists, the training copy is the one to leave out.
        for clips in (val, train):
            looks = check.look_at_all(clips, options.min_frames, options.workers, reading)
            for found in check.find_problems(clips, looks, seen, lambda: bar.update()):
                findings.append(found)
                bar.set_postfix_str(f"{len(findings)} bad")
    return findings


def _print_findings(train: ClipList, val: ClipList, findings: list[check.Finding], *, is_written: bool) -> None:
    for found in findings[:MOST_SHOWN]:
        path = (train if found.split == "train" else val).paths[found.index]
        print(f"  {found.problem.replace('_', ' ')}: {path}: {found.detail}")
    if len(findings) > MOST_SHOWN:
        print(f"  ... and {len(findings) - MOST_SHOWN:,} more" + ("" if is_written else "; --output FOLDER lists all"))
