"""PASCAL VOC 2012 from its devkit, with the additional SBD masks (SegmentationClassAug), and a check of the files."""

import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wsss.data import DataError
from wsss.data.classes import VOC_CLASSES
from wsss.data.reading import (
    LABEL_TABLE,
    VOID,
    ImageFiles,
    Pair,
    errors_of,
    multi_hot,
    read_label_rows,
    read_mask,
    read_pair,
    subset_name,
)
from wsss.data.report import Report, SplitReport

DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "data" / "voc2012"
OFFICIAL = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}

LISTS = Path("ImageSets", "Segmentation")
SUFFIXES = {"JPEGImages": ".jpg", "SegmentationClass": ".png", "SegmentationClassAug": ".png", "Annotations": ".xml"}
# The additional masks cover more images and serve training; val is scored on the masks of the challenge itself.
MASK_FOLDERS = {
    "train": ("SegmentationClassAug", "SegmentationClass"),
    "train_aug": ("SegmentationClassAug", "SegmentationClass"),
    "val": ("SegmentationClass", "SegmentationClassAug"),
    "test": (),
}


class Devkit:
    """Where the lists, images, masks and annotations of a VOC 2012 devkit are.

    Args:
        root: the folder that holds VOCdevkit/VOC2012, the VOCdevkit folder, or the VOC2012 folder itself.

    Attributes:
        path: the VOC2012 folder.
        data_root: the folder that holds VOCdevkit (the VOC2012 folder where there is no VOCdevkit around it).
        files: names, without suffix, of the files in each folder of `SUFFIXES`.

    Raises:
        DataError: no devkit there.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        candidates = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
        found = [candidate for candidate in candidates if (candidate / LISTS).is_dir()]
        if not found:
            raise DataError(
                f"{root}: no VOC 2012 devkit here ({candidates[0] / LISTS} is missing). Pass as root the folder that "
                "holds VOCdevkit/VOC2012; data/README.md says how to fill it.",
                "missing",
            )
        self.path = found[0]
        home = root.resolve()
        if home.parts[-2:] == ("VOCdevkit", "VOC2012"):
            home = home.parent
        self.data_root = home.parent if home.name == "VOCdevkit" else home
        self.files = {
            folder: frozenset(file.stem for file in (self.path / folder).glob(f"[!.]*{suffix}"))
            for folder, suffix in SUFFIXES.items()
        }

    @property
    def identity(self) -> str:
        """How results name this dataset: voc2012 where val has the official 1,449 images, else the name of `data_root`.

        It is the same for every split. A subset in a folder that is itself called voc2012 is named voc2012-subset, so
        that its figures never stand under the name of the full dataset.
        """
        try:
            official = len(self.ids("val")) == OFFICIAL["val"]
        except DataError:
            official = False
        return "voc2012" if official else subset_name(self.data_root.name)

    def list_file(self, split: str) -> Path:
        """The file with the image ids of `split`."""
        return self.path / LISTS / f"{split}.txt"

    def ids(self, split: str) -> list[str]:
        """Image ids of `split`, in the order of its list; train_aug without a list: every SBD mask outside val.

        Raises:
            ValueError: unknown split.
            DataError: the list is missing, empty, or holds something else than one id a line, each once.
        """
        if split not in OFFICIAL:
            raise ValueError(f"voc2012: unknown split {split!r}; choose one of {', '.join(OFFICIAL)}")
        file = self.list_file(split)
        if not file.is_file():
            if split == "train_aug" and self.files["SegmentationClassAug"]:
                return sorted(self.files["SegmentationClassAug"].difference(self.ids("val")))
            also = ", or the masks in SegmentationClassAug, of which it can be made" if split == "train_aug" else ""
            raise DataError(f"{file}: the list of split {split} is missing. Copy it from the devkit{also}.", "missing")
        ids = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if not ids:
            raise DataError(f"{file}: holds no image id. Copy the list again from the devkit.", "list")
        odd = next((name for name in ids if "/" in name or len(name.split()) > 1), None)
        if odd:
            raise DataError(f"{file}: {odd!r} is not an image id. Write one id a line, no folder, no suffix.", "list")
        if len(set(ids)) < len(ids):
            twice = next(name for i, name in enumerate(ids) if name in ids[:i])
            raise DataError(f"{file}: image id {twice} is listed twice. Remove one of the lines.", "list")
        return ids

    def paths(self, name: str, split: str) -> Pair:
        """Files of the image and of the mask (None for test) of image `name`.

        Raises:
            DataError: one of them is missing.
        """
        image = self.path / "JPEGImages" / f"{name}.jpg"
        if name not in self.files["JPEGImages"]:
            raise DataError(
                f"{image}: missing, but split {split} needs it. Unpack the archive of the devkit again, or take the id "
                "out of the list.",
                "missing",
            )
        folders = MASK_FOLDERS[split]
        if not folders:
            return Pair(image, None)
        folder = next((folder for folder in folders if name in self.files[folder]), None)
        if folder is None:
            raise DataError(
                f"{self.path / folders[0] / name}.png: missing (and not in {folders[1]}), but split {split} needs this "
                "mask. Unpack the archive of the masks again, or take the id out of the list.",
                "missing",
            )
        return Pair(image, self.path / folder / f"{name}.png")


def read_annotation(file: Path) -> Tensor:
    """Image-level label, float32 (20,), from an annotation of the devkit: every object counts, difficult ones too.

    Raises:
        DataError: the file is not such an annotation, or names an unknown class.
    """
    try:
        objects = ElementTree.parse(file).findall("object")
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Unpack this file again from its archive.") from error
    names = (item.findtext("name", "").strip() for item in objects)
    return multi_hot(names, VOC_CLASSES, f"{file}, object/name")


def read_label_table(file: Path) -> dict[str, Tensor]:
    """Image-level labels, float32 (20,) by image id, from a label table (`reading.read_label_rows`).

    Its column `split` is for people only.

    Raises:
        DataError: the table is missing, lacks a column, names an unknown class, or contradicts itself.
    """
    if not file.is_file():
        raise DataError(f'{file}: no such table of labels. Pass "auto", "masks" or the path of a CSV.', "missing")
    labels: dict[str, Tensor] = {}
    for row in read_label_rows(file, required=("image_id", "classes")):
        where = f"{row.where}, column classes"
        label = multi_hot(row.classes, VOC_CLASSES, where)
        if row.name in labels and not torch.equal(labels[row.name], label):
            raise DataError(f"{where}: differs from an earlier line for {row.name}. Remove one of them.", "labels")
        labels[row.name] = label
    return labels


def read_labels(devkit: Devkit, split: str, names: Sequence[str], labels: str | Path = "auto") -> tuple[Tensor, str]:
    """Image-level labels of the images `names` of `split`, and where they come from; see `VOC2012`.

    Returns:
        float32 (N, 20), and "Annotations", the path of a table, "masks" or "none".

    Raises:
        DataError: the labels of an image are unknown or wrong.
    """
    if labels == "masks":
        return _labels_from_masks(devkit, split, names), "masks"
    annotated = devkit.files["Annotations"]
    if labels == "auto" and annotated.issuperset(names):
        files = [devkit.path / "Annotations" / f"{name}.xml" for name in names]
        return torch.stack([read_annotation(file) for file in files]), "Annotations"
    table = devkit.data_root / LABEL_TABLE if labels == "auto" else Path(labels)
    known = read_label_table(table) if labels != "auto" or table.is_file() else {}
    unknown = [name for name in names if name not in known]
    if not unknown:
        return torch.stack([known[name] for name in names]), str(table)
    if split == "test" and labels == "auto":
        return torch.full((len(names), len(VOC_CLASSES)), torch.nan), "none"
    if labels != "auto" or known:
        raise DataError(
            f"{table}: column image_id lacks {unknown[0]} ({len(unknown)} of {len(names)} images of {split} are not "
            "there). Add their rows.",
            "labels",
        )
    first = next(name for name in names if name not in annotated)
    raise DataError(
        f"{devkit.path / 'Annotations' / first}.xml: missing, so the image-level labels of split {split} are unknown. "
        f"Unpack the Annotations of the devkit, or write {table} (columns image_id,split,classes), or ask for "
        'labels="masks" to take the classes of the masks, which differ in a few percent of the images.',
        "labels",
    )


def _labels_from_masks(devkit: Devkit, split: str, names: Sequence[str]) -> Tensor:
    if not MASK_FOLDERS[split]:
        raise DataError(f'{devkit.path}: split {split} has no masks, so labels="masks" cannot serve it.', "labels")
    warnings.warn(
        f'labels="masks": the image-level labels of voc2012 {split} are the classes of its masks, not the annotations '
        "that the papers use; they differ in a few percent of the images",
        stacklevel=4,
    )
    masks = (read_mask(devkit.paths(name, split).mask, len(VOC_CLASSES)) for name in names)
    counts = torch.stack([mask.flatten().bincount(minlength=VOID + 1) for mask in masks])
    return (counts[:, 1 : len(VOC_CLASSES) + 1] > 0).float()


class VOC2012(ImageFiles):
    """One split of PASCAL VOC 2012 or of a subset in the same layout.

    Masks come from SegmentationClassAug where the image has one there, else from SegmentationClass; for val it is the
    other way round. Image-level labels come from the annotations (all objects, difficult ones too) where each image of
    the split has one, else from image_labels.csv in the data root. Labels and masks of test are not published: its
    labels are NaN unless one of these two sources has them, its masks None.

    Args:
        root: the folder that holds VOCdevkit/VOC2012, the VOCdevkit folder, or the VOC2012 folder itself.
        split: train, train_aug, val or test.
        labels: "auto" as above; the path of a CSV (columns image_id, split, classes) to take it instead; "masks" to
            take the classes of the masks, with a warning: this is not what the papers train with.
        skip_unreadable: leave out damaged images, with a warning that names them; see `reading.ImageFiles`.

    Attributes:
        identity: "voc2012" where val has the official 1,449 images, else the name of the data root; with "-subset"
            where damaged images are left out.
        split, classes, names: the split, the 20 class names, and the image ids in the order of the list.
        labels: float32 (N, 20).
        label_source: "Annotations", the path of a table, "masks" or "none".

    Raises:
        ValueError: unknown split.
        DataError: a list, image, mask or label is missing or wrong; damaged images and masks show when they are read.
    """

    classes = VOC_CLASSES

    def __init__(self, root: str | Path, split: str, labels: str | Path = "auto", skip_unreadable: bool = False):
        devkit = Devkit(root)
        names = devkit.ids(split)
        pairs = [devkit.paths(name, split) for name in names]
        known, self.label_source = read_labels(devkit, split, names, labels)
        super().__init__(devkit.identity, split, VOC_CLASSES, names, known, pairs, skip_unreadable)


def check(root: str | Path, progress: Callable[[Sequence], Iterable] = iter) -> Report:
    """Read every list, label, image and mask of a devkit, as `VOC2012` would, and tell what is there and what is wrong.

    A subset in which everything fits together is fine; test may be absent, images in no list too.

    Args:
        root: as for `VOC2012`.
        progress: wraps the images to read, e.g. `tqdm`.

    Raises:
        DataError: there is no devkit at `root`.
    """
    devkit = Devkit(root)
    identity = devkit.identity
    splits: dict[str, SplitReport] = {}
    ids: dict[str, list[str]] = {}
    problems: list[DataError] = []
    for split, official in OFFICIAL.items():
        try:
            ids[split] = devkit.ids(split)
        except DataError as error:
            if split != "test" or error.kind != "missing":
                problems.append(error)
            continue
        if identity == "voc2012" and len(ids[split]) != official:
            note = f"{len(ids[split]):,} images, officially {official:,}, though val is the official list"
            problems.append(DataError(f"{devkit.list_file(split)}: {note}. Copy the official list.", "count"))
        try:
            labels, source = read_labels(devkit, split, ids[split])
        except DataError as error:
            problems.append(error)
            labels, source = torch.full((len(ids[split]), len(VOC_CLASSES)), torch.nan), "none"
        splits[split] = SplitReport.of(labels, source)
    problems += _overlaps(devkit, ids) + _surplus_masks(devkit, ids) + _surplus_annotations(devkit, ids)
    split_of = list({name: split for split in ids for name in ids[split]}.items())
    errors = errors_of(lambda item: read_pair(*devkit.paths(*item), len(VOC_CLASSES)), split_of)
    problems += [error for _, error in zip(progress(split_of), errors, strict=True) if error]
    folders = {f: len(names) if (devkit.path / f).is_dir() else None for f, names in devkit.files.items()}
    once = {str(problem): problem for problem in problems}  # train and train_aug share images and their problems
    return Report(devkit.path, identity, VOC_CLASSES, folders, splits, tuple(once.values()), OFFICIAL)


def _overlaps(devkit: Devkit, ids: dict[str, list[str]]) -> list[DataError]:
    """Images on which a model would be both trained and evaluated."""
    shared = [
        (train, held_out, sorted(set(ids.get(train, ())).intersection(ids.get(held_out, ()))))
        for train in ("train", "train_aug")
        for held_out in ("val", "test")
    ]
    return [
        DataError(
            f"{devkit.list_file(train)}: {len(names):,} ids are in {held_out} too, e.g. {names[0]}. Remove them here.",
            "overlap",
        )
        for train, held_out, names in shared
        if names
    ]


def _surplus_masks(devkit: Devkit, ids: dict[str, list[str]]) -> list[DataError]:
    """Masks of images in no list; not told while a list is unknown."""
    if not {"train", "train_aug", "val"} <= ids.keys():
        return []
    listed = set().union(*ids.values())
    return [
        DataError(f"{devkit.path / folder / name}.png: a mask in no list. Remove it, or list its id.", "surplus")
        for folder in ("SegmentationClass", "SegmentationClassAug")
        for name in sorted(devkit.files[folder] - listed)
    ]


def _surplus_annotations(devkit: Devkit, ids: dict[str, list[str]]) -> list[DataError]:
    """Annotations of images that are neither there nor in a list, as one problem: often thousands at once."""
    unknown = sorted(devkit.files["Annotations"] - devkit.files["JPEGImages"] - set().union(*ids.values()))
    if not unknown:
        return []
    first = devkit.path / "Annotations" / f"{unknown[0]}.xml"
    return [
        DataError(
            f"{first}: an annotation of an image that is not in JPEGImages (one of {len(unknown):,}). Unpack the "
            "images again, or remove it.",
            "surplus",
        )
    ]
