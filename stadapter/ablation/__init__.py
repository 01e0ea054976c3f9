"""Sweeps: all trials of one question, run, recorded and put into a table."""

from stadapter.ablation.script import main
from stadapter.trials.sweep import Arm

__all__ = ["Arm", "main"]
