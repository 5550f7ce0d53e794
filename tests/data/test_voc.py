import os
import pickle
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from devkit import HEIGHT, LISTS, OBJECTS, WIDTH, mask_of, write_devkit, write_mask
from PIL import Image

from wsss.data import DataError, co_occurrence, load_dataset
from wsss.data.classes import VOC_CLASSES
from wsss.data.voc import OFFICIAL, VOC2012, check

REAL = os.environ.get("WSSS_VOC_ROOT")
needs_real = pytest.mark.skipif(not REAL, reason="WSSS_VOC_ROOT names no VOC 2012 devkit (or subset) to read")


@pytest.fixture
def voc(tmp_path):
    """The VOC2012 folder of a tiny devkit in the data root `tiny`."""
    return write_devkit(tmp_path / "tiny")


@pytest.fixture
def root(voc):
    return voc.parents[1]


def multi_hot(*classes):
    return torch.tensor([float(name in classes) for name in VOC_CLASSES])


def write_list(voc, split, names):
    (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")


def write_table(root, rows):
    (root / "image_labels.csv").write_text("image_id,split,classes\n" + "".join(f"{row}\n" for row in rows))


def remove_annotations(voc):
    for file in (voc / "Annotations").iterdir():
        file.unlink()
    (voc / "Annotations").rmdir()


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("split", LISTS)
def test_attributes_and_samples(root, split):
    data = VOC2012(root, split)
    assert (data.identity, data.split, data.names, data.classes) == ("tiny", split, LISTS[split], VOC_CLASSES)
    assert data.labels.shape == (len(data), 20) and data.labels.dtype == torch.float32
    samples = list(data)
    assert [sample.name for sample in samples] == data.names
    for sample, label in zip(samples, data.labels, strict=True):
        assert sample.image.shape == (3, HEIGHT, WIDTH) and sample.image.dtype == torch.uint8
        torch.testing.assert_close(sample.label, label, rtol=0, atol=0, equal_nan=True)
        if split != "test":
            assert sample.mask.shape == (HEIGHT, WIDTH) and sample.mask.dtype == torch.int64
            assert torch.equal(sample.label, multi_hot(*OBJECTS[sample.name]))


def test_image_is_rgb_in_the_right_place(voc, root):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:8, :, 0], pixels[8:, 8:, 2] = 255, 255
    Image.fromarray(pixels).save(voc / "JPEGImages" / "a1.jpg", quality=100, subsampling=0)
    image = VOC2012(root, "train")[0].image.int()
    assert (image - torch.from_numpy(pixels).permute(2, 0, 1)).abs().max() < 8
    Image.fromarray(pixels[..., 0]).save(voc / "JPEGImages" / "a1.jpg", quality=100)
    grey = VOC2012(root, "train")[0].image
    assert grey.shape == (3, HEIGHT, WIDTH) and torch.equal(grey[0], grey[2])


def test_masks_prefer_aug_in_training_and_the_challenge_in_val(voc, root):
    def is_from(sample, folder):
        return torch.equal(sample.mask, torch.from_numpy(mask_of(sample.name, folder)).long())

    assert all(is_from(sample, "SegmentationClassAug") for sample in VOC2012(root, "train_aug"))
    assert all(is_from(sample, "SegmentationClassAug") for sample in VOC2012(root, "train"))
    assert all(is_from(sample, "SegmentationClass") for sample in VOC2012(root, "val"))
    assert VOC2012(root, "test")[0].mask is None
    (voc / "SegmentationClassAug" / "a1.png").unlink()
    (voc / "SegmentationClass" / "b1.png").unlink()
    assert is_from(VOC2012(root, "train")[0], "SegmentationClass")
    assert is_from(VOC2012(root, "val")[0], "SegmentationClassAug")


def test_mask_keeps_void_and_may_be_grey(voc, root):
    mask = mask_of("b1", "SegmentationClass")
    assert set(VOC2012(root, "val")[0].mask.flatten().tolist()) == {0, VOC_CLASSES.index("horse") + 1, 255}
    Image.fromarray(mask).save(voc / "SegmentationClass" / "b1.png")
    assert torch.equal(VOC2012(root, "val")[0].mask, torch.from_numpy(mask).long())


