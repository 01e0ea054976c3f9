"""Sweeps and their records read back from an MLflow store, without the output folder.

The source is the files `sweep.json` and `result.json` that the mirror attached.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from stadapter.config import ConfigError
from stadapter.results.sources import Answer
from stadapter.tracking import view
from stadapter.tracking.mirror import reason_of
from stadapter.tracking.store import STORE_ERRORS, MlflowClient, Run, search_runs
from stadapter.trials import files, record
from stadapter.trials.record import Record
from stadapter.trials.sweep import SWEEP, Sweep, load_sweep


def from_mlflow(tracking_uri: str, experiment: str = "stadapter") -> list[Answer]:
    """Return every sweep of an MLflow store with its records, sorted by name.

    Of several parent runs with the same name and recipe, the newest counts. Raises ConfigError if the store
    cannot be read or holds no sweep.
    """
    file, shown = tracking_uri.removeprefix("sqlite:///"), files.without_passwords(tracking_uri)
    if file != tracking_uri and not Path(file).exists():
        raise ConfigError(f"--tracking-uri {shown}: there is no such file")
    found: dict[str, Answer] = {}
    try:
        client = MlflowClient(tracking_uri)
        holder = client.get_experiment_by_name(experiment)
        parents = search_runs(client, holder.experiment_id, "tags.sweep_id LIKE '%'") if holder else iter(())
        for parent in parents:  # newest first
            sweep = _sweep(client, parent)
            if sweep is not None and (name := sweep.folder(Path()).name) not in found:
                found[name] = Answer(sweep, _records(client, parent, sweep))
    except STORE_ERRORS as error:
        raise ConfigError(f"--tracking-uri {shown}: cannot be read ({reason_of(error)})") from None
    if not found:
        raise ConfigError(
            f"--tracking-uri {shown}: holds no sweep with its {SWEEP}; `stadapter sync` brings it up to date"
        )
    return [found[name] for name in sorted(found)]


def pages(tracking_uri: str, experiment: str = "stadapter", most: int = 5) -> list[tuple[str, str]]:
    """Return the names of the newest sweeps of a store, each with the path of its page on an MLflow server."""
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], "tags.sweep_id LIKE '%'", max_results=most) if found else []
    return [(str(run.info.run_name), view.address(run.info.experiment_id, run.data.tags["sweep_id"])) for run in runs]


def _sweep(client: MlflowClient, parent: Run) -> Sweep | None:
    """Return the sweep of a parent run, or None if it was interrupted before its description was attached."""
    if not any(file.path == SWEEP for file in client.list_artifacts(parent.info.run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        client.download_artifacts(parent.info.run_id, SWEEP, folder)
        return load_sweep(Path(folder))


def _records(client: MlflowClient, parent: Run, sweep: Sweep) -> list[Record | None]:
    """Return the record of each trial in order, None if the store has none."""
    children = search_runs(client, parent.info.experiment_id, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    # The mirror sets the tag `finished` after attaching the files: a run with the tag is complete.
    complete = {run.data.tags["trial_id"]: run.info.run_id for run in children if "finished" in run.data.tags}
    results: list[Record | None] = []
    for trial in sweep.trials:
        if trial.id not in complete:
            results.append(None)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = client.download_artifacts(complete[trial.id], record.RESULT, folder)
            results.append(record.read_result(Path(path).parent))
    return results
