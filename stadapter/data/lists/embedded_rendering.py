"""Pixels of the embedded video world: clips whose classes are motions, and still images to pretrain on.

Handwritten digits (scikit-learn's `load_digits`) move over crops of scikit-learn's two photographs. The twelve motion
classes form six pairs that differ only in the direction of time. The second class of a pair is rendered from the first
one's parameter paths read backwards, and everything else in a clip (camera shake, gain, noise) is drawn independently
per frame. So a clip and its reversal are equally likely under the two classes of a pair, and a single frame, or a set
of frames without their order, says nothing about direction: a model without temporal reasoning gets 50 % there. The
second label of a clip is its digit, which a single frame does show.

Every clip is a function of (WORLD_SEED, split, index). A change that alters pixels must raise WORLD_VERSION. Imports
of scikit-learn (3.5 s) and PyAV are late: most runs find their clips rendered.

Shapes: T frames, H = W = 60 px, S digits in a picture. Positions and sizes are in pixels, angles in radians.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

WORLD_SEED = 2022
WORLD_VERSION = 2
NUM_FRAMES = 16
FRAME_SIZE = 60
FPS = 8
PATCH_SIZE = 12  # of the embedded backbone; still images are labelled patch by patch
BACKGROUND = 10  # the patch label "no digit here"

MOTION_CLASSES = (
    *("right", "left"),
    *("down", "up"),
    *("grow", "shrink"),
    *("clockwise", "counter-clockwise"),
    *("appear", "vanish"),
    *("apart", "together"),
)  # pair p is classes 2p and 2p + 1: the same motion, with time reversed
DIGIT_CLASSES = tuple("0123456789")

# Handwritten digits per class and split: no two splits share one. Validation takes its own out of what would else be
# pretraining material, so that it never shows a digit which the backbone or the adapters were trained on.
_INSTANCES_PER_DIGIT = {"test": 40, "train": 40, "val": 10}  # and the remaining 84 to 93 for pretraining
_STREAMS = {"train": 0, "val": 1, "test": 2, "pretraining": 3}
_MAX_SHAKE = 1  # px, camera

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Track:
    """The path of one digit over time; every array is [T]."""

    x: Floats  # of its centre
    y: Floats
    size: Floats  # side of its square
    angle: Floats  # clockwise on the screen
    opacity: Floats

    def reversed(self) -> Track:
        """Return the same path backwards in time."""
        return Track(self.x[::-1], self.y[::-1], self.size[::-1], self.angle[::-1], self.opacity[::-1])


# --- material


@cache
def digit_instances(split: str) -> tuple[NDArray[np.int64], ...]:
    """Return, for each digit class, the indices into `load_digits` that belong to `split` (or to "pretraining")."""
    labels = _digits()[1]
    rng = np.random.default_rng(WORLD_SEED)
    shares = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        start = 0
        for name, count in _INSTANCES_PER_DIGIT.items():
            if name == split:
                shares.append(order[start : start + count])
            start += count
        if split == "pretraining":
            shares.append(order[start:])
    return tuple(shares)


@cache
def _digits() -> tuple[Floats, NDArray[np.int64]]:
    """Return all glyphs in [0, 1] with a border of one empty pixel, [1797, 10, 10], and their digit classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.pad(bunch.images / 16, ((0, 0), (1, 1), (1, 1))).astype(np.float32), bunch.target


