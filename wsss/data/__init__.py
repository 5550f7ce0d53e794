"""Datasets of images, image-level labels and masks, all with the same attributes, found by name."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

DATASETS = ("embedded", "voc2012", "coco2014", "folder")


class DataError(ValueError):
    """A file of a dataset is missing or wrong; the message names the file, what is wrong in it and the remedy.

    Attributes:
        kind: one word for what is wrong: missing, unreadable, size, values, labels, list, count, overlap or surplus; of
            fetching and preparing also network, checksum or disk.
    """

    def __init__(self, message: str, kind: str = "unreadable"):
        super().__init__(message)
        self.kind = kind


@dataclass
class Sample:
    """One image of a dataset.

    Attributes:
        image: uint8 (3, H, W), RGB.
        label: float32 (C,), 1 where the class is in the image, else 0; NaN where no label is published (VOC test).
        mask: int64 (H, W) with 0 background, 1..C class (index + 1), 255 void; None where no mask is published.
        name: identifies the image within its dataset.
    """

    image: Tensor
    label: Tensor
    mask: Tensor | None
    name: str


def load_dataset(
    name: str, split: str, root: str | Path | None = None, skip_unreadable: bool = False
) -> Dataset[Sample]:
    """Open one split of a dataset.

    Every dataset has the attributes `identity` (how results name it), `split`, `classes` (names of the C foreground
    classes), `labels` (float32 (N, C), known without reading an image) and `names` (N strings).

    Args:
        name: one of `DATASETS`; "folder" is a user's own (`wsss.data.folder`).
        split: a split of that dataset.
        root: folder of the files, `data/voc2012` or `data/coco2014` of the repository unless given; the embedded
            benchmark has no files.
        skip_unreadable: leave out images that are damaged, with a warning that names them, instead of raising when
            one is read.

    Raises:
        ValueError: unknown name or split; the message lists the choices.
        DataError: a file is missing or wrong.
    """
    if name == "embedded":
        from wsss.data.scenes import Scenes

        return Scenes(split)
    if name == "voc2012":
        from wsss.data.voc import DEFAULT_ROOT, VOC2012

        return VOC2012(root or DEFAULT_ROOT, split, skip_unreadable=skip_unreadable)
    if name == "coco2014":
        from wsss.data.coco import DEFAULT_ROOT, Coco2014

        return Coco2014(root or DEFAULT_ROOT, split, skip_unreadable)
    if name == "folder":
        from wsss.data.folder import Folder

        if root is None:
            raise ValueError("dataset folder: pass the folder of your images as root")
        return Folder(root, split, skip_unreadable)
    raise ValueError(f"unknown dataset {name!r}; choose one of {', '.join(DATASETS)}")


def co_occurrence(labels: Tensor) -> Tensor:
    """How often classes share an image.

    Args:
        labels: float (N, C) of 0/1.

    Returns:
        float (C, C): entry (r, c) is P(class c | class r), the share of the images with class r that also show class
        c. The diagonal is 1; the row of a class that never occurs is NaN.
    """
    together = labels.T @ labels
    return together / together.diagonal()[:, None]
