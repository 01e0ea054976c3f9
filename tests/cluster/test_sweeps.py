"""Sweeps run with a user's commands, on real files, a real Ray and a real MLflow store."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import pytest
import ray

from stadapter import config, recipes
from stadapter.ablation import main
from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.cluster.runner import run_trials
from stadapter.commands.main import make_parser
from stadapter.config import Recipe
from stadapter.training.loop import train
from stadapter.training.options import TrainOptions
from stadapter.trials import record
from stadapter.trials.sweep import Arm, Trial, load_sweep, make_sweep, records

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "ablate_kernel.py"


def command(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(Resources(processes_per_trial=2)) as started:
        yield started


@pytest.fixture(scope="module")
def sweep_flags(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    kept = tmp_path_factory.mktemp("sweep")
    where = ["--output", str(kept / "runs"), "--tracking-uri", f"sqlite:///{kept}/mlflow.db", "--num-gpus", "0"]
    return ["--values", "1", "3", "--seeds", "2", *tiny_flags, *where]


@pytest.fixture(scope="module")
def finished(sweep_flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Return the first launch of a sweep of 2 arms x 2 seeds."""
    return command(*sweep_flags)


@pytest.fixture(scope="module")
def output(sweep_flags: list[str], finished: subprocess.CompletedProcess[str]) -> Path:
    return Path(sweep_flags[sweep_flags.index("--output") + 1])


def sweep_folder(output: Path) -> Path:
    (folder,) = (output / "sweeps").glob("kernel-embedded-*")  # with a hash, since the recipe's fields were changed
    return folder


def losses(folder: Path) -> list[float]:
    return [line["train_loss"] for line in record.read_metrics(folder)]


