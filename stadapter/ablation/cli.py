"""The command line that every ablation script shares: from a question to a table.

    from stadapter.ablation import Arm, main

    if __name__ == "__main__":
        main(__doc__, name="kernel", values=("1", "3"), make_arm=...)

Importing this, and `--help`, stay light: torch, Ray and MLflow load when a sweep starts.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stadapter import config, recipes, record
from stadapter.ablation import table
from stadapter.ablation.terminal import Terminal
from stadapter.ablation.trial import SWEEP, Arm, Sweep, Trial, make_sweep, records, save_sweep
from stadapter.config import ConfigError, Recipe
from stadapter.data.flags import add_reading_flags, reading_flags
from stadapter.data.storage import data_root

if TYPE_CHECKING:
    from stadapter.ablation.sweep import Resources
    from stadapter.data.clips import Elsewhere
    from stadapter.train import Operation

Values = Sequence[str] | Callable[[Recipe], Sequence[str]]
DEFAULT_OUTPUT = Path("runs")
DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_SEEDS = 2
GPU_CLIPS_PER_PASS = 64  # the authors' batch per GPU

EXIT_CODES = """\
exit codes: 0 every trial finished; 1 some trial failed; 2 the input cannot work, nothing was started;
130 interrupted (the same command continues)."""


def main(
    doc: str,
    name: str,
    values: Values,
    make_arm: Callable[[Recipe, str], Arm],
    arguments: list[str] | None = None,
) -> None:
    """Run the ablation script's command line and exit.

    `doc` is the script's docstring, its first paragraph the question, the one after 'Expected:' what should come out.
    `make_arm` turns the recipe and one of `values` (or of the words given to --values) into an arm; what it cannot
    read is a ConfigError. `values` may be a function of the recipe, where the arms worth comparing depend on it.
    """
    options = _parser(doc, name, values).parse_args(arguments)
    try:
        code = _run(doc, name, values, make_arm, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _parser(doc: str, name: str, values: Values) -> argparse.ArgumentParser:
    shown = "depends on the recipe, see above" if callable(values) else " ".join(values)
    parser = argparse.ArgumentParser(
        description=doc.strip(),
        epilog=f"{recipes.listing()}\n\nfields for --set:\n{_field_help()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is compared (decides the numbers)")
    what.add_argument(
        "--recipe", metavar="NAME",
        help="the training that the arms vary (default: embedded on a machine without GPUs, ssv2_clip_b16 with)",
    )  # fmt: skip
    what.add_argument("--values", nargs="+", metavar="V", help=f"the arms (default: {shown})")
    what.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, metavar="N",
        help="trials per arm; seed k sees the same clips in the same order in every arm (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE",
        help="change a field of the recipe in every arm, such as optim.epochs=1; repeatable, fields below",
    )  # fmt: skip
    what.add_argument(
        "--data-root", type=data_root, metavar="FOLDER",
        help="where the recipe's data set lies, or its address (s3://...); the embedded one needs none",
    )  # fmt: skip
    what.add_argument("--weights", type=Path, metavar="FILE", help="backbone weights from this file instead of the hub")

    where = parser.add_argument_group("where it runs (does not change the numbers)")
    where.add_argument(
        "--num-gpus", type=int, metavar="N",
        help="GPUs to use in all, 0 for none (default: all that the machine has, or the cluster with --address)",
    )  # fmt: skip
    where.add_argument(
        "--gpus-per-trial", type=int, default=1, metavar="N",
        help="GPUs that share a trial, data parallel; the global batch stays the recipe's (default: %(default)s)",
    )  # fmt: skip
    where.add_argument(
        "--processes-per-trial", type=int, metavar="N",
        help="without GPUs: processes that share a trial, data parallel (default: 1)",
    )  # fmt: skip
    where.add_argument(
        "--cpus-per-process", type=int, metavar="N",
        help="CPU cores of each training process (default: 1 without GPUs; with GPUs, the cores shared equally)",
    )  # fmt: skip
    where.add_argument(
        "--num-workers", type=int, metavar="N",
        help="loader processes per training process (default: 0 without GPUs; with GPUs, one less than its cores)",
    )  # fmt: skip
    where.add_argument(
        "--clips-per-pass", type=int, metavar="N",
        help=f"clips in one pass of a process; more are accumulated (default: all, or {GPU_CLIPS_PER_PASS} on a GPU)",
    )  # fmt: skip
    add_reading_flags(where)
    where.add_argument(
        "--decode-on-cluster", action="store_true",
        help="decode on all nodes of the cluster (Ray Data) instead of in loader processes beside the training; for "
        "machines whose cores cannot feed their GPUs",
    )  # fmt: skip
    where.add_argument(
        "--address", metavar="ADDRESS",
        help="join this running Ray cluster ('auto', host:port or ray://host:port) instead of starting Ray here; "
        "--output and --data-root must then be on a file system that its nodes share",
    )  # fmt: skip
    where.add_argument(
        "--dashboard-port",
        type=int,
        metavar="PORT",
        help="serve Ray's dashboard on 127.0.0.1 at this port (default: none)",
    )

    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="FOLDER",
        help="trials and tables; a finished trial found here is used again, not run again (default: %(default)s)",
    )  # fmt: skip
    kept.add_argument(
        "--tracking-uri", default=DEFAULT_STORE, metavar="URI",
        help="MLflow store that mirrors the runs: sqlite:///FILE or http://HOST:PORT, or 'none' (default: %(default)s)",
    )  # fmt: skip
    return parser


def _field_help() -> str:
    lines = [
        f"  {path} = {value}"
        for path, value in config.flatten(recipes.embedded).items()
        if path not in ("name", "seed")
    ]
    return "\n".join(lines) + "\n  (values shown: the embedded recipe's)"


def _run(
    doc: str, name: str, values: Values, make_arm: Callable[[Recipe, str], Arm], options: argparse.Namespace
) -> int:
    _check_numbers(options)
    if options.dashboard_port is not None:
        check_port("--dashboard-port", options.dashboard_port)
    num_gpus = _num_gpus(options)
    recipe = _recipe(options, default="ssv2_clip_b16" if num_gpus else "embedded")
    words = options.values or (values(recipe) if callable(values) else values)
    question, expected = _question_of(doc)
    sweep = make_sweep(name, question, recipe, [make_arm(recipe, word) for word in words], options.seeds, expected)

    # Everything that can be wrong with the input shows before anything is started or written.
    from stadapter.backbones import load_backbone
    from stadapter.cost import cost_of
    from stadapter.data.annotations import load_clips
    from stadapter.data.transforms import check_transforms
    from stadapter.train import Operation

    dead = {arm: cost_of(recipe).dead_params for arm, recipe in {t.arm: t.recipe for t in sweep.trials}.items()}
    for data in {trial.recipe.data for trial in sweep.trials}:
        check_transforms(data)
    processes = options.gpus_per_trial if num_gpus else options.processes_per_trial or 1
    if sweep.recipe.optim.global_batch % processes:
        raise ConfigError(
            f"optim.global_batch = {sweep.recipe.optim.global_batch}: cannot be shared equally by {processes} processes"
        )
    output = options.output.resolve()
    _check_writable(options.output, output)
    clips = {split: load_clips(sweep.recipe.data, options.data_root, split) for split in ("train", "val", "test")}
    seen = {split: clips[split].fingerprint() for split in ("train", "test")}
    if options.address is None:
        # The trials find the weights in the library's cache then, and none downloads them twice.
        for backbone in {trial.recipe.backbone for trial in sweep.trials}:
            load_backbone(backbone, sweep.recipe.data.frame_size, weights_file=options.weights)
    cpus = options.cpus_per_process or (max(1, (os.cpu_count() or 1) // num_gpus) if num_gpus else 1)
    workers = options.num_workers
    if workers is None:
        workers = cpus - 1 if num_gpus else 0
    operation = Operation(
        data_root=options.data_root,
        weights_file=options.weights and options.weights.resolve(),
        num_workers=workers,
        clips_per_pass=options.clips_per_pass or (GPU_CLIPS_PER_PASS if num_gpus else None),
        elsewhere=_elsewhere(options),
        **reading_flags(options),
    )
    from stadapter.ablation.sweep import Resources

    resources = Resources(num_gpus, processes, cpus, options.address, options.dashboard_port, options.decode_on_cluster)
    try:
        for trial, result in zip(sweep.trials, records(sweep, output), strict=True):
            if result is not None:
                record.check_data(trial.folder(output), record.fingerprints(result), seen)
        sweep.folder(output).mkdir(parents=True, exist_ok=True)
        save_sweep(sweep, output)
    except OSError as error:
        raise ConfigError(
            f"--output {options.output}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    for arm, count in dead.items():
        if count:
            print(
                f"note: {arm}: behind the last attention only CLS is read, so the last block's adapter there can never"
            )
            print(f"      receive a gradient; its {count:,} parameters are neither trained nor counted as trainable")
    if options.cache_gb:
        from stadapter.data.disk_need import describe, disk_need

        need = disk_need(clips, sweep.recipe.data, sweep.recipe.optim.epochs, options.seeds)
        print(describe(need, options.cache_gb, options.seeds))
    return _launch(sweep, output, operation, resources, options)


def _elsewhere(options: argparse.Namespace) -> Elsewhere | None:
    if not options.decode_on_cluster:
        return None
    import stadapter.ablation.sweep  # noqa: F401  # sets Ray's environment before Ray is imported
    from stadapter.ablation.cluster_decoding import decode_on_cluster

    return decode_on_cluster


def _check_writable(given: Path, output: Path) -> None:
    """ConfigError where the folder cannot be made or written; nothing is made yet."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "it is read-only" if there.is_dir() else "it is no folder"
        raise ConfigError(f"--output {given}: cannot be written ({there}: {reason}); choose another folder")


