"""COCO 2014 for semantic segmentation: masks and image-level labels made from its annotations, and a check of them.

Where the released codes of the field get their COCO masks is seldom said; the script that the READMEs of ToCo and SeCo
point to (alicranck/coco2voc) draws them like this, and so does `prepare`:

- A pixel has the class of the smallest annotated region over it, by the field `area`; of equal ones, of the earlier.
- Crowd regions (`iscrowd` 1) are drawn as their class like any other. No pixel is void.
- Images without any annotation have no mask and are in no split. That is why 82,783 photographs give 82,081 training
  images, and 40,504 give 40,137 for val.

The image-level label is the set of categories of all annotations, crowds included.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle

from wsss.data import DataError
from wsss.data.classes import COCO_CLASSES
from wsss.data.reading import (
    LABEL_TABLE,
    ImageFiles,
    LabelRow,
    Pair,
    encode_label_rows,
    encode_mask,
    errors_of,
    in_processes,
    multi_hot,
    naming_full_disk,
    read_label_rows,
    read_pair,
    rows_of_split,
    subset_name,
)
from wsss.data.report import Report, SplitReport
from wsss.files import write_atomic

DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "data" / "coco2014"
OFFICIAL = {"train": 82081, "val": 40137}
PHOTOGRAPHS = {"train": 82783, "val": 40504}
PREPARE = "Give the command `wsss data prepare coco2014`, which makes it from the annotations."


def _images(root: Path, split: str) -> Path:
    return root / f"{split}2014"


def _masks(root: Path, split: str) -> Path:
    return root / "masks" / f"{split}2014"


def _annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2014.json"


# ------------------------------------------------------------------------------------------------------------ reading


def _table(root: Path) -> list[LabelRow]:
    file = root / LABEL_TABLE
    if not file.is_file():
        raise DataError(f"{file}: missing. {PREPARE}", "missing")
    return read_label_rows(file)


def _identity(root: Path, rows: Sequence[LabelRow]) -> str:
    official = sum(row.split == "val" and bool(row.classes) for row in rows) == OFFICIAL["val"]
    return "coco2014" if official else subset_name(root.resolve().name)


def _pair(root: Path, split: str, name: str, files: tuple[frozenset[str], frozenset[str]]) -> Pair:
    """Files of image and mask; `files` holds the names of those that are there."""
    pair = Pair(_images(root, split) / f"{name}.jpg", _masks(root, split) / f"{name}.png")
    if name not in files[0]:
        raise DataError(f"{pair.image}: missing, but split {split} needs it. Unpack {split}2014.zip again.", "missing")
    if name not in files[1]:
        raise DataError(f"{pair.mask}: missing, but split {split} needs it. {PREPARE}", "missing")
    return pair


def _files(root: Path, split: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names, without suffix, of the images and of the masks that are there."""
    images, masks = _images(root, split).glob("[!.]*.jpg"), _masks(root, split).glob("[!.]*.png")
    return frozenset(file.stem for file in images), frozenset(file.stem for file in masks)


class Coco2014(ImageFiles):
    """One split of COCO 2014, or of a subset in the same layout, as `prepare` has made it.

    Args:
        root: the folder that holds train2014, val2014, masks and image_labels.csv.
        split: train or val.
        skip_unreadable: leave out damaged images, with a warning that names them; see `reading.ImageFiles`.

    Attributes:
        identity: "coco2014" where val has the official 40,137 images, else the name of the folder; with "-subset" where
            damaged images are left out.
        split, classes, names: the split, the 80 class names, and the names of the images, ascending.
        labels: float32 (N, 80).

    Raises:
        ValueError: unknown split.
        DataError: the table of labels, an image or a mask is missing or wrong; damaged files show when they are read.
    """

    classes = COCO_CLASSES

    def __init__(self, root: str | Path, split: str, skip_unreadable: bool = False):
        root = Path(root)
        if split not in OFFICIAL:
            raise ValueError(f"coco2014: unknown split {split!r}; choose one of {', '.join(OFFICIAL)}")
        table = _table(root)
        rows = [row for row in rows_of_split(table, split) if row.classes]
        if not rows:
            raise DataError(f"{root / LABEL_TABLE}: has no image of split {split}. {PREPARE}", "list")
        files = _files(root, split)
        pairs = [_pair(root, split, row.name, files) for row in rows]
        labels = _labels(rows)
        names = [row.name for row in rows]
        super().__init__(_identity(root, table), split, COCO_CLASSES, names, labels, pairs, skip_unreadable)


