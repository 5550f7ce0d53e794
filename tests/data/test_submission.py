import io
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from devkit import HEIGHT, WIDTH, write_devkit
from PIL import Image

from wsss.data import DataError
from wsss.data.classes import palette
from wsss.data.reading import encode_mask
from wsss.data.submission import FOLDER, check_submission, write_submission
from wsss.data.voc import VOC2012

NAMES = ["c1", "c2"]


@pytest.fixture
def root(tmp_path):
    """A devkit with two test images."""
    voc = write_devkit(tmp_path / "tiny")
    (voc / "JPEGImages" / "c2.jpg").write_bytes((voc / "JPEGImages" / "c1.jpg").read_bytes())
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("c1\nc2\n")
    return tmp_path / "tiny"


@pytest.fixture
def data(root):
    return VOC2012(root, "test")


def prediction(value=20):
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
    mask[:4] = value
    return mask


def predictions():
    return [(name, prediction()) for name in NAMES]


def write_tar(file, members):
    """A tar of (name, content), content being bytes or None for a folder."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = (len(content), tarfile.REGTYPE) if content is not None else (0, tarfile.DIRTYPE)
            tar.addfile(member, io.BytesIO(content or b""))
    return file


def good(name, value=20):
    return str(FOLDER / f"{name}.png"), encode_mask(prediction(value).numpy().astype(np.uint8))


@pytest.mark.parametrize("name", ["out.tar", "out.tar.gz", "out.tgz"])
def test_what_is_written_is_what_the_server_takes(root, data, tmp_path, name):
    file = write_submission(tmp_path / "new" / name, data, iter(predictions()))
    with tarfile.open(file) as tar:
        assert tar.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in NAMES]
        with Image.open(tar.extractfile(tar.getmembers()[0])) as image:
            assert image.mode == "P" and image.size == (WIDTH, HEIGHT)
            np.testing.assert_array_equal(np.asarray(image), prediction())
            np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0, 0], palette(255)[20])
    report = check_submission(file, root)
    assert (report.images, report.compared, report.problems) == (2, True, ()) and "nothing is wrong" in str(report)
    assert [path.name for path in file.parent.iterdir()] == [name], "no temporary file stays"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([("c1", prediction())], "1 images have no prediction, e.g. c2"),
        ([("c1", prediction()), ("c1", prediction())], "c1 is not in split test, or was predicted twice"),
        ([("b1", prediction())], "b1 is not in split test"),
        ([("c1", prediction().T)], r"\(24, 16\) with values 0..20; expected \(16, 24\)"),
        ([("c1", prediction(21))], "values 0..21; expected"),
        ([("c1", prediction(255))], "values 0..255; expected"),
        ([("c1", prediction(-1))], "values -1..0; expected"),
    ],
)
def test_wrong_predictions_leave_the_archive_that_is_there(data, tmp_path, changed, words):
    file = write_submission(tmp_path / "new" / "out.tgz", data, predictions())
    before = file.read_bytes()
    with pytest.raises(ValueError, match=words):
        write_submission(file, data, changed)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_another_suffix(data, tmp_path):
    with pytest.raises(ValueError, match=r"out.zip: the server takes .tar, .gz, .tgz"):
        write_submission(tmp_path / "out.zip", data, predictions())


def test_a_full_disk_loses_nothing(data, tmp_path, monkeypatch):
    file = write_submission(tmp_path / "new" / "out.tar", data, predictions())
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match="the disk is full"):
        write_submission(file, data, predictions())
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("members", "kind", "words"),
    [
        ([good("c1")], "missing", "1 images are missing, e.g. c2"),
        ([good("c1"), good("c2"), good("c2")], "list", "c2 is there 2 times"),
        ([good("c1"), good("c2"), good("b1")], "surplus", "b1.png: is no image of split test"),
        ([good("c1"), good("c2"), ("notes.txt", b"")], "surplus", "notes.txt: only results/VOC2012"),
        ([good("c1"), good("c2"), ("comp6_test_cls/c2.png", good("c2")[1])], "surplus", "only results/VOC2012"),
        ([good("c1"), good("c2", 21)], "values", "holds the value 21"),
        ([good("c1"), good("c2", 255)], "values", "holds the value 255.*no void"),
        ([good("c1"), (good("c2")[0], encode_mask(np.zeros((3, 5), np.uint8)))], "size", "5x3 pixels, its image 24x16"),
        ([good("c1"), (good("c2")[0], good("c2")[1][:-30])], "unreadable", "c2.png: cannot be decoded"),
        ([good("c1"), (good("c2")[0], b"GIF")], "unreadable", "c2.png: cannot be decoded"),
    ],
)
def test_check_names_what_is_wrong(root, tmp_path, members, kind, words):
    report = check_submission(write_tar(tmp_path / "out.tar", members), root)
    assert [problem.kind for problem in report.problems] == [kind]
    with pytest.raises(DataError, match=words):
        raise report.problems[0]
    assert "wrong: 1" in str(report) and str(report.problems[0]) in str(report)


def test_colours_instead_of_indices(root, tmp_path):
    content = io.BytesIO()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(content, "PNG")
    report = check_submission(write_tar(tmp_path / "out.tar", [good("c1"), (good("c2")[0], content.getvalue())]), root)
    assert str(report.problems[0]).endswith("has mode RGB, not P: a palette PNG of class indices.")


def test_folders_in_the_archive_are_fine(root, tmp_path):
    folders = [(str(folder), None) for folder in reversed(FOLDER.parents) if folder.name]
    assert not check_submission(write_tar(tmp_path / "out.tar", [*folders, good("c1"), good("c2")]), root).problems


def test_without_a_devkit_the_number_is_checked(tmp_path):
    file = write_tar(tmp_path / "out.tar", [good("c1"), good("c2")])
    report = check_submission(file)
    assert [problem.kind for problem in report.problems] == ["count"] and "2 images, expected 1,456" in str(report)
    assert not report.compared and "are not compared" in str(report)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"\x1f\x8b" + b"0" * 40])
def test_no_archive(tmp_path, content):
    file = tmp_path / "out.tar"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match="out.tar: cannot be read as a tar archive"):
        check_submission(file)


def test_truncated_archive(root, data, tmp_path):
    file = write_submission(tmp_path / "out.tgz", data, predictions())
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match="cannot be read as a tar archive"):
        check_submission(file, root)


def test_memory_does_not_grow_with_the_archive(tmp_path):
    def peak(count):
        noise = np.random.default_rng(0).integers(0, 21, (200, 300), np.uint8)
        content = encode_mask(noise)
        file = write_tar(tmp_path / f"{count}.tar", [(str(FOLDER / f"{i}.png"), content) for i in range(count)])
        tracemalloc.start()
        check_submission(file)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, len(content)

    (few, one), (many, _) = peak(5), peak(100)
    assert many - few < 10 * one, "95 more images of this size were read"
