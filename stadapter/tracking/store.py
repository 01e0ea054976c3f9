"""What a sweep looks like in MLflow. The one module that imports it.

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

# Read by MLflow when it is imported. Its own defaults wait four minutes for a dead server, print the steps of
# creating a database, and report usage over the network.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

import sqlalchemy
from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from sqlalchemy.exc import SQLAlchemyError

from stadapter import config
from stadapter.tracking import view
from stadapter.trials import files, lock, provenance, record
from stadapter.trials.sweep import FIGURE, Sweep, Trial, records
from stadapter.version import __version__

# What a store that is away, full, locked or read-only raises (`requests` raises OSErrors). Anything else is a bug.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)
_COSTS = ("trainable_params", "macs_per_view", "seconds", "cpu_seconds", "peak_memory_mib")
_ARTIFACTS = (record.CONFIG, record.METRICS, record.RESULT)
_MODEL, _MODEL_CODE = "model", "stadapter.inference.mlflow_pyfunc"  # not imported here: it needs torch
_MOST_METRICS = 800  # in a batch: MLflow takes 1,000 entries, parameters and tags counted in
_PARENT, _NOTE = "mlflow.parentRunId", "mlflow.note.content"


class Store:
    """Writes the run folders of one sweep. Errors are raised; every write can be repeated and then changes nothing."""

    def __init__(self, sweep: Sweep, output: Path, tracking_uri: str, experiment: str) -> None:
        self.sweep, self.output, self.uri, self.experiment = sweep, output, tracking_uri, experiment
        self.client: MlflowClient
        self.parent: Run
        self.address = ""
        self.known: dict[str, Run] = {}  # runs that the parent had when it was opened, by trial id
        self.runs: dict[str, str] = {}  # run ids by trial id, of the trials touched since
        self.logged: dict[str, set[int]] = {}  # epochs that the store has, by trial id
        self.failed: set[str] = set()  # trial ids whose runs bear an error
        self.unlogged: dict[str, list[Param]] = {}  # parameters that go with the next batch, by run id
        arms = [arm.label for arm in sweep.arms]
        self.order = {trial.id: f"{arms.index(trial.arm):03d}-{trial.seed:03d}" for trial in sweep.trials}

    def open(self) -> None:
        artifacts = _reach_database(self.uri)
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(self.experiment)
        # The tag answers MLflow's question whether this is about language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        self.experiment_id = (
            found.experiment_id if found else self.client.create_experiment(self.experiment, artifacts, kind)
        )
        key = _sweep_id(self.sweep, self.output)
        parents = self.client.search_runs([self.experiment_id], f"tags.sweep_id = '{key}'", max_results=1)
        if parents:
            self.parent = parents[0]
            self.client.update_run(self.parent.info.run_id, status="RUNNING")
            for run in self._children():
                tags = run.data.tags
                self.known[tags["trial_id"]] = run
                if "error" in tags:
                    self.failed.add(tags["trial_id"])
                order = self.order.get(tags["trial_id"], tags["order"])
                if order != tags["order"]:  # an arm was put between since
                    self.client.set_tag(run.info.run_id, "order", order)
        else:
            name = f"{self.sweep.name} · {self.sweep.recipe.name}"
            tags = {"sweep_id": key, _NOTE: self.sweep.question} | self._tags()
            self.parent = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self._save_view(key)
        self.address = view.address(self.experiment_id, key)

    def _children(self, condition: str = "") -> Iterator[Run]:
        condition, token = f"tags.`{_PARENT}` = '{self.parent.info.run_id}'{condition}", None
        while token != "":
            page = self.client.search_runs([self.experiment_id], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token or ""

    def _save_view(self, key: str) -> None:
        done = next((result for result in records(self.sweep, self.output) if result), None)
        names = [_test(name) for name in (done.metrics if done else ("top1",)) if not name.endswith("loss")]
        names.sort(key="test/top1".__ne__)
        saved = view.saved_view(self.sweep, self.parent.info.run_id, self.parent.info.start_time, names)
        self.client.set_experiment_tag(self.experiment_id, view.TAG + key, saved)

    def open_trial(self, trial: Trial) -> str:
        """The id of the trial's run: found, or created as running."""
        if trial.id in self.runs:
            return self.runs[trial.id]
        epochs = record.read_metrics(trial.folder(self.output))
        run, self.logged[trial.id] = self.known.get(trial.id), set()
        if run:
            history = self.client.get_metric_history(run.info.run_id, "train_loss")
            self.logged[trial.id] = {metric.step for metric in history}
            first = min(history, key=lambda metric: metric.step, default=None)
            if first and (first.step, first.timestamp) not in {(e["epoch"], _ms(e["time"])) for e in epochs}:
                # Begun anew, by --force or after the folder was deleted. Two trainings in one run would be no curve;
                # the old one goes to MLflow's bin, from where it can be restored.
                self.client.delete_run(run.info.run_id)
                self._delete_models(run.info.run_id)
                self.failed.discard(trial.id)
                run, self.logged[trial.id] = None, set()
        if run is None:
            result = record.read_result(trial.folder(self.output))
            began = result.started if result else epochs[0]["time"] if epochs else time.time()
            tags = {_PARENT: self.parent.info.run_id, "trial_id": trial.id, "arm": trial.arm, "seed": str(trial.seed)}
            tags |= self._tags() | {"order": self.order[trial.id]}
            name = f"{trial.arm} s{trial.seed}"  # MLflow's list shows fifteen letters
            run = self.client.create_run(self.experiment_id, _ms(began), tags, name)
        if not run.data.params:
            self.unlogged[run.info.run_id] = [Param(path, value) for path, value in view.params(trial.recipe).items()]
        self.runs[trial.id] = run.info.run_id
        return self.runs[trial.id]

    def start_trial(self, trial: Trial) -> None:
        run_id = self.open_trial(trial)
        self._log(run_id)
        if trial.id in self.known or trial.id in self.failed:
            self.client.update_run(run_id, status="RUNNING")

    def _log(self, run_id: str, metrics: Sequence[Metric] = (), tags: Sequence[RunTag] = ()) -> None:
        """All at once where a batch holds them: a database takes as long for one number as for a thousand."""
        params = self.unlogged.get(run_id, [])
        for start in range(0, len(metrics), _MOST_METRICS) or ([0] if params or tags else []):
            batch = metrics[start : start + _MOST_METRICS]
            last = start + _MOST_METRICS >= len(metrics)
            self.client.log_batch(run_id, batch, params, tags if last else ())
            params = []
        self.unlogged.pop(run_id, None)

    def _new_epochs(self, trial: Trial) -> list[Metric]:
        found: list[Metric] = []
        for epoch in record.read_metrics(trial.folder(self.output)):
            if epoch["epoch"] not in self.logged[trial.id]:
                values = {name: value for name, value in epoch.items() if name not in {"epoch", "step", "time"}}
                if "seconds" in values:  # a trial has its own
                    values["epoch_seconds"] = values.pop("seconds")
                # First, since MLflow's page of selected runs begins with the metric that was logged first.
                first = {name: values[name] for name in ("val_top1",) if name in values}
                found += _metrics(first | values, _ms(epoch["time"]), epoch["epoch"])
        return found

    def log_epochs(self, trial: Trial) -> None:
        run_id = self.open_trial(trial)
        metrics = self._new_epochs(trial)
        self._log(run_id, metrics)
        self.logged[trial.id] |= {metric.step for metric in metrics}

    def finish_trial(self, trial: Trial) -> None:
        folder = trial.folder(self.output)
        result = record.read_result(folder)
        assert result is not None, f"{folder} has no {record.RESULT}"
        finished = _ms(result.finished)
        known = self.known.get(trial.id)
        if known and known.info.status == "FINISHED" and known.data.tags.get("finished") == str(finished):
            return
        run_id = self.open_trial(trial)
        for name in _ARTIFACTS:
            if (folder / name).exists():
                self.client.log_artifact(run_id, str(folder / name))
        if (folder / record.TRAINED).exists():
            self._log_model(run_id, trial, folder / record.TRAINED)
        values = {_test(name): value for name, value in result.metrics.items()}
        values |= {name: value for name in _COSTS if (value := getattr(result, name)) is not None}
        tags = [RunTag(name, str(getattr(result, name))) for name in ("git_commit", "device", "precision")]
        tags.append(RunTag("finished", str(finished)))  # after the files, with the numbers: what has it is complete
        metrics = self._new_epochs(trial)
        self._log(run_id, [*metrics, *_metrics(values, finished, 0)], tags)
        self.logged[trial.id] |= {metric.step for metric in metrics}
        if trial.id in self.failed:
            self.client.delete_tag(run_id, "error")
            self.failed.discard(trial.id)
        self.client.set_terminated(run_id, "FINISHED", finished)

    def _log_model(self, run_id: str, trial: Trial, weights: Path) -> None:
        """`runs:/<run_id>/model`. Every field is given: MLflow's own `log_model` takes seconds to guess them."""
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
        self.log_epochs(trial)
        self.client.set_tag(self.runs[trial.id], "error", message[:4000])
        self.failed.add(trial.id)
        self.client.set_terminated(self.runs[trial.id], "FAILED")

    def close(self, table_files: list[Path], status: str) -> None:
        for run in list(self._children(" AND attributes.status = 'RUNNING'")):
            # Another launch may be training it.
            if not lock.owner_of(self.output / "trials" / run.data.tags["trial_id"]):
                self.client.set_terminated(run.info.run_id, "KILLED")
        parent_id = self.parent.info.run_id
        for path in table_files:
            self.client.log_artifact(parent_id, str(path))
        # The description is a part of the parent's first page.
        texts = [self.sweep.question, *(path.read_text() for path in table_files if path.suffix == ".md")]
        if any(path.name == FIGURE for path in table_files):
            texts.insert(1, f"![figure](get-artifact?path={FIGURE}&run_uuid={parent_id})")
        self.client.set_tag(parent_id, _NOTE, "\n\n".join(texts)[:5000])
        self._save_view(self.parent.data.tags["sweep_id"])
        self.client.set_terminated(parent_id, status)

    def _tags(self) -> dict[str, str]:
        commit = provenance.provenance()["git_commit"]
        return {"sweep": self.sweep.name, "recipe": self.sweep.recipe.name, "git_commit": commit}


