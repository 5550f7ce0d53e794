import json
import pickle

import numpy as np
import pytest
import torch
from devkit import COCO_IDS, COCO_SIZE, coco_name, crowd, rectangle, run_lengths, write_coco
from pycocotools.coco import COCO as Index

from wsss.data import DataError, load_dataset
from wsss.data.classes import COCO_CLASSES
from wsss.data.coco import OFFICIAL, AnnotatedImage, Coco2014, Region, check, draw_mask, prepare, read_annotations
from wsss.data.reading import LABEL_TABLE, encode_mask

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VALUE = {name: COCO_CLASSES.index(name) + 1 for name in COCO_IDS}


@pytest.fixture
def root(tmp_path):
    """Photographs and annotations of a tiny COCO, not prepared."""
    return write_coco(tmp_path / "tiny")


@pytest.fixture
def prepared(root):
    prepare(root, workers=1)
    return root


def change(root, split, function):
    """Rewrite an annotation file after `function` has changed its content."""
    file = root / "annotations" / f"instances_{split}2014.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))
    return file


def multi_hot(*names):
    return torch.tensor([float(name in names) for name in COCO_CLASSES])


# ------------------------------------------------------------------------------------------------------------- masks


def test_masks_and_labels_are_those_of_the_annotations(prepared):
    data = Coco2014(prepared, "train")
    assert data.names == [coco_name("train", 3), coco_name("train", 7)], "ascending, without the one that shows nothing"
    assert (data.identity, data.split, data.classes) == ("tiny", "train", COCO_CLASSES)
    assert torch.equal(data.labels, torch.stack([multi_hot("hot dog", "cat"), multi_hot("dog", "person")]))
    expected = np.full(COCO_SIZE, VALUE["hot dog"])
    expected[10:20, 20:30] = VALUE["cat"]
    np.testing.assert_array_equal(data[0].mask, expected)
    expected = np.where(crowd(), VALUE["person"], 0)  # the crowd is drawn as its class
    expected[5:15, 5:15] = VALUE["dog"]
    expected[10:16, 10:16] = VALUE["person"]  # the smaller region lies on top
    np.testing.assert_array_equal(data[1].mask, expected)
    assert data[1].image.shape == (3, *COCO_SIZE) and data[1].image.dtype == torch.uint8
    assert data[1].mask.dtype == torch.int64 and data[1].name == coco_name("train", 7)
    assert len(Coco2014(prepared, "val")) == 1


def random_regions(rng, count):
    """Rectangles, triangles and crowds, some of equal area."""
    for index in range(count):
        left, top = rng.integers(0, 30, 2)
        right, bottom = left + rng.integers(1, 25), top + rng.integers(1, 25)
        outline = rectangle(*map(float, (left, top, right, bottom)))
        if index % 3 == 1:
            outline = [outline[0][:6], [float(x) for x in rng.uniform(0, 30, 8)]]
        if index % 3 == 2:
            outline = run_lengths(rng.random((45, 60)) > 0.8)
        yield Region("here", int(rng.integers(1, 81)), float(rng.integers(0, 4)), outline)


def test_smaller_regions_hide_larger_ones_and_of_equal_ones_the_earlier_hides_the_later(capsys):
    """The rule written out: from the smallest up, a region takes the pixels that are still free."""
    rng = np.random.default_rng(0)
    image = AnnotatedImage("random", 45, 60, list(random_regions(rng, 30)))
    index = Index()
    index.imgs = {1: {"height": 45, "width": 60}}
    expected = np.zeros((45, 60), np.uint8)
    for area in range(4):
        for region in image.regions:
            if region.area == area:
                filled = index.annToMask({"image_id": 1, "segmentation": region.outline})  # pycocotools' own
                expected = np.where(expected > 0, expected, filled * region.value)
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(draw_mask(image), expected)


def test_packed_run_lengths_are_drawn_too():
    from pycocotools import mask as rle

    packed = rle.encode(np.asfortranarray(crowd().astype(np.uint8)))
    image = AnnotatedImage("packed", *COCO_SIZE, [Region("here", 5, 1.0, packed)])
    np.testing.assert_array_equal(draw_mask(image), np.where(crowd(), 5, 0))


def test_the_80_classes_keep_the_order_of_cocos_numbers():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert sorted(COCO_IDS, key=COCO_IDS.get) == sorted(COCO_IDS, key=COCO_CLASSES.index)
    assert (VALUE["person"], VALUE["cat"], VALUE["dog"], VALUE["hot dog"]) == (1, 16, 17, 53)


def test_two_processes_make_the_same_files(root, prepared):
    before = {file: file.read_bytes() for file in root.rglob("*.png")}
    for file in before:
        file.unlink()
    prepare(root, workers=2)
    assert before and {file: file.read_bytes() for file in root.rglob("*.png")} == before


