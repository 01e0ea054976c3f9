"""The parser of one command behind `stadapter`."""

from __future__ import annotations

import argparse
from typing import Any

Commands = Any  # argparse's subparsers, whose class has no public name


def add_parser(commands: Commands, name: str, summary: str, description: str, epilog: str = "") -> Any:
    """Add a command whose help keeps its line breaks. `summary` is its line in `stadapter --help`."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
