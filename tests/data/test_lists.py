"""Lists of clips, as published and as users write them."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from stadapter.config import ConfigError, DataConfig
from stadapter.data.lists import embedded
from stadapter.data.lists.clip_list import split_segment
from stadapter.data.lists.formats import ClipList, Split, load_clips

TEMPLATES = ["Holding [something] next to [something]", "Approaching [something]", "Closing [something]"]


def config(dataset: str, num_classes: int = 3) -> DataConfig:
    return DataConfig(dataset, num_classes)


def touch(root: Path, *paths: str) -> None:
    """Write an empty file: the readers look for files and do not open them."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def ssv2(root: Path, folder: str = "videos", suffix: str = ".mp4") -> Path:
    names = [template.replace("[", "").replace("]", "") for template in TEMPLATES]
    (root / "labels.json").write_text(json.dumps({name: str(i) for i, name in enumerate(names)}))
    for file, ids in (("train.json", [7, 3, 12]), ("validation.json", [9])):
        entries = [
            {"id": str(i), "label": "holding a pen", "template": TEMPLATES[i % 3], "placeholders": ["a pen"]}
            for i in ids
        ]
        (root / file).write_text(json.dumps(entries))
        touch(root, *(f"{folder}/{i}{suffix}" for i in ids))
    return root


def kinetics(root: Path, pattern: str = "videos/{clip}.mp4") -> Path:
    header = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(header + "zumba,aaaaaaaaaaa,1,11,train\narm wrestling,bbbbbbbbbbb,20,30,train\n")
    (root / "val.csv").write_text(header + '"zumba",ccccccccccc,155,165,val\n')
    for label, clip in (
        ("zumba", "aaaaaaaaaaa_000001_000011"),
        ("arm wrestling", "bbbbbbbbbbb_000020_000030"),
        ("zumba", "ccccccccccc_000155_000165"),
    ):
        touch(root, pattern.format(label=label, clip=clip))
    return root


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [embedded.ClipRow(f"clip{i}", tmp_path / f"test/{i}.mp4", motion=2 * i + 1, digit=9 - i) for i in range(3)]
    monkeypatch.setattr(embedded, "ensure_world", lambda root=None: tmp_path)
    monkeypatch.setattr(embedded, "load_manifest", lambda root, split: rows)
    return tmp_path


# --- the embedded world


@pytest.mark.parametrize("split", ["val", "test"])
def test_embedded_motion_follows_every_test_clip_by_its_reversal(world: Path, split: Split) -> None:
    clips = load_clips(config("embedded_motion", 12), None, split)
    assert clips.paths == ["test/0.mp4", "test/0.mp4", "test/1.mp4", "test/1.mp4", "test/2.mp4", "test/2.mp4"]
    assert clips.labels == [1, 0, 3, 2, 5, 4]
    assert clips.reversed == [False, True] * 3


def test_embedded_motion_trains_on_every_file_once(world: Path) -> None:
    clips = load_clips(config("embedded_motion", 12), None, "train")
    assert (clips.labels, clips.reversed) == ([1, 3, 5], [False] * 3)


def test_embedded_digit_has_no_reversals(world: Path) -> None:
    clips = load_clips(config("embedded_digit", 10), None, "test")
    assert (clips.labels, clips.reversed) == ([9, 8, 7], [False] * 3)
    assert clips.class_names == tuple("0123456789")


