"""Decoding video files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from videos import PYRAMID, decode_all, scene, write_video

from stadapter.config import ConfigError
from stadapter.data.video import decoding
from stadapter.data.video.decoding import Backend, ClipError, check_backend, count_frames, decode, frame_size


def _why_no_torchcodec() -> str:
    try:
        check_backend("torchcodec")
    except ConfigError as error:
        return str(error)
    return ""


WITHOUT = _why_no_torchcodec()
BACKENDS = ["pyav", "decord", pytest.param("torchcodec", marks=pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT))]

FILES = {
    "constant_rate.mp4": {},
    "b_frames.mp4": {"x264": PYRAMID},
    "open_gop.mp4": {"x264": f"{PYRAMID}:open-gop=1"},
    "intra_refresh.mp4": {"x264": "keyint=12:intra-refresh=1:bframes=0"},
    "interlaced.mp4": {"x264": "keyint=12:interlaced=1:bframes=2"},
    "variable_rate.mp4": {"x264": PYRAMID, "times_ms": np.cumsum([10, 40, 33, 5, 90] * 8).tolist()},
    "transport_stream.ts": {"x264": f"{PYRAMID}:open-gop=1"},
    "no_time_stamps.avi": {"x264": PYRAMID},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "hidden_frames_vp8.webm": {"codec": "libvpx"},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, options in FILES.items():
        write_video(folder / name, scene(40), **options)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILES)
def test_any_request_gives_the_frames_of_a_full_decode(videos: Path, name: str, backend: Backend) -> None:
    expected = decode_all(videos / name)
    rng = np.random.default_rng(1)
    for _ in range(20):
        indices = rng.integers(0, len(expected), rng.integers(1, 9)).tolist()
        np.testing.assert_array_equal(decode(videos / name, indices, backend=backend), expected[indices])


@pytest.mark.parametrize("name", FILES)
def test_count_is_the_number_of_decodable_frames(videos: Path, name: str) -> None:
    assert count_frames(videos / name) == len(decode_all(videos / name)) == 40


def test_frames_are_in_the_order_they_were_written(tmp_path: Path) -> None:
    written = scene(30)
    decoded = decode(write_video(tmp_path / "a.mp4", written, x264=PYRAMID), range(30)).astype(int)
    distance = [[np.abs(frame - other).mean() for other in written.astype(int)] for frame in decoded]
    assert np.argmin(distance, axis=1).tolist() == list(range(30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width"), [(47, 63), (48, 63), (60, 60), (240, 426)])
def test_sizes_that_fill_no_macroblock_are_exact(tmp_path: Path, height: int, width: int, backend: Backend) -> None:
    path = write_video(tmp_path / "odd.mp4", scene(6, height, width))
    decoded = decode(path, [5, 0], backend=backend)
    assert decoded.shape == (2, height, width, 3)
    np.testing.assert_array_equal(decoded, decode_all(path)[[5, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_frame_can_be_asked_for_many_times(tmp_path: Path, backend: Backend) -> None:
    path = write_video(tmp_path / "one.mp4", scene(1))
    np.testing.assert_array_equal(decode(path, [0] * 4, backend=backend), decode_all(path)[[0] * 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotated_files_come_out_upright(tmp_path: Path, backend: Backend) -> None:
    path = write_video(tmp_path / "turned.mp4", scene(4), rotation=90)
    upright = np.rot90(decode_all(path), 1, axes=(1, 2))
    np.testing.assert_array_equal(decode(path, [0, 3], backend=backend), upright[[0, 3]])


def test_indices_may_be_a_function_of_the_number_of_frames(videos: Path) -> None:
    path = videos / "b_frames.mp4"
    np.testing.assert_array_equal(decode(path, lambda total: [total - 1]), decode_all(path)[[39]])


def test_few_frames_of_a_long_clip_do_not_decode_all(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    keep = decoding._keep

    def count(frames: list[Any], wanted: set[int], pictures: dict[int, np.ndarray], short_side: int | None) -> None:
        decoded.extend(frames)
        keep(frames, wanted, pictures, short_side)

    monkeypatch.setattr(decoding, "_keep", count)
    decode(videos / "b_frames.mp4", [0, 38])
    assert 2 <= len(decoded) < 15


def test_spaces_and_non_ascii_letters_in_a_path_are_fine(tmp_path: Path) -> None:
    path = write_video(tmp_path / "räum te" / "klip 1 é.mp4", scene(3))
    assert decode(path, [2]).shape == decode(path, [2], backend="decord").shape == (1, 48, 64, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "zero bytes"), (b"not a video\n" * 99, "not a video"), (None, "No such file")]
)
def test_what_is_no_video_is_a_clip_error(tmp_path: Path, content: bytes | None, reason: str, backend: Backend) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=rf"bad.mp4: .*{reason}"):
        decode(path, [0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_cut_before_its_index_is_a_clip_error(videos: Path, tmp_path: Path, backend: Backend) -> None:
    (tmp_path / "cut.mp4").write_bytes((videos / "b_frames.mp4").read_bytes()[:2000])
    with pytest.raises(ClipError, match=r"cut.mp4: .*truncated"):
        decode(tmp_path / "cut.mp4", [0], backend=backend)


def _moov_first(path: Path, target: Path) -> bytes:
    """Return the same streams with the index at the front of the file."""
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return target.read_bytes()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_file_cut_behind_its_index_is_a_clip_error(videos: Path, tmp_path: Path, share: float) -> None:
    content = _moov_first(videos / "b_frames.mp4", tmp_path / "front.mp4")
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ClipError, match=r"cut.mp4: is truncated"):
        decode(tmp_path / "cut.mp4", [0])


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_a_cut_matroska_file_is_a_clip_error(tmp_path: Path, codec: str) -> None:
    content = write_video(tmp_path / "whole.mkv", scene(20), codec=codec).read_bytes()
    assert count_frames(tmp_path / "whole.mkv") == 20
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ClipError, match=r"cut.mkv: is truncated"):
        decode(tmp_path / "cut.mkv", [0])


def test_damaged_pictures_are_a_clip_error(videos: Path, tmp_path: Path) -> None:
    content = bytearray(_moov_first(videos / "b_frames.mp4", tmp_path / "front.mp4"))
    start = content.find(b"mdat") + 2000
    content[start : start + 3000] = bytes(3000)
    (tmp_path / "damaged.mp4").write_bytes(content)
    with pytest.raises(ClipError, match=r"damaged.mp4"):
        decode(tmp_path / "damaged.mp4", range(40))


def test_sound_alone_is_a_clip_error(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44100
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(ClipError, match=r"sound.mp4: has no video stream"):
        decode(tmp_path / "sound.mp4", [0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [-1, 40])
def test_an_index_outside_the_clip_is_a_clip_error(videos: Path, index: int, backend: Backend) -> None:
    with pytest.raises(ClipError, match=rf"frame {index} was asked for, but the clip has 40"):
        decode(videos / "b_frames.mp4", [0, index], backend=backend)


def test_an_index_outside_an_unindexed_clip_is_a_clip_error(videos: Path) -> None:
    with pytest.raises(ClipError, match=r"frame 40 was asked for, but the clip has 40"):
        decode(videos / "transport_stream.ts", [40])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotation", [0, 90])
def test_a_reduced_request_is_the_same_through_every_backend(tmp_path: Path, rotation: int, backend: Backend) -> None:
    path = write_video(tmp_path / "wide.mp4", scene(6, 48, 64), rotation=rotation)
    reduced = decode(path, [4, 1], backend=backend, short_side=24)
    assert reduced.shape == ((2, 32, 24, 3) if rotation else (2, 24, 32, 3))
    np.testing.assert_array_equal(reduced, decode(path, [4, 1], short_side=24))
    smooth = decode(path, [4, 1]).reshape(2, *(n for side in reduced.shape[1:3] for n in (side, 2)), 3).mean((2, 4))
    assert np.abs(smooth - reduced).mean() < 20  # unrelated pictures: 85


def test_a_reduced_request_never_enlarges(tmp_path: Path) -> None:
    path = write_video(tmp_path / "small.mp4", scene(2, 48, 64))
    np.testing.assert_array_equal(decode(path, [1], short_side=49), decode(path, [1]))


def test_an_empty_request_gives_no_frames(videos: Path) -> None:
    assert all(len(decode(videos / "b_frames.mp4", [], backend=backend)) == 0 for backend in ("pyav", "decord"))


def test_the_size_is_known_without_decoding(videos: Path) -> None:
    assert frame_size(videos / "vp9.webm") == (48, 64)


def test_an_unknown_backend_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"--decoder cv2: must be one of auto, pyav, decord, torchcodec"):
        check_backend("cv2")


def test_a_backend_that_is_not_installed_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ConfigError, match=r"--decoder decord: it is not installed; pip install decord"):
        check_backend("decord")


def test_importing_the_module_loads_no_decoder() -> None:
    modules = "sys, stadapter.data.lists.formats, stadapter.data.video.decoding"
    code = f"import {modules}; print({{'av', 'decord'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
