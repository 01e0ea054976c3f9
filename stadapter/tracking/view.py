"""The page that MLflow opens on a sweep: one bar per arm, seeds averaged, arms in the order of the table.

MLflow keeps saved views ("Views" above the list of runs) as JSON in tags of the experiment: a name and a state. The
state's format is undocumented; this is that of MLflow 3.17. A version that reads it differently shows its default
charts; the runs are unaffected.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from stadapter.config import Recipe, flatten
from stadapter.trials.sweep import Sweep

TAG = "mlflow.sharedViewState."
_SECTION = "arms"
# By step and unsmoothed: MLflow's default smoothing draws 84 where 98 was measured.
_EPOCHS = {"lineSmoothness": 0, "useGlobalLineSmoothing": False, "xAxisKey": "step", "displayPoints": True, "range": {}}


def saved_view(sweep: Sweep, parent_id: str, created_ms: int, test_metrics: list[str]) -> str:
    """Return the tag value that saves a sweep's view. `test_metrics` are names as logged, the deciding one first."""
    ablated = list(dict.fromkeys(path for arm in sweep.arms for path in arm.fields))
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": "tags.`order`",
        "orderByAsc": True,
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [_arm(sweep, ablated)]},
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [
            *(f"params.`{path}`" for path in [*ablated, "seed"]),
            *(f"metrics.`{name}`" for name in [*test_metrics, "trainable_params", "seconds"]),
        ],
        "compareRunSections": [_section(sweep)],
        "compareRunCharts": _charts(test_metrics),
    }
    name = f"{sweep.name} · {sweep.recipe.name}"
    return json.dumps({"name": name, "createdAt": created_ms, "updatedAt": created_ms, "state": json.dumps(state)})


def _section(sweep: Sweep) -> dict[str, Any]:
    shape = {"display": True, "isReordered": True, "columns": 2, "cardHeight": 400}
    return {"uuid": _SECTION, "name": sweep.name} | shape


def _charts(test_metrics: list[str]) -> list[dict[str, Any]]:
    """Return the charts of the page in order."""
    charts: list[dict[str, Any]] = [
        {"type": "BAR", "metricKey": test_metrics[0]},
        _epochs("val_top1"),
        # Cost against gain: an arm to the right of another but not above it is not worth its parameters.
        {"type": "SCATTER", "xaxis": _metric("trainable_params"), "yaxis": _metric(test_metrics[0])},
        *({"type": "BAR", "metricKey": name} for name in test_metrics[1:]),
        _epochs("train_loss"),
        {"type": "BAR", "metricKey": "seconds"},
    ]
    common = {"metricSectionId": _SECTION, "runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    return [{"uuid": f"chart{i}", **common, **chart} for i, chart in enumerate(charts)]


def params(recipe: Recipe) -> dict[str, str]:
    """Return a recipe's fields as text, a kernel's three extents also singly: a chart's axis needs numbers."""
    params: dict[str, str] = {}
    for path, value in flatten(recipe).items():
        if path == "adapter.kernel_size":
            params[path] = "x".join(map(str, value))
            params |= {f"{path}.{axis}": str(extent) for axis, extent in zip("thw", value, strict=True)}
        elif isinstance(value, list):
            params[path] = ",".join(map(str, value))
        elif value is None or isinstance(value, bool):
            params[path] = str(value).lower()
        else:
            params[path] = str(value) or "default"
    return params


def _arm(sweep: Sweep, ablated: list[str]) -> dict[str, str]:
    """Return MLflow's grouping of runs: by the ablated field if the arms' labels end in its values, else by label.

    The list of runs is narrow: of the label `kernel 3x3x3` it shows `kernel ...`, but of a field the whole value.
    """
    if len(ablated) == 1 and all(t.arm.endswith(f" {params(t.recipe)[ablated[0]]}") for t in sweep.trials):
        return {"mode": "param", "groupByData": ablated[0]}
    return {"mode": "tag", "groupByData": "arm"}


def address(experiment_id: str, key: str) -> str:
    """Return the path of a saved view, to append to the address of an MLflow server."""
    query = {"viewStateShareKey": key, "compareRunsMode": "CHART", "workflowType": "machine_learning"}
    return f"/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def _metric(name: str) -> dict[str, str]:
    return {"key": name, "type": "METRIC"}


def _epochs(name: str) -> dict[str, Any]:
    return {"type": "LINE", "metricKey": name, "selectedMetricKeys": [name], **_EPOCHS}