def test_prepare_explains_its_numbers_and_goes_on_where_it_was_stopped(root):
    seen = []
    lines = prepare(root, workers=1, progress=lambda items: seen.extend(items) or items)
    assert lines == [
        "train: 3 photographs, 1 without any of the 80 classes are left out: 2 images",
        "val: 2 photographs, 1 without any of the 80 classes are left out: 1 images",
        "3 masks made now",
    ]
    assert [file.stem for _, file in seen] == [coco_name("train", 3), coco_name("train", 7), coco_name("val", 4)]
    kept, lost = (root / "masks" / "train2014" / f"{coco_name('train', number)}.png" for number in (3, 7))
    kept.write_bytes(b"left as it is")
    lost.unlink()
    assert prepare(root, workers=1)[-1] == "1 masks made now"
    assert lost.is_file() and kept.read_bytes() == b"left as it is"


def test_a_stopped_preparation_never_passes_for_a_smaller_dataset(root, monkeypatch):
    monkeypatch.setattr("wsss.data.coco.encode_mask", lambda mask: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(root, workers=1)
    with pytest.raises(DataError, match=r"000000000003.png: missing.*wsss data prepare coco2014"):
        Coco2014(root, "train")


def test_a_full_disk_loses_nothing(prepared, monkeypatch):
    kept, lost = (prepared / "masks" / "train2014" / f"{coco_name('train', number)}.png" for number in (3, 7))
    lost.unlink()
    before = {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    (prepared / LABEL_TABLE).unlink()
    with pytest.raises(DataError, match=f"{prepared}: the disk is full.*Make room"):
        prepare(prepared, workers=1)
    monkeypatch.undo()
    del before[prepared / LABEL_TABLE]
    assert {file: file.read_bytes() for file in prepared.rglob("*") if file.is_file()} == before
    prepare(prepared, workers=1)
    assert lost.is_file() and (prepared / LABEL_TABLE).is_file() and kept in before


def test_a_folder_that_cannot_be_written_is_named(root):
    (root / "masks").write_text("a file, which denies even the superuser")
    with pytest.raises(PermissionError, match=r"masks/train2014.*Make it writable"):
        prepare(root, workers=1)
    assert (root / "masks").read_text().startswith("a file")


def test_another_table_is_not_overwritten(prepared):
    table = prepared / LABEL_TABLE
    table.write_text(table.read_text().replace("cat;", ""))
    edited = table.read_text()
    with pytest.raises(DataError, match=f"{LABEL_TABLE}: says something else than the annotations. Remove it"):
        prepare(prepared, workers=1)
    assert table.read_text() == edited


# -------------------------------------------------------------------------------------------------------- annotations


def test_annotation_for_an_unknown_image(root):
    file = change(root, "train", lambda content: content["annotations"][1].update(image_id=12345))
    with pytest.raises(DataError, match=f"{file.name}, annotation 701: image_id 12345 is no image") as caught:
        prepare(root, workers=1)
    assert caught.value.kind == "labels" and not (root / LABEL_TABLE).exists()


@pytest.mark.parametrize("category", [12, 91, None])
def test_annotation_of_an_unknown_category(root, category):
    change(root, "val", lambda content: content["annotations"][0].update(category_id=category))
    with pytest.raises(DataError, match=f"val2014.json, annotation 400: category_id {category} is no category"):
        prepare(root, workers=1)


@pytest.mark.parametrize("outline", [[[1.0, 2.0]], [], {"size": [30, 40]}, {"size": [3, 4], "counts": [12]}, "square"])
def test_outline_that_cannot_be_drawn(root, outline):
    change(root, "val", lambda content: content["annotations"][0].update(segmentation=outline))
    with pytest.raises(DataError, match="val2014.json, annotation 400, field segmentation: cannot be drawn"):
        prepare(root, workers=1)


@pytest.mark.parametrize(
    "text", ["", '{"images": [', "[]", "{}", '{"categories": 1, "images": [], "annotations": []}', "\xff"]
)
def test_damaged_annotation_file(root, text):
    file = root / "annotations" / "instances_train2014.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"{file}: is no annotation file of COCO .*Unpack it again"):
        read_annotations(file)


def test_missing_annotation_file(root):
    (root / "annotations" / "instances_val2014.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2014.json: missing.*wsss data fetch coco2014"):
        prepare(root, workers=1)


# ------------------------------------------------------------------------------------------------------------ reading


def test_reading_what_is_not_prepared_names_the_command(root):
    for function in (lambda: Coco2014(root, "val"), lambda: check(root)):
        with pytest.raises(DataError, match=f"{LABEL_TABLE}: missing.*wsss data prepare coco2014") as caught:
            function()
        assert caught.value.kind == "missing"


def test_unknown_split(prepared):
    with pytest.raises(ValueError, match="'test'.*train, val"):
        Coco2014(prepared, "test")


def test_load_dataset_and_workers(prepared, monkeypatch):
    monkeypatch.setattr("wsss.data.coco.DEFAULT_ROOT", prepared)
    data = pickle.loads(pickle.dumps(load_dataset("coco2014", "val")))
    assert isinstance(data, Coco2014) and data[0].name == coco_name("val", 4)


def test_missing_image_and_mask(prepared):
    (prepared / "masks" / "val2014" / f"{coco_name('val', 4)}.png").unlink()
    with pytest.raises(DataError, match=r"val2014/COCO_val2014_000000000004.png: missing.*prepare coco2014"):
        Coco2014(prepared, "val")
    (prepared / "val2014" / f"{coco_name('val', 4)}.jpg").unlink()
    with pytest.raises(DataError, match=r"val2014/COCO_val2014_000000000004.jpg: missing.*val2014.zip"):
        Coco2014(prepared, "val")


@pytest.mark.parametrize(("value", "fine"), [(80, True), (255, True), (81, False), (254, False)])
def test_void_is_no_class_and_other_values_are_refused(prepared, value, fine):
    file = prepared / "masks" / "val2014" / f"{coco_name('val', 4)}.png"
    file.write_bytes(encode_mask(np.full(COCO_SIZE, value, np.uint8)))
    if fine:
        assert Coco2014(prepared, "val")[0].mask.unique().tolist() == [value]
    else:
        with pytest.raises(DataError, match=rf"000000000004.png: mask value {value} .*\(0..80\)"):
            Coco2014(prepared, "val")[0]


def test_the_official_number_of_val_makes_it_coco2014(prepared, monkeypatch):
    assert OFFICIAL == {"train": 82081, "val": 40137}
    monkeypatch.setattr("wsss.data.coco.OFFICIAL", {"train": 82081, "val": 1})
    assert Coco2014(prepared, "train").identity == Coco2014(prepared, "val").identity == "coco2014"


def test_a_subset_never_takes_the_name_of_the_full_dataset(prepared):
    assert Coco2014(prepared.rename(prepared.with_name("coco2014")), "val").identity == "coco2014-subset"


# ----------------------------------------------------------------------------------------------------------- checking


def kinds(report):
    return sorted(problem.kind for problem in report.problems)


def test_check_of_good_files(prepared):
    seen = []
    report = check(prepared, progress=lambda items: seen.extend(items) or items)
    assert report.problems == () and len(seen) == 3
    assert report.folders == {"train2014": 3, "masks/train2014": 2, "val2014": 2, "masks/val2014": 1}
    assert {split: found.images for split, found in report.splits.items()} == {"train": 2, "val": 1}
    counts = dict(zip(COCO_CLASSES, report.splits["train"].class_counts, strict=True))
    assert {name: count for name, count in counts.items() if count} == {"hot dog": 1, "cat": 1, "dog": 1, "person": 1}
    text = str(report)
    assert "a subset: 2 of 82,081" in text and "a subset: 1 of 40,137" in text and "nothing is wrong" in text
    assert "train: 3 photographs, 1 without any of the 80 classes are left out: 2 images" in text


def test_check_explains_the_official_numbers(prepared, monkeypatch):
    """82,783 photographs give 82,081 images; the same arithmetic on the tiny files, and a table that lost a line."""
    monkeypatch.setattr("wsss.data.coco.OFFICIAL", {"train": 2, "val": 1})
    monkeypatch.setattr("wsss.data.coco.PHOTOGRAPHS", {"train": 3, "val": 2})
    report = check(prepared)
    assert report.identity == "coco2014" and not report.problems and "the official number" in str(report)
    table = prepared / LABEL_TABLE
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if "train2014_000000000009" not in line))
    report = check(prepared)
    assert kinds(report) == ["count", "surplus"], "the photograph is in no line now"
    assert "officially 3 photographs, 1 without any of the 80 classes are left out: 2 images" in str(report)