def test_train_aug_without_a_list_is_aug_minus_val(voc, root):
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    assert VOC2012(root, "train_aug").names == ["a1", "a2", "a3"]


def test_datasets_reach_workers(root):
    data = pickle.loads(pickle.dumps(VOC2012(root, "val")))
    assert data[1].name == "b2" and data.identity == "tiny"


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("part", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize("split", LISTS)
def test_identity_is_the_same_for_every_way_in(root, part, split):
    data = VOC2012(root / part, split)
    assert data.identity == "tiny" and len(data) == len(LISTS[split])


def test_identity_of_a_relative_root_and_of_a_bare_devkit(voc, root, monkeypatch):
    monkeypatch.chdir(root)
    assert VOC2012(".", "val").identity == "tiny"
    voc.rename(root / "mine")
    assert VOC2012(root / "mine", "val").identity == "mine"


def test_official_val_list_makes_it_voc2012(voc, root):
    names = [f"v{i}" for i in range(1449)]
    for folder, name in (("JPEGImages", "b1.jpg"), ("Annotations", "b1.xml"), ("SegmentationClass", "b1.png")):
        source = voc / folder / name
        for other in names:
            os.link(source, source.with_name(other + source.suffix))
    write_list(voc, "val", names)
    assert VOC2012(root, "val").identity == VOC2012(root, "train").identity == "voc2012"
    report = check(root)
    assert [problem.kind for problem in report.problems if problem.kind == "count"] == ["count"] * 3
    assert "10,582" in str(report) and OFFICIAL["val"] == 1449


def test_a_subset_never_takes_the_name_of_the_full_dataset(root):
    assert VOC2012(root.rename(root.with_name("VOC2012")), "val").identity == "VOC2012-subset"


# ------------------------------------------------------------------------------------------------------------ labels


def test_labels_from_the_table_where_annotations_are_missing(voc, root):
    rows = ["a1,train_aug,dog person", "a2,train_aug,cat", "a3,train_aug,dog sofa", "b1,val,horse", "b2,val,cow"]
    write_table(root, rows)
    assert VOC2012(root, "train_aug").label_source == "Annotations"
    remove_annotations(voc)
    data = VOC2012(root, "train_aug")
    assert data.label_source == str(root / "image_labels.csv")
    expected = [multi_hot("dog", "person"), multi_hot("cat"), multi_hot("dog", "sofa")]
    assert torch.equal(data.labels, torch.stack(expected))
    assert torch.equal(VOC2012(root, "train").labels, data.labels[:2])
    assert torch.equal(VOC2012(root / "VOCdevkit" / "VOC2012", "val").labels[1], multi_hot("cow"))


def test_labels_from_a_given_table(root, tmp_path):
    table = tmp_path / "other.csv"
    table.write_text("\ufeffimage_id,split,classes\nb1,val,bus car\nb2,val,\n", encoding="utf-8")
    data = VOC2012(root, "val", labels=table)
    assert torch.equal(data.labels, torch.stack([multi_hot("bus", "car"), multi_hot()]))
    assert data.label_source == str(table)
    assert torch.equal(VOC2012(root, "val", labels=str(table)).labels, data.labels)


def test_labels_from_masks_only_when_asked(root):
    with pytest.warns(UserWarning, match="not the annotations") as caught:
        data = VOC2012(root, "train_aug", labels="masks")
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert torch.equal(data.labels, torch.stack([multi_hot("dog"), multi_hot("cat"), multi_hot("dog")]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VOC2012(root, "train_aug")


def test_no_labels_names_three_remedies(voc, root):
    (voc / "Annotations" / "a3.xml").unlink()
    with pytest.raises(DataError, match=r'a3\.xml.*Annotations.*image_labels\.csv.*labels="masks"'):
        VOC2012(root, "train_aug")
    assert len(VOC2012(root, "train")) == 2


def test_labels_of_test_are_unknown_unless_given(root):
    data = VOC2012(root, "test")
    assert data.labels.isnan().all() and data.label_source == "none"
    write_table(root, ["c1,test,bus"])
    assert torch.equal(VOC2012(root, "test").labels[0], multi_hot("bus"))
    with pytest.raises(DataError, match="test has no masks"):
        VOC2012(root, "test", labels="masks")


# ------------------------------------------------------------------------------------------------------------ errors


def damage(voc, file, keep):
    content = (voc / file).read_bytes()
    (voc / file).write_bytes(content[: int(len(content) * keep)])


def fails(root, split, *words, kind=None, labels="auto"):
    """Opening or reading `split` raises a DataError that contains `words`."""
    with pytest.raises(DataError) as caught:
        list(VOC2012(root, split, labels=labels))
    for word in words:
        assert word in str(caught.value)
    if kind:
        assert caught.value.kind == kind


def test_no_devkit(tmp_path):
    with pytest.raises(DataError, match="VOCdevkit/VOC2012.*data/README.md"):
        VOC2012(tmp_path / "nowhere", "val")
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(DataError, match="ImageSets/Segmentation is missing"):
        VOC2012(tmp_path, "val")


def test_unknown_split(root):
    with pytest.raises(ValueError, match="'trainval'.*train, train_aug, val, test"):
        VOC2012(root, "trainval")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["val.txt", "no image id"]),
        (["b1", "b2", "b1"], ["val.txt", "b1 is listed twice"]),
        (["/JPEGImages/b1.jpg /SegmentationClass/b1.png"], ["val.txt", "one id a line"]),
        (["b1 1"], ["val.txt", "'b1 1'", "one id a line"]),
        (["b1", "gone"], ["gone.jpg", "missing", "split val"]),
        (["b1", "c1"], ["c1.png", "SegmentationClassAug", "missing"]),
    ],
)
def test_bad_lists(voc, root, lines, words):
    write_list(voc, "val", lines)
    fails(root, "val", *words)