def _labels(rows: Sequence[LabelRow]) -> torch.Tensor:
    return torch.stack([multi_hot(row.classes, COCO_CLASSES, f"{row.where}, column classes") for row in rows])


# ------------------------------------------------------------------------------------------------------------- making


class Region(NamedTuple):
    """An annotated region: where it is written, mask value, area in pixels, and outline (polygons or run lengths)."""

    where: str
    value: int
    area: float
    outline: object


class AnnotatedImage(NamedTuple):
    """An image of an annotation file: name without suffix, size in pixels, regions in the order of the file."""

    name: str
    height: int
    width: int
    regions: list[Region]


def read_annotations(file: Path) -> list[AnnotatedImage]:
    """All images of an annotation file of COCO, with annotations or without, in the order of their ids.

    Raises:
        DataError: the file is missing, damaged, or names an unknown image or category.
    """
    if not file.is_file():
        raise DataError(
            f"{file}: missing. Fetch it with `wsss data fetch coco2014`, or unpack annotations_trainval2014.zip.",
            "missing",
        )
    try:
        content = json.loads(file.read_bytes(), object_hook=_packed)
        names = {category["id"]: category["name"] for category in content["categories"]}
        regions = defaultdict(list)
        for entry in content["annotations"]:
            where = f"{file}, annotation {entry['id']}"
            if names.get(entry["category_id"]) not in COCO_CLASSES:
                raise DataError(f"{where}: category_id {entry['category_id']} is no category of COCO 2014.", "labels")
            value = COCO_CLASSES.index(names[entry["category_id"]]) + 1
            regions[entry["image_id"]].append(Region(where, value, entry["area"], entry["segmentation"]))
        images = {
            entry["id"]: AnnotatedImage(
                Path(entry["file_name"]).stem, entry["height"], entry["width"], regions.pop(entry["id"], [])
            )
            for entry in content["images"]
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file}: is no annotation file of COCO ({type(error).__name__}: {error}). Unpack it again from its "
            "archive."
        ) from error
    for image_id, [first, *_] in regions.items():
        raise DataError(
            f"{first.where}: image_id {image_id} is no image of this file. Unpack it again from its archive, or remove "
            "the annotation.",
            "labels",
        )
    return [images[key] for key in sorted(images)]


def _packed(entry: dict) -> dict:
    """An object of the file with its polygons as arrays, which take a quarter of the memory of lists of numbers."""
    if isinstance(entry.get("segmentation"), list):
        entry["segmentation"] = [np.array(polygon, np.float64) for polygon in entry["segmentation"]]
    return entry


def draw_mask(image: AnnotatedImage) -> np.ndarray:
    """uint8 (H, W): the class of the smallest region over each pixel, 0 where there is none; see the module's text.

    Raises:
        DataError: the outline of a region cannot be drawn.
    """
    mask = np.zeros((image.height, image.width), np.uint8)
    for region in reversed(sorted(image.regions, key=lambda region: region.area)):
        try:
            mask[_filled(region.outline, image.height, image.width)] = region.value
        except Exception as error:  # pycocotools raises Exception itself
            raise DataError(f"{region.where}, field segmentation: cannot be drawn ({error}).", "values") from error
    return mask


def _filled(outline: object, height: int, width: int) -> np.ndarray:
    """bool (H, W) of a list of polygons, or of run lengths, written out or packed."""
    if isinstance(outline, list):
        packed = rle.merge(rle.frPyObjects(outline, height, width))
    elif isinstance(outline["counts"], list):
        packed = rle.frPyObjects(outline, height, width)
    else:
        packed = outline
    return rle.decode(packed).astype(bool)


def _write_mask(item: tuple[AnnotatedImage, Path]) -> None:
    image, file = item
    write_atomic(file, encode_mask(draw_mask(image)))


