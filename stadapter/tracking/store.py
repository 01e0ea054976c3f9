"""A sweep written as runs in MLflow.

parent run   one per sweep: the question and, at the end, its tables and its figure
child runs   one per trial: parameters, metrics, tags, the files of the run folder, and the trained weights as a model
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# MLflow reads these variables when it is imported. Its defaults wait four minutes for a dead server, print the steps of
# creating a database, and report usage over the network.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from sqlalchemy.exc import SQLAlchemyError

from stadapter import config
from stadapter.tracking import view
from stadapter.tracking.database import reach_database
from stadapter.trials import files, lock, provenance, record
from stadapter.trials.record import Record
from stadapter.trials.sweep import FIGURE, Sweep, Trial, records
from stadapter.version import __version__

# Raised if a store is unreachable, full, locked or read-only (`requests` raises OSErrors). Any other error is a bug.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
_COSTS = ("trainable_params", "macs_per_view", "seconds", "cpu_seconds", "peak_memory_mib")
_ARTIFACTS = (record.CONFIG, record.METRICS, record.RESULT)
_MODEL, _MODEL_CODE = "model", "stadapter.inference.mlflow_pyfunc"  # not imported here: it needs torch
_MOST_METRICS = 800  # in a batch: MLflow takes 1,000 entries, parameters and tags included
_PARENT, _NOTE = "mlflow.parentRunId", "mlflow.note.content"


class Store:
    """The runs of one sweep in a store, written from its run folders.

    Every method may raise STORE_ERRORS. Repeating a write changes nothing.
    """

    def __init__(self, sweep: Sweep, output: Path, tracking_uri: str, experiment: str) -> None:
        self.sweep, self.output, self.uri, self.experiment = sweep, output, tracking_uri, experiment
        self.client: MlflowClient
        self.parent: Run
        self.address = ""
        self.known: dict[str, Run] = {}  # the parent's runs when it was opened, by trial id
        self.runs: dict[str, str] = {}  # run ids by trial id, of the trials written since
        self.logged: dict[str, set[int]] = {}  # epochs in the store, by trial id
        self.failed: set[str] = set()  # trial ids whose runs have the tag `error`
        self.unlogged: dict[str, list[Param]] = {}  # parameters to send with the next batch, by run id
        arms = [arm.label for arm in sweep.arms]
        self.order = {trial.id: f"{arms.index(trial.arm):03d}-{trial.seed:03d}" for trial in sweep.trials}

    def open(self) -> None:
        """Connect to the store, and find or create the experiment and the sweep's parent run."""
        artifacts = reach_database(self.uri)
        self.client = MlflowClient(self.uri)
        self.experiment_id = self._find_experiment(artifacts)
        key = _sweep_id(self.sweep, self.output)
        parents = self.client.search_runs([self.experiment_id], f"tags.sweep_id = '{key}'", max_results=1)
        if parents:
            self.parent = parents[0]
            self.client.update_run(self.parent.info.run_id, status="RUNNING")
            self._note_children()
        else:
            name = f"{self.sweep.name} · {self.sweep.recipe.name}"
            tags = {"sweep_id": key, _NOTE: self.sweep.question} | self._tags()
            self.parent = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self._save_view(key)
        self.address = view.address(self.experiment_id, key)

    def _find_experiment(self, artifacts: str | None) -> str:
        """Return the id of the experiment, creating it if it is missing."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found:
            return str(found.experiment_id)
        # Without the tag MLflow's page asks whether the experiment is about language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self.client.create_experiment(self.experiment, artifacts, kind))

    def _note_children(self) -> None:
        """Remember the parent's runs, and correct their order if arms were inserted since they were made."""
        for run in self._children():
            tags = run.data.tags
            self.known[tags["trial_id"]] = run
            if "error" in tags:
                self.failed.add(tags["trial_id"])
            order = self.order.get(tags["trial_id"], tags["order"])
            if order != tags["order"]:
                self.client.set_tag(run.info.run_id, "order", order)

    def _children(self, condition: str = "") -> Iterator[Run]:
        return search_runs(
            self.client, self.experiment_id, f"tags.`{_PARENT}` = '{self.parent.info.run_id}'{condition}"
        )

    def _save_view(self, key: str) -> None:
        done = next((result for result in records(self.sweep, self.output) if result), None)
        names = [_test(name) for name in (done.metrics if done else ("top1",)) if not name.endswith("loss")]
        names.sort(key="test/top1".__ne__)
        saved = view.saved_view(self.sweep, self.parent.info.run_id, self.parent.info.start_time, names)
        self.client.set_experiment_tag(self.experiment_id, view.TAG + key, saved)

    def open_trial(self, trial: Trial) -> str:
        """Return the id of a trial's run, creating the run if it is missing."""
        if trial.id not in self.runs:
            run = self._resumed_run(trial) or self._create_run(trial)
            if not run.data.params:
                params = view.params(trial.recipe)
                self.unlogged[run.info.run_id] = [Param(path, value) for path, value in params.items()]
            self.runs[trial.id] = run.info.run_id
        return self.runs[trial.id]

    def _resumed_run(self, trial: Trial) -> Run | None:
        """Return the run of a trial and note its epochs, or return None if the training has no run yet.

        A trial begun anew, by --force or after its folder was deleted, gets another run: two trainings in one run give
        a broken curve. The old run goes to MLflow's bin, from where it can be restored.
        """
        self.logged[trial.id] = set()
        run = self.known.get(trial.id)
        if run is None:
            return None
        history = self.client.get_metric_history(run.info.run_id, "train_loss")
        first = min(history, key=lambda metric: metric.step, default=None)
        epochs = {(e["epoch"], _ms(e["time"])) for e in record.read_metrics(trial.folder(self.output))}
        if first and (first.step, first.timestamp) not in epochs:
            self.client.delete_run(run.info.run_id)
            self._delete_models(run.info.run_id)
            self.failed.discard(trial.id)
            return None
        self.logged[trial.id] = {metric.step for metric in history}
        return run

    def _create_run(self, trial: Trial) -> Run:
        tags = {_PARENT: self.parent.info.run_id, "trial_id": trial.id, "arm": trial.arm, "seed": str(trial.seed)}
        tags |= self._tags() | {"order": self.order[trial.id]}
        name = f"{trial.arm} s{trial.seed}"  # short: MLflow's list shows fifteen letters
        return self.client.create_run(self.experiment_id, _ms(self._began(trial)), tags, name)

    def _began(self, trial: Trial) -> float:
        """Return the time at which a trial began: from its record, else its first epoch, else now."""
        folder = trial.folder(self.output)
        if result := record.read_result(folder):
            return result.started
        epochs = record.read_metrics(folder)
        return float(epochs[0]["time"]) if epochs else time.time()

    def start_trial(self, trial: Trial) -> None:
        """Open a trial's run, and set it to running again if it had ended."""
        run_id = self.open_trial(trial)
        self._log(run_id)
        if trial.id in self.known or trial.id in self.failed:
            self.client.update_run(run_id, status="RUNNING")

    def _log(self, run_id: str, metrics: Sequence[Metric] = (), tags: Sequence[RunTag] = ()) -> None:
        """Log to a run in as few batches as possible: a database takes as long for one number as for a thousand."""
        params = self.unlogged.get(run_id, [])
        for start in range(0, len(metrics), _MOST_METRICS) or ([0] if params or tags else []):
            batch = metrics[start : start + _MOST_METRICS]
            last = start + _MOST_METRICS >= len(metrics)
            self.client.log_batch(run_id, batch, params, tags if last else ())
            params = []
        self.unlogged.pop(run_id, None)

    def _new_epochs(self, trial: Trial) -> list[Metric]:
        """Return the metrics of the epochs missing from the store."""
        found: list[Metric] = []
        for epoch in record.read_metrics(trial.folder(self.output)):
            if epoch["epoch"] not in self.logged[trial.id]:
                values = {name: value for name, value in epoch.items() if name not in {"epoch", "step", "time"}}
                if "seconds" in values:  # the trial's metric has this name
                    values["epoch_seconds"] = values.pop("seconds")
                # Logged first, because MLflow's page of selected runs begins with the metric logged first.
                first = {name: values[name] for name in ("val_top1",) if name in values}
                found += _metrics(first | values, _ms(epoch["time"]), epoch["epoch"])
        return found

    def log_epochs(self, trial: Trial) -> None:
        """Log the epochs missing from the store."""
        run_id = self.open_trial(trial)
        metrics = self._new_epochs(trial)
        self._log(run_id, metrics)
        self.logged[trial.id] |= {metric.step for metric in metrics}

    def finish_trial(self, trial: Trial) -> None:
        """Log a finished trial: files, model, epochs, results. The tag `finished` comes last."""
        folder = trial.folder(self.output)
        result = record.read_result(folder)
        assert result is not None, f"{folder} has no {record.RESULT}"
        finished = _ms(result.finished)
        known = self.known.get(trial.id)
        if known and known.info.status == "FINISHED" and known.data.tags.get("finished") == str(finished):
            return
        run_id = self.open_trial(trial)
        self._log_files(run_id, trial)
        epochs = self._new_epochs(trial)
        tags = [RunTag(name, str(getattr(result, name))) for name in ("git_commit", "device", "precision")]
        # Sent with the numbers, after the files: a run with this tag is complete.
        tags.append(RunTag("finished", str(finished)))
        self._log(run_id, [*epochs, *_metrics(_results(result), finished, 0)], tags)
        self.logged[trial.id] |= {metric.step for metric in epochs}
        if trial.id in self.failed:
            self.client.delete_tag(run_id, "error")
            self.failed.discard(trial.id)
        self.client.set_terminated(run_id, "FINISHED", finished)

    def _log_files(self, run_id: str, trial: Trial) -> None:
        folder = trial.folder(self.output)
        for name in _ARTIFACTS:
            if (folder / name).exists():
                self.client.log_artifact(run_id, str(folder / name))
        if (folder / record.TRAINED).exists():
            self._log_model(run_id, trial, folder / record.TRAINED)

    def _log_model(self, run_id: str, trial: Trial, weights: Path) -> None:
        """Log the model `runs:/<run_id>/model`, every field given: MLflow's `log_model` takes seconds to guess them."""
        if trial.id in self.known:
            self._delete_models(run_id)  # of an attempt that was cut short
        tags = {"arm": trial.arm, "seed": str(trial.seed), "trial_id": trial.id}
        logged = self.client.create_logged_model(self.experiment_id, _MODEL, run_id, tags)
        takes = ModelSignature(Schema([ColSpec("string")]), params=ParamSchema([ParamSpec("top", "long", 5)]))
        model = Model(logged.artifact_location, run_id, signature=takes, model_id=logged.model_id)
        pyfunc.add_to_model(model, _MODEL_CODE, data=weights.name)
        with tempfile.TemporaryDirectory() as folder:
            model.save(os.path.join(folder, "MLmodel"))
            Path(folder, "requirements.txt").write_text(f"stadapter=={__version__}\n")
            Path(folder, weights.name).symlink_to(weights.resolve())
            self.client.log_model_artifacts(logged.model_id, folder)
        self.client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])

    def _delete_models(self, run_id: str) -> None:
        for model in self.client.search_logged_models([self.experiment_id], f"source_run_id = '{run_id}'"):
            self.client.delete_logged_model(model.model_id)

    def fail_trial(self, trial: Trial, message: str) -> None:
        """Log the epochs of a failed trial, and the reason as the tag `error`."""
        self.log_epochs(trial)
        self.client.set_tag(self.runs[trial.id], "error", message[:4000])
        self.failed.add(trial.id)
        self.client.set_terminated(self.runs[trial.id], "FAILED")

    def close(self, table_files: list[Path], status: str) -> None:
        """Attach the tables, describe and end the parent run, and end the runs of trials that no process trains."""
        for run in list(self._children(" AND attributes.status = 'RUNNING'")):
            # A locked trial may be in training by another launch.
            if not lock.owner_of(self.output / "trials" / run.data.tags["trial_id"]):
                self.client.set_terminated(run.info.run_id, "KILLED")
        parent_id = self.parent.info.run_id
        for path in table_files:
            self.client.log_artifact(parent_id, str(path))
        # MLflow shows the description on the parent run's first page.
        texts = [self.sweep.question, *(path.read_text() for path in table_files if path.suffix == ".md")]
        if any(path.name == FIGURE for path in table_files):
            texts.insert(1, f"![figure](get-artifact?path={FIGURE}&run_uuid={parent_id})")
        self.client.set_tag(parent_id, _NOTE, "\n\n".join(texts)[:5000])
        self._save_view(self.parent.data.tags["sweep_id"])
        self.client.set_terminated(parent_id, status)

    def _tags(self) -> dict[str, str]:
        commit = provenance.provenance()["git_commit"]
        return {"sweep": self.sweep.name, "recipe": self.sweep.recipe.name, "git_commit": commit}