def test_missing_lists(voc, root):
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "val.txt").unlink()
    fails(root, "val", "val.txt", "missing", kind="missing")
    (lists / "train_aug.txt").unlink()
    fails(root, "train_aug", "val.txt", kind="missing")  # held-out images would slip into training
    for file in (voc / "SegmentationClassAug").iterdir():
        file.unlink()
    fails(root, "train_aug", "train_aug.txt", "SegmentationClassAug", kind="missing")


def test_missing_folder(voc, root):
    (voc / "JPEGImages").rename(voc / "images")
    fails(root, "train", str(voc / "JPEGImages" / "a1.jpg"), "missing", kind="missing")


def test_truncated_jpeg(voc, root):
    damage(voc, "JPEGImages/b2.jpg", 0.5)
    fails(root, "val", str(voc / "JPEGImages" / "b2.jpg"), "truncated", "archive", kind="unreadable")


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_not_an_image(voc, root, content):
    (voc / "JPEGImages" / "b1.jpg").write_bytes(content)
    fails(root, "val", "b1.jpg", "archive", kind="unreadable")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_mask(voc, root, keep):
    damage(voc, "SegmentationClass/b1.png", keep)
    fails(root, "val", str(voc / "SegmentationClass" / "b1.png"), "archive", kind="unreadable")


def test_mask_of_another_size(voc, root):
    write_mask(voc / "SegmentationClass" / "b1.png", mask_of("b1", "SegmentationClass").T.copy())
    fails(root, "val", "SegmentationClass/b1.png", "16x24", "b1.jpg 24x16", kind="size")


@pytest.mark.parametrize("value", [21, 254])
def test_mask_value_outside_the_classes(voc, root, value):
    mask = mask_of("b1", "SegmentationClass")
    mask[0, 0] = value
    write_mask(voc / "SegmentationClass" / "b1.png", mask)
    fails(root, "val", "SegmentationClass/b1.png", f"value {value} ", kind="values")


