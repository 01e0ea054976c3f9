"""Small data sets in three published layouts (SSv2, Kinetics, EPIC-Kitchens-100), from their lists to a table."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from stadapter.cluster.ray_runtime import Cluster
from stadapter.cluster.resources import Resources
from stadapter.trials import record

SCRIPT = Path(__file__).parents[2] / "experiments" / "ablate_kernel.py"
SMALL = {
    "data.frame_size": "60",
    "data.num_frames": "4",
    "data.frame_stride": "2",
    "backbone.name": "embedded",
    "backbone.weights": "seed:0",
    "adapter.bottleneck_width": "8",
    "optim.epochs": "1",
    "optim.warmup_epochs": "0.5",
    "optim.global_batch": "4",
    "optim.precision": "float32",
}
TEMPLATES = ("Pushing [something] from left to right", "Pushing [something] from right to left")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Cluster(Resources()):
        yield ray.get_runtime_context().gcs_address


def clips_of(folder: Path, split: str) -> list[tuple[Path, int]]:
    """Return the shared clips of a split as pairs (file, class)."""
    classes = sorted(path.name for path in (folder / split).iterdir())
    return [(path, classes.index(path.parent.name)) for path in sorted((folder / split).glob("*/*.mp4"))]


def lay_out_ssv2(source: Path, root: Path) -> None:
    names = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    (root / "labels.json").write_text(json.dumps({name: str(i) for i, name in enumerate(names)}))
    (root / "videos").mkdir()
    number = 100
    for split, file in (("train", "train.json"), ("val", "validation.json")):
        entries = []
        for path, label in clips_of(source, split):
            number += 1
            shutil.copy(path, root / "videos" / f"{number}.mp4")
            entries.append({"id": str(number), "template": TEMPLATES[label], "placeholders": ["a cup"]})
        (root / file).write_text(json.dumps(entries))


def lay_out_kinetics(source: Path, root: Path) -> None:
    for split in ("train", "val"):
        lines = ["label,youtube_id,time_start,time_end,split"]
        for number, (path, label) in enumerate(clips_of(source, split)):
            name, video = ("arm wrestling", "zumba")[label], f"{split}-video{number:02d}"
            (root / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / split / name / f"{video}_{number:06d}_{number + 10:06d}.mp4")
            lines.append(f"{name},{video},{number},{number + 10},{split}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")


def lay_out_epic(source: Path, root: Path) -> None:
    """Write clips that are cut already, named by their narration."""
    (root / "videos").mkdir()
    header = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,verb"
    for split, file in (("train", "EPIC_100_train.csv"), ("val", "EPIC_100_validation.csv")):
        lines = [header + ",verb_class,noun,noun_class"]
        for number, (path, label) in enumerate(clips_of(source, split)):
            narration = f"P01_{split}_{number}"
            shutil.copy(path, root / "videos" / f"{narration}.mp4")
            lines.append(f"{narration},P01,P01_{split},00:00:01,00:00:02,1,16,push cup,push,{label},cup,{number % 3}")
        (root / file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("recipe", "lay_out", "arms", "fields", "columns"),
    [
        ("ssv2_clip_b16", lay_out_ssv2, ["1", "3"], {"data.num_classes": "2"}, ["top1"]),
        ("kinetics400_clip_b16", lay_out_kinetics, ["3"], {"data.num_classes": "2"}, ["top1"]),
        (
            "epic_kitchens100_clip_b16",
            lay_out_epic,
            ["3"],
            {"data.num_classes": "5", "data.label_groups": "2,3"},
            ["top1", "verb_top1", "noun_top1"],
        ),
    ],
)
def test_a_data_set_as_published_goes_from_its_lists_to_a_table(
    address: str,
    clip_folder: Path,
    tmp_path: Path,
    recipe: str,
    lay_out: Callable[[Path, Path], None],
    arms: list[str],
    fields: dict[str, str],
    columns: list[str],
) -> None:
    root, output = tmp_path / "data", tmp_path / "runs"
    root.mkdir()
    lay_out(clip_folder, root)
    settings = [word for path, value in {**SMALL, **fields}.items() for word in ("--set", f"{path}={value}")]
    where = ["--address", address, "--num-gpus", "0", "--output", output, "--tracking-uri", "none"]
    what = ["--recipe", recipe, "--data-root", root, "--values", *arms, "--seeds", "1"]
    words = [sys.executable, SCRIPT, *what, *settings, *where]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel 3x1x1" in done.stdout
    (sweep,) = (output / "sweeps").iterdir()
    rows = list(csv.DictReader((sweep / "table.csv").open()))
    assert len(rows) == len(arms)
    for row in rows:
        result = record.read_result(output / "trials" / row["trial_id"])
        assert result is not None
        assert result.data["test"].clips == 7
        assert result.bad_clips["test"].clips == 0
        assert all(0 <= float(row[name]) <= 100 for name in columns)
    header = (sweep / "table.txt").read_text().splitlines()[0]
    assert ("verb %" in header) == ("noun %" in header) == ("verb_top1" in columns)
