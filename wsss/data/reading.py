"""Images, masks and label tables on disk, and datasets made of them; what VOC 2012, COCO 2014 and own folders share."""

import contextlib
import csv
import errno
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from wsss.data import DATASETS, DataError, Sample
from wsss.data.classes import palette
from wsss.engines import cores

VOID = 255
LABEL_TABLE = "image_labels.csv"
HEADER = ("image_id", "split", "classes")

# ------------------------------------------------------------------------------------------------------ images, masks


def _decode(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are cut off or damaged
        raise DataError(f"{file}: cannot be decoded ({error}). Unpack this file again from its archive.") from error
    return image


def read_image(file: Path) -> Tensor:
    """Read a photograph as uint8 (3, H, W), RGB.

    Raises:
        DataError: the file is damaged or cut off.
    """
    # Reordered by numpy: for small arrays torch would spend more time on waking its threads than on the copy.
    return torch.from_numpy(np.asarray(_decode(file).convert("RGB")).transpose(2, 0, 1).copy())


def read_mask(file: Path, num_classes: int) -> Tensor:
    """Read the indices of a palette (or plain grey) mask as int64 (H, W): 0 background, 1..C class, 255 void.

    Raises:
        DataError: the file is damaged, has colours instead of indices, or holds another value.
    """
    image = _decode(file)
    if image.mode not in ("P", "L"):
        raise DataError(
            f"{file}: the mask has mode {image.mode}, not indices. Save it as a palette or 8-bit grey PNG of class "
            "indices (the masks of the devkit are palette PNGs).",
            "values",
        )
    mask = np.asarray(image)
    wrong = np.unique(mask[(mask > num_classes) & (mask != VOID)])
    if wrong.size:
        raise DataError(
            f"{file}: mask value {', '.join(map(str, wrong[:5]))} is neither a class (0..{num_classes}) nor void "
            f"({VOID}). Copy the original mask again.",
            "values",
        )
    return torch.from_numpy(mask.astype(np.int64))


def read_pair(image_file: Path, mask_file: Path | None, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Read a photograph and its mask (None where there is none); see `read_image` and `read_mask`.

    Raises:
        DataError: a file is damaged or holds wrong values, or the two differ in size.
    """
    image = read_image(image_file)
    if mask_file is None:
        return image, None
    mask = read_mask(mask_file, num_classes)
    if mask.shape != image.shape[1:]:
        (h, w), (height, width) = mask.shape, image.shape[1:]
        raise DataError(
            f"{mask_file}: the mask is {w}x{h} pixels, its image {image_file.name} {width}x{height}. Copy both again "
            "from their archives, or resize both alike.",
            "size",
        )
    return image, mask


def encode_mask(mask: np.ndarray) -> bytes:
    """The palette PNG, in the colours of the VOC devkit, of uint8 (H, W) indices."""
    image = Image.fromarray(mask)
    image.putpalette(palette(255).tobytes())
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


class Pair(NamedTuple):
    """Files of an image and of its mask, which is None where there is none."""

    image: Path
    mask: Path | None


def errors_of(read: Callable, items: Sequence) -> Iterator[DataError | None]:
    """Call `read` on each item, on all cores; for each, in order, the DataError that it raises, or None."""

    def errors(chunk: Sequence) -> list[DataError | None]:
        return [_error_of(read, item) for item in chunk]

    chunks = [items[start : start + 64] for start in range(0, len(items), 64)]
    with ThreadPoolExecutor(cores()) as pool:  # threads: Pillow decodes without holding the interpreter
        yield from chain.from_iterable(pool.map(errors, chunks))


def _error_of(read: Callable, item: object) -> DataError | None:
    try:
        read(item)
    except DataError as error:
        return error
    return None


# ------------------------------------------------------------------------------------------------------------- labels


class LabelRow(NamedTuple):
    """A line of a label table.

    Attributes:
        where: file and line, to open an error message with.
        name: the image id.
        split: as written there.
        classes: names of the classes in the image.
    """

    where: str
    name: str
    split: str
    classes: tuple[str, ...]


def read_label_rows(file: Path, required: Collection[str] = HEADER) -> list[LabelRow]:
    """Read a table of image-level labels: a CSV with columns image_id, split and classes.

    `classes` holds names separated by semicolons, or by spaces where no semicolon is: names with a space in them, like
    "hot dog", end in a semicolon even when they stand alone.

    Args:
        required: columns that must be there.

    Raises:
        DataError: the table cannot be read as text, or lacks a column.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            absent = set(required).difference(rows.fieldnames or ())
            if absent:
                columns = ", ".join(sorted(absent))
                raise DataError(f"{file}: column {columns} is missing. Write the header {','.join(HEADER)}.", "labels")
            return [
                LabelRow(f"{file}, line {rows.line_num}", row["image_id"], row.get("split", ""), _names(row["classes"]))
                for row in rows
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: is not a CSV in UTF-8 ({error}). Save it as one.", "labels") from error


def _names(text: str | None) -> tuple[str, ...]:
    text = text or ""
    return tuple(filter(None, map(str.strip, text.split(";") if ";" in text else text.split())))


def encode_label_rows(rows: Iterable[tuple[str, str, Iterable[str]]]) -> str:
    """The text of a label table with rows (image id, split, classes); `read_label_rows` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((name, split, "".join(f"{item};" for item in classes)) for name, split, classes in rows)
    return text.getvalue()


def multi_hot(names: Iterable[str], classes: Sequence[str], where: str) -> Tensor:
    """float32 (C,) with 1 for each of `names`; `where` opens the error message for a name that is no class."""
    label = torch.zeros(len(classes))
    for name in names:
        if name not in classes:
            raise DataError(f"{where}: unknown class {name!r}. The names are {', '.join(classes)}.", "labels")
        label[classes.index(name)] = 1
    return label


def rows_of_split(rows: Sequence[LabelRow], split: str) -> list[LabelRow]:
    """The rows of a split, in their order, of a table in which every image has one row.

    Raises:
        DataError: an image is listed twice.
    """
    seen = set()
    for row in rows:
        if row.name in seen:
            raise DataError(f"{row.where}: {row.name} is listed twice. Remove one of the lines.", "list")
        seen.add(row.name)
    return [row for row in rows if row.split == split]


# ----------------------------------------------------------------------------------------------------------- datasets


def subset_name(folder: str) -> str:
    """How results name files in `folder` that are not a whole dataset: never by the name of a whole one."""
    return f"{folder}-subset" if folder.lower() in (*DATASETS, "") else folder


class ImageFiles(Dataset[Sample]):
    """One split of a dataset that consists of image files, with masks or without.

    Args:
        identity: how results name the dataset.
        labels: float32 (N, C).
        pairs: N files of image and mask.
        skip_unreadable: leave out images that cannot be decoded, or whose mask cannot, with a warning that names each
            file. Every file is read once for this. What is left is called a subset in `identity`.

    Attributes:
        identity, split, classes, names, labels: see `wsss.data.load_dataset`.

    Raises:
        DataError: with `skip_unreadable`, no image can be read. Without it, damaged files show when they are read.
    """

    def __init__(
        self,
        identity: str,
        split: str,
        classes: tuple[str, ...],
        names: Sequence[str],
        labels: Tensor,
        pairs: Sequence[Pair],
        skip_unreadable: bool,
    ):
        self.identity, self.split, self.classes = identity, split, classes
        self.names, self.labels, self._pairs = list(names), labels, list(pairs)
        if skip_unreadable:
            self._skip_unreadable()

    def _skip_unreadable(self) -> None:
        errors = list(errors_of(lambda pair: read_pair(*pair, len(self.classes)), self._pairs))
        kept = [index for index, error in enumerate(errors) if error is None or error.kind != "unreadable"]
        if len(kept) == len(errors):
            return
        messages = "\n".join(f"  {error}" for error in errors if error and error.kind == "unreadable")
        if not kept:
            raise DataError(f"{self.identity} {self.split}: no image can be read.\n{messages}")
        left_out = len(errors) - len(kept)
        warnings.warn(
            f"{self.identity} {self.split}: {left_out} of {len(errors)} images are left out, and results are named "
            f"{self.identity}-subset:\n{messages}",
            stacklevel=4,
        )
        self.identity += "-subset"
        self.names, self._pairs = [self.names[i] for i in kept], [self._pairs[i] for i in kept]
        self.labels = self.labels[kept]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image, mask = read_pair(*self._pairs[index], len(self.classes))
        return Sample(image, self.labels[index], mask, self.names[index])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, from the head of its file."""
        with Image.open(self._pairs[index].image) as image:
            return image.height, image.width


# ------------------------------------------------------------------------------------------------------------ writing


def in_processes(function: Callable, items: Sequence, workers: int | None = None) -> Iterator:
    """`map(function, items)` on `workers` processes (default: one a core); with one worker, in this process."""
    workers = min(workers or cores(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    context = get_context("forkserver")  # imports everything once, and forks from a process without threads
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(function, items, chunksize=min(32, -(-len(items) // workers)))
        finally:  # an error or an interrupt does not wait for what is still queued
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{folder}: the disk is full ({error.strerror}). Make room and give the same command again: what is there "
            "stays, and it goes on from there.",
            "disk",
        ) from error
