"""Reading clips, against the plain way: time per clip on one core, peak memory, and equality of pixels.

    python -m benchmarks.data

Every method runs once per round, one after the other, so that a busy machine slows all of them alike; times are
medians of this process's CPU seconds. (decord runs in this process; trainings run it in a separate one, which costs one
more copy of the frames.) A ratio is the plain way's time over ours. "lean" is the reference that picks frames before it
converts and resizes them; see reference_decoding.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import reference_decoding
from stadapter import recipes
from stadapter.config import ConfigError, DataConfig, Resize
from stadapter.data.cache.frames import ClipCache, decode_settings
from stadapter.data.cache.quota import GB
from stadapter.data.clips import ClipDataset
from stadapter.data.lists.clip_list import ClipList
from stadapter.data.reader import Reading
from stadapter.data.sampling import dense_indices
from stadapter.data.transforms import train_pixels
from stadapter.data.video.decoding import Backend, check_backend, decode
from stadapter.training import hardware

KINETICS = dataclasses.replace(recipes.get("kinetics400_clip_b16").data, num_classes=400)
SSV2 = recipes.get("ssv2_clip_b16").data
PEAK_LIMIT_MIB = 150 * 10**6 / 2**20
EXACT_LIMIT = 1e-5
CLIP_STD = 0.2576  # smallest of CLIP's channel deviations: one normalised unit

Pixels = Callable[[Path, int], Tensor]  # path, round -> pixels


@dataclass(frozen=True)
class Method:
    name: str
    reference: str
    run: Pixels
    target: float | None = None  # least ratio to the plain reference


def plain_ways() -> dict[str, Pixels]:
    return {
        "train": lambda path, number: reference_decoding.train_pixels(path, KINETICS, number),
        "train, lean": lambda path, number: reference_decoding.train_pixels(path, KINETICS, number, lean=True),
        "temporal": lambda path, number: reference_decoding.test_pixels(path, KINETICS),
        "spatial": lambda path, number: reference_decoding.test_pixels(path, SSV2),
    }


def ours(config: DataConfig, resize: Resize, *, train: bool, reading: Reading) -> Pixels:
    config = dataclasses.replace(config, resize=resize)

    def run(path: Path, number: int) -> Tensor:
        clips = ClipList(config.dataset, "train", str(path.parent), [path.name], [0], [False], ("a",))
        # Random numbers as in epoch `number` of a training with seed 0.
        dataset = ClipDataset(clips, config, seed=0, train=train, reading=reading)
        return dataset[number, 0]["pixels"] if train else dataset[0]["pixels"]

    return run


def our_ways(cache: ClipCache) -> list[Method]:
    def train(decoder: Backend, resize: Resize = "fast", cached: bool = False) -> Pixels:
        return ours(KINETICS, resize, train=True, reading=Reading(decoder=decoder, cache=cache if cached else None))

    def test(config: DataConfig, resize: Resize) -> Pixels:
        return ours(config, resize, train=False, reading=Reading())

    torchcodec = [Method("training clip, torchcodec", "train", train("torchcodec"))] if _has_torchcodec() else []
    return [
        Method("training clip, decord", "train", lambda path, number: _train(path, "fast", number, "decord"), 1.5),
        Method("training clip, PyAV (fastest exact)", "train", train("auto"), 1.9),
        Method("training clip, PyAV, exact resizing", "train", train("auto", "exact")),
        *torchcodec,
        Method("training clip, warm cache", "train", train("auto", cached=True), 15),
        Method("test clip, 3 temporal views", "temporal", test(KINETICS, "fast"), 12),
        Method("test clip, 3 temporal views, exact", "temporal", test(KINETICS, "exact")),
        Method("test clip, 3 spatial views", "spatial", test(SSV2, "fast"), 7),
        Method("test clip, 3 spatial views, exact", "spatial", test(SSV2, "exact")),
    ]


def _has_torchcodec() -> bool:
    try:
        check_backend("torchcodec")
    except ConfigError:
        return False
    return True


def measure(ways: dict[str, Pixels], paths: list[Path], rounds: int) -> dict[str, float]:
    """Return the median CPU milliseconds per clip of every way.

    The ways are interleaved; the first round warms up and fills the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for path in paths:
            for name, run in ways.items():
                if number == 0:
                    for drawn in range(1, rounds + 1) if "cache" in name else (1,):
                        run(path, drawn)
                    continue
                started = time.process_time()
                run(path, number)
                times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items() if values}


