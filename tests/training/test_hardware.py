"""The names and figures of the machine, also if the machine does not report them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stadapter.training import hardware

CPU = torch.device("cpu")


MEASURE = """
import json, torch
from stadapter.training import hardware
CPU = torch.device("cpu")
ballast = torch.ones(128, 2**18)  # 128 MiB that come and go: a peak to forget
del ballast
hardware.reset_peak_memory(CPU)
before = hardware.peak_memory_mib(CPU)
ballast = torch.ones(64, 2**18)  # 64 MiB
print(json.dumps([before, hardware.peak_memory_mib(CPU)]))
"""


def test_the_peak_memory_is_measured_anew() -> None:
    """The measurement needs a new process: in this one, memory of other tests may be freed at any moment."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    if before is None or after is None:
        pytest.skip("this system counts no peak")
    assert after - before > 50


def test_a_system_that_counts_no_peak_costs_the_figure_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_STATUS", tmp_path / "status")
    assert hardware.peak_memory_mib(CPU) is None
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  1024 kB\n")
    assert hardware.peak_memory_mib(CPU) is None
    (tmp_path / "status").write_text("VmHWM:\t  2048 kB\n")
    assert hardware.peak_memory_mib(CPU) == 2
