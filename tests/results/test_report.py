"""Reports from made-up records: right numbers, missing trials marked, equal from a folder and from MLflow."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import made_up
import pytest
from scipy import stats

from stadapter import config, recipes
from stadapter.commands.main import main
from stadapter.results import table
from stadapter.results.content import finding, glance
from stadapter.results.factors import find_factor
from stadapter.results.figure import draw, short_labels
from stadapter.results.frames import arms_frame, trials_frame
from stadapter.results.latex import to_latex
from stadapter.results.report import write_report
from stadapter.results.sources import Answer, from_folder
from stadapter.tracking.mirror import sync
from stadapter.tracking.reader import from_mlflow
from stadapter.trials import record
from stadapter.trials.sweep import Arm, Axis, Sweep, load_sweep, make_sweep, save_sweep, sweep_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three sweeps: kernel with 3 seeds and one trial missing, width with one seed, and one of names."""
    folder = tmp_path_factory.mktemp("made_up")
    made_up.write(made_up.kernel_sweep(3), folder, made_up.KERNEL, leave_out=7)
    widths = {"width 6": 90.0, "width 48": 96.0, "width 96": 96.2}
    arms = [Arm(label, {"adapter.bottleneck_width": int(label[6:])}, int(label[6:])) for label in widths]
    sweep = make_sweep("width", "How wide & how <deep>?", recipes.embedded, arms, 1, axis=Axis("channels", is_log=True))
    made_up.write(sweep, folder, widths)
    places = {"before_mhsa": 96.0, "after_mhsa": 95.0}
    arms = [Arm(label, {"adapter.placement": label}) for label in places]
    made_up.write(make_sweep("placement", "Where?", recipes.embedded, arms, 2), folder, places)
    return folder


def answer(output: Path, name: str) -> Answer:
    (found,) = (a for a in from_folder(output) if a.sweep.name == name)
    return found


def test_the_frame_of_arms_is_the_statistics_of_the_frame_of_trials(output: Path) -> None:
    kernel = answer(output, "kernel")
    trials = trials_frame(kernel)
    arms = arms_frame(kernel).set_index("arm")
    done = trials[trials.status == "finished"]
    wide = done.pivot(index="seed", columns="arm", values="top1")
    for arm in made_up.KERNEL:
        values = wide[arm].dropna()
        assert arms.loc[arm, "top1_mean"] == pytest.approx(values.mean())
        assert arms.loc[arm, "top1_sd"] == pytest.approx(values.std())
    pairs = wide[["kernel 5x3x3", "kernel 3x3x3"]].dropna()
    assert len(pairs) == 2  # one seed of the arm is missing
    expected = stats.ttest_rel(pairs["kernel 5x3x3"], pairs["kernel 3x3x3"]).pvalue
    assert arms.loc["kernel 5x3x3", "p"] == pytest.approx(expected)
    assert list(arms.index[arms.default]) == ["kernel 3x3x3"]  # equal to the recipe, and not the first
    assert (arms.p_holm.dropna() >= arms.p.dropna()).all()


def test_a_missing_trial_is_a_marked_hole(output: Path) -> None:
    kernel = answer(output, "kernel")
    text = table.to_text(kernel.sweep, kernel.records)
    (line,) = (line for line in text.splitlines() if line.startswith("kernel 5x3x3"))
    assert line.endswith("2 of 3")
    done = [r.metrics["top1"] for t, r in zip(kernel.sweep.trials, kernel.records, strict=True)
            if r and t.arm == "kernel 5x3x3"]  # fmt: skip
    assert f"{statistics.mean(done):.1f} ± {statistics.stdev(done):.1f}" in line
    assert "INCOMPLETE: kernel 5x3x3 (2 of 3 seeds finished)" in text


