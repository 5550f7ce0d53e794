"""Time of PAR and of the dense energy loss against plain versions of both, as the number of pixels grows.

Run with `python benchmarks/refine.py`; takes less than a minute, on one CPU core. PAR is compared with a loop over
pixels and neighbours, the energy loss with one that makes the whole kernel. "-" stands for what would take too long.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from wsss.losses import KERNEL_ENTRIES, dense_energy_loss
from wsss.refine import PAR

SIDES = (8, 16, 32, 64, 96)
LOOP_UP_TO = 16
DENSE_UP_TO = 64
CLASSES = 4
ENERGY = {"weight": 1e-7, "sigma_rgb": 15.0, "sigma_xy": 100.0, "scale_factor": 1.0}


def par_by_loops(image: np.ndarray, masks: np.ndarray, par: PAR) -> np.ndarray:
    """PAR of one image (3, H, W) and its masks (M, H, W), one pixel and one neighbour at a time."""
    height, width = image.shape[1:]
    distance = np.hypot(*np.transpose(par.offsets))
    position = np.exp(-((distance / (distance.std(ddof=1) + 1e-8) / par.SHARPNESS) ** 2))
    position *= par.POSITION_WEIGHT / position.sum()
    cells = [(y, x) for y in range(height) for x in range(width)]
    around = {
        (y, x): [(np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)) for dy, dx in par.offsets]
        for y, x in cells
    }
    weights = {}
    for y, x in cells:
        neighbours = np.array([image[:, v, u] for v, u in around[y, x]])
        ratio = (neighbours - image[:, y, x]) / (neighbours.std(0, ddof=1) + 1e-8) / par.SHARPNESS
        similarity = np.exp(-(ratio**2).mean(1))
        weights[y, x] = similarity / similarity.sum() + position
    for _ in range(par.iterations):
        refined = np.zeros_like(masks)
        for y, x in cells:
            for (v, u), weight in zip(around[y, x], weights[y, x], strict=True):
                refined[:, y, x] += weight * masks[:, v, u]
        masks = refined
    return masks


def dense_energy(rgb: Tensor, logits: Tensor) -> Tensor:
    """The energy of fully labelled images at full size with the whole kernel (B, N, N) in memory."""
    scores = logits.softmax(1)
    gate = 1 - scores.detach().amax(1)
    height, width = rgb.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.stack([x, y]).expand(len(rgb), -1, -1, -1) / ENERGY["sigma_xy"]
    features = torch.cat([position, rgb / ENERGY["sigma_rgb"]], 1).flatten(2).mT
    kernel = torch.exp(-torch.cdist(features, features).square() / 2)
    filtered = (scores.flatten(2) @ kernel) * gate.flatten(1)[:, None]
    return -ENERGY["weight"] * (scores.flatten(2) * filtered).sum() / len(rgb)


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """Result and milliseconds of one call."""
    start = time.perf_counter()
    result = function()
    return result, 1000 * (time.perf_counter() - start)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    par = PAR()
    tiny = torch.rand(1, 3, 8, 8)
    par(tiny, tiny), dense_energy(tiny, tiny)  # The first calls of a process also load libraries.
    header = ("pixels", "PAR loops ms", "PAR ms", "dense ms", "dense MiB", "energy ms", "energy MiB")
    row = "{:>8}" + "{:>14}" * 6
    print("One image, one thread, forward, one call each; MiB: largest part of the kernel in memory at once.")
    print(row.format(*header))
    for side in SIDES:
        image, masks = torch.rand(1, 3, side, side), torch.rand(1, CLASSES, side, side)
        rgb, logits = 255 * image, torch.randn(1, CLASSES, side, side)
        label = torch.ones(1, side, side, dtype=torch.long)
        loops = dense = "-"
        refined, par_time = timed(lambda: par(image, masks))
        energy, energy_time = timed(lambda: dense_energy_loss(rgb, logits, label, **ENERGY))
        if side <= LOOP_UP_TO:
            expected, loops_time = timed(lambda: par_by_loops(image[0].numpy(), masks[0].numpy(), par))
            np.testing.assert_allclose(refined[0].numpy(), expected, atol=1e-5)
            loops = f"{loops_time:.1f}"
        if side <= DENSE_UP_TO:
            expected, dense_time = timed(lambda: dense_energy(rgb, logits))
            torch.testing.assert_close(energy, expected, rtol=1e-3, atol=0)
            dense = f"{dense_time:.1f}"
        entries = side**4
        sizes = [f"{count * 4 / 2**20:.1f}" for count in (entries, min(entries, KERNEL_ENTRIES))]
        print(row.format(side**2, loops, f"{par_time:.1f}", dense, sizes[0], f"{energy_time:.1f}", sizes[1]))


if __name__ == "__main__":
    main()
