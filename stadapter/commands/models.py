"""The commands on trained models: evaluate, predict, export, convert.

Each `add_*` puts one command into the parser and names the function that runs it. What loads torch is imported in that
function.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from stadapter import config, recipes
from stadapter.ablation.exit_codes import DONE, FAILED
from stadapter.commands.parsers import Commands, add_parser
from stadapter.config import ConfigError
from stadapter.data.lists.clip_list import ClipList
from stadapter.data.lists.formats import load_clips
from stadapter.training.flags import (
    add_data_root,
    add_reading_flags,
    add_set,
    add_weights,
    changed_fields,
    complete_files,
    reading_flags,
)
from stadapter.training.options import TrainOptions
from stadapter.trials import record

MODEL = "a run folder, a trained.safetensors, or a file made by `convert` or stadapter.save"
DEFAULT_TOP = 5


def add_evaluate(commands: Commands) -> None:
    """Add `evaluate`."""
    parser = add_parser(
        commands,
        "evaluate",
        "test a trained model on its data set",
        "Test a trained model on its data set's test clips, with the recipe's views and precision: the\n"
        "numbers that the training itself prints at its end. Under torchrun the processes share the clips.",
        "examples:\n"
        "  stadapter evaluate runs/one\n"
        "  stadapter evaluate ssv2.safetensors --data-root /data/ssv2 --num-workers 8\n"
        "  stadapter evaluate k400.safetensors --data-root /data/k400 --set data.test_spatial_views=3",
    )
    _add_model(parser)
    _add_passes(parser)
    add_data_root(parser)
    add_set(parser, "change how clips are looked at, such as data.test_temporal_views=1; repeatable")
    add_reading_flags(parser)
    parser.set_defaults(run=_evaluate)


def add_predict(commands: Commands) -> None:
    """Add `predict`."""
    parser = add_parser(
        commands,
        "predict",
        "print the classes that a trained model sees in videos",
        "Print the most probable classes of each video, from the mean over the recipe's test views. A video\n"
        "that cannot be read is named on standard error, and the others go on; the exit code is 1 then.",
        "examples:\n"
        "  stadapter predict runs/one holiday.mp4\n"
        "  stadapter predict ssv2.safetensors clips/ more.webm --top 3 --num-workers 8",
    )
    _add_model(parser)
    complete_files(
        parser.add_argument(
            "videos", nargs="+", metavar="VIDEO", help="a video file, or a folder of them, at any depth"
        )
    )
    parser.add_argument(
        "--top", type=int, default=DEFAULT_TOP, metavar="N", help="how many classes to print (default: %(default)s)"
    )
    _add_passes(parser)
    parser.set_defaults(run=_predict)


def add_export(commands: Commands) -> None:
    """Add `export`."""
    parser = add_parser(
        commands,
        "export",
        "write a trained model as a torch.export or ONNX file",
        "Write a trained model as one file that needs no code of this package: torch.export's (.pt2), or\n"
        "ONNX (.onnx; pip install 'stadapter[onnx]'). Pixels go in as frames are, resized and cropped;\n"
        "normalising is part of the file; logits come out. The number of clips at once is free. The written\n"
        "file is compared with the model to 1e-5 before it takes its place.",
        "examples:\n"
        "  stadapter export runs/one --output model.pt2\n"
        "  stadapter export ssv2.safetensors --output ssv2.onnx\n\n"
        "in Python: torch.export.load('model.pt2').module()(pixels)",
    )
    _add_model(parser)
    complete_files(
        parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .pt2 or .onnx")
    )
    parser.set_defaults(run=_export)


def add_convert(commands: Commands) -> None:
    """Add `convert`."""
    parser = add_parser(
        commands,
        "convert",
        "from and to the checkpoints of the authors' code",
        "Read a checkpoint of the authors' published code (.pth) and write it as a file of this package\n"
        "(.safetensors), or the other way round; the ending of --output says which. What the shapes of the\n"
        "tensors decide goes into the recipe: adapters, their places, kernel and width, classes, image size.\n"
        "The rest (data set, sampling, views) is --recipe's: by default that of Something-Something-v2 for\n"
        "174 classes, of Kinetics-400 for 400.",
        "examples:\n"
        "  stadapter convert ssv2_24x384.pth --output ssv2.safetensors --data-root /data/ssv2\n"
        "  stadapter evaluate ssv2.safetensors --data-root /data/ssv2\n"
        "  stadapter convert runs/one --output one.pth\n\n" + recipes.listing(),
    )  # fmt: skip
    complete_files(parser.add_argument("model", type=Path, metavar="MODEL", help=f"an authors' .pth; or {MODEL}"))
    complete_files(
        parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors or .pth")
    )
    parser.add_argument("--recipe", metavar="NAME", help="of data and backbone, where the classes do not say it")
    add_set(parser, "change a field of that recipe, such as data.num_frames=16; repeatable")
    add_weights(parser)
    add_data_root(parser, "the data set, for the names of its classes; without it `predict` prints numbers")
    parser.set_defaults(run=_convert)


def _add_model(parser: argparse.ArgumentParser) -> None:
    complete_files(parser.add_argument("model", metavar="MODEL", help=MODEL))
    add_weights(parser)


def _add_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    parser.add_argument("--clips-per-pass", type=int, metavar="N", help="clips at once, all views of each (default: 8)")


def _check_output(file: Path, *endings: str) -> None:
    """Raise ConfigError if no file of this name can be written. Makes its folder."""
    if file.suffix not in endings:
        raise ConfigError(f"--output {file}: must end in {' or '.join(endings)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {file}: cannot be written ({error.strerror}); choose another folder") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ConfigError(f"--output {file}: cannot be written; choose another name or folder")


def _evaluate(options: argparse.Namespace) -> int:
    import torch.distributed as dist
    from tqdm import tqdm

    from stadapter.data.bad_clips import BadClipsError
    from stadapter.inference import trained
    from stadapter.training.process_group import join_process_group

    train_options = TrainOptions(
        options.data_root,
        options.weights,
        options.num_workers,
        options.clips_per_pass,
        **reading_flags(options),
    )
    model, recipe, header = trained.open_trained(
        options.model, weights_file=options.weights, changes=changed_fields(options)
    )
    clips = load_clips(recipe.data, options.data_root, "test")
    group = join_process_group()
    if group.rank == 0:
        _note_other_clips(clips, header.data.get("test", {}).get("fingerprint", ""))
    bar = tqdm(total=len(clips), unit=" clips", file=sys.stderr, disable=None if group.rank == 0 else True)

    def watch(batches: Any) -> Any:
        for batch in batches:
            yield batch
            bar.update(len(batch["label"]) * group.world_size)

    try:
        with bar:
            metrics = trained.test(model, recipe, train_options, group, clips, watch)
    except BadClipsError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    finally:
        if group.world_size > 1:
            dist.destroy_process_group()
    if group.rank == 0:
        print(f"{recipe.name}: {len(clips)} clips, fingerprint {clips.fingerprint()}, {recipe.optim.precision}")
        print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    return DONE


def _note_other_clips(clips: ClipList, trained_on: str) -> None:
    """Print a note if the training was tested on other clips than these. `trained_on` is their fingerprint."""
    if trained_on and trained_on != clips.fingerprint():
        print(
            f"note: these test clips (fingerprint {clips.fingerprint()}) are not those that the training was tested on "
            f"({trained_on})",
            file=sys.stderr,
        )


def _predict(options: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from stadapter.inference import predict, trained

    if options.top < 1:
        raise ConfigError(f"--top {options.top}: must be at least 1")
    train_options = TrainOptions(num_workers=options.num_workers, clips_per_pass=options.clips_per_pass)
    videos = predict.find_videos(options.videos)
    model, recipe, header = trained.open_trained(options.model, weights_file=options.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unreadable = 0
    with tqdm(total=len(videos), unit=" videos", file=sys.stderr, disable=None) as bar:
        for video, found in predict.predict(model, recipe, videos, train_options, device):
            if isinstance(found, str):
                unreadable += 1
                tqdm.write(f"error: {found}", file=sys.stderr)
            else:
                tops = predict.top_classes(found, recipe.data, header.class_names, options.top)
                lines = [f"{100 * share:6.2f} %  {name}" for top in tops for name, share in top]
                tqdm.write("\n".join([video, *lines]), file=sys.stdout)
            bar.update()
    if unreadable:
        print(f"{unreadable} of {len(videos)} videos cannot be read", file=sys.stderr)
    return FAILED if unreadable else DONE


def _export(options: argparse.Namespace) -> int:
    from stadapter.data.transforms import pixel_dtype
    from stadapter.inference import trained
    from stadapter.inference.export import ExportError, export

    _check_output(options.output, ".pt2", ".onnx")
    model, recipe, _ = trained.open_trained(options.model, weights_file=options.weights)
    try:
        difference = export(model, recipe, options.output)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    data, kind = recipe.data, str(pixel_dtype(recipe.data)).removeprefix("torch.")
    scale = "0..255" if kind == "uint8" else "0..1"
    print(f"{options.output}: pixels {kind} [B, {data.num_frames}, 3, {data.frame_size}, {data.frame_size}], {scale}")
    print(f"logits float32 [B, {data.num_classes}], at most {difference:.1g} from the model's")
    return DONE


def _convert(options: argparse.Namespace) -> int:
    _check_output(options.output, ".safetensors", ".pth")
    if options.output.suffix == ".pth":
        _convert_to_authors(options)
    else:
        _convert_from_authors(options)
    return DONE


def _convert_to_authors(options: argparse.Namespace) -> None:
    from stadapter.inference import authors

    if options.recipe or options.overrides or options.data_root:
        raise ConfigError(
            f"{options.model}: holds its recipe; --recipe, --set and --data-root are for an authors' .pth"
        )
    file = options.model / record.TRAINED if options.model.is_dir() else options.model
    dtype = authors.to_authors(file, options.output, weights_file=options.weights)
    print(f"{options.output}: the backbone in {str(dtype).removeprefix('torch.')}, adapters and head in float32")


def _convert_from_authors(options: argparse.Namespace) -> None:
    from stadapter.inference import authors

    if options.overrides and not options.recipe:
        raise ConfigError(f"--set {options.overrides[0]}: say of which --recipe")
    base = config.replace(recipes.get(options.recipe), **changed_fields(options)) if options.recipe else None
    model, recipe = authors.from_authors(options.model, base, weights_file=options.weights)
    names = load_clips(recipe.data, options.data_root, "test").class_names if options.data_root else ()
    authors.save_converted(options.output, model, recipe, names)
    adapter, chosen = recipe.adapter, recipe.adapter.blocks
    where = "all blocks" if chosen is None else f"blocks {', '.join(map(str, chosen))}"
    size = "x".join(map(str, adapter.kernel_size))
    print(
        f"{options.output}: recipe {recipe.name}, {recipe.backbone.name}, {len(model.adapters())} adapters of width "
        f"{adapter.bottleneck_width}, kernel {size}, {adapter.placement} in {where}, {recipe.data.num_classes} classes"
    )
