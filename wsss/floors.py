"""What a score on a dataset is worth: what takes no network to reach, and what no grid of patches can exceed by much.

A mean IoU means little without its floor (a rule that never looks at the image) and its ceiling (a network that makes
no mistake but predicts one label distribution for each patch). Both depend on the split: on how large, how central and
how jagged its objects are.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.metrics import ConfusionMatrix

RADII = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # of the disc, as shares of the image's shorter side
VOID = 255


def floors(dataset: Dataset[Sample], grid: tuple[int, int], images: int | None = None) -> dict[str, float]:
    """Floors and ceilings of the mIoU on (the first `images` images of) a split; measured once per process.

    - "all background": no pixel belongs to a class.
    - "best centred disc": with the image-level labels known, a centred disc of each image has the first of its labels
      (in the order of `dataset.classes`), the rest is background. Of `RADII`, the one with the best mIoU on this very
      split: a generous floor.
    - "token grid, nearest" and "token grid, bilinear": the true class shares of every patch, upsampled to the size of
      the truth, arg max. A network with an output of that resolution has to guess at shapes in order to do better.

    Args:
        dataset: a split with masks.
        grid: (h, w), the number of patches that a network cuts an image into.

    Returns:
        name -> mIoU in percent, over background and classes as everywhere; void pixels are left out.

    Raises:
        ValueError: the split has no masks, or a grid or number of images below 1.
    """
    if min(grid) < 1 or (images is not None and images < 1):
        raise ValueError(f"floors: grid is {tuple(grid)} and images is {images}; give numbers from 1 on")
    if dataset[0].mask is None:
        raise ValueError(f"{dataset.identity}: the split {dataset.split!r} has no masks, so its floors are unknown")
    return dict(_measure(dataset, tuple(grid), images))


@lru_cache(maxsize=16)
def _measure(dataset: Dataset[Sample], grid: tuple[int, int], images: int | None) -> dict[str, float]:
    classes = len(dataset.classes) + 1
    background, nearest, bilinear = (ConfusionMatrix(classes) for _ in range(3))
    discs = [ConfusionMatrix(classes) for _ in RADII]
    for index in range(len(dataset) if images is None else min(images, len(dataset))):
        sample = dataset[index]
        background.update(torch.zeros_like(sample.mask), sample.mask)
        for matrix, prediction in zip(discs, centred_discs(sample.label, tuple(sample.mask.shape))):
            matrix.update(prediction, sample.mask)
        for matrix, mode in ((nearest, "nearest"), (bilinear, "bilinear")):
            matrix.update(grid_prediction(sample.mask, classes, grid, mode), sample.mask)
    percent = lambda matrix: 100 * matrix.scores().miou
    return {
        "all background": percent(background),
        "best centred disc": max(map(percent, discs)),
        "token grid, nearest": percent(nearest),
        "token grid, bilinear": percent(bilinear),
    }


def centred_discs(label: Tensor, size: tuple[int, int], radii: Sequence[float] = RADII) -> Tensor:
    """Label maps with a centred disc of the first class of an image, one for each radius.

    Args:
        label: (C,) of 0/1; without any class everything is background.
        size: (H, W).
        radii: shares of the shorter side.

    Returns:
        int64 (len(radii), H, W) in 0..C.
    """
    y, x = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in size)
    distance = (y[:, None].square() + x.square()).sqrt()
    inside = distance <= min(size) * torch.tensor(radii, dtype=torch.float64)[:, None, None]
    return inside.long() * ((label.argmax().item() + 1) if label.any() else 0)


def class_shares(mask: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """Which share of each patch belongs to which class, void pixels left out.

    Args:
        mask: int64 (H, W) in 0..classes-1, or 255 for void.
        classes: K, background included.
        grid: (h, w). Where it does not divide (H, W), neighbouring patches overlap by a pixel.

    Returns:
        float64 (K, h, w), summing to 1 over K; 0 in patches that are void altogether.
    """
    valid = mask != VOID
    pixels = F.one_hot(mask.where(valid, 0), classes).permute(2, 0, 1).double() * valid
    shares = F.adaptive_avg_pool2d(pixels[None], grid)[0]
    return shares / shares.sum(0).clamp(min=1e-12)


def grid_prediction(mask: Tensor, classes: int, grid: tuple[int, int], mode: str) -> Tensor:
    """What is left of a mask that went through a grid of patches: `class_shares`, upsampled, arg max.

    Args:
        mode: "nearest" or "bilinear" (without aligned corners, as `maps.resize`).

    Returns:
        int64 (H, W) in 0..classes-1.
    """
    present = mask.flatten().bincount(minlength=VOID + 1)[:classes]
    present[0] += 1  # a patch that is void altogether becomes background
    present = present.nonzero()[:, 0]  # the other classes have no share anywhere
    compact = torch.searchsorted(present, mask).where(mask != VOID, VOID)
    corners = {"align_corners": False} if mode == "bilinear" else {}
    shares = F.interpolate(class_shares(compact, len(present), grid)[None], tuple(mask.shape), mode=mode, **corners)[0]
    return present[shares.max(0).indices]  # the arg max; `argmax` takes twenty times as long


def sentence(floors: Mapping[str, float]) -> str:
    """The result of `floors` for the caption of a table."""
    values = {name: f"{value:.1f}" for name, value in floors.items()}
    return (
        f"For comparison, mIoU in %: all background {values['all background']}, best centred disc with the image "
        f"labels known {values['best centred disc']}; the truth seen through the token grid "
        f"{values['token grid, nearest']} (nearest), {values['token grid, bilinear']} (bilinear)."
    )
