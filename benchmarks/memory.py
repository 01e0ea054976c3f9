"""Resident memory over many random opens: a small leak per file would end a long training.

    python -m benchmarks.memory                      # 100,000 opens through every decoder
    python -m benchmarks.memory --opens 2000 --decoder pyav

Growth is counted after a tenth of the opens, when libraries have allocated the memory that they keep.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from stadapter.config import ConfigError
from stadapter.data.cache.frames import ClipCache, decode_settings
from stadapter.data.cache.quota import GB
from stadapter.data.video.decoding import ClipError, check_backend, decode

WAYS = ("pyav", "decord", "torchcodec", "cache")
_FILES, _SAMPLES = 16, 20


def write_files(folder: Path) -> list[Path]:
    """Write small videos of many lengths and sizes. The last one is damaged: errors must not leak either."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.mp4" for number in range(_FILES)]
    for number, path in enumerate(paths):
        height, width = 48 + 16 * (number % 4), 64 + 16 * (number % 3)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "bf": "2"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            for _ in range(8 + number):
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    paths[-1].write_bytes(paths[-1].read_bytes()[:-200])
    return paths


def resident_mib(opens: int, way: str, paths: list[Path], show: Callable[[str], None] = lambda _: None) -> list[float]:
    """Return the resident MiB of this process after each twentieth of the opens, passing each to `show`."""
    rng = np.random.default_rng(1)
    cache = ClipCache(paths[0].parent, GB, decode_settings("auto", None), paths[0].parent / "cache")
    found = []
    for number in range(1, opens + 1):
        path, wanted = paths[rng.integers(len(paths))], rng.integers(0, 8, 4).tolist()
        try:
            if way == "cache":
                cache.read(path, wanted, decode)
            else:
                decode(path, wanted, backend=way)  # type: ignore[arg-type]  # one of the names in WAYS
        except ClipError:
            pass
        if number % max(1, opens // _SAMPLES) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            show(f" {found[-1]:.1f}")
    return found


def growth_mib(resident: list[float]) -> float:
    """Return by how many MiB memory grew from a tenth of the opens to the end."""
    return resident[-1] - resident[len(resident) // 10]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--opens", type=int, default=100_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--decoder", choices=WAYS, help="only this one, in this process (default: each in its own)")
    options = parser.parse_args(arguments)
    if options.decoder is None:
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.memory", "--opens", str(options.opens), "--decoder", way]
            subprocess.run(command, check=True)
        return 0
    if options.decoder != "cache":
        try:
            check_backend(options.decoder)
        except ConfigError as error:
            print(f"{options.decoder}: left out ({error})")
            return 0
    with tempfile.TemporaryDirectory() as scratch:
        print(
            f"{datetime.date.today()} {options.decoder}: {options.opens:,} opens, MiB after each 5 %:",
            end="",
            flush=True,
        )
        paths = write_files(Path(scratch))
        resident = resident_mib(options.opens, options.decoder, paths, lambda text: print(text, end="", flush=True))
    print(f"\n  grows by {growth_mib(resident):+.1f} MiB from 10 % on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
