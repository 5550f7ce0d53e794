"""A tiny VOC 2012 devkit for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

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
