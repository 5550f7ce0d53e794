"""A user's own folder of images with image-level labels, and masks where there are some.

ROOT/
    images/             JPEG or PNG files, in sub-folders or not; an image id is the path in here without suffix
    image_labels.csv    image_id,split,classes: one line an image, classes as in "dog; hot dog;"
    classes.txt         one class a line, in the order of the mask values 1, 2, ...
    masks/              optional: PNGs of class indices (0 background, 255 void) under the image's id

`build` writes what is missing of the two text files.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from wsss.data import DataError
from wsss.data.reading import (
    LABEL_TABLE,
    VOID,
    ImageFiles,
    LabelRow,
    Pair,
    encode_label_rows,
    errors_of,
    multi_hot,
    read_label_rows,
    read_pair,
    rows_of_split,
    subset_name,
)
from wsss.data.report import Report, SplitReport
from wsss.files import write_atomic

SUFFIXES = (".jpg", ".jpeg", ".png")
CLASS_LIST = "classes.txt"
LABELS = "Give the command `wsss data labels ROOT`, which says what is to be written there."


class ImageFolder:
    """What is in such a folder.

    Attributes:
        images, masks: file by image id.
        classes: names in the order of the mask values.
        rows: the lines of image_labels.csv.

    Raises:
        DataError: a text file is missing or wrong, or two images have the same id.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.images = _find_images(self.root)
        self.masks = _by_id(self.root / "masks", (".png",))
        self.rows = read_label_rows(_existing(self.root / LABEL_TABLE))
        self.classes = _read_classes(_existing(self.root / CLASS_LIST))

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of the table."""
        return list(dict.fromkeys(row.split for row in self.rows))

    def pair(self, row: LabelRow, masked: bool) -> Pair:
        """Files of the image of a row and of its mask, None unless the split is `masked`."""
        if row.name not in self.images:
            raise DataError(
                f"{row.where}, column image_id: there is no image {self.root / 'images' / row.name} ("
                f"{', '.join(SUFFIXES)}). Put it there, or remove the line.",
                "missing",
            )
        if masked and row.name not in self.masks:
            raise DataError(
                f"{self.root / 'masks' / row.name}.png: missing, though other images of split {row.split} have a mask. "
                "Add it, or remove those.",
                "missing",
            )
        return Pair(self.images[row.name], self.masks[row.name] if masked else None)

    def masked(self, rows: Sequence[LabelRow]) -> bool:
        """Whether any image of a split has a mask; then all must have one."""
        return any(row.name in self.masks for row in rows)

    def labels(self, rows: Sequence[LabelRow]) -> torch.Tensor:
        """float32 (N, C)."""
        return torch.stack([multi_hot(row.classes, self.classes, f"{row.where}, column classes") for row in rows])


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file}: missing. {LABELS}", "missing")
    return file


def _by_id(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("[!.]*")):
        if file.suffix.lower() not in suffixes:
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{file}: {found[name].name} has the same name but for the suffix. Rename one.", "list")
        found[name] = file
    return found


def _find_images(root: Path) -> dict[str, Path]:
    images = _by_id(root / "images", SUFFIXES)
    if not images:
        raise DataError(f"{root / 'images'}: there is no image ({', '.join(SUFFIXES)}). Put yours there.", "missing")
    return images


def _read_classes(file: Path) -> tuple[str, ...]:
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names) or len(names) >= VOID:
        raise DataError(
            f"{file}: holds {len(names)} names, {len(set(names))} different ones. Write each class once, one a line, "
            f"at most {VOID - 1}.",
            "labels",
        )
    return tuple(names)


class Folder(ImageFiles):
    """One split of a user's own images.

    Args:
        root: the folder described in the module's text.
        split: a name in the column `split` of image_labels.csv.
        skip_unreadable: leave out damaged images, with a warning that names them; see `reading.ImageFiles`.

    Attributes:
        identity: the name of the folder; with "-subset" where damaged images are left out.
        split, classes, names: the split, the names in classes.txt, and the image ids in the order of the table.
        labels: float32 (N, C).

    Raises:
        ValueError: unknown split.
        DataError: a file is missing or wrong; damaged images and masks show when they are read.
    """

    def __init__(self, root: str | Path, split: str, skip_unreadable: bool = False):
        folder = ImageFolder(root)
        rows = rows_of_split(folder.rows, split)
        if not rows:
            raise ValueError(f"{folder.root}: unknown split {split!r}; choose one of {', '.join(folder.splits)}")
        masked = folder.masked(rows)
        pairs = [folder.pair(row, masked) for row in rows]
        identity = subset_name(folder.root.resolve().name)
        names = [row.name for row in rows]
        super().__init__(identity, split, folder.classes, names, folder.labels(rows), pairs, skip_unreadable)


def build(root: str | Path) -> list[str]:
    """Write image_labels.csv, from the sub-folders that the images lie in, and classes.txt, where they are missing.

    images/dog/1.jpg gets the label dog; images with several classes are edited by hand afterwards. All go into the
    split `train`. The classes are ordered by the alphabet.

    Returns:
        A line for people about each file that was written.

    Raises:
        DataError: images lie in no sub-folder, or the table names no class.
    """
    root = Path(root)
    images = _find_images(root)
    written = []
    table = root / LABEL_TABLE
    if not table.is_file():
        bare = [name for name in images if "/" not in name]
        if bare:
            raise DataError(
                f"{images[bare[0]]}: lies in no sub-folder named after its class, so its label is unknown "
                f"({len(bare):,} images). Move them, or write {table} with the columns image_id,split,classes.",
                "labels",
            )
        write_atomic(table, encode_label_rows((name, "train", [Path(name).parts[0]]) for name in images))
        written.append(f"{table}: written from the sub-folders, {len(images):,} images, all of them in split train")
    if not (root / CLASS_LIST).is_file():
        classes = sorted({name for row in read_label_rows(table) for name in row.classes})
        if not classes:
            raise DataError(f"{table}, column classes: names no class. Write them there.", "labels")
        write_atomic(root / CLASS_LIST, "".join(f"{name}\n" for name in classes))
        written.append(f"{root / CLASS_LIST}: written, {len(classes):,} classes in the order of the alphabet")
    return written


def check(root: str | Path, progress: Callable[[Sequence], Iterable] = iter) -> Report:
    """Read every line, image and mask of a user's own folder, and tell what is there and what is wrong.

    Args:
        root: as for `Folder`.
        progress: wraps the images to read, e.g. `tqdm`.

    Raises:
        DataError: image_labels.csv or classes.txt is missing or cannot be read.
    """
    folder = ImageFolder(root)
    splits, problems, to_read = {}, [], []
    for split in folder.splits:
        try:
            rows = rows_of_split(folder.rows, split)
            splits[split] = SplitReport.of(folder.labels(rows), LABEL_TABLE)
        except DataError as error:
            problems.append(error)
            continue
        to_read += [(row, folder.masked(rows)) for row in rows]
    listed = {row.name for row in folder.rows}
    for files in (folder.images, folder.masks):
        problems += [
            DataError(f"{files[name]}: not in {LABEL_TABLE}. Write a line for it, or remove it.", "surplus")
            for name in files.keys() - listed
        ]
    read = lambda item: read_pair(*folder.pair(*item), len(folder.classes))
    problems += [error for _, error in zip(progress(to_read), errors_of(read, to_read), strict=True) if error]
    counts = {"images": len(folder.images), "masks": len(folder.masks) or None}
    once = {str(problem): problem for problem in problems}  # two splits may meet the same line
    name = subset_name(folder.root.resolve().name)
    return Report(folder.root, name, folder.classes, counts, splits, tuple(once.values()))
