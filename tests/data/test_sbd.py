import numpy as np
import pytest
from devkit import HEIGHT, LISTS, WIDTH, mask_of, sbd_mask_of, write_devkit, write_sbd
from PIL import Image
from scipy.io import savemat

from wsss.data import DataError
from wsss.data.sbd import prepare, read_mat
from wsss.data.voc import VOC2012, check


@pytest.fixture
def voc(tmp_path):
    """The VOC2012 folder of a devkit as it is unpacked, without additional masks or their list, beside SBD."""
    path = write_devkit(tmp_path / "tiny")
    for file in (path / "SegmentationClassAug").iterdir():
        file.unlink()
    (path / "SegmentationClassAug").rmdir()
    (path / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    write_sbd(tmp_path / "tiny")
    return path


@pytest.fixture
def root(voc):
    return voc.parents[1]


@pytest.fixture
def mats(root):
    return root / "benchmark_RELEASE" / "dataset" / "cls"


def aug(voc):
    return voc / "SegmentationClassAug"


def test_train_aug_is_sbd_and_train_without_val(voc, root):
    lines = prepare(root, workers=1)
    assert lines == ["train_aug: 3 images (officially 10,582); 3 masks made now"]
    assert (voc / "ImageSets" / "Segmentation" / "train_aug.txt").read_text() == "a1\na2\na3\n"
    data = {sample.name: sample.mask.numpy() for sample in VOC2012(root, "train_aug")}
    assert list(data) == LISTS["train_aug"]
    np.testing.assert_array_equal(data["a1"], mask_of("a1", "SegmentationClass"))  # VOC's own, though SBD has one
    np.testing.assert_array_equal(data["a2"], mask_of("a2", "SegmentationClass"))
    np.testing.assert_array_equal(data["a3"], sbd_mask_of("a3"))
    assert not (aug(voc) / "b2.png").exists(), "SBD's mask of an image of val is left out"
    with Image.open(aug(voc) / "a3.png") as image:
        assert image.mode == "P"
    assert check(root).problems == ()


@pytest.mark.parametrize("part", ["", "benchmark_RELEASE", "benchmark_RELEASE/dataset"])
def test_sbd_may_lie_elsewhere(voc, root, tmp_path, part):
    (root / "benchmark_RELEASE").rename(tmp_path / "benchmark_RELEASE")
    prepare(voc, sbd=tmp_path / part, workers=1)
    assert len(VOC2012(root, "train_aug")) == 3


def test_goes_on_where_it_was_stopped(voc, root):
    prepare(root, workers=1)
    (aug(voc) / "a1.png").write_bytes(b"left as it is")
    (aug(voc) / "a3.png").unlink()
    seen = []
    lines = prepare(root, workers=1, progress=lambda items: seen.extend(items) or items)
    assert seen == ["a3"] and lines == ["train_aug: 3 images (officially 10,582); 1 masks made now"]
    assert (aug(voc) / "a1.png").read_bytes() == b"left as it is"
    np.testing.assert_array_equal(VOC2012(root, "train_aug")[2].mask, sbd_mask_of("a3"))


def test_a_stopped_preparation_never_passes_for_a_smaller_train_aug(voc, root, mats):
    (mats / "a3.mat").write_bytes(b"")
    with pytest.raises(DataError, match="a3.mat"):
        prepare(root, workers=1)
    assert sorted(file.name for file in aug(voc).iterdir()) == ["a1.png", "a2.png"]
    with pytest.raises(DataError, match="a3.png: missing"):
        VOC2012(root, "train_aug")


def test_a_list_that_is_there_is_followed(voc, root):
    listed = voc / "ImageSets" / "Segmentation" / "train_aug.txt"
    listed.write_text("a3\na2\n")
    prepare(root, workers=1)
    assert listed.read_text() == "a3\na2\n" and VOC2012(root, "train_aug").names == ["a3", "a2"]
    listed.write_text("a3\nc1\n")
    with pytest.raises(DataError, match=r"c1.mat: missing.*\(1 of 2 are without\)"):
        prepare(root, workers=1)


def test_without_sbd_three_remedies_are_named(voc, root, tmp_path):
    (root / "benchmark_RELEASE").rename(root / "elsewhere")
    with pytest.raises(DataError, match="cls: missing.*wsss data fetch sbd.*pass the folder.*SegmentationClassAug"):
        prepare(root, workers=1)
    assert not aug(voc).exists()


def test_a_full_disk_loses_nothing(voc, root, monkeypatch):
    (voc / "SegmentationClass" / "a2.png").rename(voc / "a2.png")
    with pytest.raises(DataError, match="a2.mat: missing, and VOC has no mask"):
        prepare(root, workers=1)
    (voc / "a2.png").rename(voc / "SegmentationClass" / "a2.png")
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    real, calls = __import__("os").replace, []

    def full_from_the_third_on(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.replace", full_from_the_third_on)
    with pytest.raises(DataError, match="the disk is full.*goes on from there"):
        prepare(root, workers=1)
    monkeypatch.undo()
    after = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert before.items() < after.items() and len(after) == len(before) + 2, "the list and one mask"
    prepare(root, workers=1)
    assert check(root).problems == ()


# -------------------------------------------------------------------------------------------------------- single files


def test_mat_file(mats):
    mask = read_mat(mats / "b2.mat")
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask, sbd_mask_of("b2"))


@pytest.mark.parametrize("keep", [0, 20, 100, 200, 300])
def test_damaged_mat_file(mats, keep):
    file = mats / "a3.mat"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{file}: field GTcls.Segmentation cannot be read") as caught:
        read_mat(file)
    assert caught.value.kind == "unreadable"


def test_every_damaged_byte_is_a_named_error_or_a_mask(mats):
    """Whatever scipy makes of a damaged file, no other exception comes out."""
    file = mats / "a3.mat"
    content = file.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(0, len(content), 200):
        file.write_bytes(content[:place] + bytes([rng.integers(256)]) + content[place + 1 :])
        try:
            assert read_mat(file).ndim == 2
        except DataError as error:
            refused += str(file) in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"GTinst": {"Segmentation": np.zeros((3, 3), np.uint8)}}, "KeyError: 'GTcls'"),
        ({"GTcls": {"Boundaries": np.zeros((3, 3), np.uint8)}}, "AttributeError"),
        ({"GTcls": {"Segmentation": np.full((3, 4), 21, np.uint8)}}, r"uint8 \(3, 4\); expected uint8 .* of 0..20"),
        ({"GTcls": {"Segmentation": np.zeros((3, 4, 3), np.uint8)}}, r"\(3, 4, 3\)"),
        ({"GTcls": {"Segmentation": np.zeros((3, 4))}}, "float64"),
        ({"GTcls": {"Segmentation": np.zeros((0, 4), np.uint8)}}, "Segmentation"),
        ({"GTcls": {"Segmentation": "text"}}, "Segmentation"),
    ],
)
def test_another_mat_file(tmp_path, fields, words):
    savemat(tmp_path / "other.mat", fields)
    with pytest.raises(DataError, match=f"other.mat: .*{words}"):
        read_mat(tmp_path / "other.mat")