def test_mask_with_colours(voc, root):
    file = voc / "SegmentationClass" / "b1.png"
    Image.open(file).convert("RGB").save(file)
    fails(root, "val", "SegmentationClass/b1.png", "mode RGB", "indices", kind="values")


def test_unknown_class_in_an_annotation(voc, root):
    file = voc / "Annotations" / "b2.xml"
    file.write_text(file.read_text().replace("<name>person", "<name>zebra"))
    fails(root, "val", "b2.xml", "object/name", "'zebra'", "tvmonitor", kind="labels")


def test_damaged_annotation(voc, root):
    damage(voc, "Annotations/b2.xml", 0.5)
    fails(root, "val", "b2.xml", "archive", kind="unreadable")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id,split,classes\nb1,val,horse\nb2,val,zebra\n", ["line 3", "column classes", "'zebra'"]),
        ("image_id,split,classes\nb1,val,horse\n", ["column image_id", "b2", "1 of 2 images of val"]),
        ("name,split,classes\nb1,val,horse\n", ["column image_id is missing", "image_id,split,classes"]),
        ("image_id,split\nb1,val\n", ["column classes is missing"]),
        ("", ["column classes, image_id is missing"]),
        ("image_id,split,classes\nb1,train,cow\nb1,val,cat\n", ["line 3", "b1", "differs"]),
    ],
)
def test_bad_tables(voc, root, text, words):
    table = root / "image_labels.csv"
    table.write_text(text)
    fails(root, "val", str(table), *words, kind="labels", labels=table)
    remove_annotations(voc)
    fails(root, "val", str(table), *words, kind="labels")


def test_missing_table(root):
    fails(root, "val", "maskz", "no such table", '"masks"', kind="missing", labels="maskz")


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(DataError("a.jpg: gone", "missing")))
    assert (str(error), error.kind) == ("a.jpg: gone", "missing")


# ------------------------------------------------------------------------------------------------------------- check


def kinds(report):
    return [problem.kind for problem in report.problems]


def test_check_of_a_consistent_subset(voc, root):
    report = check(root)
    assert report.problems == () and report.identity == "tiny"
    assert report.folders == {"JPEGImages": 6, "SegmentationClass": 4, "SegmentationClassAug": 5, "Annotations": 5}
    assert {split: found.images for split, found in report.splits.items()} == {s: len(n) for s, n in LISTS.items()}
    counts = dict(zip(VOC_CLASSES, report.splits["train_aug"].class_counts, strict=True))
    assert {name: count for name, count in counts.items() if count} == {"dog": 2, "cat": 1, "person": 1}
    assert report.splits["test"].label_source == "none" and sum(report.splits["test"].class_counts) == 0
    text = str(report)
    assert "a subset: 2 of 1,449" in text and "a subset: 3 of 10,582" in text and "nothing is wrong" in text


def test_check_reads_each_image_once_and_shows_progress(root):
    seen = []
    check(root, progress=lambda items: seen.extend(items) or items)
    assert sorted(name for name, _ in seen) == ["a1", "a2", "a3", "b1", "b2", "c1"]


def test_check_without_test_and_with_unlisted_images_is_fine(voc, root):
    (voc / "ImageSets" / "Segmentation" / "test.txt").unlink()
    report = check(root)
    assert report.problems == () and "test" not in report.splits and "absent  officially 1,456" in str(report)


def test_check_tells_everything_that_is_wrong(voc, root):
    damage(voc, "JPEGImages/a1.jpg", 0.5)
    (voc / "JPEGImages" / "a2.jpg").unlink()
    write_mask(voc / "SegmentationClassAug" / "a3.png", np.zeros((4, 5), np.uint8))
    write_mask(voc / "SegmentationClass" / "b1.png", np.full((HEIGHT, WIDTH), 77, np.uint8))
    write_mask(voc / "SegmentationClassAug" / "stray.png", np.zeros((4, 5), np.uint8))
    (voc / "Annotations" / "b2.xml").unlink()
    write_list(voc, "train", ["a1", "a2", "b2"])
    report = check(root)
    expected = ["labels", "labels", "missing", "overlap", "size", "surplus", "unreadable", "values"]
    assert sorted(kinds(report)) == expected
    text = str(report)
    for word in ("wrong: 8", "a1.jpg", "a2.jpg", "a3.png", "b1.png", "stray.png", "train.txt", "b2.xml"):
        assert word in text