@cache
def _photographs() -> tuple[Floats, ...]:
    """Return both photographs in [0, 1] at full, half and third resolution, each [H, W, 3]."""
    from sklearn.datasets import load_sample_images

    levels = []
    for photo in load_sample_images().images:
        for factor in (1, 2, 3):
            height, width = (side // factor for side in photo.shape[:2])
            cells = photo[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
            levels.append((cells.mean(axis=(1, 3)) / 255).astype(np.float32))
    return tuple(levels)


def load_material() -> None:
    """Load the digits and photographs that rendering shares: threads that start at once would each load them."""
    _digits(), _photographs()


def _background(rng: Generator) -> Floats:
    """Return a crop of a photograph, wider than a frame by the camera's shake, with random contrast."""
    photos = _photographs()
    photo = photos[rng.integers(len(photos))]
    side = FRAME_SIZE + 2 * _MAX_SHAKE
    top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
    crop = photo[top : top + side, left : left + side, :]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    mean = crop.mean()
    return mean + (crop - mean) * np.float32(rng.uniform(0.2, 0.7))


def _colour(rng: Generator, background: Floats) -> Floats:
    """Return a random colour that stands out from the background's mean in brightness."""
    level = background.mean()
    while True:
        colour = rng.random(3, dtype=np.float32)
        if abs(colour.mean() - level) > 0.35:
            return colour


# --- motion


def motion_tracks(motion: int, rng: Generator) -> list[Track]:
    """Return the tracks of a clip's digits. Classes 2p and 2p + 1 make the same draws; the latter are reversed."""
    steps = np.exp(rng.normal(0, 0.4, NUM_FRAMES - 1))  # speed jitter; always forwards
    progress = np.concatenate([[0], np.cumsum(steps)]) / steps.sum() - 0.5  # from -0.5 to 0.5
    x, y = rng.uniform(22, 38, 2)
    size, angle, opacity = rng.uniform(24, 30), rng.normal(0, 0.2), 1.0
    offsets = [(0.0, 0.0)]
    match motion // 2:
        case 0:
            x = rng.uniform(26, 34) + rng.uniform(16, 32) * progress
        case 1:
            y = rng.uniform(26, 34) + rng.uniform(16, 32) * progress
        case 2:
            size = rng.uniform(22, 26) * rng.uniform(1.7, 2.4) ** progress
        case 3:  # around a point beside the digit, turning with it
            angle = rng.uniform(0, 2 * np.pi) + np.radians(rng.uniform(140, 240)) * progress
            radius, lead = rng.uniform(12, 17), rng.uniform(0, 2 * np.pi)
            x = rng.uniform(28, 32) + radius * np.cos(angle + lead)
            y = rng.uniform(28, 32) + radius * np.sin(angle + lead)
        case 4:
            opacity = np.clip(0.5 + rng.uniform(0.9, 1.3) * progress, 0, 1)
        case 5:
            size = rng.uniform(18, 22)
            direction, distance = rng.normal(0, 0.3), rng.uniform(25, 28) + rng.uniform(24, 32) * progress
            dx, dy = np.cos(direction) * distance / 2, np.sin(direction) * distance / 2
            x, y = rng.uniform(28, 32, 2)
            offsets = [(dx, dy), (-dx, -dy)]
    tracks = [_track(x + dx, y + dy, size, angle, opacity) for dx, dy in offsets]
    return [track.reversed() for track in tracks] if motion % 2 else tracks


def _track(*values: float | NDArray[np.float64], frames: int = NUM_FRAMES) -> Track:
    return Track(*(np.broadcast_to(np.asarray(value, np.float32), frames) for value in values))


# --- rendering


def _coverage(glyph: Floats, track: Track) -> Floats:
    """Return the share of each pixel that the digit covers, [T, H, W], by bilinear look-up in the glyph."""
    axis = np.arange(FRAME_SIZE, dtype=np.float32) + 0.5
    dx, dy = (axis - c[:, None] for c in (track.x, track.y))  # [T, W], [T, H]
    cos, sin = (f(track.angle)[:, None] * 8 / track.size[:, None] for f in (np.cos, np.sin))
    centre = (glyph.shape[0] - 1) / 2
    u = (cos * dx)[:, None, :] + (sin * dy)[:, :, None] + centre
    v = (cos * dy)[:, :, None] - (sin * dx)[:, None, :] + centre
    limit = glyph.shape[0] - 1.001  # the border is empty, so clamping paints nothing outside the glyph
    np.clip(u, 0, limit, out=u)
    np.clip(v, 0, limit, out=v)
    column, row = u.astype(np.int32), v.astype(np.int32)
    u -= column
    v -= row
    corner = row * glyph.shape[0] + column
    flat = glyph.ravel()
    above = flat[corner] * (1 - u) + flat[corner + 1] * u
    corner += glyph.shape[0]
    below = flat[corner] * (1 - u) + flat[corner + 1] * u
    ink = above * (1 - v) + below * v
    return np.minimum(ink * 1.5, 1) * track.opacity[:, None, None]


def _render(rng: Generator, instances: list[int], tracks: list[Track]) -> tuple[Pixels, Floats]:
    """Paint digits over a random background: frames [T, H, W, 3] and each digit's visible coverage [S, T, H, W].

    The camera's shake, the gain's flicker and the noise are independent from frame to frame: they have no direction.
    """
    background = _background(rng)
    frames_count = len(tracks[0].x)
    shake = rng.integers(0, 2 * _MAX_SHAKE + 1, (frames_count, 2))
    frames = np.stack([background[y : y + FRAME_SIZE, x : x + FRAME_SIZE] for x, y in shake])
    visible: list[Floats] = []
    for instance, track in zip(instances, tracks, strict=True):
        moved_x, moved_y = (c + _MAX_SHAKE - s for c, s in zip((track.x, track.y), shake.T, strict=True))
        moved = Track(moved_x.astype(np.float32), moved_y.astype(np.float32), track.size, track.angle, track.opacity)
        cover = _coverage(_digits()[0][instance], moved)
        visible = [*(under * (1 - cover) for under in visible), cover]
        frames += cover[..., None] * (_colour(rng, background) - frames)
    gain = rng.uniform(0.75, 1.1) * rng.uniform(0.95, 1.05, frames_count)
    frames *= gain.astype(np.float32)[:, None, None, None]
    frames += rng.standard_normal(frames.shape, np.float32) * np.float32(rng.uniform(0.01, 0.03))
    return (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8), np.stack(visible)


def clip_labels(index: int) -> tuple[int, int]:
    """Return (motion, digit) of a clip: every run of 120 indices holds each combination once."""
    return index % len(MOTION_CLASSES), index // len(MOTION_CLASSES) % len(DIGIT_CLASSES)


def render_clip(split: str, index: int) -> Pixels:
    """Return the frames of one clip, [T, H, W, 3]; both digits of the last pair are of the same class."""
    motion, digit = clip_labels(index)
    rng = np.random.default_rng((WORLD_SEED, _STREAMS[split], index))
    tracks = motion_tracks(motion, rng)
    instances = rng.choice(digit_instances(split)[digit], len(tracks))
    return _render(rng, list(instances), tracks)[0]


def still_images(
    count: int, seed: int = 0, split: str = "pretraining"
) -> Iterator[tuple[Pixels, Floats, NDArray[np.int64]]]:
    """Yield pictures for pretraining: pixels [H, W, 3], 1 for each digit shown [10], a label per patch [25] (10: none).

    They show one or two digits, of any class, in all places, sizes, angles and opacities that occur in clips.
    """
    grid = FRAME_SIZE // PATCH_SIZE
    for index in range(count):
        rng = np.random.default_rng((WORLD_SEED, _STREAMS[split], seed, index))
        digits = rng.integers(10, size=rng.integers(1, 3))
        instances = [int(rng.choice(digit_instances(split)[digit])) for digit in digits]
        pictures, visible = _render(rng, instances, [_still_track(rng) for _ in digits])
        # Mean coverage of each patch by each digit, [S, 25]. A digit's strokes fill about a third of its square.
        cover = visible[:, 0].reshape(-1, grid, PATCH_SIZE, grid, PATCH_SIZE).mean(axis=(2, 4)).reshape(-1, grid**2)
        patches = np.where(cover.max(axis=0) > 0.06, digits[cover.argmax(axis=0)], BACKGROUND)
        present = np.zeros(10, np.float32)
        present[digits] = 1
        yield pictures[0], present, patches


def _still_track(rng: Generator) -> Track:
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < 0.3 else rng.normal(0, 0.2)
    opacity = rng.uniform(0.2, 1) if rng.random() < 0.2 else 1.0
    return _track(rng.uniform(10, 50), rng.uniform(10, 50), rng.uniform(15, 34), angle, opacity, frames=1)


# --- files


def write_mp4(path: Path, frames: Pixels) -> None:
    """Encode frames [T, H, W, 3] as H.264.

    Constant quantiser, equal for key and predicted frames, and no look-ahead: quality that changed along the clip
    would leak the arrow of time. No B-frames: every decoder then counts the frames alike.
    """
    import av

    options = {"preset": "veryfast", "qp": "24", "bf": "0", "x264-params": "ipratio=1:aq-mode=0:mbtree=0:scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1  # the files are smaller than a thread's start-up is worth, and stay deterministic
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
