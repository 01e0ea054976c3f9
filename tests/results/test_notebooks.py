"""The notebooks run unchanged on a small output folder, and are committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import made_up
import nbclient
import nbformat
import pytest

from stadapter.trials import record

NOTEBOOKS = sorted((Path(__file__).parents[2] / "analysis").glob("*.ipynb"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an output folder like that of `make demo`, with one unfinished trial."""
    folder = tmp_path_factory.mktemp("demo")
    sweep = made_up.kernel_sweep()
    made_up.write(sweep, folder, made_up.KERNEL, leave_out=5)
    for trial in sweep.trials:
        epochs = [{"epoch": n, "step": n, "time": 0.0, "train_loss": 1.0 / n, "val_top1": 20.0 * n} for n in (1, 2)]
        lines = "".join(f"{json.dumps(epoch)}\n" for epoch in epochs)
        trial.folder(folder).mkdir(exist_ok=True)
        (trial.folder(folder) / record.METRICS).write_text(lines)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STADAPTER_OUTPUT", str(output))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    assert any("image/png" in one.get("data", {}) for one in outputs)
    assert any("INCOMPLETE: kernel 5x3x3 (1 of 2 seeds finished)" in str(one) for one in outputs)
    assert not [one for one in outputs if one.output_type == "stream" and one.name == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_committed_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["all_ablations", "kernel"]