def test_check_tells_annotations_of_unknown_images_at_once(voc, root):
    for name in ("x1", "x2"):
        (voc / "Annotations" / f"{name}.xml").write_text((voc / "Annotations" / "a1.xml").read_text())
    report = check(root)
    assert kinds(report) == ["surplus"]
    assert "x1.xml: an annotation of an image that is not in JPEGImages (one of 2)" in str(report)


def test_check_tells_which_lists_are_missing(voc, root):
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    report = check(root)
    assert kinds(report) == ["missing"] and "val.txt" in str(report)


def test_check_tells_a_problem_of_two_splits_once(voc, root):
    file = voc / "Annotations" / "a1.xml"
    file.write_text(file.read_text().replace("<name>person", "<name>zebra"))
    assert kinds(check(root)) == ["labels"]


def test_check_shortens_long_lists_of_problems(voc, root):
    for i in range(30):
        write_mask(voc / "SegmentationClass" / f"stray{i:02}.png", np.zeros((4, 5), np.uint8))
    report = check(root)
    assert len(report.problems) == 30 and "... and 20 more" in str(report) and str(report).count("stray") == 10


# ----------------------------------------------------------------------------------------------------------- package


def test_load_dataset(root, monkeypatch):
    data = load_dataset("voc2012", "val", root)
    assert isinstance(data, VOC2012) and data.names == ["b1", "b2"]
    with pytest.raises(ValueError, match="'cityscapes'.*embedded, voc2012"):
        load_dataset("cityscapes", "val")
    with pytest.raises(ValueError, match="'nope'.*train_aug"):
        load_dataset("voc2012", "nope", root)
    monkeypatch.setattr("wsss.data.voc.DEFAULT_ROOT", root)
    assert load_dataset("voc2012", "val").names == ["b1", "b2"]
    scenes = types.ModuleType("wsss.data.scenes")
    scenes.Scenes = lambda split: ("scenes", split)
    monkeypatch.setitem(sys.modules, "wsss.data.scenes", scenes)
    assert load_dataset("embedded", "train") == ("scenes", "train")


def test_co_occurrence():
    labels = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]).double()
    matrix = co_occurrence(labels)
    expected = torch.tensor([[1, 2 / 3, 1 / 3, 0], [1, 1, 1 / 2, 0], [1 / 2, 1 / 2, 1, 0], [torch.nan] * 4]).double()
    torch.testing.assert_close(matrix, expected, equal_nan=True)


# --------------------------------------------------------------------------------------------------------- real files


@needs_real
@pytest.mark.parametrize("split", ["train", "train_aug", "val"])
def test_real_samples(split):
    data = VOC2012(REAL, split)
    assert data.identity == ("voc2012" if len(VOC2012(REAL, "val")) == 1449 else Path(REAL).resolve().name)
    assert len(set(data.names)) == len(data) == len(data.labels)
    assert (data.labels.sum(1) >= 1).all()
    agree = []
    for index in range(0, len(data), max(1, len(data) // 40)):
        sample = data[index]
        assert sample.mask.shape == sample.image.shape[1:]
        shown = np.setdiff1d(sample.mask, [0, 255]) - 1
        agree.append(np.array_equal(shown, sample.label.nonzero()[:, 0]))
    assert np.mean(agree) > 0.75  # annotations and masks name the same classes in about 95 % of the images


@needs_real
def test_real_training_and_validation_are_apart():
    assert not set(VOC2012(REAL, "train_aug").names) & set(VOC2012(REAL, "val").names)