def test_check_tells_everything_that_is_wrong(prepared):
    images, masks = prepared / "train2014", prepared / "masks" / "train2014"
    (images / f"{coco_name('train', 3)}.jpg").write_bytes(b"")
    (masks / f"{coco_name('train', 7)}.png").write_bytes(encode_mask(np.zeros((4, 5), np.uint8)))
    (masks / "stray.png").write_bytes(encode_mask(np.zeros((4, 5), np.uint8)))
    (images / "stray.jpg").write_bytes(b"")
    (prepared / "val2014" / f"{coco_name('val', 4)}.jpg").unlink()
    report = check(prepared)
    assert kinds(report) == ["missing", "size", "surplus", "surplus", "unreadable"]
    for word in ("wrong: 5", "stray.jpg", "stray.png", "000000000003.jpg", "5x4", "000000000004.jpg"):
        assert word in str(report)


def test_check_of_bad_tables(prepared):
    table = prepared / LABEL_TABLE
    text = table.read_text()
    table.write_text(text.replace("cat;", "zebu;", 1))
    report = check(prepared)
    assert kinds(report) == ["labels"] and "line 2, column classes: unknown class 'zebu'" in str(report)
    table.write_text("".join(line for line in text.splitlines(True) if "val" not in line))
    assert kinds(check(prepared)) == ["list"] and "no image of split val" in str(check(prepared))
