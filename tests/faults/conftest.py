"""The flag `--all-faults`, and the fault matrix printed at the end."""

from __future__ import annotations

import pytest
from matrix import COLUMNS, MATRIX


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="inject every fault, not the short form's alone")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: left out of the short form of the fault matrix")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-faults"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="only with --all-faults (make faults)"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not MATRIX:
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *MATRIX, strict=True)]
    terminalreporter.section("fault matrix")
    for row in (COLUMNS, tuple("-" * width for width in widths), *MATRIX):
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