def test_embedded_classes_cannot_be_renumbered(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_classes = 10: 'embedded_motion' has 12"):
        load_clips(config("embedded_motion", 10), None, "train")


# --- Something-Something-v2


@pytest.mark.parametrize("folder", ["videos", "20bn-something-something-v2"])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_ssv2_is_read_as_published(tmp_path: Path, folder: str, suffix: str) -> None:
    clips = load_clips(config("ssv2"), ssv2(tmp_path, folder, suffix), "train")
    assert clips.paths == [f"{folder}/{i}{suffix}" for i in (7, 3, 12)]
    assert clips.labels == [1, 0, 0]
    assert clips.class_names[0] == "Holding something next to something"


def test_val_and_test_are_both_the_validation_list(tmp_path: Path) -> None:
    val, test = (load_clips(config("ssv2"), ssv2(tmp_path), split) for split in ("val", "test"))
    assert val.paths == test.paths == ["videos/9.mp4"]
    assert val.fingerprint() == test.fingerprint()


def test_an_unknown_ssv2_template_names_the_entry(tmp_path: Path) -> None:
    entries = [{"id": "1", "template": TEMPLATES[0]}, {"id": "2", "template": "Juggling [something]"}]
    (ssv2(tmp_path) / "train.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"train.json: entry 2: the template 'Juggling \[something\]' is not in"):
        load_clips(config("ssv2"), tmp_path, "train")


def test_an_ssv2_entry_without_a_template_names_the_entry(tmp_path: Path) -> None:
    (ssv2(tmp_path) / "train.json").write_text('[{"id": "1"}]')
    with pytest.raises(ConfigError, match=r'train.json: entry 1: must have "id" and "template"'):
        load_clips(config("ssv2"), tmp_path, "train")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    (ssv2(tmp_path) / "train.json").write_text('[\n{"id": "1",}\n]')
    with pytest.raises(ConfigError, match=r"train.json:2: is not valid JSON"):
        load_clips(config("ssv2"), tmp_path, "train")


def test_too_few_classes_for_ssv2_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"entry 1: label 1 is outside 0 ... 0"):
        load_clips(config("ssv2", 1), ssv2(tmp_path), "train")


# --- Kinetics


@pytest.mark.parametrize("pattern", ["videos/{clip}.mp4", "videos/{label}/{clip}.mp4", "train/{label}/{clip}.mp4"])
def test_kinetics_is_read_as_published(tmp_path: Path, pattern: str) -> None:
    clips = load_clips(config("kinetics400"), kinetics(tmp_path, pattern), "train")
    assert clips.paths == [
        pattern.format(label="zumba", clip="aaaaaaaaaaa_000001_000011"),
        pattern.format(label="arm wrestling", clip="bbbbbbbbbbb_000020_000030"),
    ]
    assert clips.labels == [1, 0]
    assert clips.class_names == ("arm wrestling", "zumba")


def test_kinetics_numbers_its_classes_by_the_training_list(tmp_path: Path) -> None:
    assert load_clips(config("kinetics400"), kinetics(tmp_path), "val").labels == [1]


def test_a_malformed_kinetics_time_names_the_line(tmp_path: Path) -> None:
    with open(kinetics(tmp_path) / "train.csv", "a") as file:
        file.write("zumba,ddddddddddd,1,,train\n")
    with pytest.raises(ConfigError, match=r"train.csv:4: time_start and time_end"):
        load_clips(config("kinetics400"), tmp_path, "train")


def test_a_kinetics_header_without_a_column_names_it(tmp_path: Path) -> None:
    (kinetics(tmp_path) / "train.csv").write_text("youtube_id,time_start,time_end\n")
    with pytest.raises(ConfigError, match=r"train.csv:1: the header has no column 'label'"):
        load_clips(config("kinetics400"), tmp_path, "train")


def test_too_many_kinetics_classes_are_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.csv: has 2 classes, but data.num_classes = 1"):
        load_clips(config("kinetics400", 1), kinetics(tmp_path), "train")


# --- lists and folders


@pytest.mark.parametrize("dataset", ["ssv2", "kinetics400"])
def test_a_path_label_list_wins_over_the_published_files(tmp_path: Path, dataset: str) -> None:
    touch(tmp_path, "videos/some clip.mp4", "videos/b.mp4")
    (tmp_path / "train.txt").write_text("some clip.mp4 2\n\nb.mp4 0\n")
    clips = load_clips(config(dataset), kinetics(ssv2(tmp_path)), "train")
    assert (clips.paths, clips.labels) == (["videos/some clip.mp4", "videos/b.mp4"], [2, 0])


@pytest.mark.parametrize("line", ["b.mp4", "b.mp4 one", "3", "b.mp4,1"])
def test_a_malformed_list_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.txt").write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(ConfigError, match=r"train.txt:2: must be a path, a space and a label"):
        load_clips(config("ssv2"), tmp_path, "train")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_names_file_and_line(tmp_path: Path, label: int) -> None:
    (tmp_path / "train.txt").write_text(f"a.mp4 0\nb.mp4 {label}\n")
    with pytest.raises(ConfigError, match=rf"train.txt:2: label {label} is outside 0 ... 2"):
        load_clips(config("ssv2"), tmp_path, "train")


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/b/2.mp4",
        "train/b/1.webm",
        "train/a/x.MP4",
        "train/c/y.mp4",
        "train/c/notes.txt",
        "val/c/z.mp4",
    )
    train, val = (load_clips(config("folder"), tmp_path, split) for split in ("train", "val"))
    assert train.paths == ["train/a/x.MP4", "train/b/1.webm", "train/b/2.mp4", "train/c/y.mp4"]
    assert (train.labels, train.class_names) == ([0, 1, 1, 2], ("a", "b", "c"))
    assert (val.paths, val.labels) == (["val/c/z.mp4"], [2])


def test_a_validation_class_that_is_not_trained_is_a_config_error(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "train/c/1.mp4", "val/d/1.mp4")
    with pytest.raises(ConfigError, match=r"val/d: the class is not in"):
        load_clips(config("folder"), tmp_path, "val")


