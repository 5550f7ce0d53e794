"""Tiny datasets in the layout of the real ones, for tests: VOC 2012, SBD and COCO 2014."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from wsss.data.classes import VOC_CLASSES, palette

LISTS = {"train": ["a1", "a2"], "train_aug": ["a1", "a2", "a3"], "val": ["b1", "b2"], "test": ["c1"]}
OBJECTS = {"a1": ["dog", "person", "dog"], "a2": ["cat"], "a3": ["dog"], "b1": ["horse"], "b2": ["horse", "person"]}
WIDTH, HEIGHT = 24, 16
ANNOTATION = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>1</difficult><part><name>head</name></part></object>"""


def write_mask(file: Path, mask: np.ndarray) -> None:
    """Save uint8 (H, W) indices as a palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette(palette(255).tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def mask_of(name: str, folder: str) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH): the first object in the upper left quarter; the two folders differ in the void below."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[: HEIGHT // 2, : WIDTH // 2] = VOC_CLASSES.index(OBJECTS[name][0]) + 1
    mask[-1 if folder == "SegmentationClassAug" else -2] = 255
    return mask


def write_devkit(root: Path) -> Path:
    """Write VOCdevkit/VOC2012 with six images into `root` and return the VOC2012 folder."""
    path = root / "VOCdevkit" / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "Annotations"):
        (path / folder).mkdir(parents=True)
    for split, names in LISTS.items():
        (path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    rng = np.random.default_rng(0)
    for name in sorted(set().union(*LISTS.values())):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(path / "JPEGImages" / f"{name}.jpg", quality=95)
        if name not in OBJECTS:
            continue
        objects = "".join(OBJECT.format(name=item) for item in OBJECTS[name])
        (path / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(name=name, objects=objects))
        for folder in ("SegmentationClassAug",) if name == "a3" else ("SegmentationClass", "SegmentationClassAug"):
            write_mask(path / folder / f"{name}.png", mask_of(name, folder))
    return path


# ---------------------------------------------------------------------------------------------------------------- SBD

SBD = ["a1", "a3", "b2"]  # of VOC's train, of neither, of VOC's val


def sbd_mask_of(name: str) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH): the first object in the lower right quarter, no void."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[HEIGHT // 2 :, WIDTH // 2 :] = VOC_CLASSES.index(OBJECTS[name][0]) + 1
    return mask


def write_sbd(root: Path) -> Path:
    """Write benchmark_RELEASE with three masks, laid out as in SBD's own files, and return its folder `dataset`."""
    folder = root / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    for name in SBD:
        mask = sbd_mask_of(name)
        boundaries = np.array([csc_matrix(mask == index) for index in range(1, 21)], object)[:, None]
        present = np.setdiff1d(mask, 0)[:, None]
        fields = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": present}
        savemat(folder / "cls" / f"{name}.mat", {"GTcls": fields}, do_compression=True)
    return folder


# --------------------------------------------------------------------------------------------------------------- COCO

COCO_SIZE = (30, 40)  # height, width
COCO_IDS = {"person": 1, "cat": 17, "dog": 18, "hot dog": 58}  # 4 of the 80, with the gaps of COCO's own numbers


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """The polygon around the pixels [top:bottom, left:right]."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray) -> dict:
    """Uncompressed run lengths of a bool (H, W), column by column from a run of zeros, as COCO has its crowds."""
    values = np.concatenate([[False], mask.T.ravel(), [False]])
    ends = np.flatnonzero(np.diff(values.astype(np.int8)))
    counts = np.diff(np.concatenate([[0], ends, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def crowd() -> np.ndarray:
    """bool (H, W): the region of the crowd in image 7 of train."""
    mask = np.zeros(COCO_SIZE, bool)
    mask[:5] = True
    mask[10:12, 30:] = True
    return mask


COCO = {  # split -> image id -> [(category, outline, area, iscrowd)]
    "train": {
        7: [
            ("dog", rectangle(5, 5, 15, 15), 100, 0),  # under the person, over the crowd's edge
            ("person", rectangle(10, 10, 16, 16), 36, 0),
            ("person", run_lengths(crowd()), int(crowd().sum()), 1),
        ],
        3: [("hot dog", rectangle(0, 0, 40, 30), 1200, 0), ("cat", rectangle(20, 10, 30, 20), 100, 0)],
        9: [],
    },
    "val": {4: [("cat", rectangle(2, 3, 12, 13), 100, 0)], 5: []},
}


def coco_name(split: str, number: int) -> str:
    return f"COCO_{split}2014_{number:012}"


def write_coco(root: Path) -> Path:
    """Write photographs and annotations of a tiny COCO 2014, as its archives have them, into `root` and return it."""
    rng = np.random.default_rng(0)
    for split, images in COCO.items():
        (root / f"{split}2014").mkdir(parents=True)
        content = {
            "categories": [{"id": key, "name": name} for name, key in COCO_IDS.items()],
            "images": [
                {"id": number, "file_name": f"{coco_name(split, number)}.jpg"}
                | dict(zip(("height", "width"), COCO_SIZE, strict=True))
                for number in images
            ],
            "annotations": [
                {
                    "id": 100 * number + index,
                    "image_id": number,
                    "category_id": COCO_IDS[name],
                    "segmentation": outline,
                    "area": area,
                    "iscrowd": iscrowd,
                }
                for number, regions in images.items()
                for index, (name, outline, area, iscrowd) in enumerate(regions)
            ],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
        for number in images:
            pixels = rng.integers(0, 256, (*COCO_SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2014" / f"{coco_name(split, number)}.jpg")
    return root