def pages(tracking_uri: str, experiment: str = "stadapter", most: int = 5) -> list[tuple[str, str]]:
    """The sweeps in a store, newest first: their names, and their pages below the address of an MLflow server."""
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], "tags.sweep_id LIKE '%'", max_results=most) if found else []
    return [(str(run.info.run_name), view.address(run.info.experiment_id, run.data.tags["sweep_id"])) for run in runs]


def _reach_database(uri: str) -> str | None:
    """Make one attempt to reach a database: MLflow itself makes ten, which take 100 s.

    Returns where artifacts belong: `mlruns` beside a SQLite file, wherever a server is started; None with a server.
    """
    if uri.partition("://")[0].partition("+")[0] not in DATABASE_ENGINES:
        return None
    url = sqlalchemy.make_url(uri)
    file = Path(url.database).resolve() if url.get_backend_name() == "sqlite" and url.database else None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        engine = sqlalchemy.create_engine(url)
    except ModuleNotFoundError as error:
        raise OSError(f"{url.drivername} needs the Python package {error.name}") from None
    try:
        with engine.connect() as connection:
            if file:
                connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails on what is no database, or cannot be written
    finally:
        engine.dispose()
    return (file.parent / "mlruns").as_uri() if file else None


def _sweep_id(sweep: Sweep, output: Path) -> str:
    """Names the parent run: the question, the recipe that its arms change, and this output folder, wherever it moves.

    More seeds or arms belong to the same parent; the same question in another --output, or with --set, does not.
    """
    path = output / "ledger_id"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, uuid.uuid4().hex.encode())
    recipe = config.identity(config.replace(sweep.recipe, seed=0))
    return hashlib.sha256(f"{sweep.name} {recipe} {path.read_text()}".encode()).hexdigest()[:12]


def _test(name: str) -> str:
    """A prefix gives the results a section of their own above the curves; step 0 draws them as bars."""
    return "test/" + name.removeprefix("test_")


def _metrics(values: dict[str, Any], timestamp: int, step: int) -> list[Metric]:
    """Numbers only, and no infinity: a store would show 1.8e308."""
    return [
        Metric(name, float(value), timestamp, step)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
