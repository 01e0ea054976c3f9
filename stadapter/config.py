"""Recipes: a complete description of one training, as frozen values.

A `Recipe` holds every field that decides a result, and nothing else: where files lie, how many GPUs work on it
and where it is logged are arguments of the functions that use them. Two trainings with equal recipes must give
equal numbers, so a recipe can be hashed into the identity of a trial.

Fields are addressed by their dotted path everywhere a person meets them: `adapter.kernel_size` on the command
line, in MLflow and in a table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stadapter.strategies import STRATEGIES

Placement = Literal["before_mhsa", "after_mhsa", "both", "after_mlp", "parallel"]
Activation = Literal["none", "gelu"]
Sampling = Literal["uniform", "dense"]
Resize = Literal["fast", "exact"]
Precision = Literal["float32", "bfloat16", "float16"]


# The names in the table of strategies; a type checker cannot read them from there.
if TYPE_CHECKING:
    Strategy = str
else:
    Strategy = Literal[tuple(STRATEGIES)]


class ConfigError(ValueError):
    """A value the user gave cannot work. The message is one line: what, where, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its type's name if it has no message."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and how frames become pixels (paper, section 4.1 and supplement; authors' training commands)."""

    dataset: str
    num_classes: int  # logits; with label_groups, of both heads together
    label_groups: tuple[int, int] | None = None  # verb and noun classes: two labels per clip, a head for each
    num_frames: int = 8
    frame_size: int = 224
    sampling: Sampling = "uniform"
    frame_stride: int = 16  # frames between two sampled ones; dense sampling only
    fixed_frames: bool = False  # training looks at the frames of one test view, every epoch: little to cache
    decoded_short_side: int | None = None  # larger frames are reduced to it while they are decoded, before any crop
    resize: Resize = "fast"  # exact: in float32, as the authors'; fast: in uint8, rounded and clamped to 0 ... 255
    short_side_jitter: tuple[float, float] | None = None  # of frame_size, then a random crop
    random_resized_crop: tuple[float, float] | None = None  # share of the frame's area
    horizontal_flip: bool = False
    rand_augment: str | None = None  # a timm string, e.g. "rand-m7-n4-mstd0.5-inc1"
    random_erasing: float = 0.0  # probability that a clip loses a box, the same in all its frames
    repeated_augmentation: int = 1  # views of a clip in one global batch; an epoch then has as many times the steps
    test_temporal_views: int = 1
    test_spatial_views: int = 1

    def __post_init__(self) -> None:
        if self.label_groups is not None and sum(self.label_groups) != self.num_classes:
            raise ConfigError(
                f"data.label_groups = {self.label_groups}: must add up to data.num_classes = {self.num_classes}"
            )
        if self.decoded_short_side is not None and self.decoded_short_side < self.frame_size:
            raise ConfigError(
                f"data.decoded_short_side = {self.decoded_short_side}: is below data.frame_size = {self.frame_size}; "
                "frames would be reduced only to be enlarged again"
            )
        if not 0 <= self.random_erasing <= 1:
            raise ConfigError(f"data.random_erasing = {self.random_erasing}: a probability, in [0, 1]")
        for name in ("num_classes", "num_frames", "frame_stride", "repeated_augmentation", "test_temporal_views"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen image transformer.

    `name` is `timm/<model>`, `open_clip/<model>/<pretrained tag>`, or `embedded` for the one in the package.
    `weights` is empty for the library's own weights, or the SHA-256 of the file given by `--weights`, or `seed:<n>`
    for random ones (tests, timings).
    """

    name: str
    weights: str = ""


