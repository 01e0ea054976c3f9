"""Records -> statistics -> tables and figures -> one report.

    python -m analysis                      # the report on everything in runs/
    python -m analysis --tracking-uri URI   # the same from an MLflow store

The functions are the ones that the notebooks call.
"""

from analysis import content, figures
from analysis.content import finding
from analysis.figures import draw
from analysis.frames import arms_frame, trials_frame
from analysis.report import write_report
from analysis.sources import Answer, from_folder, from_mlflow
from analysis.tables import to_latex

__all__ = [
    "Answer",
    "arms_frame",
    "content",
    "draw",
    "figures",
    "finding",
    "from_folder",
    "from_mlflow",
    "to_latex",
    "trials_frame",
    "write_report",
]
