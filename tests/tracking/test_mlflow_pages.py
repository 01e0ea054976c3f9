"""An MLflow store in use: a sweep's page in a browser, and a trial's model loaded."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import made_up
import mlflow
import pandas as pd
import pytest
from documents import BLOCK, ROOT
from mlflow import MlflowClient
from mlflow.entities import LoggedModel

from stadapter.config import ConfigError, Recipe
from stadapter.inference.predict import predict
from stadapter.inference.trained import open_trained
from stadapter.results import table
from stadapter.trials.sweep import Arm, make_sweep, records, save_sweep

KERNEL = made_up.kernel_sweep(2)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing of a user's profile, and no calls home.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, undisturbed: Path, tiny_recipe: Recipe) -> Path:
    """Write a made-up sweep of the kernel, and a sweep of a single trained trial."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    made_up.write(KERNEL, folder, made_up.KERNEL)
    trained = make_sweep("trained", "q", tiny_recipe, [Arm("tiny", {})], 1)
    shutil.copytree(undisturbed, trained.trials[0].folder(folder))
    trained.folder(folder).mkdir()
    save_sweep(trained, folder)
    return folder


@pytest.fixture(scope="module")
def store(output: Path) -> str:
    """Return the store that the command in docs/mlflow.md makes of the output folder."""
    (block,) = (block for tested, block in BLOCK.findall((ROOT / "docs" / "mlflow.md").read_text()) if tested)
    command, *words = shlex.split(block)
    assert command == "stadapter"
    done = subprocess.run([sys.executable, "-m", command, *words], cwd=output.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return f"sqlite:///{output.parent}/mlflow.db"


@pytest.fixture
def logged(store: str) -> Iterator[LoggedModel]:
    """Return the only model in the store: the made-up trials have no weights."""
    mlflow.set_tracking_uri(store)
    experiment = mlflow.get_experiment_by_name("stadapter")
    (model,) = MlflowClient(store).search_logged_models([experiment.experiment_id])
    yield model
    mlflow.set_tracking_uri(None)


def test_a_trials_model_gives_the_classes_of_a_video(logged: LoggedModel, undisturbed: Path, clip_folder: Path) -> None:
    videos = [str(path) for path in sorted(clip_folder.glob("val/*/*.mp4"))[:2]]
    model = mlflow.pyfunc.load_model(f"runs:/{logged.source_run_id}/model")
    found = model.predict(videos)
    assert list(found.columns) == ["video", "rank", "class", "probability"]
    assert list(found.video) == [videos[0], videos[0], videos[1], videos[1]]
    network, recipe, header = open_trained(undisturbed)
    for video, prob_K in predict(network, recipe, videos):
        mine = found[found.video == video].set_index("class").probability
        assert not isinstance(prob_K, str)
        assert dict(mine) == pytest.approx(dict(zip(header.class_names, prob_K.tolist(), strict=True)), abs=1e-6)
        assert mine.is_monotonic_decreasing
    pd.testing.assert_frame_equal(model.predict(pd.DataFrame({"clip": videos})), found)
    assert len(model.predict(videos[0], params={"top": 1})) == 1
    with pytest.raises(ConfigError, match=r"nothing\.mp4: cannot be read"):
        model.predict("nothing.mp4")


def test_a_model_is_its_weights_and_a_description_without_code(logged: LoggedModel, output: Path) -> None:
    folder = Path(logged.artifact_location.removeprefix("file://"))
    assert sorted(path.name for path in folder.iterdir()) == ["MLmodel", "requirements.txt", "trained.safetensors"]
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert logged.status == "READY" and logged.tags["arm"] == "tiny"


@pytest.fixture(scope="module")
def page(store: str) -> Iterator[str]:
    """Start the server of `stadapter ui`, and return the printed address of the kernel's sweep."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "stadapter", "ui", "--port", port, "--tracking-uri", store]
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert ui.stdout is not None
        address = next(found[1] for line in ui.stdout if (found := re.match(r"  kernel · embedded: (\S+)", line)))
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_the_printed_page_has_a_named_bar_per_arm_in_the_tables_order(page: str, output: Path, tmp_path: Path) -> None:
    dump = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={tmp_path}", "--virtual-time-budget=90000", "--dump-dom"]
    for _ in range(8):  # a server that has just started answers later than Chromium's virtual time waits
        shown = subprocess.run([*dump, page], capture_output=True, text=True, timeout=120).stdout
        if "bartext" in shown:
            break
    values = ["1x3x3", "3x3x3", "5x3x3", "7x3x3"]
    assert re.findall(r">Group: ([^<]+)<", shown) == values
    assert set(re.findall(r">(kernel [^<]+ s\d)<", shown)) == {f"kernel {v} s{seed}" for v in values for seed in (0, 1)}
    chart = shown.partition(">test/top1<")[2].partition(" vs. test/top1<")[0]
    bars = re.findall(r'class="bartext[^"]*"[^>]*data-unformatted="([^"]+)"', chart)
    rows = table.make_rows(KERNEL, records(KERNEL, output))
    assert bars[::-1] == [f"{row.top1.mean:.2f}" for row in rows if row.top1]  # the first arm is on top
    assert re.findall(r">(\dx3x3)</span>", chart)[::-1] == values
