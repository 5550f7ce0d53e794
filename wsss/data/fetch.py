"""Fetching the public datasets from their own hosts: resumed where it was cut off, checked, and unpacked.

A folder `.fetch` in the data folder holds what is under way: NAME.part while an archive comes in, NAME once it is whole
and its checksum is right, NAME.done after it was unpacked, when the archive itself is removed.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

from wsss.data import DataError
from wsss.data.reading import naming_full_disk
from wsss.files import write_atomic

CHUNK = 1 << 20
MIRROR = "Name a mirror with --source."
RETRIES = 6  # in a row without a byte between them; the pauses are 1, 2, 4, ... seconds
TIMEOUT = 60


@dataclass(frozen=True)
class Archive:
    """One file to fetch.

    Attributes:
        url: where its publisher has it.
        size: in bytes.
        checksum: algorithm:hexadecimal digits.
        wanted: paths in it, or beginnings of paths, that are unpacked.
    """

    url: str
    size: int
    checksum: str
    wanted: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A dataset: what it is called, where it is described, on which terms it may be used, its archives."""

    title: str
    home: str
    licence: str
    archives: tuple[Archive, ...]


# The hosts publish no checksums. Those of VOC and SBD are the ones torchvision checks; those of COCO, with the sizes,
# and the size of VOC are from TensorFlow Datasets.
COCO_HOST = "http://images.cocodataset.org"  # its certificate is that of the storage behind it, so https fails
SOURCES = {
    "voc2012": Source(
        "PASCAL VOC 2012, train and val",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        "photographs from Flickr, to be used according to Flickr's terms of use",
        (
            Archive(
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                1_999_639_040,
                "md5:6cd6e144f989b92b3379bac3b3de84fd",
                ("VOCdevkit/",),
            ),
        ),
    ),
    "sbd": Source(
        "Semantic Boundaries Dataset: the additional masks of VOC",
        "http://home.bharathh.info/pubs/codes/SBD/download.html",
        "none stated; its authors ask to cite Hariharan et al., ICCV 2011",
        (
            Archive(
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
                1_419_539_633,
                "md5:82b4d87ceb2ed10f6038a1cba92111cb",
                ("benchmark_RELEASE/dataset/cls/",),  # its images are VOC's
            ),
        ),
    ),
    "coco2014": Source(
        "COCO 2014, train and val",
        "https://cocodataset.org/#termsofuse",
        "annotations CC BY 4.0; photographs from Flickr, to be used according to Flickr's terms of use",
        (
            Archive(
                f"{COCO_HOST}/annotations/annotations_trainval2014.zip",
                252_872_794,
                "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
                ("annotations/instances_train2014.json", "annotations/instances_val2014.json"),
            ),
            Archive(
                f"{COCO_HOST}/zips/train2014.zip",
                13_510_573_713,
                "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
                ("train2014/",),
            ),
            Archive(
                f"{COCO_HOST}/zips/val2014.zip",
                6_645_013_297,
                "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                ("val2014/",),
            ),
        ),
    ),
}


def announce(name: str, root: Path, mirror: str | None = None) -> str:
    """What `fetch` is about to do: terms, sizes, from where, to where."""
    source = SOURCES[name]
    lines = [source.title, f"  see      {source.home}", f"  licence  {source.licence}", f"  to       {root}"]
    for archive in source.archives:
        state = "unpacked here before" if _done(root, archive).exists() else f"{archive.size / 1e9:.2f} GB"
        lines.append(f"  from     {_address(archive, mirror)} ({state})")
    return "\n".join(lines)


def fetch(name: str, root: str | Path, mirror: str | None = None, progress: bool = True) -> list[str]:
    """Fetch, check and unpack a dataset; given again, it goes on where it was stopped.

    Nothing that is there is ever overwritten: a file of the archive whose path is taken stays in the archive.

    Args:
        name: one of `SOURCES`.
        root: the data folder, e.g. data/voc2012.
        mirror: another place that has the same archives under the same names: the URL of a folder, or a folder on disk,
            where they stay.
        progress: show bars.

    Returns:
        Lines for people about each archive.

    Raises:
        DataError: an archive cannot be had, is another one than expected, or would leave `root`; the disk is full;
            another fetch into `root` is running.
    """
    root = Path(root)
    with naming_full_disk(root), _alone(root):
        return [line for archive in SOURCES[name].archives for line in _fetch(archive, root, mirror, progress)]


def _fetch(archive: Archive, root: Path, mirror: str | None, progress: bool) -> Iterator[str]:
    done = _done(root, archive)
    if done.exists():
        yield f"{archive.name}: was unpacked here before; to do it again, remove {done}"
        return
    place = _address(archive, mirror)
    fetched = root / ".fetch" / archive.name
    if isinstance(place, Path):
        file = place
        _verify(file, archive, progress)
    else:
        file = fetched
        if not file.exists():
            part = file.with_name(f"{file.name}.part")
            _download(place, part, archive, progress)
            _verify(part, archive, progress)
            part.rename(file)
    new, kept, other = _unpack(file, archive, root, progress)
    write_atomic(done, f"{archive.checksum}\n{new + kept} files\n")
    fetched.unlink(missing_ok=True)
    yield f"{archive.name}: {new:,} files unpacked, {kept:,} were there"
    if other:
        yield f"  {len(other):,} of those have another size than in the archive and were left alone, e.g. {other[0]}"


def _done(root: Path, archive: Archive) -> Path:
    return root / ".fetch" / f"{archive.name}.done"


