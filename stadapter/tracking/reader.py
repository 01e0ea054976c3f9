"""Sweeps and their records read back from an MLflow store, for whoever has the store but not the output folder.

What comes back is what was in the run folders: the files `sweep.json` and `result.json` that the mirror attached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from stadapter.config import ConfigError
from stadapter.results.sources import Answer
from stadapter.tracking.store import STORE_ERRORS, MlflowClient, Run
from stadapter.trials import files, record
from stadapter.trials.record import Record
from stadapter.trials.sweep import SWEEP, Sweep, load_sweep


def from_mlflow(tracking_uri: str) -> list[Answer]:
    """Every sweep in an MLflow store, by name. ConfigError where there is none or the store cannot be read."""
    return [Answer(sweep, found) for sweep, found in read_sweeps(tracking_uri)]


def read_sweeps(tracking_uri: str, experiment: str = "stadapter") -> list[tuple[Sweep, list[Record | None]]]:
    """Every sweep of a store with the record of each trial in order, None where it has none; sorted by name.

    Of several parents with the same name and recipe, the one begun last counts. ConfigError where the store cannot be
    read or holds no sweep.
    """
    file, shown = tracking_uri.removeprefix("sqlite:///"), files.without_passwords(tracking_uri)
    if file != tracking_uri and not Path(file).exists():
        raise ConfigError(f"--tracking-uri {shown}: there is no such file")
    found: dict[str, tuple[Sweep, list[Record | None]]] = {}
    try:
        client = MlflowClient(tracking_uri)
        holder = client.get_experiment_by_name(experiment)
        parents = _search(client, holder.experiment_id, "tags.sweep_id LIKE '%'") if holder else iter(())
        for parent in parents:  # newest first
            sweep = _sweep(client, parent)
            if sweep is not None:
                name = sweep.folder(Path()).name
                if name not in found:
                    found[name] = sweep, _records(client, parent, sweep)
    except STORE_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--tracking-uri {shown}: cannot be read ({reason[:160]})") from None
    if not found:
        raise ConfigError(
            f"--tracking-uri {shown}: holds no sweep with its {SWEEP}; `stadapter sync` brings it up to date"
        )
    return [found[name] for name in sorted(found)]


def _search(client: MlflowClient, experiment_id: str, condition: str) -> Iterator[Run]:
    token = None
    while token != "":
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def _sweep(client: MlflowClient, parent: Run) -> Sweep | None:
    """The sweep of a parent run; None where it was interrupted before its description was attached."""
    if not any(file.path == SWEEP for file in client.list_artifacts(parent.info.run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        client.download_artifacts(parent.info.run_id, SWEEP, folder)
        return load_sweep(Path(folder))


def _records(client: MlflowClient, parent: Run, sweep: Sweep) -> list[Record | None]:
    children = _search(client, parent.info.experiment_id, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    # The mirror sets this tag after the files: what has it is complete.
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
