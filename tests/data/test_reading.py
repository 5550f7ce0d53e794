import errno
import os

import numpy as np
import pytest
import torch
from devkit import LISTS, write_coco, write_devkit
from PIL import Image

from wsss.data import DataError, coco, load_dataset
from wsss.data.classes import palette
from wsss.data.reading import (
    LABEL_TABLE,
    cores,
    encode_label_rows,
    encode_mask,
    errors_of,
    in_processes,
    naming_full_disk,
    read_label_rows,
    rows_of_split,
    subset_name,
)
from wsss.data.voc import VOC2012


def damage(file):
    file.write_bytes(file.read_bytes()[:-40])


# ---------------------------------------------------------------------------------------------- damaged files are named


def test_damaged_files_are_left_out_only_when_asked_and_are_named(tmp_path):
    voc = write_devkit(tmp_path / "tiny")
    damage(voc / "JPEGImages" / "a1.jpg")
    damage(voc / "SegmentationClassAug" / "a3.png")
    with pytest.raises(DataError, match="a1.jpg: cannot be decoded"):
        list(VOC2012(tmp_path / "tiny", "train_aug"))
    with pytest.warns(UserWarning, match=r"2 of 3 images are left out") as caught:
        data = VOC2012(tmp_path / "tiny", "train_aug", skip_unreadable=True)
    message = str(caught[0].message)
    assert str(voc / "JPEGImages" / "a1.jpg") in message and str(voc / "SegmentationClassAug" / "a3.png") in message
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert data.names == ["a2"] and len(data) == 1 and data[0].name == "a2"
    assert data.labels.shape == (1, 20) and torch.equal(data[0].label, data.labels[0])
    assert data.identity == "tiny-subset", "results of fewer images never carry the name of all"


def test_nothing_damaged_leaves_everything_as_it_is(tmp_path, recwarn):
    write_devkit(tmp_path / "tiny")
    data = VOC2012(tmp_path / "tiny", "train_aug", skip_unreadable=True)
    assert (data.names, data.identity) == (LISTS["train_aug"], "tiny") and not recwarn.list


def test_other_faults_are_not_skipped(tmp_path):
    voc = write_devkit(tmp_path / "tiny")
    mask = np.full((4, 5), 0, np.uint8)
    (voc / "SegmentationClassAug" / "a1.png").write_bytes(encode_mask(mask))
    data = VOC2012(tmp_path / "tiny", "train_aug", skip_unreadable=True)
    with pytest.raises(DataError, match="5x4"):
        data[0]


def test_a_split_of_damaged_images_alone_is_refused(tmp_path):
    voc = write_devkit(tmp_path / "tiny")
    for name in LISTS["val"]:
        damage(voc / "JPEGImages" / f"{name}.jpg")
    with pytest.raises(DataError, match=r"no image can be read[\s\S]*b1.jpg[\s\S]*b2.jpg"):
        VOC2012(tmp_path / "tiny", "val", skip_unreadable=True)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["voc2012", "coco2014"])
def test_load_dataset_passes_it_on(tmp_path, name):
    root = tmp_path / "tiny"
    if name == "coco2014":
        coco.prepare(write_coco(root), workers=1)
        damage(root / "train2014" / "COCO_train2014_000000000003.jpg")
    else:
        damage(write_devkit(root) / "JPEGImages" / "a1.jpg")
    whole = load_dataset(name, "train", root)
    with pytest.warns(UserWarning, match="left out"):
        rest = load_dataset(name, "train", root, skip_unreadable=True)
    assert rest.names == whole.names[1:]


def test_size_comes_from_the_head_of_the_file(tmp_path):
    voc = write_devkit(tmp_path)
    damage(voc / "JPEGImages" / "a1.jpg")
    assert VOC2012(tmp_path, "train").size(0) == (16, 24)


# ------------------------------------------------------------------------------------------------------------- helpers


def test_errors_come_in_order_and_other_exceptions_pass():
    def read(item):
        if item % 3 == 0:
            raise DataError(f"{item}")

    found = [str(error) if error else None for error in errors_of(read, list(range(200)))]
    assert found == [f"{item}" if item % 3 == 0 else None for item in range(200)]
    assert list(errors_of(read, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(errors_of(lambda item: 1 / item, [1, 0]))


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_keep_the_order_and_pass_errors_on(workers):
    assert list(in_processes(abs, [-3, 2, -1], workers)) == [3, 2, 1]
    with pytest.raises(TypeError):
        list(in_processes(abs, [-1, "two"], workers))
    assert cores() >= 1


def test_masks_are_written_in_the_colours_of_voc(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    (tmp_path / "mask.png").write_bytes(encode_mask(mask))
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")).reshape(-1, 3), palette(255))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_its_folder(tmp_path, number):
    with pytest.raises(DataError, match=rf"{tmp_path}: the disk is full .*Make room") as caught:
        with naming_full_disk(tmp_path):
            raise OSError(number, os.strerror(number))
    assert caught.value.kind == "disk"
    with pytest.raises(FileNotFoundError):
        with naming_full_disk(tmp_path):
            raise FileNotFoundError(errno.ENOENT, "gone")


def test_no_folder_takes_the_name_of_a_dataset():
    assert [subset_name(name) for name in ("mine", "COCO2014", "")] == ["mine", "COCO2014-subset", "-subset"]


# -------------------------------------------------------------------------------------------------------- label tables


def test_label_tables_survive_a_round_trip(tmp_path):
    rows = [("a", "train", ["dog", "hot dog"]), ("b/1", "val", ["hot dog"]), ("c,d", "train", [])]
    file = tmp_path / LABEL_TABLE
    file.write_text(encode_label_rows(rows))
    assert [(row.name, row.split, list(row.classes)) for row in read_label_rows(file)] == rows


def test_names_are_separated_by_spaces_where_no_semicolon_is(tmp_path):
    file = tmp_path / LABEL_TABLE
    file.write_text('image_id,split,classes\na,train,dog  person\nb,train,"dog; traffic light"\nc,train,hot dog;\n')
    assert [row.classes for row in read_label_rows(file)] == [("dog", "person"), ("dog", "traffic light"), ("hot dog",)]


def test_bad_label_tables(tmp_path):
    file = tmp_path / LABEL_TABLE
    file.write_text("image_id,classes\na,dog\n")
    with pytest.raises(DataError, match="column split is missing"):
        read_label_rows(file)
    assert read_label_rows(file, ["image_id"])[0].split == ""
    file.write_bytes("image_id,split,classes\na,train,Käse\n".encode("latin-1"))
    with pytest.raises(DataError, match=f"{LABEL_TABLE}: is not a CSV in UTF-8"):
        read_label_rows(file)
    file.write_text("image_id,split,classes\na,train,dog\nb,val,dog\na,val,dog\n")
    rows = read_label_rows(file)
    with pytest.raises(DataError, match="line 4: a is listed twice"):
        rows_of_split(rows, "train")
    assert [row.name for row in rows_of_split(rows[:2], "val")] == ["b"]
