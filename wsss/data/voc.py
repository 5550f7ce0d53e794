"""PASCAL VOC 2012 from its devkit, with the additional SBD masks (SegmentationClassAug), and a check of the files."""

import csv
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from wsss.data import DATASETS, DataError, Sample
from wsss.data.classes import VOC_CLASSES

DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "data" / "voc2012"
OFFICIAL = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}
VOID = 255

LISTS = Path("ImageSets", "Segmentation")
LABEL_TABLE = "image_labels.csv"
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
        if official:
            return "voc2012"
        name = self.data_root.name
        return f"{name}-subset" if name.lower() in (*DATASETS, "") else name

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

    def paths(self, name: str, split: str) -> tuple[Path, Path | None]:
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
            return image, None
        folder = next((folder for folder in folders if name in self.files[folder]), None)
        if folder is None:
            raise DataError(
                f"{self.path / folders[0] / name}.png: missing (and not in {folders[1]}), but split {split} needs this "
                "mask. Unpack the archive of the masks again, or take the id out of the list.",
                "missing",
            )
        return image, self.path / folder / f"{name}.png"


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


def read_mask(file: Path) -> Tensor:
    """Read the indices of a palette (or plain grey) mask as int64 (H, W): 0 background, 1..20 class, 255 void.

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
    wrong = np.unique(mask[(mask > len(VOC_CLASSES)) & (mask != VOID)])
    if wrong.size:
        raise DataError(
            f"{file}: mask value {', '.join(map(str, wrong[:5]))} is neither a class (0..{len(VOC_CLASSES)}) nor void "
            f"({VOID}). Copy the original mask again.",
            "values",
        )
    return torch.from_numpy(mask.astype(np.int64))


def read_pair(image_file: Path, mask_file: Path | None) -> tuple[Tensor, Tensor | None]:
    """Read a photograph and its mask (None where there is none); see `read_image` and `read_mask`.

    Raises:
        DataError: a file is damaged or holds wrong values, or the two differ in size.
    """
    image = read_image(image_file)
    if mask_file is None:
        return image, None
    mask = read_mask(mask_file)
    if mask.shape != image.shape[1:]:
        (h, w), (height, width) = mask.shape, image.shape[1:]
        raise DataError(
            f"{mask_file}: the mask is {w}x{h} pixels, its image {image_file.name} {width}x{height}. Copy both again "
            "from the devkit, or resize both alike.",
            "size",
        )
    return image, mask


def _multi_hot(classes: Iterable[str], where: str) -> Tensor:
    """float32 (20,) with 1 for each of `classes`; `where` opens the error message for an unknown name."""
    label = torch.zeros(len(VOC_CLASSES))
    for name in classes:
        if name not in VOC_CLASSES:
            raise DataError(f"{where}: unknown class {name!r}. The names are {', '.join(VOC_CLASSES)}.", "labels")
        label[VOC_CLASSES.index(name)] = 1
    return label


def read_annotation(file: Path) -> Tensor:
    """Image-level label, float32 (20,), from an annotation of the devkit: every object counts, difficult ones too.

    Raises:
        DataError: the file is not such an annotation, or names an unknown class.
    """
    try:
        objects = ElementTree.parse(file).findall("object")
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{file}: cannot be read ({error}). Unpack this file again from its archive.") from error
    return _multi_hot((item.findtext("name", "").strip() for item in objects), f"{file}, object/name")


def read_label_table(file: Path) -> dict[str, Tensor]:
    """Image-level labels, float32 (20,) by image id, from a CSV with columns image_id, split and classes.

    `classes` holds class names separated by spaces; `split` is for the reader only.

    Raises:
        DataError: the table is missing, lacks a column, names an unknown class, or contradicts itself.
    """
    if not file.is_file():
        raise DataError(f'{file}: no such table of labels. Pass "auto", "masks" or the path of a CSV.', "missing")
    labels: dict[str, Tensor] = {}
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        absent = {"image_id", "classes"}.difference(rows.fieldnames or ())
        if absent:
            columns = ", ".join(sorted(absent))
            raise DataError(f"{file}: column {columns} is missing. Write the header image_id,split,classes.", "labels")
        for row in rows:
            where = f"{file}, line {rows.line_num}, column classes"
            name, label = row["image_id"], _multi_hot((row["classes"] or "").split(), where)
            if name in labels and not torch.equal(labels[name], label):
                raise DataError(f"{where}: differs from an earlier line for {name}. Remove one of them.", "labels")
            labels[name] = label
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
    masks = (read_mask(devkit.paths(name, split)[1]) for name in names)
    counts = torch.stack([mask.flatten().bincount(minlength=VOID + 1) for mask in masks])
    return (counts[:, 1 : len(VOC_CLASSES) + 1] > 0).float()


class VOC2012(Dataset[Sample]):
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

    Attributes:
        identity: "voc2012" where val has the official 1,449 images, else the name of the data root.
        split, classes, names: the split, the 20 class names, and the image ids in the order of the list.
        labels: float32 (N, 20).
        label_source: "Annotations", the path of a table, "masks" or "none".

    Raises:
        ValueError: unknown split.
        DataError: a list, image, mask or label is missing or wrong; damaged images and masks show when they are read.
    """

    classes = VOC_CLASSES

    def __init__(self, root: str | Path, split: str, labels: str | Path = "auto"):
        devkit = Devkit(root)
        self.identity = devkit.identity
        self.split = split
        self.names = devkit.ids(split)
        self._paths = [devkit.paths(name, split) for name in self.names]
        self.labels, self.label_source = read_labels(devkit, split, self.names, labels)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image, mask = read_pair(*self._paths[index])
        return Sample(image, self.labels[index], mask, self.names[index])


@dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Attributes:
        images: number of ids in its list.
        label_source: where its image-level labels come from, as in `VOC2012`.
        class_counts: number of images with each of the 20 classes; zeros where labels are unknown.
    """

    images: int
    label_source: str
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What is in a devkit and what is wrong with it; as text, a report for people.

    Attributes:
        path: the VOC2012 folder.
        identity: how results name this dataset.
        folders: number of files in each folder of the devkit, None where the folder is absent.
        splits: the splits that are there.
        problems: what is wrong, in the order found.
    """

    path: Path
    identity: str
    folders: dict[str, int | None]
    splits: dict[str, SplitReport]
    problems: tuple[DataError, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}", f"results will name it {self.identity}", "", "files"]
        for folder, count in self.folders.items():
            lines.append(f"  {folder:<22}{'absent' if count is None else f'{count:,}':>8}")
        lines += ["", "images and where their image-level labels come from"]
        for split, official in OFFICIAL.items():
            if split in self.splits:
                images, source = self.splits[split].images, self.splits[split].label_source
                note = _against_official(images, official)
                lines.append(f"  {split:<12}{images:>8,}  {note:<29}  labels: {source}")
            else:
                lines.append(f"  {split:<12}{'absent':>8}  officially {official:,}")
        lines += ["", "images with each class", f"  {'':<12}" + "".join(f"{split:>11}" for split in self.splits)]
        for index, name in enumerate(VOC_CLASSES):
            counts = "".join(f"{report.class_counts[index]:>11,}" for report in self.splits.values())
            lines.append(f"  {name:<12}{counts}")
        lines += ["", f"wrong: {len(self.problems):,}" if self.problems else "nothing is wrong"]
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            messages = [str(problem) for problem in self.problems if problem.kind == kind]
            lines += [f"  {kind}: {len(messages):,}", *(f"    {message}" for message in messages[:10])]
            if len(messages) > 10:
                lines.append(f"    ... and {len(messages) - 10:,} more")
        return "\n".join(lines)


def _against_official(images: int, official: int) -> str:
    if images == official:
        return "the official number"
    return f"a subset: {images:,} of {official:,}" if images < official else f"not the official {official:,}"


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
            labels, source = torch.zeros(1, len(VOC_CLASSES)), "none"
        splits[split] = SplitReport(len(ids[split]), source, tuple(labels.nansum(0).long().tolist()))
    problems += _overlaps(devkit, ids) + _surplus_masks(devkit, ids)
    split_of = {name: split for split in ids for name in ids[split]}
    for name, split in progress(list(split_of.items())):
        try:
            read_pair(*devkit.paths(name, split))
        except DataError as error:
            problems.append(error)
    folders = {f: len(names) if (devkit.path / f).is_dir() else None for f, names in devkit.files.items()}
    once = {str(problem): problem for problem in problems}  # train and train_aug share images and their problems
    return Report(devkit.path, identity, folders, splits, tuple(once.values()))


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