def peak_mib(run: Pixels, path: Path) -> float:
    """Return by how many MiB the resident memory of this process rises while it reads a clip."""
    run(path.with_name("short.mp4"), 0)  # let libraries allocate what they keep
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status_kib("VmRSS")
    run(path, 0)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


PEAKS: dict[str, Callable[[], Pixels]] = {
    "plain": lambda: plain_ways()["temporal"],
    "fast": lambda: ours(KINETICS, "fast", train=False, reading=Reading()),
    "exact": lambda: ours(KINETICS, "exact", train=False, reading=Reading()),
}


def compare(path: Path) -> tuple[float, list[str]]:
    """Return the largest difference between `exact` and the plain way, in normalised units, and lines to print."""
    worst, lines = 0.0, []
    triples = {
        "3 temporal views": (reference_decoding.test_pixels(path, KINETICS), *_both(KINETICS, path)),
        "3 spatial views": (reference_decoding.test_pixels(path, SSV2), *_both(SSV2, path)),
        "training clip": (
            reference_decoding.train_pixels(path, KINETICS, 2),
            _train(path, "exact", 2),
            _train(path, "fast", 2),
        ),
    }
    for name, (reference, exact, fast) in triples.items():
        exact_off, fast_off = ((ours - reference).abs() / CLIP_STD for ours in (exact, fast.float() / 255))
        worst = max(worst, float(exact_off.max()))
        lines.append(
            f"{name}: exact differs from plain by at most {float(exact_off.max()):.1e} normalised units (limit "
            f"{EXACT_LIMIT:.0e}); fast by {float(fast_off.mean()):.4f} on average, {float(fast_off.max()):.3f} at most"
        )
    return worst, lines


def _both(config: DataConfig, path: Path) -> tuple[Tensor, Tensor]:
    exact, fast = (ours(config, resize, train=False, reading=Reading())(path, 0) for resize in ("exact", "fast"))
    return exact, fast


def _train(path: Path, resize: Resize, seed: int, decoder: Backend = "auto") -> Tensor:
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(KINETICS, resize=resize)
    frames = decode(
        path, lambda total: dense_indices(total, config.num_frames, config.frame_stride, rng), backend=decoder
    )
    return train_pixels(frames, config, rng)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--clips", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--peak", choices=list(PEAKS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.peak:
        print(peak_mib(PEAKS[options.peak](), options.file))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        return _run(Path(scratch), options)


def _run(scratch: Path, options: argparse.Namespace) -> int:
    load = os.getloadavg()[0]
    paths = [reference_decoding.write_clip(scratch / f"{seed}.mp4", seed) for seed in range(options.clips)]
    reference_decoding.write_clip(scratch / "short.mp4", 0, seconds=1)
    worst, lines = compare(paths[0])
    methods = our_ways(ClipCache(scratch, 10 * GB, decode_settings("auto", None), scratch / "cache"))
    references = plain_ways()
    ways = references | {method.name: method.run for method in methods}
    ms = measure(ways, paths, options.rounds)

    print(f"{datetime.date.today()}, {hardware.cpu_name()}, one thread, load {load:.1f} to {os.getloadavg()[0]:.1f}")
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    print(
        f"{options.clips} clips of 10 s, 340x256, 30 fps, H.264, {kilobytes:.0f} kB; CPU ms, median of {options.rounds}"
    )
    print("references: " + ", ".join(f"{name} {ms[name]:.0f} ms" for name in references) + "\n")
    print(f"{'':38}{'ms':>8}{'x plain':>10}{'x lean':>9}{'target':>9}")
    missed = worst > EXACT_LIMIT
    for method in methods:
        ratio = ms[method.reference] / ms[method.name]
        lean = f"{ms['train, lean'] / ms[method.name]:.2f}" if method.reference == "train" else ""
        target = "" if method.target is None else f">= {method.target:g}"
        missed = missed or (method.target is not None and ratio < method.target)
        print(f"{method.name:38}{ms[method.name]:8.1f}{ratio:10.2f}{lean:>9}{target:>9}")
    print()
    for name in PEAKS:
        command = [sys.executable, "-m", "benchmarks.data", "--peak", name, "--file", str(paths[0])]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        limit = "" if name == "plain" else f"   <= {PEAK_LIMIT_MIB:.0f} (150 MB)"
        missed = missed or (name != "plain" and peak > PEAK_LIMIT_MIB)
        print(f"peak memory of a test clip, {name:6}{peak:8.0f} MiB{limit}")
    print("\n" + "\n".join(lines))
    print("some targets are missed" if missed else "all targets are met")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