def prepare(
    root: str | Path, workers: int | None = None, progress: Callable[[Sequence], Iterable] = iter
) -> list[str]:
    """Make image_labels.csv and the masks of train and val from the annotations; goes on where it was stopped.

    The table is written first, so that a dataset of which masks are still missing is refused and never taken for a
    smaller one. Masks that are there are left as they are.

    Args:
        root: the folder that holds `annotations`; the photographs are not needed.
        workers: processes; default: one a core.
        progress: wraps the masks to make, e.g. `tqdm`.

    Returns:
        Lines for people about what was made.

    Raises:
        DataError: annotations are missing, damaged or contradictory, a table is there that says something else, or the
            disk is full.
    """
    root = Path(root)
    images = {split: read_annotations(_annotations(root, split)) for split in OFFICIAL}
    rows = [
        (image.name, split, [COCO_CLASSES[value - 1] for value in sorted({region.value for region in image.regions})])
        for split in OFFICIAL
        for image in images[split]
    ]
    shown = {split: [image for image in images[split] if image.regions] for split in OFFICIAL}
    files = [(image, _masks(root, split) / f"{image.name}.png") for split in OFFICIAL for image in shown[split]]
    missing = [item for item in files if not item[1].is_file()]
    with naming_full_disk(root):
        _write_table(root / LABEL_TABLE, encode_label_rows(rows))
        for _ in zip(progress(missing), in_processes(_write_mask, missing, workers), strict=True):
            pass
    lines = [f"{split}: {_explanation(len(images[split]), len(shown[split]))}" for split in OFFICIAL]
    return [*lines, f"{len(missing):,} masks made now"]


def _write_table(file: Path, content: str) -> None:
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise DataError(f"{file}: says something else than the annotations. Remove it to have it made anew.", "labels")
    write_atomic(file, content)


def _explanation(photographs: int, shown: int) -> str:
    left_out = photographs - shown
    return f"{photographs:,} photographs, {left_out:,} without any of the 80 classes are left out: {shown:,} images"


# ------------------------------------------------------------------------------------------------------------ checking


def check(root: str | Path, progress: Callable[[Sequence], Iterable] = iter) -> Report:
    """Read the labels, every image and every mask of COCO 2014, and tell what is there and what is wrong.

    Args:
        root: as for `Coco2014`.
        progress: wraps the images to read, e.g. `tqdm`.

    Raises:
        DataError: there is no table of labels at `root`.
    """
    root = Path(root)
    table = _table(root)
    identity = _identity(root, table)
    splits, notes, problems = {}, [], []
    folders: dict[str, int | None] = {}
    to_read: list[tuple[str, str]] = []
    files = {split: _files(root, split) for split in OFFICIAL}
    for split, official in OFFICIAL.items():
        for folder, names in zip((_images(root, split), _masks(root, split)), files[split], strict=True):
            folders[str(folder.relative_to(root))] = len(names) if folder.is_dir() else None
        try:
            rows = rows_of_split(table, split)
            used = [row for row in rows if row.classes]
            if not used:
                raise DataError(f"{root / LABEL_TABLE}: has no image of split {split}. {PREPARE}", "list")
            splits[split] = SplitReport.of(_labels(used), LABEL_TABLE)
        except DataError as error:
            problems.append(error)
            continue
        notes.append(f"{split}: {_explanation(len(rows), len(used))}")
        if identity == "coco2014" and (len(rows), len(used)) != (PHOTOGRAPHS[split], official):
            expected = _explanation(PHOTOGRAPHS[split], official)
            problems.append(DataError(f"{root / LABEL_TABLE}: {notes[-1]}; officially {expected}. {PREPARE}", "count"))
        problems += _surplus(_images(root, split), ".jpg", files[split][0] - {row.name for row in rows})
        problems += _surplus(_masks(root, split), ".png", files[split][1] - {row.name for row in used})
        to_read += [(split, row.name) for row in used]
    read = lambda item: read_pair(*_pair(root, *item, files[item[0]]), len(COCO_CLASSES))
    problems += [error for _, error in zip(progress(to_read), errors_of(read, to_read), strict=True) if error]
    return Report(root, identity, COCO_CLASSES, folders, splits, tuple(problems), OFFICIAL, tuple(notes))


def _surplus(folder: Path, suffix: str, names: Iterable[str]) -> list[DataError]:
    return [
        DataError(f"{folder / name}{suffix}: not in {LABEL_TABLE}. Remove it, or make the table anew.", "surplus")
        for name in sorted(names)
    ]