@dataclass(frozen=True)
class AdapterConfig:
    """ST-Adapter(X) = X + f(DWConv3D(X W_down)) W_up (paper, equation 5).

    The strategy `adapter` takes width, placement and blocks from here, and nothing else.
    """

    bottleneck_width: int = 384
    kernel_size: tuple[int, int, int] = (3, 1, 1)  # (t, h, w)
    activation: Activation = "none"
    placement: Placement = "before_mhsa"
    blocks: tuple[int, ...] | None = None  # 0-based; None: every block
    adapt_cls: bool = False  # CLS through the bottleneck too, as a token without neighbours
    zero_init_conv: bool = True  # False: PyTorch's default, and a fresh adapter is not the identity

    def __post_init__(self) -> None:
        if self.bottleneck_width < 1:
            raise ConfigError(
                f"adapter.bottleneck_width = {self.bottleneck_width}: the bottleneck needs at least 1 channel"
            )
        if len(self.kernel_size) != 3 or any(extent < 1 or extent % 2 == 0 for extent in self.kernel_size):
            raise ConfigError(
                f"adapter.kernel_size = {self.kernel_size}: needs three odd positive extents (t, h, w), "
                "such as (3, 1, 1); an even kernel has no centre"
            )
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ConfigError(f"adapter.blocks = {self.blocks}: a block is named twice")