def _check_numbers(options: argparse.Namespace) -> None:
    bounds = {"seeds": 1, "gpus_per_trial": 1, "processes_per_trial": 1, "cpus_per_process": 1, "clips_per_pass": 1}
    for name, least in {**bounds, "num_gpus": 0, "num_workers": 0, "dashboard_port": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def _num_gpus(options: argparse.Namespace) -> int:
    """How many GPUs the sweep uses, or a ConfigError where the flags ask for what is not there."""
    if options.address is not None:
        from stadapter.ablation.sweep import join_cluster

        there, where = join_cluster(options.address), f"the cluster at {options.address}"
    else:
        import torch

        there, where = torch.cuda.device_count(), "this machine"
    wanted = there if options.num_gpus is None else options.num_gpus
    if wanted > there:
        raise ConfigError(f"--num-gpus {wanted}: {where} has {there}; --num-gpus 0 runs without")
    if not wanted and options.gpus_per_trial > 1:
        raise ConfigError(
            f"--gpus-per-trial {options.gpus_per_trial}: there are no GPUs to use; see --processes-per-trial"
        )
    if wanted and options.gpus_per_trial > wanted:
        raise ConfigError(f"--gpus-per-trial {options.gpus_per_trial}: more than the {wanted} GPUs to use in all")
    if wanted and options.processes_per_trial:
        raise ConfigError("--processes-per-trial is for training without GPUs; use --gpus-per-trial")
    return wanted


def check_port(flag: str, port: int) -> None:
    """ConfigError where nothing can listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{flag} {port}: cannot be used ({reason}); choose another port") from None


def _recipe(options: argparse.Namespace, default: str) -> Recipe:
    fields = dict(config.parse_override(text) for text in options.overrides)
    if "seed" in fields:
        raise ConfigError("--set seed: seeds are 0 ... N - 1 of --seeds N")
    recipe = config.replace(recipes.get(options.recipe or default), **fields)
    return recipes.with_weights(recipe, options.weights)


def _question_of(doc: str) -> tuple[str, str]:
    """A script's question, its first paragraph, and what its paragraph 'Expected:' says."""
    paragraphs = [paragraph.replace("\n", " ") for paragraph in doc.strip().split("\n\n")]
    expected = next((p.removeprefix("Expected: ") for p in paragraphs if p.startswith("Expected: ")), "")
    return paragraphs[0], expected


def _launch(sweep: Sweep, output: Path, operation: Operation, resources: Resources, options: argparse.Namespace) -> int:
    from stadapter.ablation.sweep import Cluster, run_trials

    missing = [trial for trial, result in zip(sweep.trials, records(sweep, output), strict=True) if result is None]
    terminal = Terminal(sweep, len(sweep.trials) - len(missing))
    mirror = None
    if options.tracking_uri != "none":
        from stadapter.ablation.tracking import Mirror

        mirror = Mirror(sweep, output, options.tracking_uri, say=terminal.say)
        mirror.start()
        for trial in sweep.trials:
            if trial not in missing:
                mirror.trial_finished(trial)

    def on_event(kind: str, trial: Trial, details: dict[str, Any]) -> None:
        result = record.read_result(trial.folder(output)) if kind == "finished" else None
        terminal.event(kind, trial, result or details)
        if mirror is None:
            return
        if kind == "started":
            mirror.trial_started(trial)
        elif kind == "epoch":
            mirror.trial_epoch(trial)
        elif kind == "finished":
            mirror.trial_finished(trial)
        else:
            mirror.trial_failed(trial, details["message"])

    if missing:
        with Cluster(resources) as cluster:
            terminal.starting(len(missing), min(cluster.trials_at_once(), len(missing)), resources, output)
            run_trials(cluster, missing, output, operation, on_event)
    terminal.close()

    found = records(sweep, output)
    folder = sweep.folder(output)
    files = {"table.txt": table.to_text, "table.md": table.to_markdown, "table.csv": table.to_csv}
    for file, render in files.items():
        record.write_atomically(folder / file, render(sweep, found).encode())
    print(f"\n{sweep.question}\n\n{table.to_text(sweep, found)}")
    unfinished = sum(result is None for result in found)
    if mirror is not None:
        status = "FAILED" if terminal.failed else "KILLED" if unfinished else "FINISHED"
        mirror.finish([folder / file for file in (SWEEP, *files)], status)
    if unfinished:
        print(f"{unfinished} of {len(found)} trials have no result. The same command runs these again, and only these.")
        return 130 if terminal.failed < unfinished else 1
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    print(f"Tables: {folder}\nNext:")
    if mirror is not None:
        store = "" if options.tracking_uri == DEFAULT_STORE else f" --tracking-uri {options.tracking_uri}"
        print(f"  {python} -m stadapter.ablation ui{store}    # compare the runs in MLflow")
    another = "ablate_kernel.py" if sweep.name == "width" else "ablate_width.py"
    print(f"  {python} experiments/{another}    # another question")
    return 0
