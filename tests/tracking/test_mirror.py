"""The MLflow mirror copies run folders, changes nothing if repeated, and never hurts a sweep."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from stadapter.config import ConfigError, flatten
from stadapter.recipes import embedded
from stadapter.tracking.mirror import Mirror, sync
from stadapter.tracking.reader import pages
from stadapter.trials import files, record
from stadapter.trials.sweep import Arm, Sweep, Trial, make_sweep

BEGAN = 1_700_000_000.0


def a_sweep(name: str = "kernel", seeds: int = 1) -> Sweep:
    arms = [Arm(f"kernel {k}x3x3", {"adapter.kernel_size": (k, 3, 3)}) for k in (1, 3)]
    return make_sweep(name, "How far in *time* must an adapter look?", embedded, arms, seeds)


def write_epochs(trial: Trial, output: Path, epochs: int, began: float = BEGAN) -> None:
    folder = trial.folder(output)
    record.prepare_folder(folder, trial.recipe)
    lines = [
        {"epoch": n, "step": 120 * n, "time": began + n, "train_loss": 2.5 / n, "val_top1": 20.0 * n, "seconds": 8.5}
        for n in range(1, epochs + 1)
    ]
    (folder / record.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_result(trial: Trial, output: Path) -> None:
    write_epochs(trial, output, 3)
    (trial.folder(output) / record.TRAINED).write_bytes(b"tensors")
    result = {
        "trial_id": trial.id,
        "recipe": flatten(trial.recipe),
        "metrics": {"test_loss": 0.1, "top1": 97.1, "top5": 99.9, "direction_top1": 98.0},
        "epoch": 3,
        "data": {},
        "trainable_params": 61_000,
        "macs_per_view": 160_000_000,
        "seconds": 36.5,
        "device": "a processor",
        "precision": "float32",
        "git_commit": "c0ffee",
        "started": BEGAN,
        "finished": BEGAN + 40,
    }
    files.write_json(trial.folder(output) / record.RESULT, result)


def run_whole(mirror: Mirror, sweep: Sweep, output: Path, tables: list[Path]) -> None:
    """Mirror a sweep in the order of its driver."""
    mirror.start()
    for trial in sweep.trials:
        mirror.trial_started(trial)
        write_epochs(trial, output, 1)
        mirror.trial_epoch(trial)
        write_result(trial, output)
        mirror.trial_finished(trial)
    mirror.finish(tables)


class Store:
    """A store, read by tests."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def runs(self, sweep: Sweep) -> list[Run]:
        experiment = self.client.get_experiment_by_name("stadapter")
        assert experiment is not None
        runs = self.client.search_runs([experiment.experiment_id], f"tags.sweep = '{sweep.name}'")
        return sorted(runs, key=lambda run: run.data.tags.get("order", ""))

    def parent(self, sweep: Sweep) -> Run:
        (parent,) = (run for run in self.runs(sweep) if "trial_id" not in run.data.tags)
        return parent

    def children(self, sweep: Sweep) -> list[Run]:
        return [run for run in self.runs(sweep) if "trial_id" in run.data.tags]

    def points(self, run: Run) -> dict[str, list[tuple[int, float]]]:
        return {
            name: [(metric.step, metric.value) for metric in self.client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }

    def models(self, run: Run) -> list[str | None]:
        found = self.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        assert all((model.status, model.tags["arm"]) == ("READY", run.data.tags["arm"]) for model in found)
        return [model.name for model in found]

    def artifacts(self, run: Run) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return one SQLite store for all tests, as creating it takes seconds. Each test's sweep has another name."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    Mirror(a_sweep("creates_the_store"), tmp_path_factory.mktemp("none"), uri).start()
    return Store(uri)


@pytest.fixture(scope="module")
def finished(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """Return a sweep that was mirrored from start to end."""
    sweep, output = a_sweep("whole"), tmp_path_factory.mktemp("whole")
    table = sweep.folder(output) / "table.md"
    table.parent.mkdir(parents=True)
    table.write_text("| arm | top-1 |\n|---|---|\n")
    figure = table.with_name("figure.png")
    figure.write_bytes(b"pixels")
    run_whole(Mirror(sweep, output, store.uri), sweep, output, [table, figure])
    return sweep, output


@pytest.fixture
def dead_server() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_every_trial_is_a_finished_child_of_the_sweep(store: Store, finished: tuple[Sweep, Path]) -> None:
    parent = store.parent(finished[0])
    children = store.children(finished[0])
    assert [run.info.run_name for run in children] == ["kernel 1x3x3 s0", "kernel 3x3x3 s0"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}


def test_epochs_are_points_at_their_number_and_results_are_bars_at_zero(
    store: Store, finished: tuple[Sweep, Path]
) -> None:
    points = store.points(store.children(finished[0])[0])
    assert points["val_top1"] == [(1, 20.0), (2, 40.0), (3, 60.0)]
    assert points["epoch_seconds"] == [(1, 8.5), (2, 8.5), (3, 8.5)]
    assert points["test/top1"] == [(0, 97.1)]
    assert points["test/loss"] == [(0, 0.1)]
    assert points["trainable_params"] == [(0, 61_000)]
    assert points["seconds"] == [(0, 36.5)]


def test_parameters_are_the_recipes_fields_as_readable_text(store: Store, finished: tuple[Sweep, Path]) -> None:
    params = store.children(finished[0])[1].data.params
    assert params["adapter.kernel_size"] == "3x3x3"
    assert params["adapter.kernel_size.t"] == "3"
    assert params["adapter.blocks"] == "none"
    assert params["optim.betas"] == "0.9,0.95"
    assert params["train_final_norm"] == "true"
    assert set(flatten(embedded)) <= set(params)


def test_tags_say_what_where_and_from_which_code(store: Store, finished: tuple[Sweep, Path]) -> None:
    sweep = finished[0]
    tags = store.children(sweep)[1].data.tags
    expected = {
        "arm": "kernel 3x3x3",
        "seed": "0",
        "trial_id": sweep.trials[1].id,
        "sweep": "whole",
        "recipe": "embedded",
        "device": "a processor",
        "git_commit": "c0ffee",
    }
    assert expected.items() <= tags.items()


def test_the_run_folders_files_are_artifacts(store: Store, finished: tuple[Sweep, Path]) -> None:
    child = store.children(finished[0])[0]
    assert store.artifacts(child) == {"config.json", "metrics.jsonl", "result.json"}
    assert store.models(child) == ["model"]


def test_the_parent_shows_the_question_the_figure_and_the_table(store: Store, finished: tuple[Sweep, Path]) -> None:
    parent = store.parent(finished[0])
    assert store.artifacts(parent) == {"table.md", "figure.png"}
    figure = f"![figure](get-artifact?path=figure.png&run_uuid={parent.info.run_id})"
    expected = f"{finished[0].question}\n\n{figure}\n\n| arm | top-1 |\n|---|---|\n"
    assert parent.data.tags["mlflow.note.content"] == expected


def test_artifacts_lie_beside_the_database_wherever_it_is_opened_from(store: Store) -> None:
    experiment = store.client.get_experiment_by_name("stadapter")
    folder = Path(store.uri.removeprefix("sqlite:///")).parent
    assert experiment is not None
    assert experiment.artifact_location == (folder / "mlruns").as_uri()


def test_a_saved_view_groups_the_sweeps_trials_by_arm(store: Store, finished: tuple[Sweep, Path]) -> None:
    sweep, output = finished
    mirror = Mirror(sweep, output, store.uri)
    mirror.start()
    mirror.finish([])
    key = store.parent(sweep).data.tags["sweep_id"]
    experiment = store.client.get_experiment_by_name("stadapter")
    assert experiment is not None
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    state = json.loads(view["state"])
    assert view["name"] == "whole · embedded"
    assert state["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "adapter.kernel_size"}]
    assert state["compareRunCharts"][0]["metricKey"] == "test/top1"
    assert f"viewStateShareKey={key}" in mirror.address


def test_the_newest_sweep_is_the_first_page(store: Store, tmp_path: Path) -> None:
    mirror = Mirror(a_sweep("newest"), tmp_path, store.uri)
    mirror.start()
    assert pages(store.uri)[0] == ("newest · embedded", mirror.address)


def test_syncing_what_is_there_adds_nothing(store: Store, finished: tuple[Sweep, Path]) -> None:
    sweep, output = finished
    before = [(run.info.run_id, store.points(run), store.models(run)) for run in store.children(sweep)]
    assert sync(sweep, output, store.uri) == (2, 0)
    assert [(run.info.run_id, store.points(run), store.models(run)) for run in store.children(sweep)] == before


def test_sync_alone_writes_what_a_mirror_writes(store: Store, finished: tuple[Sweep, Path], tmp_path: Path) -> None:
    sweep = a_sweep("synced")
    for trial in sweep.trials:
        write_result(trial, tmp_path)
    assert sync(sweep, tmp_path, store.uri) == (2, 0)
    for synced, mirrored in zip(store.children(sweep), store.children(finished[0]), strict=True):
        assert store.points(synced) == store.points(mirrored)
        assert synced.data.params == mirrored.data.params
        assert (synced.info.start_time, synced.info.end_time) == (BEGAN * 1000, (BEGAN + 40) * 1000)


def test_a_trial_resumed_after_a_crash_is_one_run_with_one_curve(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("crashed")
    first = Mirror(sweep, tmp_path, store.uri)
    first.start()
    first.trial_started(sweep.trials[0])
    write_epochs(sweep.trials[0], tmp_path, 2)
    first.trial_epoch(sweep.trials[0])  # and nothing more: the driver was killed
    (crashed,) = store.children(sweep)
    run_whole(Mirror(sweep, tmp_path, store.uri), sweep, tmp_path, [])
    resumed = store.children(sweep)[0]
    assert resumed.info.run_id == crashed.info.run_id
    assert resumed.info.status == "FINISHED"
    assert [step for step, _ in store.points(resumed)["val_top1"]] == [1, 2, 3]


def test_a_trial_begun_anew_replaces_its_run(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("forced")
    run_whole(Mirror(sweep, tmp_path, store.uri), sweep, tmp_path, [])
    old = store.children(sweep)[0]
    (sweep.trials[0].folder(tmp_path) / record.RESULT).unlink()
    write_epochs(sweep.trials[0], tmp_path, 1, began=BEGAN + 1000)
    assert sync(sweep, tmp_path, store.uri) == (1, 1)
    new = store.children(sweep)[0]
    assert new.info.run_id != old.info.run_id
    assert store.models(old) == []
    assert store.points(new)["val_top1"] == [(1, 20.0)]


def test_more_seeds_belong_to_the_same_sweep(store: Store, tmp_path: Path) -> None:
    for seeds in (1, 2):
        sweep = a_sweep("seeds", seeds)
        for trial in sweep.trials:
            write_result(trial, tmp_path)
        sync(sweep, tmp_path, store.uri)
    assert len(store.children(sweep)) == 4
    assert store.parent(sweep).info.status == "FINISHED"


def test_another_output_folder_is_another_sweep(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("outputs")
    for output in (tmp_path / "a", tmp_path / "b"):
        write_result(sweep.trials[0], output)
        sync(sweep, output, store.uri)
    assert len(store.runs(sweep)) == 4


def test_a_failed_trial_is_failed_and_says_why(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("failed")
    mirror = Mirror(sweep, tmp_path, store.uri)
    mirror.start()
    mirror.trial_started(sweep.trials[0])
    mirror.trial_failed(sweep.trials[0], "loss is not finite at step 12")
    mirror.finish([], "FAILED")
    (child,) = store.children(sweep)
    assert (child.info.status, child.data.tags["error"]) == ("FAILED", "loss is not finite at step 12")


def test_a_failed_trial_that_then_succeeds_has_no_error_left(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("mended")
    mirror = Mirror(sweep, tmp_path, store.uri)
    mirror.start()
    mirror.trial_failed(sweep.trials[0], "out of memory")
    write_result(sweep.trials[0], tmp_path)
    mirror.trial_finished(sweep.trials[0])
    (child,) = store.children(sweep)
    assert child.info.status == "FINISHED"
    assert "error" not in child.data.tags


def test_a_trial_that_was_interrupted_does_not_count_as_running(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("interrupted")
    mirror = Mirror(sweep, tmp_path, store.uri)
    mirror.start()
    mirror.trial_started(sweep.trials[0])
    mirror.finish([], "KILLED")
    assert {run.info.status for run in store.runs(sweep)} == {"KILLED"}


def test_a_dead_server_costs_one_warning_and_seconds(
    dead_server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    sweep = a_sweep(seeds=3)
    began = time.monotonic()
    mirror = Mirror(sweep, tmp_path, dead_server, say=said.append)
    run_whole(mirror, sweep, tmp_path, [])
    assert time.monotonic() - began < 12
    assert len(said) == 1
    assert f"stadapter sync --output {tmp_path} --tracking-uri {dead_server}" in said[0]
    assert "\n" not in said[0]
    assert mirror.address == ""
    assert capfd.readouterr() == ("", "")


def test_the_first_write_waits_for_a_store_that_is_still_being_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, done, may_open = a_sweep(), list[str](), threading.Event()
    mirror = Mirror(sweep, tmp_path, "sqlite:///never-opened.db")
    monkeypatch.setattr(mirror._store, "open", lambda: done.append(f"open {may_open.wait(20)}"))
    monkeypatch.setattr(mirror._store, "start_trial", lambda trial: done.append("write"))
    mirror.start(wait=False)
    assert done == []
    threading.Timer(0.1, may_open.set).start()
    mirror.trial_started(sweep.trials[0])
    assert done == ["open True", "write"]


def test_a_store_that_could_not_be_opened_meanwhile_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, said = a_sweep(), list[str]()
    mirror = Mirror(sweep, tmp_path, "sqlite:///never-opened.db", say=said.append)

    def gone() -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(mirror._store, "open", gone)
    mirror.start(wait=False)
    for trial in sweep.trials:
        mirror.trial_started(trial)
    assert len(said) == 1 and "(gone)" in said[0]


def test_a_store_that_never_opens_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, said, released = a_sweep(), list[str](), threading.Event()
    mirror = Mirror(sweep, tmp_path, "sqlite:///never-opened.db", say=said.append)
    monkeypatch.setattr("stadapter.tracking.mirror.OPENING_S", 0.1)
    monkeypatch.setattr(mirror._store, "open", lambda: released.wait(20))
    mirror.start()
    for trial in sweep.trials:
        mirror.trial_started(trial)
    released.set()
    assert len(said) == 1 and "it did not open within 0.1 s" in said[0]


def test_a_store_that_never_opens_does_not_keep_the_process(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from stadapter.recipes import embedded
from stadapter.tracking.mirror import Mirror
from stadapter.trials.sweep import Arm, make_sweep

mirror = Mirror(make_sweep("kernel", "?", embedded, [Arm("a", {{}})], 1), Path({str(tmp_path)!r}), "sqlite:///no.db")
mirror._store.open = lambda: time.sleep(600)
mirror.start(wait=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_last_write_waits_again_if_the_first_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, done, may_open = a_sweep(), list[str](), threading.Event()
    mirror = Mirror(sweep, tmp_path, "sqlite:///never-opened.db")
    monkeypatch.setattr(mirror._store, "open", lambda: done.append(f"open {may_open.wait(20)}"))
    monkeypatch.setattr(mirror._store, "close", lambda table_files, status: done.append(f"closed {status}"))
    mirror.start(wait=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("stadapter.tracking.mirror.futures.wait", interrupted)
        mirror.trial_started(sweep.trials[0])
    threading.Timer(0.1, may_open.set).start()
    mirror.finish([], "KILLED")
    assert done == ["open True", "closed KILLED"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_store_that_dies_in_the_middle_is_completed_by_sync(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, said = a_sweep("dies"), list[str]()
    mirror = Mirror(sweep, tmp_path, store.uri, say=said.append)
    mirror.start()
    mirror.trial_started(sweep.trials[0])
    with monkeypatch.context() as patch:

        def gone(*_arguments: object, **_names: object) -> None:
            raise ConnectionError("gone")

        patch.setattr(MlflowClient, "log_batch", gone)
        write_epochs(sweep.trials[0], tmp_path, 1)
        mirror.trial_epoch(sweep.trials[0])
    for trial in sweep.trials:
        write_result(trial, tmp_path)
        mirror.trial_finished(trial)
    mirror.finish([])
    assert len(said) == 1
    assert [run.info.status for run in store.children(sweep)] == ["RUNNING"]
    sync(sweep, tmp_path, store.uri)
    assert [run.info.status for run in store.runs(sweep)] == ["FINISHED"] * 3


def test_a_slow_store_is_left_out_when_patience_is_used_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, said, now = a_sweep("slow"), list[str](), [0.0]
    monkeypatch.setattr("stadapter.tracking.mirror.time.monotonic", lambda: now[0])
    mirror = Mirror(sweep, tmp_path, store.uri, say=said.append)
    mirror.start()
    calls = 0

    def slow(trial: Trial) -> None:
        nonlocal calls
        calls += 1
        now[0] += 4

    monkeypatch.setattr(mirror._store, "log_epochs", slow)
    for _ in range(10):
        mirror.trial_epoch(sweep.trials[0])
    assert calls == 3
    assert len(said) == 1
    assert "slow" in said[0]


def test_a_file_that_is_no_database_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be looked at " * 10)
    began = time.monotonic()
    Mirror(a_sweep(), tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", say=said.append).start()
    assert len(said) == 1
    assert time.monotonic() - began < 5


def test_a_bug_is_not_taken_for_a_dead_store(store: Store, tmp_path: Path) -> None:
    sweep = a_sweep("bug")
    mirror = Mirror(sweep, tmp_path, store.uri)
    mirror.start()
    with pytest.raises(AssertionError, match="has no result"):
        mirror.trial_finished(sweep.trials[0])


def test_sync_with_a_dead_server_is_an_error_of_one_line(dead_server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--tracking-uri {dead_server}: cannot be written") as caught:
        sync(a_sweep(), tmp_path, dead_server)
    assert "\n" not in str(caught.value)


def test_a_password_in_the_address_is_not_printed(dead_server: str, tmp_path: Path) -> None:
    said: list[str] = []
    Mirror(a_sweep(), tmp_path, dead_server.replace("//", "//me:secret@"), say=said.append).start()
    assert "secret" not in said[0]
