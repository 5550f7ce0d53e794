import fcntl
import hashlib
import http.client
import io
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from devkit import write_coco, write_devkit, write_sbd

from wsss.data import DataError, coco, fetch, sbd, voc

CONTENT = np.random.default_rng(0).bytes(300_000)  # does not compress: archives have about this size


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges; `server.script` holds what goes wrong with the next answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.path.rpartition("/")[2], asked))
        fault = server.script.pop(0) if server.script else {}
        content = server.files.get(self.path.lstrip("/"))
        if content is None or "status" in fault:
            self.send_error(fault.get("status", 404))
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        start += fault.get("shift", 0)
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: fault.get("cut")])
        if "cut" in fault:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `address` is its URL."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: http_server.pauses.append(seconds))
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.files, http_server.script, http_server.log, http_server.pauses = {}, [], [], []
    http_server.ranges, http_server.address = True, f"http://127.0.0.1:{http_server.server_port}"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http_server
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def tar(members):
    """The bytes of a tar of (path, bytes or link target)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path, data in members:
            member = tarfile.TarInfo(path)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def archive_of(content, name, wanted=("VOCdevkit/",), algorithm="md5"):
    checksum = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
    return fetch.Archive(f"https://example.invalid/{name}", len(content), checksum, wanted)


def offer(monkeypatch, server, members=None, name="voc2012"):
    """Serve a tar as the only archive of a dataset; returns its bytes."""
    content = tar(members or [("VOCdevkit/VOC2012/big.bin", CONTENT), ("VOCdevkit/VOC2012/small.txt", b"small")])
    server.files["data.tar"] = content
    archives = (archive_of(content, "data.tar"),)
    monkeypatch.setitem(fetch.SOURCES, name, fetch.Source("tiny", "example.invalid", "free", archives))
    return content


def get(root, server, name="voc2012"):
    return fetch.fetch(name, root, server.address, progress=False)


def files(root):
    """Path -> content of everything but what belongs to `fetch` itself."""
    found = [file for file in root.rglob("*") if file.is_file() and ".fetch" not in file.parts]
    return {str(file.relative_to(root)): file.read_bytes() for file in found}


WHOLE = {"VOCdevkit/VOC2012/big.bin": CONTENT, "VOCdevkit/VOC2012/small.txt": b"small"}

# ---------------------------------------------------------------------------------------------------- datasets, whole


def test_voc_and_sbd_from_nothing_to_a_dataset(tmp_path, server, monkeypatch):
    home, root = tmp_path / "made", tmp_path / "data"
    path = write_devkit(home)
    shutil.rmtree(path / "SegmentationClassAug")
    (path / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    (write_sbd(home) / "img").mkdir()
    (home / "benchmark_RELEASE" / "dataset" / "img" / "a1.jpg").write_bytes(b"not needed")
    for key, name, mode, folder in (
        ("voc2012", "voc.tar", "w", "VOCdevkit"),
        ("sbd", "sbd.tgz", "w:gz", "benchmark_RELEASE"),
    ):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(home / folder, folder)
        server.files[name] = (tmp_path / name).read_bytes()
        wanted = fetch.SOURCES[key].archives[0].wanted
        source = fetch.Source(key, "", "", (archive_of(server.files[name], name, wanted),))
        monkeypatch.setitem(fetch.SOURCES, key, source)
        fetch.fetch(key, root, server.address, progress=False)
    assert not (root / "benchmark_RELEASE" / "dataset" / "img").exists(), "SBD's photographs are VOC's"
    sbd.prepare(root, workers=1)
    assert voc.check(root).problems == () and len(voc.VOC2012(root, "train_aug")) == 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_from_nothing_to_a_dataset(tmp_path, server, monkeypatch):
    home, root, archives = write_coco(tmp_path / "made"), tmp_path / "data", []
    (home / "annotations" / "captions_train2014.json").write_text("not needed")
    for archive in fetch.SOURCES["coco2014"].archives:
        folder = archive.wanted[0].partition("/")[0]
        with zipfile.ZipFile(tmp_path / archive.name, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted((home / folder).iterdir()):
                packed.write(file, file.relative_to(home))
        server.files[archive.name] = (tmp_path / archive.name).read_bytes()
        archives.append(archive_of(server.files[archive.name], archive.name, archive.wanted, "sha256"))
    monkeypatch.setitem(fetch.SOURCES, "coco2014", fetch.Source("coco", "", "", tuple(archives)))
    lines = fetch.fetch("coco2014", root, server.address, progress=False)
    assert [line.split(":")[1] for line in lines] == [f" {n} files unpacked, 0 were there" for n in (2, 3, 2)]
    assert not (root / "annotations" / "captions_train2014.json").exists()
    coco.prepare(root, workers=1)
    assert coco.check(root).problems == ()


def test_second_fetch_does_nothing(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    assert get(tmp_path, server) == ["data.tar: 2 files unpacked, 0 were there"]
    assert files(tmp_path) == WHOLE and len(server.log) == 1
    assert sorted(file.name for file in (tmp_path / ".fetch").iterdir()) == [".lock", "data.tar.done"]
    [line] = get(tmp_path, server)
    assert "was unpacked here before" in line and "data.tar.done" in line and len(server.log) == 1


def test_progress_bars_are_on_stderr(tmp_path, server, monkeypatch, capsys):
    offer(monkeypatch, server)
    fetch.fetch("voc2012", tmp_path, server.address)
    out, err = capsys.readouterr()
    assert not out and all(word in err for word in ("data.tar: 100%", "checking data.tar", "unpacking data.tar"))


def test_table_of_sources():
    """Sizes and checksums as they are published elsewhere; see the comment there."""
    assert list(fetch.SOURCES) == ["voc2012", "sbd", "coco2014"]
    archives = {archive.name: archive for source in fetch.SOURCES.values() for archive in source.archives}
    assert archives["VOCtrainval_11-May-2012.tar"].checksum == "md5:6cd6e144f989b92b3379bac3b3de84fd"
    assert sum(archive.size for archive in fetch.SOURCES["coco2014"].archives) == 20_408_459_804
    for archive in archives.values():
        algorithm, digits = archive.checksum.split(":")
        assert len(bytes.fromhex(digits)) == hashlib.new(algorithm).digest_size
        assert archive.wanted and archive.url.startswith("http")
    assert all(source.licence and source.home for source in fetch.SOURCES.values())


def test_announcement_says_terms_and_sizes(tmp_path, server, monkeypatch):
    text = fetch.announce("coco2014", tmp_path)
    for word in ("CC BY 4.0", "Flickr", "13.51 GB", "6.65 GB", "0.25 GB", "images.cocodataset.org", str(tmp_path)):
        assert word in text
    offer(monkeypatch, server)
    get(tmp_path, server)
    assert "unpacked here before" in fetch.announce("voc2012", tmp_path)
    assert f"{server.address}/data.tar" in fetch.announce("voc2012", tmp_path, server.address + "/")


# ----------------------------------------------------------------------------------------------- connections that fail


def test_broken_connection_is_taken_up_where_it_broke(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    server.script = [{"cut": 100_000}, {"cut": 50_000}, {"status": 503}, {"cut": 0}]
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE
    assert [asked for _, asked in server.log] == [None, "bytes=100000-", *["bytes=150000-"] * 3]
    assert server.pauses == [1, 1, 2, 4] and len(content) > 300_000


def test_killed_fetch_goes_on(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    read, reads = http.client.HTTPResponse.read, []

    def killed(response, amount=None):
        if reads:
            raise KeyboardInterrupt
        reads.append(amount)
        return read(response, 120_000)

    monkeypatch.setattr(http.client.HTTPResponse, "read", killed)
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, server)
    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    assert (tmp_path / ".fetch" / "data.tar.part").read_bytes() == content[:120_000] and files(tmp_path) == {}
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and server.log[-1] == ("data.tar", "bytes=120000-")


def test_server_without_ranges_starts_over(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    server.ranges, server.script = False, [{"cut": 100_000}]
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and len(server.log) == 2


def test_server_that_answers_with_another_range_is_asked_again(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    server.script = [{"cut": 100_000}, {"shift": 7}]
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and len(server.log) == 3


def test_gives_up_in_the_end_and_goes_on_another_time(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    server.script = [{"cut": 100_000}] + [{"cut": 0}] * fetch.RETRIES
    with pytest.raises(DataError, match=rf"100,000 of {len(content):,} bytes are here. Give the same") as caught:
        get(tmp_path, server)
    assert caught.value.kind == "network" and server.pauses == [2**n for n in range(fetch.RETRIES)]
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and server.log[-1] == ("data.tar", "bytes=100000-")


def test_no_server(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=f"127.0.0.1:{port}/data.tar: .*refused.*0 of .* --source"):
        fetch.fetch("voc2012", tmp_path, f"http://127.0.0.1:{port}", progress=False)


@pytest.mark.parametrize("status", [403, 404, 416])
def test_refusals_are_not_repeated(tmp_path, server, monkeypatch, status):
    offer(monkeypatch, server)
    server.script = [{"status": status}]
    with pytest.raises(DataError, match=rf"data.tar: the server answers {status} .*--source"):
        get(tmp_path, server)
    assert len(server.log) == 1


# -------------------------------------------------------------------------------------------------------- wrong content


def test_file_of_another_size_is_refused_before_it_is_fetched(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    server.files["data.tar"] += b"more"
    with pytest.raises(DataError, match=rf"has {len(content) + 4:,} bytes, expected {len(content):,}"):
        get(tmp_path, server)
    assert not (tmp_path / ".fetch" / "data.tar.part").exists()


def test_wrong_checksum_is_told_and_the_next_call_starts_afresh(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    server.files["data.tar"] = content[:-1] + b"x"
    with pytest.raises(DataError, match=r"data.tar.part: its md5 is \w{32}, expected \w{32}.*It was removed") as caught:
        get(tmp_path, server)
    assert caught.value.kind == "checksum" and files(tmp_path) == {}
    server.files["data.tar"] = content
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and server.log[-1] == ("data.tar", None)


def test_damaged_partial_file_is_found_out(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    part = tmp_path / ".fetch" / "data.tar.part"
    part.parent.mkdir()
    part.write_bytes(bytes(1000))
    with pytest.raises(DataError, match="expected"):
        get(tmp_path, server)
    assert server.log == [("data.tar", "bytes=1000-")] and not part.exists()
    part.write_bytes(content + b"too long")
    with pytest.raises(DataError, match="expected"):
        get(tmp_path, server)
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE


def test_archives_in_a_folder_stay_there(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with pytest.raises(DataError, match="mirror/data.tar: missing. Put the archive there, or fetch it from"):
        fetch.fetch("voc2012", tmp_path / "data", str(mirror), progress=False)
    (mirror / "data.tar").write_bytes(content[:-1])
    with pytest.raises(DataError, match="left as it is"):
        fetch.fetch("voc2012", tmp_path / "data", str(mirror), progress=False)
    (mirror / "data.tar").write_bytes(content)
    fetch.fetch("voc2012", tmp_path / "data", str(mirror), progress=False)
    assert files(tmp_path / "data") == WHOLE and (mirror / "data.tar").read_bytes() == content and not server.log


@pytest.mark.parametrize("path", ["VOCdevkit/../../evil", "VOCdevkit/..", "VOCdevkit/a\\..\\evil", "VOCdevkit/c:evil"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_would_leave_the_folder_are_refused(tmp_path, server, monkeypatch, kind, path):
    content = io.BytesIO(tar([(path, b"evil")]) if kind == "tar" else b"")
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as packed:
            packed.writestr(zipfile.ZipInfo(path), b"evil")
    name = f"data.{kind}"
    server.files[name] = content.getvalue()
    archives = (archive_of(server.files[name], name),)
    monkeypatch.setitem(fetch.SOURCES, "voc2012", fetch.Source("", "", "", archives))
    with pytest.raises(DataError, match="would be written outside of the data folder"):
        get(tmp_path / "data", server)
    assert files(tmp_path / "data") == {} and [file.name for file in tmp_path.iterdir()] == ["data"]


def test_links_and_what_is_not_wanted_are_passed_over(tmp_path, server, monkeypatch):
    members = [("VOCdevkit/link", "/etc"), ("/etc/evil", b""), ("other/file", b""), ("./VOCdevkit/a", b"a")]
    offer(monkeypatch, server, members)
    assert get(tmp_path, server) == ["data.tar: 1 files unpacked, 0 were there"]
    assert files(tmp_path) == {"VOCdevkit/a": b"a"} and not (tmp_path / "VOCdevkit" / "link").is_symlink()


# ------------------------------------------------------------------------------------------ what is there is never lost


def test_files_that_are_there_are_never_overwritten(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    mine = tmp_path / "VOCdevkit" / "VOC2012" / "small.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own, longer")
    (mine.parent / "other.txt").write_text("mine too")
    lines = get(tmp_path, server)
    assert lines[0] == "data.tar: 1 files unpacked, 1 were there"
    assert "1 of those have another size" in lines[1] and str(mine) in lines[1]
    kept = {"VOCdevkit/VOC2012/small.txt": b"my own, longer", "VOCdevkit/VOC2012/other.txt": b"mine too"}
    assert files(tmp_path) == WHOLE | kept


def test_full_disk_while_fetching(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    monkeypatch.setattr(fetch, "CHUNK", 40_000)
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 100_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def limited(path, mode="r", *rest, **options):
        return Full(path, mode) if path.suffix == ".part" and "r" not in mode else opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(DataError, match=f"{tmp_path}: the disk is full .*Make room.*goes on from there") as caught:
        get(tmp_path, server)
    assert caught.value.kind == "disk" and len(server.log) == 1, "a full disk is no broken connection"
    assert (tmp_path / ".fetch" / "data.tar.part").read_bytes() == content[:80_000]
    monkeypatch.setattr(Path, "open", opened)
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE and server.log[-1] == ("data.tar", "bytes=80000-")


def test_full_disk_while_unpacking(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    copy, calls = shutil.copyfileobj, []

    def full_at_the_second(source, target, length):
        calls.append(target)
        target.write(b"half of it")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        target.seek(0)
        copy(source, target, length)

    monkeypatch.setattr("shutil.copyfileobj", full_at_the_second)
    with pytest.raises(DataError, match="the disk is full"):
        get(tmp_path, server)
    monkeypatch.undo()
    assert list(files(tmp_path)) == ["VOCdevkit/VOC2012/big.bin"], "whole files only, no temporary one"
    assert (tmp_path / ".fetch" / "data.tar").is_file() and not (tmp_path / ".fetch" / "data.tar.done").exists()
    offer(monkeypatch, server)
    assert get(tmp_path, server) == ["data.tar: 1 files unpacked, 1 were there"]
    assert files(tmp_path) == WHOLE and len(server.log) == 1, "the archive was there, and was not fetched again"


def test_too_little_space_is_told_before_anything_is_fetched(tmp_path, server, monkeypatch):
    content = offer(monkeypatch, server)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * len(content) - 1))
    with pytest.raises(DataError, match="data.tar and its content need .* Make room, or pass another folder"):
        get(tmp_path, server)
    assert not server.log


def test_a_folder_that_cannot_be_written_is_named(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    (tmp_path / "data").write_text("a file, which denies even the superuser")
    with pytest.raises(DataError, match=rf"{tmp_path / 'data'}: cannot be written .*Make it writable.*--root"):
        get(tmp_path / "data", server)
    assert (tmp_path / "data").read_text().startswith("a file") and not server.log


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_named(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied"):
        get(tmp_path, server)


def test_two_fetches_into_one_folder(tmp_path, server, monkeypatch):
    offer(monkeypatch, server)
    (tmp_path / ".fetch").mkdir()
    with (tmp_path / ".fetch" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another fetch into this folder is running"):
            get(tmp_path, server)
    get(tmp_path, server)
    assert files(tmp_path) == WHOLE
