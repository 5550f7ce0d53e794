"""Files that are never half written."""

import json
import os

import pytest

from wsss.files import write_atomic, write_json


def test_text_and_bytes_in_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "text.md"
    assert write_atomic(path, "Fuß\n") == path
    assert path.read_bytes() == "Fuß\n".encode()
    assert write_atomic(str(path), b"\x00\xff").read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it"
    assert os.listdir(path.parent) == ["text.md"]


@pytest.mark.parametrize("broken", ["os.fdopen", "os.chmod", "os.replace"])
def test_old_content_stays_when_writing_fails_and_no_temporary_file_does(tmp_path, monkeypatch, broken):
    path = write_atomic(tmp_path / "record.json", "old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if broken == "os.fdopen":  # the disk is full in the middle of the content
        opened = os.fdopen

        def half(handle, mode):
            file = opened(handle, mode, buffering=0)
            return type("Full", (), {"__enter__": lambda s: s, "__exit__": lambda s, *_: file.close(), "write": fail})()

        monkeypatch.setattr(broken, half)
    else:
        monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match=r"record.json: cannot be written \(No space left on device\). What it held is"):
        write_atomic(path, "new content")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "record.json", "new")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("not a folder")  # denies even the superuser
    with pytest.raises(PermissionError, match=r"cannot write into the folder .*/file/runs \(.*\). Make it writable"):
        write_atomic(tmp_path / "file" / "runs" / "record.json", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_named_with_the_remedy(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"Permission denied\). Make it writable"):
        write_atomic(tmp_path / "record.json", "new")


def test_json_is_sorted_indented_and_ends_a_line(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    text = write_json(tmp_path / "value.json", value).read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n") and text.index('"a"') < text.index('"b"')


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        write_json(path, {"tensor": object()})
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["value.json"]