def test_an_arm_without_any_result_is_a_row_of_dashes_and_no_error(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(1)
    made_up.write(sweep, tmp_path, made_up.KERNEL, leave_out=0)
    (found,) = from_folder(tmp_path)
    assert table.grid(found.rows)[1][1:3] == ["-", "-"]
    write_report([found], tmp_path / "report")
    for trial in sweep.trials:
        (trial.folder(tmp_path) / record.RESULT).unlink(missing_ok=True)
    write_report(from_folder(tmp_path), tmp_path / "nothing")
    assert "no trial has finished" in (tmp_path / "nothing" / "report.md").read_text()


def test_a_number_that_is_not_finite_is_a_hole_too(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    first = sweep.trials[0]
    broken = made_up.result(first, 50.0, metrics={"top1": float("nan")})
    record.write_result(first.folder(tmp_path), broken)
    (found,) = from_folder(tmp_path)
    assert found.rows[0].hole == "1 of 2"
    assert found.rows[0].top1 is not None and found.rows[0].top1.n == 1


def test_a_diverged_trial_is_marked(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    first = sweep.trials[0]
    record.write_result(first.folder(tmp_path), made_up.result(first, 8.0, diverged=True))
    (found,) = from_folder(tmp_path)
    text = table.to_text(found.sweep, found.records)
    assert re.search(r"kernel 1x3x3 .*†", text)
    assert "† the training of at least one seed diverged" in text
    assert list(trials_frame(found).status)[:2] == ["diverged", "finished"]


def test_a_table_of_one_seed_has_no_error_bar_and_says_why(output: Path) -> None:
    width = answer(output, "width")
    text = table.to_text(width.sweep, width.records)
    assert "±" not in text and "interval  " not in text.splitlines()[0]
    assert "One seed per arm: no error bar" in text
    assert "Differences cannot be tested" in finding(width)
    figure = draw(width)
    segments = [s for container in figure.axes[0].containers for s in container.lines[2][0].get_segments()]
    assert all(len(segment) == 0 for segment in segments)


def test_trials_tested_on_different_clips_raise_a_warning(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    first = sweep.trials[0]
    other = {"train": record.ClipsUsed("0", 1), "test": record.ClipsUsed("2", 1)}
    record.write_result(first.folder(tmp_path), made_up.result(first, 48.0, data=other))
    (found,) = from_folder(tmp_path)
    assert any(note.startswith("WARNING: the trials were not tested on the same clips") for note in found.notes)


def test_latex_is_a_booktabs_table(output: Path) -> None:
    for found in from_folder(output):
        text = to_latex(found)
        for environment in ("table", "tabular"):
            assert text.count(f"\\begin{{{environment}}}") == text.count(f"\\end{{{environment}}}") == 1
        assert [text.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]
        assert text.isascii()
        assert text.replace(r"\{", "").replace(r"\}", "").count("{") == text.replace(r"\}", "").count("}")
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        columns = re.search(r"\\begin\{tabular\}\{(l[r]+)\}", text)
        assert columns
        body = text[text.index("\\toprule") : text.index("\\bottomrule")]
        lines = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(lines) == 1 + len(found.sweep.arms)
        for line in lines:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
        for special in "%#_":
            assert not re.search(rf"(?<!\\){special}", text.replace("fig:", "").replace(f"tab:{found.name}", ""))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex on this machine")
def test_latex_compiles_and_no_table_is_wider_than_its_column(output: Path, tmp_path: Path) -> None:
    tables = "\n".join(to_latex(found) for found in from_folder(output))
    packages = "\\usepackage{booktabs}\n\\usepackage{graphicx}"
    document = f"\\documentclass[twocolumn]{{article}}\n{packages}\n\\begin{{document}}\n{tables}\n\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout


def test_differences_that_are_equal_in_all_seeds_are_said_to_be_untested(tmp_path: Path) -> None:
    sweep = made_up.kernel_sweep(2)
    made_up.write(sweep, tmp_path, made_up.KERNEL)
    accuracies = {"kernel 1x3x3": (40.0, 41.0), "kernel 3x3x3": (96.0, 97.0)}  # 56 points in both seeds
    for trial in sweep.trials:
        if trial.arm in accuracies:
            top1 = accuracies[trial.arm][trial.seed]
            record.write_result(trial.folder(tmp_path), made_up.result(trial, top1))
    (found,) = from_folder(tmp_path)
    rows = {row.arm: row for row in found.rows}
    assert rows["kernel 1x3x3"].untestable and not rows["kernel 5x3x3"].untestable
    assert any(note.startswith("No p-value: kernel 1x3x3; ") for note in found.notes)
    assert glance([found])[1][5].endswith(" of 2 arms; 1 not testable")
    assert "kernel 1x3x3 differs by -56.0 points in every seed" in finding(found)
    tested = rows["kernel 5x3x3"].difference
    assert tested is not None and tested.p is not None and tested.p_holm is not None
    assert tested.p_holm >= min(1.0, 2 * tested.p)  # three comparisons, of which one has no p-value


def test_the_same_report_from_mlflow_and_from_the_folder(output: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for found in from_folder(output):
        sync(found.sweep, output, store)
    assert from_mlflow(store) == from_folder(output)
    assert main(["report", "--output", str(output), "--report", str(tmp_path / "a")]) == 0
    assert main(["report", "--tracking-uri", store, "--report", str(tmp_path / "b")]) == 0
    written = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.suffix != ".pdf"
    )
    assert len(written) == 2 + 4 + 5 * 3
    for file in written:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_report_leads_from_a_number_to_its_runs(output: Path, tmp_path: Path) -> None:
    answers = from_folder(output)
    page = write_report(answers, tmp_path).read_text()
    text = (tmp_path / "report.md").read_text()
    for found in answers:
        for trial, result in zip(found.sweep.trials, found.records, strict=True):
            assert f"trials/{trial.id}" in text and f"trials/{trial.id}" in page
            assert result is None or (output / "trials" / trial.id).is_dir()
        with (tmp_path / "tables" / f"{found.name}-trials.csv").open() as file:
            assert [row["trial_id"] for row in csv.DictReader(file)] == [t.id for t in found.sweep.trials]
    assert "How wide &amp; how &lt;deep&gt;?" in page  # text is text, not markup
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained
    for link in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (tmp_path / link).exists()


def test_figures_have_axes_with_units_and_a_point_per_arm(output: Path) -> None:
    kernel = draw(answer(output, "kernel"))
    assert kernel.axes[0].get_xlabel() == "temporal extent of the kernel (frames)"
    assert {axes.get_ylabel() for axes in kernel.axes} == {"top-1 accuracy (%)"}
    line = kernel.axes[0].containers[0].lines[0]
    assert list(line.get_xdata()) == [1, 3, 5, 7]
    means = [row.top1.mean for row in answer(output, "kernel").rows if row.top1]
    assert list(line.get_ydata()) == pytest.approx(means)
    assert kernel.axes[1].get_xlabel() == "trainable parameters"
    names = draw(answer(output, "placement"))
    assert [label.get_text() for label in names.axes[0].get_yticklabels()] == ["before_mhsa", "after_mhsa"]


def experiment(name: str, words: Sequence[str]) -> Sweep:
    """Return the sweep of one seed that a script in experiments/ makes of the given words."""
    script = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
    arms = [script["make_arm"](recipes.embedded, word) for word in words]
    return make_sweep(name, "?", recipes.embedded, arms, 1, axis=Axis("an axis"))


def series_of(sweep: Sweep) -> dict[str, tuple[tuple[float, ...], bool]]:
    rows = table.make_rows(sweep, [made_up.result(trial, 90.0) for trial in sweep.trials])
    return {s.label: (s.x, s.connected) for s in find_factor(sweep.axis, rows).series}


def test_depth_is_drawn_as_last_first_and_other_blocks() -> None:
    sweep = experiment("ablate_depth", ("last1", "last2", "first2", "0,2,4", "3", "2", "all"))
    assert series_of(sweep) == {
        "last blocks": ((1, 2, 6), True),
        "first blocks": ((2, 6), True),
        "one block": ((1, 1), False),
        "blocks 0,2,4": ((3,), False),
    }
    assert table.default_arm(sweep) == "all blocks"


def test_a_line_of_one_arm_that_another_line_holds_is_not_drawn_twice() -> None:
    assert series_of(experiment("ablate_depth", ("last1", "all"))) == {"last blocks": ((1, 6), True)}
    assert series_of(experiment("ablate_depth", ("last1", "first1"))) == {
        "last blocks": ((1,), False),
        "first blocks": ((1,), False),
    }


def test_a_kernel_has_a_line_for_each_spatial_extent() -> None:
    sweep = experiment("ablate_kernel", ("3x1x1", "1x1x1", "1", "3"))
    assert series_of(sweep) == {"spatial extent 1×1": ((1, 3), True), "spatial extent 3×3": ((1, 3), True)}


def test_arms_are_listed_by_name_where_one_has_no_place_on_the_axis() -> None:
    arms = [Arm("one", {"adapter.bottleneck_width": 4}, 4), Arm("two", {"adapter.bottleneck_width": 8})]
    assert series_of(make_sweep("mine", "?", recipes.embedded, arms, 1, axis=Axis("channels"))) == {}


def test_a_sweep_keeps_its_axis_and_one_saved_without_is_listed_by_name(tmp_path: Path) -> None:
    sweep = experiment("ablate_depth", ("last1", "2", "all"))
    folder = sweep.folder(tmp_path)
    folder.mkdir(parents=True)
    save_sweep(sweep, tmp_path)
    assert load_sweep(folder).axis == Axis("an axis")
    assert series_of(load_sweep(folder)) == series_of(sweep)
    saved = json.loads((folder / "sweep.json").read_text())
    del saved["axis"]
    saved["arms"] = [{"label": arm["label"], "fields": arm["fields"]} for arm in saved["arms"]]
    (folder / "sweep.json").write_text(json.dumps(saved))
    old = load_sweep(folder)
    assert old.axis is None and [trial.id for trial in old.trials] == [trial.id for trial in sweep.trials]
    assert series_of(old) == {}


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["kernel 1x1x1", "kernel 3x1x1"], ["1x1x1", "3x1x1"]),
        (["last 1", "first 1", "all blocks"], ["last 1", "first 1", "all blocks"]),
        (["width 48"], ["48"]),
        (["both", "parallel"], ["both", "parallel"]),
    ],
)
def test_a_point_is_named_without_the_words_that_all_arms_share(labels: list[str], short: list[str]) -> None:
    assert list(short_labels(labels).values()) == short


def test_the_default_is_the_first_arm_where_none_equals_the_recipe() -> None:
    arms = [Arm("a", {"adapter.bottleneck_width": 7}), Arm("b", {"adapter.bottleneck_width": 9})]
    sweep = make_sweep("width", "?", config.replace(recipes.embedded, seed=5), arms, 1)
    assert table.default_arm(sweep) == "a"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "/no/such"], "there is no sweep in this folder"),
        (["--tracking-uri", "sqlite:////no/such.db"], "there is no such file"),
        (["--tracking-uri", "http://127.0.0.1:9"], "cannot be read"),
    ],
)
def test_bad_input_has_a_one_line_answer(flags: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "analysis", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_the_sweeps_of_a_folder_are_found_by_name(output: Path) -> None:
    assert [path.name for path in sweep_folders(output)] == ["kernel-embedded", "placement-embedded", "width-embedded"]


def test_the_command_line_of_sweeps_stays_light() -> None:
    code = "import sys, stadapter.commands.main; print([m for m in HEAVY if m in sys.modules])"
    code = code.replace("HEAVY", "('torch', 'ray', 'mlflow', 'scipy', 'pandas', 'optuna', 'matplotlib')")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_published_values_are_shown_with_their_status_and_source() -> None:
    arms = [Arm(f"width {n}", {"adapter.bottleneck_width": n}, n) for n in (384, 192)]
    sweep = make_sweep("width", "?", recipes.kinetics400_clip_b16, arms, 2, axis=Axis("channels", is_log=True))
    found = Answer(sweep, [made_up.result(trial, 80.0 + trial.seed) for trial in sweep.trials])
    header, known, unknown = table.grid(found.rows)
    paper = header.index("paper %")
    assert (known[paper], unknown[paper]) == ("82.0 ✓", "-")
    assert any("STAN, Table 4" in note and "(verified)" in note for note in found.notes)
    assert "82.0 $^{\\mathrm{v}}$" in to_latex(found)
    (stars,) = [line for line in draw(found).axes[0].lines if line.get_label() == "published"]
    assert (list(stars.get_xdata()), list(stars.get_ydata())) == ([384.0], [82.0])


def test_an_unverified_value_is_a_hollow_star_and_every_source_is_named() -> None:
    arms = [Arm(place, {"adapter.placement": place}, x) for x, place in enumerate(("both", "before_mhsa"))]
    sweep = make_sweep("places", "?", recipes.ssv2_clip_b16, arms, 1, axis=Axis("place"))
    params = {"both": 14_354_094, "before_mhsa": 7_243_950}
    records = [made_up.result(trial, 60.0, trainable_params=params[trial.arm]) for trial in sweep.trials]
    found = Answer(sweep, records)
    header, verified, unverified = table.grid(found.rows)
    paper = header.index("paper %")
    assert (verified[paper], unverified[paper]) == ("67.1 ✓", "66.3 ?")
    assert any("67.1 ✓ STAN" in note and "66.3 ? review of the paper" in note for note in found.notes)
    stars = {str(line.get_label()): line for line in draw(found).axes[0].lines if line.get_marker() == "*"}
    assert {label: list(line.get_ydata()) for label, line in stars.items()} == {
        "published": [67.1],
        "published, unverified": [66.3],
    }
    assert stars["published, unverified"].get_markerfacecolor() == "none"
