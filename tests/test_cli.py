import hashlib
import tarfile

import numpy as np
import pytest
import torch
from devkit import write_coco, write_devkit, write_sbd
from PIL import Image

from wsss.cli import main
from wsss.data import fetch
from wsss.data.submission import write_submission
from wsss.data.voc import VOC2012

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_data_check_of_good_files(tmp_path, capsys):
    write_devkit(tmp_path / "tiny")
    assert main(["data", "check", "voc2012", "--root", str(tmp_path / "tiny")]) == 0
    out, err = capsys.readouterr()
    assert "a subset: 2 of 1,449" in out and "nothing is wrong" in out and "labels: Annotations" in out
    assert "reading" in err and "6/6" in err, "the progress bar is on stderr"


def test_data_check_of_bad_files(tmp_path, capsys):
    path = write_devkit(tmp_path)
    (path / "JPEGImages" / "b1.jpg").write_bytes(b"")
    assert main(["data", "check", "voc2012", "--root", str(path)]) == 1
    out, _ = capsys.readouterr()
    assert "unreadable: 1" in out and "b1.jpg" in out


def test_data_check_of_a_missing_folder(tmp_path, capsys):
    assert main(["data", "check", "voc2012", "--root", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "nowhere" in err and "data/README.md" in err


def test_data_check_looks_into_the_default_folder(tmp_path, capsys, monkeypatch):
    write_devkit(tmp_path)
    monkeypatch.setattr("wsss.data.voc.DEFAULT_ROOT", tmp_path)
    assert main(["data", "check", "voc2012"]) == 0


def test_data_check_lists_ten_of_a_kind_or_all(tmp_path, capsys):
    path = write_devkit(tmp_path)
    for number in range(12):
        (path / "SegmentationClass" / f"stray{number:02}.png").write_bytes(b"")
    for options, listed in (([], 10), (["--all"], 12)):
        assert main(["data", "check", "voc2012", "--root", str(path), *options]) == 1
        assert capsys.readouterr().out.count("stray") == listed


def test_data_check_passes_damaged_files_only_when_asked(tmp_path, capsys):
    path = write_devkit(tmp_path)
    (path / "JPEGImages" / "b1.jpg").write_bytes(b"")
    assert main(["data", "check", "voc2012", "--root", str(path), "--skip-unreadable"]) == 0
    out = capsys.readouterr().out
    assert "b1.jpg" in out and "1 unreadable files pass; skip_unreadable=True leaves their images out" in out
    (path / "SegmentationClass" / "stray.png").write_bytes(b"")
    assert main(["data", "check", "voc2012", "--root", str(path), "--skip-unreadable"]) == 1, "other faults do not pass"


def test_data_prepare_voc(tmp_path, capsys):
    path = write_devkit(tmp_path / "tiny")
    for file in (path / "SegmentationClassAug").iterdir():
        file.unlink()
    arguments = ["data", "prepare", "voc2012", "--root", str(tmp_path / "tiny"), "--workers", "1"]
    assert main(arguments) == 1
    assert "wsss data fetch sbd" in capsys.readouterr().err
    write_sbd(tmp_path / "sbd")
    assert main([*arguments, "--sbd", str(tmp_path / "sbd")]) == 0
    out, err = capsys.readouterr()
    assert "3 masks made now" in out and "3/3" in err
    assert main(["data", "check", "voc2012", "--root", str(tmp_path / "tiny")]) == 0


def test_data_prepare_and_check_coco(tmp_path, capsys):
    root = str(write_coco(tmp_path))
    assert main(["data", "check", "coco2014", "--root", root]) == 1
    assert "wsss data prepare coco2014" in capsys.readouterr().err
    assert main(["data", "prepare", "coco2014", "--root", root, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 without any of the 80 classes are left out: 2 images" in out and "3 masks made now" in out
    assert main(["data", "check", "coco2014", "--root", root]) == 0
    out, err = capsys.readouterr()
    assert "a subset: 2 of 82,081" in out and "nothing is wrong" in out and "3/3" in err


def test_data_prepare_into_a_folder_that_cannot_be_written(tmp_path, capsys):
    root = write_coco(tmp_path)
    (root / "masks").write_text("a file, which denies even the superuser")
    assert main(["data", "prepare", "coco2014", "--root", str(root), "--workers", "1"]) == 1
    assert "masks/train2014" in capsys.readouterr().err


def test_data_labels_and_check_of_an_own_folder(tmp_path, capsys):
    image = Image.fromarray(np.zeros((6, 8, 3), np.uint8))
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / "mine" / "images" / name).parent.mkdir(parents=True)
        image.save(tmp_path / "mine" / "images" / name)
    assert main(["data", "labels", str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert "image_labels.csv: written" in out and "classes.txt: written" in out and "nothing is wrong" in out
    (tmp_path / "mine" / "images" / "dog" / "2.jpg").unlink()
    assert main(["data", "check", "folder", "--root", str(tmp_path / "mine")]) == 1
    assert "missing: 1" in capsys.readouterr().out
    assert main(["data", "check", "folder"]) == 1
    assert "--root" in capsys.readouterr().err


def test_data_check_submission(tmp_path, capsys):
    path = write_devkit(tmp_path)
    (path / "ImageSets" / "Segmentation" / "test.txt").write_text("c1\n")
    file = write_submission(tmp_path / "out.tgz", VOC2012(path, "test"), [("c1", torch.zeros(16, 24).long())])
    assert main(["data", "check-submission", str(file), "--root", str(path)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["data", "check-submission", str(file)]) == 1
    assert "expected 1,456" in capsys.readouterr().out
    assert main(["data", "check-submission", str(tmp_path / "none.tar")]) == 1
    assert "none.tar: cannot be read" in capsys.readouterr().err


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder with a small devkit as the archive of VOC 2012."""
    write_devkit(tmp_path / "made")
    (tmp_path / "mirror").mkdir()
    file = tmp_path / "mirror" / "voc.tar"
    with tarfile.open(file, "w") as archive:
        archive.add(tmp_path / "made" / "VOCdevkit", "VOCdevkit")
    checksum = f"md5:{hashlib.md5(file.read_bytes()).hexdigest()}"
    archive = fetch.Archive("https://example.invalid/voc.tar", file.stat().st_size, checksum, ("VOCdevkit/",))
    monkeypatch.setitem(fetch.SOURCES, "voc2012", fetch.Source("tiny VOC", "example.invalid", "free", (archive,)))
    return file.parent


@pytest.mark.parametrize(("terminal", "answer", "fetched"), [(True, "y", True), (True, "", False), (False, "y", False)])
def test_data_fetch_states_the_terms_and_asks(tmp_path, mirror, capsys, monkeypatch, terminal, answer, fetched):
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    arguments = ["data", "fetch", "voc2012", "--root", str(tmp_path / "data"), "--source", str(mirror)]
    assert main(arguments) == (0 if fetched else 1)
    out, err = capsys.readouterr()
    assert out.index("licence  free") < out.index("voc.tar") and "GB" in out
    assert (tmp_path / "data" / "VOCdevkit").exists() == fetched and ("--yes" in err) != fetched


def test_data_fetch_with_yes(tmp_path, mirror, capsys):
    arguments = ["data", "fetch", "voc2012", "--root", str(tmp_path / "data"), "--source", str(mirror), "--yes"]
    assert main(arguments) == 0
    assert "files unpacked, 0 were there" in capsys.readouterr().out
    assert main(["data", "check", "voc2012", "--root", str(tmp_path / "data")]) == 0
    (mirror / "voc.tar").write_bytes(b"damaged")
    arguments[4] = str(tmp_path / "other")
    assert main(arguments) == 1
    assert "expected" in capsys.readouterr().err and not (tmp_path / "other" / "VOCdevkit").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["data"],
        ["data", "check"],
        ["data", "check", "cityscapes"],
        ["data", "fetch", "folder"],
        ["data", "prepare", "sbd"],
        ["data", "labels"],
        ["nonsense"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: wsss" in capsys.readouterr().err