def test_a_sweep_ends_well_and_says_nothing_that_is_not_its_own(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    for noise in ("ray", "Ray", "pid=", "WARNING", "mlflow.store"):
        lines = [line for line in finished.stdout.splitlines() if noise in line and "python " not in line]
        assert not lines


def test_every_trial_is_announced_when_it_starts_and_when_it_ends(finished: subprocess.CompletedProcess[str]) -> None:
    for arm in ("kernel 1x3x3", "kernel 3x3x3"):
        for seed in (0, 1):
            assert len(re.findall(rf"\d:\d\d  started   {arm} seed {seed}\n", finished.stdout)) == 1
            assert len(re.findall(rf"\d:\d\d  finished  {arm} seed {seed}  top-1 ", finished.stdout)) == 1
            assert len(re.findall(rf"\d:\d\d  epoch     {arm} seed {seed}  epoch [12]/2 ", finished.stdout)) == 2


def test_the_table_is_the_records_mean_and_spread(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    found = records(load_sweep(sweep_folder(output)), output)
    for arm, pair in (("kernel 1x3x3", found[:2]), ("kernel 3x3x3", found[2:])):
        a, b = (r.metrics["top1"] for r in pair if r is not None)
        spread = abs(a - b) / 2**0.5
        assert f"{arm}  {(a + b) / 2:.1f} ± {spread:.1f}" in finished.stdout


def test_the_next_commands_to_try_exist(finished: subprocess.CompletedProcess[str], output: Path) -> None:
    tail = finished.stdout.partition("Next:")[2]
    commands = [shlex.split(line, comments=True) for line in tail.splitlines() if line.strip()]
    begins = [words.index(name) for words, name in zip(commands, ("ui", "report"), strict=True)]
    for words, begin in zip(commands, begins, strict=True):
        assert words[begin - 1].endswith("stadapter")
        make_parser().parse_args(words[begin:])  # exits where it cannot read it
    assert commands[1][begins[1] + 1 :] == ["--output", str(output)]


def test_the_csv_leads_from_a_row_to_its_run_folders(output: Path) -> None:
    with (sweep_folder(output) / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        result = record.read_result(output / "trials" / row["trial_id"])
        assert result is not None
        assert float(row["top1"]) == result.metrics["top1"]
        assert int(row["seed"]) == result.recipe["seed"]


def test_arms_with_one_seed_see_the_same_clips(output: Path) -> None:
    # A fresh adapter is the identity and the head starts equal: where the clips agree, so does the first step's loss.
    one, other = load_sweep(sweep_folder(output)).trials[::2]
    first = [record.read_metrics(trial.folder(output))[0] for trial in (one, other)]
    assert first[0]["step"] == first[1]["step"]
    assert one.recipe.seed == other.recipe.seed == 0
    results = [record.read_result(trial.folder(output)) for trial in (one, other)]
    assert results[0] is not None and results[1] is not None
    assert results[0].data == results[1].data


def test_a_finished_sweep_is_not_run_again(sweep_flags: list[str], finished: Any, output: Path) -> None:
    before = {path: path.read_bytes() for path in output.glob("trials/*/*") if path.is_file()}
    drawn = (sweep_folder(output) / "figure.png").stat().st_mtime_ns
    again = command(*sweep_flags)
    assert again.returncode == 0
    assert (sweep_folder(output) / "figure.png").stat().st_mtime_ns == drawn
    assert "4 finished before" in again.stdout
    assert "started" not in again.stdout
    assert {path: path.read_bytes() for path in output.glob("trials/*/*") if path.is_file()} == before
    assert (
        again.stdout.partition("---")[2].partition("Next")[0]
        == finished.stdout.partition("---")[2].partition("Next")[0]
    )


def test_finished_trials_on_other_clips_are_not_taken_for_these(
    tiny_recipe: Recipe, clip_folder: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [Arm("kernel 3x3x3", {"adapter.kernel_size": (3, 3, 3)})]
    made_up.write(make_sweep("kernel", "?", tiny_recipe, arms, 1), tmp_path, {"kernel 3x3x3": 50.0})
    with pytest.raises(SystemExit) as ended:
        main("?", "kernel", ("3x3x3",), lambda *_: arms[0], [*tiny_flags, "--seeds", "1", "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert "another data set" in capsys.readouterr().err


def test_a_trial_of_the_sweep_equals_a_training_in_a_plain_process(
    output: Path, clip_folder: Path, tmp_path: Path
) -> None:
    trial = load_sweep(sweep_folder(output)).trials[3]
    here = train(trial.recipe, tmp_path, TrainOptions(data_root=clip_folder))
    there = record.read_result(trial.folder(output))
    assert there is not None
    assert here.metrics == there.metrics
    assert losses(tmp_path) == losses(trial.folder(output))


def test_two_processes_on_ray_train_give_the_numbers_of_one(
    cluster: Cluster, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    trial = Trial("only", tiny_recipe)
    events: list[str] = []
    run_trials(cluster, [trial], tmp_path, TrainOptions(clip_folder), lambda kind, trial, details: events.append(kind))
    assert events == ["started", "epoch", "epoch", "finished"]
    one = train(tiny_recipe, tmp_path / "one", TrainOptions(clip_folder))
    two = record.read_result(trial.folder(tmp_path))
    assert two is not None
    assert two.processes == 2
    assert losses(trial.folder(tmp_path)) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert two.metrics["top1"] == one.metrics["top1"]


def test_a_trial_that_fails_says_why_and_costs_no_other(
    cluster: Cluster, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    alone = Cluster(Resources())  # the Ray of `cluster`, one process per trial
    broken = config.replace(tiny_recipe, **{"optim.base_lr": 1e30, "optim.clip_norm": None})
    trials = [Trial("broken", broken), Trial("sound", tiny_recipe)]
    events: list[tuple[str, str, Any]] = []
    run_trials(
        alone,
        trials,
        tmp_path,
        TrainOptions(clip_folder),
        lambda *event: events.append((event[0], event[1].arm, event[2])),
    )
    ends = {arm: (kind, details) for kind, arm, details in events if kind in ("failed", "finished")}
    assert ends["sound"][0] == "finished"
    assert ends["broken"][0] == "failed"
    assert "the loss became" in ends["broken"][1]["message"]
    assert record.read_result(trials[0].folder(tmp_path)) is None


def test_an_adapter_from_somebodys_file_trains_in_the_processes_of_a_sweep(
    cluster: Cluster, tiny_recipe: Recipe, clip_folder: Path, tmp_path: Path
) -> None:
    path = Path(__file__).parents[2] / "docs" / "own_idea" / "temporal_attention.py"
    spec = importlib.util.spec_from_file_location("temporal_attention", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["temporal_attention"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trials = [
        Trial(word, config.replace(tiny_recipe, **module.make_arm(tiny_recipe, word).fields)) for word in module.ARMS
    ]
    run_trials(Cluster(Resources()), trials, tmp_path, TrainOptions(clip_folder), lambda *event: None)
    results = [record.read_result(trial.folder(tmp_path)) for trial in trials]
    assert [result and result.recipe["own.adapter"] for result in results] == ["", "TemporalAttentionAdapter", ""]


def test_a_running_cluster_can_be_joined(cluster: Cluster, tiny_flags: list[str], tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    flags = ["--address", address, "--values", "3", "--seeds", "1", "--recipe", "embedded", "--tracking-uri", "none"]
    done = command(*flags, *tiny_flags, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel 3x3x3" in done.stdout


def test_help_teaches_and_loads_nothing_heavy() -> None:
    started = time.perf_counter()
    shown = command("--help").stdout
    assert time.perf_counter() - started < 5  # a loaded machine; without torch and Ray it takes a fraction of a second
    for word in ("--num-gpus", "--gpus-per-trial", "--seeds", "--recipe", "--address", "--output", "--tracking-uri"):
        assert word in shown
    assert "adapter.kernel_size = [3, 3, 3]" in shown
    probe = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    loaded = "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    watched = f"import atexit, sys; atexit.register(lambda: {loaded}); {probe}"
    ended = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    assert ended.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--values", "2"], "an even kernel has no centre"),
        (["--values", "three"], "expected a temporal extent"),
        (["--values", "3", "3x3x3"], "the same training"),
        (["--set", "adapter.blocks=0,99"], "99"),
        (["--set", "adapter.bottleneck_width=0"], "at least 1 channel"),
        (["--set", "optim.epochz=3"], "no field"),
        (["--recipe", "ssv2_clip_b16"], "--data-root"),
        (["--recipe", "ssv2_clip_b16", "--data-root", "/no/such/folder"], "/no/such/folder"),
        (["--recipe", "ssv2_clip_b61"], "did you mean ssv2_clip_b16"),
        (["--num-gpus", "99"], "this machine has"),
        (["--num-gpus", "0", "--gpus-per-trial", "2"], "there are no GPUs"),
        (["--num-gpus", "0", "--processes-per-trial", "3"], "cannot be shared equally by 3 processes"),
        (["--seeds", "0"], "at least 1"),
        (["--set", "data.short_side_jitter=0.5,1"], "needs 1 <= low <= high"),
        (["--set", "data.sampling=uniform", "--set", "data.test_temporal_views=3"], "uniform sampling has 1 view"),
        (["--weights", "/no/such/file"], "cannot be read"),
        (["--output", "/dev/null/runs"], "cannot be written"),
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_bad_input_has_a_one_line_answer_and_starts_nothing(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STADAPTER_CACHE", str(tmp_path / "cache"))  # where even the embedded clips are not yet
    at = [] if "--output" in flags else ["--output", str(tmp_path / "runs")]
    done = command(*at, "--tracking-uri", "none", *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_trials_find_a_cache_that_was_named_by_a_relative_path(tmp_path: Path) -> None:
    """Tune changes the working directory; with a relative path each trial would render the embedded world again."""
    probe = "import os, stadapter.cluster.runner; print(os.environ['STADAPTER_CACHE'])"
    environment = {**os.environ, "STADAPTER_CACHE": "cache", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert said.stdout.strip() == str(tmp_path.resolve() / "cache")


def test_a_port_in_use_has_a_one_line_answer(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sweep = command("--dashboard-port", str(port), "--output", tmp_path, "--tracking-uri", "none")
        (tmp_path / "mlflow.db").touch()
        flags = ["--port", str(port), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
        ui = subprocess.run(
            [sys.executable, "-m", "stadapter", "ui", *flags], capture_output=True, text=True, timeout=60
        )
    for done in (sweep, ui):
        assert done.returncode == 2
        assert re.fullmatch(
            rf"error: --(dashboard-)?port {port}: cannot be used \(.*\); choose another port\n", done.stderr
        )


def test_sync_writes_the_records_into_another_store(output: Path, tmp_path: Path) -> None:
    import mlflow

    store = f"sqlite:///{tmp_path}/other.db"
    sync = [sys.executable, "-m", "stadapter", "sync", "--output", output, "--tracking-uri", store]
    done = subprocess.run(sync, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("stadapter")
    runs = client.search_runs([experiment.experiment_id])
    accuracies = sorted(run.data.metrics["test/top1"] for run in runs if "trial_id" in run.data.tags)
    found = records(load_sweep(sweep_folder(output)), output)
    assert accuracies == sorted(r.metrics["top1"] for r in found if r is not None)


def test_the_sweep_folder_describes_the_sweep(output: Path) -> None:
    saved = json.loads((sweep_folder(output) / "sweep.json").read_text())
    assert saved["name"] == "kernel"
    first = saved["arms"][0]
    assert (first["label"], first["fields"], first["x"]) == ("kernel 1x3x3", {"adapter.kernel_size": [1, 3, 3]}, 1)
    assert saved["axis"]["label"] == "temporal extent of the kernel (frames)"
    assert os.listdir(output / "trials") and len(list(output.glob("trials/*/result.json"))) == 4


def test_the_processes_of_a_ray_that_is_started_here_know_its_address(cluster: Cluster) -> None:
    """Ray Train uses an address to free the CPUs of a trial that died, and may guess that of another Ray."""
    before = os.environ.get("RAY_ADDRESS")
    told = ray.remote(lambda: os.environ.get("RAY_ADDRESS")).options(num_cpus=0)
    assert ray.get(told.remote()) == ray.get_runtime_context().gcs_address != before


def test_a_sweep_with_changed_fields_does_not_replace_the_tables_of_another(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    arms = [Arm("only", {})]
    plain = make_sweep("kernel", "q", recipes.embedded, arms, 1)
    changed = [
        make_sweep("kernel", "q", config.replace(recipes.embedded, **{"optim.epochs": n}), arms, 1) for n in (2, 3)
    ]
    assert plain.folder(tmp_path).name == "kernel-embedded"
    assert len({sweep.folder(tmp_path) for sweep in (plain, *changed)}) == 3