@dataclass(frozen=True)
class BaselineConfig:
    """The sizes of the baselines; each strategy reads the field that names it in brackets."""

    prompts: int = 8  # learned tokens per block (prompt)
    partial_blocks: int = 2  # trained, counted from the last (partial)
    temporal_blocks: int = 1  # of the transformer over frames (temporal)
    lora_rank: int = 8  # (lora)

    def __post_init__(self) -> None:
        for name in ("prompts", "partial_blocks", "temporal_blocks", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rival.{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class CustomCode:
    """An adapter or a model that is not in the package: a name in a Python file, and the hash of the file's content.

    The content decides results and is hashed; the place of the file is not. `stadapter.model.custom` fills these in.
    """

    file: str = ""
    sha256: str = ""
    adapter: str = ""  # a class there, built in place of every ST-Adapter
    model: str = ""  # a function there, called in place of the package's way from a backbone to a classifier

    def __post_init__(self) -> None:
        named = bool(self.adapter or self.model)
        if bool(self.file) != named or bool(self.sha256) != named:
            raise ConfigError(
                f"own.file = {self.file!r}: own.file, own.sha256 and one of own.adapter and own.model belong together; "
                "see stadapter.model.custom"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up, cosine to zero, all per step (authors' training commands)."""

    epochs: int
    global_batch: int  # clips per optimiser step, whatever the number of GPUs
    base_lr: float  # per 256 clips; the rate used is base_lr * global_batch / 256
    backbone_lr_factor: float = 1.0  # the rate of what was pretrained, in units of the rate of what is new
    warmup_epochs: float = 2.0
    weight_decay: float = 0.01  # 0 on biases and norms
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    head_dropout: float = 0.5
    precision: Precision = "float32"  # of the autocast region; adapters, head and optimiser stay in float32

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "base_lr", "backbone_lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name} = {getattr(self, name)}: must be above 0")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(
                f"optim.warmup_epochs = {self.warmup_epochs}: must be at least 0 and below optim.epochs = {self.epochs}"
            )
        if not 0 <= self.head_dropout < 1:
            raise ConfigError(f"optim.head_dropout = {self.head_dropout}: must be in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optim.weight_decay = {self.weight_decay}: must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas = {self.betas}: must both be in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:  # 0 would train nothing, below it uphill
            raise ConfigError(f"optim.clip_norm = {self.clip_norm}: must be above 0, or none")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"optim.label_smoothing = {self.label_smoothing}: must be in [0, 1)")

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / 256


@dataclass(frozen=True)
class Recipe:
    """A complete description of one training. `name` is a label: it is shown, and decides nothing."""

    name: str
    data: DataConfig
    backbone: BackboneConfig
    optim: OptimConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    # The names `rival` and `own` are hashed into every trial's identity: they stay.
    rival: BaselineConfig = field(default_factory=BaselineConfig)
    own: CustomCode = field(default_factory=CustomCode)
    strategy: Strategy = "st_adapter"
    train_final_norm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: must be at least 0")
        if self.optim.global_batch % self.data.repeated_augmentation:
            raise ConfigError(
                f"data.repeated_augmentation = {self.data.repeated_augmentation}: must divide "
                f"optim.global_batch = {self.optim.global_batch}"
            )


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every field by dotted path, tuples as lists, in order of definition: these are logged and hashed."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                visit(f"{prefix}.{f.name}" if prefix else f.name, getattr(value, f.name))
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    visit("", recipe)
    return flat


def unflatten(flat: dict[str, Any]) -> Recipe:
    """Return the recipe that `flatten` made these fields of. Raises ConfigError for an unknown or missing field."""
    unknown = set(flat)

    def build(cls: type, prefix: str) -> Any:
        hints = typing.get_type_hints(cls)
        values = {}
        for f in dataclasses.fields(cls):
            path = f"{prefix}.{f.name}" if prefix else f.name
            if dataclasses.is_dataclass(hints[f.name]):
                values[f.name] = build(hints[f.name], path)
            elif path in flat:
                unknown.discard(path)
                values[f.name] = _coerce(path, hints[f.name], flat[path])
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{path}: the field is missing")
        return cls(**values)

    recipe = build(Recipe, "")
    if unknown:
        raise ConfigError(f"{sorted(unknown)[0]}: a recipe has no such field")
    return recipe


def replace(recipe: Recipe, **fields: Any) -> Recipe:
    """Return a copy with fields changed by dotted path: `replace(recipe, **{"adapter.kernel_size": (3, 1, 1)})`."""
    flat = flatten(recipe)
    for path, value in fields.items():
        if path not in flat:
            raise ConfigError(f"{path}: a recipe has no such field; it has {', '.join(flat)}")
        flat[path] = list(value) if isinstance(value, tuple) else value
    return unflatten(flat)


def difference(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """Return the fields of `other` that differ, by path: `replace(recipe, **difference(recipe, other)) == other`."""
    mine = flatten(recipe)
    return {path: value for path, value in flatten(other).items() if value != mine[path]}


def parse_override(text: str) -> tuple[str, Any]:
    """Return ("adapter.kernel_size", (3, 1, 1)) of `adapter.kernel_size=3,1,1`, typed as the field is."""
    path, separator, raw = text.partition("=")
    path = path.strip()
    if not separator:
        raise ConfigError(f"--set {text}: expected FIELD=VALUE, such as adapter.bottleneck_width=192")
    hint: Any = Recipe
    for part in path.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in hints:
            raise ConfigError(f"--set {text}: a recipe has no field '{path}'; try --help for the list")
        hint = hints[part]
    if dataclasses.is_dataclass(hint):
        raise ConfigError(f"--set {text}: '{path}' is a group of fields; name one of them")
    return path, _coerce(path, hint, raw.strip())


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """Return a JSON value, a Python value or a command line's text as the type of the field, or raise ConfigError."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    try:
        if origin is Literal:
            if value not in args:
                raise ConfigError(f"{path} = {value}: must be one of {', '.join(map(str, args))}")
            return value
        if origin is tuple:
            items = [v for v in value.strip("()[] ").split(",") if v.strip()] if isinstance(value, str) else list(value)
            kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
            if len(items) != len(kinds):
                raise ConfigError(f"{path} = {value}: needs {len(kinds)} values separated by commas")
            return tuple(_coerce(path, kind, item) for kind, item in zip(kinds, items, strict=True))
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{path} = {value}: cannot be read as {getattr(hint, '__name__', hint)}") from None


# Raised by hand when a change of the code changes the numbers that an unchanged recipe gives.
RESULTS_VERSION = 1


LABELS = ("name", "own.file")  # fields that are shown or used, and decide nothing


def scientific_fields(recipe: Recipe) -> dict[str, Any]:
    """Return every field that decides a result, by path: no labels, and `own.*` only if there is custom code."""
    return {
        path: value
        for path, value in flatten(recipe).items()
        if path not in LABELS and not (path.startswith("own.") and not value)
    }


def identity(recipe: Recipe) -> str:
    """Return 12 hex digits, equal exactly when two trainings must give equal numbers: a hash of `scientific_fields`."""
    fields = scientific_fields(recipe)
    text = json.dumps({"fields": fields, "results_version": RESULTS_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for one purpose (data order, augmentation, dropout, ...) and step, epoch or clip."""
    text = "/".join(map(str, (seed, purpose, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