def search_runs(client: MlflowClient, experiment_id: str, condition: str) -> Iterator[Run]:
    """Yield the runs of an experiment that meet a condition, newest first, page by page."""
    token = None
    while token != "":
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def _sweep_id(sweep: Sweep, output: Path) -> str:
    """Return the id of the parent run: a hash of the question, the recipe and an id kept in the output folder.

    More seeds or arms belong to the same parent, also after the folder moved. The same question in another --output, or
    with --set, has another parent.
    """
    path = output / "ledger_id"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, uuid.uuid4().hex.encode())
    recipe = config.identity(config.replace(sweep.recipe, seed=0))
    return hashlib.sha256(f"{sweep.name} {recipe} {path.read_text()}".encode()).hexdigest()[:12]


def _results(result: Record) -> dict[str, float]:
    """Return the metrics and costs of a finished trial, to log at step 0, which MLflow draws as bars."""
    costs = {name: value for name in _COSTS if (value := getattr(result, name)) is not None}
    return {_test(name): value for name, value in result.metrics.items()} | costs


def _test(name: str) -> str:
    """Return a metric's name under `test/`: the prefix gives results a separate section above the curves."""
    return "test/" + name.removeprefix("test_")


def _metrics(values: dict[str, Any], timestamp: int, step: int) -> list[Metric]:
    """Return the finite numbers as metrics: a store would show infinity as 1.8e308."""
    return [
        Metric(name, float(value), timestamp, step)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