def _address(archive: Archive, mirror: str | None) -> str | Path:
    if mirror is None:
        return archive.url
    return f"{mirror.rstrip('/')}/{archive.name}" if "://" in mirror else Path(mirror) / archive.name


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of a data folder."""
    try:
        (root / ".fetch").mkdir(parents=True, exist_ok=True)
        lock = (root / ".fetch" / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"{root}: cannot be written ({error.strerror}). Make it writable, or pass another folder with --root.",
            "disk",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{root}: another fetch into this folder is running. Wait for it.", "disk") from None
        yield


# -------------------------------------------------------------------------------------------------------- downloading


class _Broken(Exception):
    """A connection that failed in a way that may pass."""


def _download(url: str, part: Path, archive: Archive, progress: bool) -> None:
    """Bring `part` to the full size, from the size that it has."""
    _require_space(part, archive)
    failures = 0
    with _bar(archive.name, archive.size, _size(part), progress) as bar:
        while (before := _size(part)) < archive.size:
            try:
                _append(url, part, archive, bar)
            except _Broken as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures > RETRIES:
                    raise DataError(
                        f"{url}: {error}; {_size(part):,} of {archive.size:,} bytes are here. Give the same command "
                        "again to go on, or name a mirror with --source.",
                        "network",
                    ) from error
                time.sleep(2 ** (failures - 1))


def _append(url: str, part: Path, archive: Archive, bar: tqdm) -> None:
    """One request for what is missing; raises `_Broken` where the answer ends too early."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with _open(request) as response:
        total, first = _extent(response)
        if total not in (None, archive.size):
            raise DataError(f"{url}: has {total:,} bytes, expected {archive.size:,}. {MIRROR}", "size")
        if first not in (0, start):
            raise _Broken(f"the server sends bytes from {first:,} on, asked for {start:,}")
        resumed = first == start
        bar.update((start if resumed else 0) - bar.n)
        with part.open("ab" if resumed else "wb") as file:  # a server that knows no ranges sends all of it again
            while _size(part) <= archive.size:
                chunk = _read(response)
                if not chunk:
                    break
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
    if _size(part) < archive.size:
        raise _Broken("the connection ended early")


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code >= 500 or error.code in (408, 429):
            raise _Broken(f"the server answers {error.code} {error.reason}") from error
        answer = f"the server answers {error.code} {error.reason}"
        raise DataError(f"{request.full_url}: {answer}. {MIRROR}", "network") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error)) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error)) from error


def _extent(response: http.client.HTTPResponse) -> tuple[int | None, int]:
    """Size of the whole file, where the server says it, and the first byte of this answer."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found:
            raise _Broken("the server's Content-Range cannot be understood")
        return None if found[2] == "*" else int(found[2]), int(found[1])
    length = response.headers.get("Content-Length")
    return int(length) if length else None, 0


def _require_space(part: Path, archive: Archive) -> None:
    """The rest of the archive and about as much again for what is unpacked."""
    free, needed = shutil.disk_usage(part.parent).free, 2 * archive.size - _size(part)
    if free < needed:
        raise DataError(
            f"{part.parent}: {free / 1e9:.2f} GB are free, {archive.name} and its content need {needed / 1e9:.2f}. "
            "Make room, or pass another folder with --root.",
            "disk",
        )


def _verify(file: Path, archive: Archive, progress: bool) -> None:
    """Compare size and checksum; a wrong one that was downloaded is removed, so that the next call starts afresh."""
    if not file.is_file():
        raise DataError(f"{file}: missing. Put the archive there, or fetch it from {archive.url}.", "missing")
    algorithm, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as content, _bar(f"checking {archive.name}", _size(file), 0, progress) as bar:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        remedy = "It is left as it is; name another --source."
        if file.suffix == ".part":
            file.unlink()
            remedy = "It was removed; give the same command again, or name a mirror with --source."
        raise DataError(
            f"{file}: its {algorithm} is {digest.hexdigest()}, expected {expected}, so it is damaged or another file. "
            f"{remedy}",
            "checksum",
        )


def _bar(label: str, total: int, initial: int, progress: bool) -> tqdm:
    return tqdm(
        desc=label, total=total, initial=initial, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# ---------------------------------------------------------------------------------------------------------- unpacking


def _unpack(file: Path, archive: Archive, root: Path, progress: bool) -> tuple[int, int, list[Path]]:
    """Unpack what is wanted and not there yet.

    Returns:
        Number of files unpacked, number of files that were there, and those of them that have another size.
    """
    new, kept, other = 0, 0, []
    for path, size, content in tqdm(_members(file), desc=f"unpacking {file.name}", unit="file", disable=not progress):
        if not path.startswith(archive.wanted):
            continue
        target = root / _inside(path, file)
        if not target.exists():
            _write(target, content)
            new += 1
            continue
        kept += 1
        if target.stat().st_size != size:
            other.append(target)
    return new, kept, other


def _members(file: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    """Path, size and content of each regular file of a tar or zip archive; links and devices are passed over.

    Each is written under a path that `_inside` has checked, so nothing is left for tarfile's own filters to refuse.
    """
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as content:
                        yield entry.filename, entry.file_size, content
    else:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name.removeprefix("./"), member.size, archive.extractfile(member)


def _inside(path: str, file: Path) -> Path:
    """The path of a member, which must stay in the folder it is unpacked in."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
        raise DataError(
            f"{file}: its member {path!r} would be written outside of the data folder. Do not use this archive.",
            "values",
        )
    return Path(*parts.parts)


def _write(target: Path, content: BinaryIO) -> None:
    """Write a member under a temporary name, then give it its own, so that a file that is there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
        os.chmod(temporary, 0o644)
        os.rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
