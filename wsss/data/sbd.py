"""Masks of the Semantic Boundaries Dataset (SBD, Hariharan et al., ICCV 2011) as SegmentationClassAug of a VOC devkit.

SBD marks 11,355 images of VOC, some of them in VOC's val. The 10,582 images of train_aug are those of SBD and of VOC's
train without those of VOC's val. Images of train keep the mask of the challenge itself; the masks of SBD know no void.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from wsss.data import DataError
from wsss.data.classes import VOC_CLASSES
from wsss.data.reading import encode_mask, in_processes, naming_full_disk
from wsss.data.voc import MASK_FOLDERS, OFFICIAL, Devkit
from wsss.files import write_atomic

FOLDER = Path("benchmark_RELEASE", "dataset")


def read_mat(file: Path) -> np.ndarray:
    """uint8 (H, W) of a category file of SBD (`cls/*.mat`, field GTcls.Segmentation): 0 background, 1..20 class.

    Raises:
        DataError: the file is damaged, is not such a file, or holds another value.
    """
    try:
        mask = np.asarray(loadmat(file, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation)
    except Exception as error:  # scipy raises all kinds for a damaged file
        raise DataError(
            f"{file}: field GTcls.Segmentation cannot be read ({type(error).__name__}: {error}). Unpack it again from "
            "its archive."
        ) from error
    if mask.ndim != 2 or mask.dtype != np.uint8 or not mask.size or mask.max() > len(VOC_CLASSES):
        raise DataError(
            f"{file}: GTcls.Segmentation is {mask.dtype} {mask.shape}; expected uint8 (H, W) of 0..{len(VOC_CLASSES)}. "
            "Unpack it again from its archive.",
            "values",
        )
    return mask


def _write_mask(name: str, mats: Path, devkit: Path) -> None:
    own = devkit / "SegmentationClass" / f"{name}.png"
    mat = mats / f"{name}.mat"
    content = own.read_bytes() if own.is_file() else encode_mask(read_mat(mat))
    write_atomic(devkit / "SegmentationClassAug" / f"{name}.png", content)


def prepare(
    root: str | Path,
    sbd: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> list[str]:
    """Make train_aug.txt and SegmentationClassAug of a VOC devkit from SBD; goes on where it was stopped.

    A list that is there is followed. A new one is written first, so that a train_aug of which masks are still missing
    is refused and never taken for a smaller one. Masks that are there are left as they are.

    Args:
        root: as for `VOC2012`.
        sbd: the folder that holds `cls`, or benchmark_RELEASE; default: benchmark_RELEASE beside VOCdevkit.
        workers: processes; default: one a core.
        progress: wraps the names of the masks to make, e.g. `tqdm`.

    Returns:
        Lines for people about what was made.

    Raises:
        DataError: SBD, a list or a mask is missing, a file is damaged, or the disk is full.
    """
    devkit = Devkit(root)
    mats = _mats(Path(sbd) if sbd else devkit.data_root / FOLDER)
    marked = {file.stem for file in mats.glob("[!.]*.mat")}
    listed = devkit.list_file("train_aug")
    if listed.is_file():
        names = devkit.ids("train_aug")
    else:
        names = sorted(marked.union(devkit.ids("train")).difference(devkit.ids("val")))
    lacking = set(names).difference(marked, *(devkit.files[folder] for folder in MASK_FOLDERS["train_aug"]))
    if lacking:
        raise DataError(
            f"{mats / min(lacking)}.mat: missing, and VOC has no mask of this image of train_aug ({len(lacking):,} of "
            f"{len(names):,} are without). Unpack benchmark.tgz again, or correct {listed}.",
            "missing",
        )
    missing = [name for name in names if name not in devkit.files["SegmentationClassAug"]]
    with naming_full_disk(devkit.path):
        if not listed.is_file():
            write_atomic(listed, "".join(f"{name}\n" for name in names))
        write = partial(_write_mask, mats=mats, devkit=devkit.path)
        for _ in zip(progress(missing), in_processes(write, missing, workers), strict=True):
            pass
    note = "the official number" if len(names) == OFFICIAL["train_aug"] else f"officially {OFFICIAL['train_aug']:,}"
    return [f"train_aug: {len(names):,} images ({note}); {len(missing):,} masks made now"]


def _mats(folder: Path) -> Path:
    found = [part for part in (folder, folder / "dataset", folder / FOLDER) if (part / "cls").is_dir()]
    if not found:
        raise DataError(
            f"{folder / 'cls'}: missing. Fetch it with `wsss data fetch sbd`, or pass the folder of SBD that holds "
            "`cls`, or put a folder SegmentationClassAug of PNGs into the devkit, which needs no SBD.",
            "missing",
        )
    return found[0] / "cls"
