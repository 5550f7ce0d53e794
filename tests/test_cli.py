import pytest
from devkit import write_devkit

from wsss.cli import main


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


@pytest.mark.parametrize("arguments", [[], ["data"], ["data", "check"], ["data", "check", "cityscapes"], ["nonsense"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: wsss" in capsys.readouterr().err
