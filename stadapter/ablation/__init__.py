"""Sweeps: all trials of one question, run, recorded and put into a table."""

from stadapter.ablation.script import main
from stadapter.trials.sweep import Arm, Axis

__all__ = ["Arm", "Axis", "main"]
