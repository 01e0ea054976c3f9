"""Sweeps: all trials of one question, run, recorded and put into a table."""

from stadapter.ablation.observer import Observer, Outcome, TrialEvent
from stadapter.ablation.options import SweepOptions
from stadapter.ablation.run import run_sweep
from stadapter.ablation.script import main
from stadapter.trials.sweep import Arm, Axis

__all__ = ["Arm", "Axis", "Observer", "Outcome", "SweepOptions", "TrialEvent", "main", "run_sweep"]