def test_a_wrong_number_of_class_folders_is_a_config_error(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4")
    with pytest.raises(ConfigError, match=r"train: has 1 class folders, but data.num_classes = 3"):
        load_clips(config("folder"), tmp_path, "train")


def test_a_folder_without_clips_is_a_config_error(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.txt", "train/b/1.txt", "train/c/1.txt")
    with pytest.raises(ConfigError, match=r"no clips found"):
        load_clips(config("folder"), tmp_path, "train")


# --- all formats


@pytest.mark.parametrize("dataset", ["ssv2", "kinetics400", "epic_kitchens100", "folder"])
def test_an_unset_data_root_says_what_must_be_there(dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"--data-root is not set: .* needs a folder with .*train"):
        load_clips(config(dataset), None, "train")


@pytest.mark.parametrize("dataset", ["ssv2", "kinetics400", "epic_kitchens100", "folder"])
def test_a_missing_data_root_says_what_must_be_there(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder; it must hold .*train"):
        load_clips(config(dataset), tmp_path / "nowhere", "train")


@pytest.mark.parametrize("dataset", ["ssv2", "kinetics400", "epic_kitchens100", "folder"])
def test_an_empty_data_root_names_what_is_missing(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"is missing"):
        load_clips(EPIC if dataset == "epic_kitchens100" else config(dataset), tmp_path, "train")


def test_an_unknown_data_set_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.dataset = moments: must be one of embedded_motion"):
        load_clips(config("moments"), tmp_path, "train")


def test_a_list_whose_videos_are_elsewhere_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 0\n")
    with pytest.raises(ConfigError, match=r"none of the first clips of train.txt is there; looked for a.mp4"):
        load_clips(config("ssv2"), tmp_path, "train")


def test_a_first_clip_that_is_gone_does_not_hide_the_layout(tmp_path: Path) -> None:
    (ssv2(tmp_path) / "videos" / "7.mp4").unlink()
    assert len(load_clips(config("ssv2"), tmp_path, "train")) == 3


def test_error_messages_are_one_line(tmp_path: Path) -> None:
    (ssv2(tmp_path) / "labels.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        load_clips(config("ssv2"), tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_ids_labels_directions_and_order_but_not_the_root() -> None:
    clips = ClipList("folder", "train", "/a", ["x", "y"], [0, 1], [False, False], ("p", "q"))
    same = dataclasses.replace(clips, root="/b", split="val")
    others = [
        dataclasses.replace(clips, **change)
        for change in ({"paths": ["x", "z"]}, {"labels": [1, 1]}, {"reversed": [False, True]})
    ]
    others.append(dataclasses.replace(clips, paths=["y", "x"], labels=[1, 0]))
    assert clips.fingerprint() == same.fingerprint()
    assert len({clips.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert len(clips.fingerprint()) == 16


# --- EPIC-Kitchens-100

EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC = DataConfig("epic_kitchens100", 5, label_groups=(2, 3))


def epic(root: Path, *videos: str) -> Path:
    rows = ["P01_01_0,P01,P01_01,00:00:01.08,00:00:00.14,00:00:03.37,8,202,open door,open,1,door,2,['door'],[2]\n"]
    rows.append("P01_01_1,P01,P01_01,00:00:04.2,00:00:04.37,00:00:06.17,262,370,take cup,take,0,cup,1,['cup'],[1]\n")
    for split in ("train", "validation"):
        (root / f"EPIC_100_{split}.csv").write_text(EPIC_HEADER + "".join(rows))
    touch(root, *videos)
    return root


def test_epic_clips_cut_before_have_a_verb_and_a_noun(tmp_path: Path) -> None:
    clips = load_clips(EPIC, epic(tmp_path, "videos/P01_01_0.mp4"), "train")
    assert clips.paths == ["videos/P01_01_0.mp4", "videos/P01_01_1.mp4"]
    assert clips.labels == [(1, 2), (0, 1)]


def test_epic_segments_of_long_videos_count_frames_from_0(tmp_path: Path) -> None:
    clips = load_clips(EPIC, epic(tmp_path, "P01/videos/P01_01.MP4"), "val")
    assert [split_segment(path) for path in clips.paths] == [
        ("P01/videos/P01_01.MP4", (7, 202)),
        ("P01/videos/P01_01.MP4", (261, 370)),
    ]


def test_an_epic_class_out_of_its_group_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"EPIC_100_train.csv:2: label 2 is outside 0 ... 1"):
        load_clips(DataConfig("epic_kitchens100", 5, label_groups=(3, 2)), epic(tmp_path), "train")


def test_a_malformed_epic_frame_names_the_line(tmp_path: Path) -> None:
    path = epic(tmp_path) / "EPIC_100_train.csv"
    path.write_text(path.read_text().replace(",262,", ",soon,"))
    with pytest.raises(ConfigError, match=r"EPIC_100_train.csv:3: start_frame, stop_frame"):
        load_clips(EPIC, tmp_path, "train")


def test_epic_without_label_groups_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.label_groups is none"):
        load_clips(config("epic_kitchens100"), epic(tmp_path), "train")


def test_a_list_with_verb_and_noun_wins_over_the_published_file(tmp_path: Path) -> None:
    (epic(tmp_path, "a b.mp4") / "train.txt").write_text("a b.mp4 1 2\n")
    clips = load_clips(EPIC, tmp_path, "train")
    assert (clips.paths, clips.labels) == (["a b.mp4"], [(1, 2)])


# --- CSV with header


def listed(root: Path, train: str, val: str = "path,label\n") -> Path:
    touch(root, "a.mp4", "räum te/b.mp4")
    (root / "train.csv").write_text(train, encoding="utf-8")
    (root / "val.csv").write_text(val, encoding="utf-8")
    return root


def test_a_csv_with_numbers_is_read_by_its_header(tmp_path: Path) -> None:
    clips = load_clips(config("list"), listed(tmp_path, "label,path,note\n2,a.mp4,x\n0,räum te/b.mp4,y\n"), "train")
    assert (clips.paths, clips.labels) == (["a.mp4", "räum te/b.mp4"], [2, 0])


def test_a_csv_with_names_numbers_them_over_the_training_list(tmp_path: Path) -> None:
    root = listed(tmp_path, "path,label\na.mp4,zumba\nräum te/b.mp4,boxing\n", "path,label\na.mp4,zumba\n")
    clips = load_clips(config("list"), root, "val")
    assert (clips.labels, clips.class_names) == ([1], ("boxing", "zumba"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.mp4,1\n", r"train.csv:1: the header has no column 'label'"),
        ("path,label\na.mp4,0\na.mp4,7\n", r"train.csv:3: label 7 is outside 0 ... 2"),
        ("path,label\na.mp4\n", r"train.csv:2: must have a path and a label"),
        ('path,label\na.mp4,"up, down"\na.mp4,up, left\n', r"train.csv:3: has more values .*' left'.* double quotes"),
    ],
)
def test_a_malformed_csv_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_clips(config("list"), listed(tmp_path, text), "train")


def test_a_surplus_value_in_a_published_list_names_file_and_line(tmp_path: Path) -> None:
    with open(kinetics(tmp_path) / "train.csv", "a") as file:
        file.write("zumba, slow,ddddddddddd,1,11,train\n")
    with pytest.raises(ConfigError, match=r"train.csv:4: has more values than the header"):
        load_clips(config("kinetics400"), tmp_path, "train")


def test_a_list_that_is_not_utf8_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("räum.mp4 0\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"train.txt: is not text in UTF-8"):
        load_clips(config("list"), tmp_path, "train")


# --- remote roots


def test_a_data_set_at_an_address_is_read_as_a_local_one(tmp_path: Path) -> None:
    local = load_clips(config("ssv2"), ssv2(tmp_path), "train")
    remote = load_clips(config("ssv2"), f"local://{tmp_path}", "train")
    assert (remote.paths, remote.labels, remote.fingerprint()) == (local.paths, local.labels, local.fingerprint())


def test_class_folders_at_an_address_are_read_as_local_ones(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "train/c/3.mp4", "val/b/4.mp4")
    local, remote = (load_clips(config("folder"), root, "val") for root in (tmp_path, f"file://{tmp_path}"))
    assert (remote.paths, remote.labels) == (local.paths, local.labels) == (["val/b/4.mp4"], [1])


def test_an_address_of_an_unknown_kind_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://bucket/ssv2: cannot be read"):
        load_clips(config("ssv2"), "nowhere://bucket/ssv2", "train")


def test_a_million_clips_load_in_seconds_by_a_tenth(tmp_path: Path) -> None:
    touch(tmp_path, "videos/class/000000.mp4")
    (tmp_path / "train.txt").write_text("".join(f"videos/class/{i:06d}.mp4 {i % 400}\n" for i in range(100_000)))
    started = time.process_time()
    clips = load_clips(config("list", 400), tmp_path, "train")
    assert len(clips) == 100_000
    assert time.process_time() - started < 2  # a loaded machine; a quarter of a second is usual


@pytest.mark.parametrize("there", ["train", "val"])
def test_a_list_without_its_counterpart_is_not_mixed_with_the_published_one(tmp_path: Path, there: str) -> None:
    kinetics(tmp_path)
    (tmp_path / f"{there}.txt").write_text("videos/aaaaaaaaaaa_000001_000011.mp4 0\n")
    missing = "val" if there == "train" else "train"
    with pytest.raises(ConfigError, match=f"there is no .*{missing}.txt"):
        load_clips(config("kinetics400"), tmp_path, missing)  # type: ignore[arg-type]
