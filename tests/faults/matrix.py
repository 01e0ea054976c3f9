"""The fault matrix: a row for each fault that was injected."""

from __future__ import annotations

COLUMNS = ("fault", "injected how", "recovered in s", "trials lost", "trials repeated", "steps repeated")
MATRIX: list[tuple[str, ...]] = []
