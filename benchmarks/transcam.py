"""How long the stages after BNR-TransCAM's classifier take, and how much memory: `python benchmarks/transcam.py`, a few
minutes on two CPU cores.

1. Pair affinities in training, against a gathered copy of the embedding for every offset, as the grid grows.
2. The random walk, against squaring the dense matrix of all cells. Both compute the same numbers.
3. The CRF over a folder of images, on all cores against one, and its classes that no pixel has computed as one.

Memory is the peak of one pass, measured in a process of its own (Linux). "-" stands for what would take too long.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsss.affinity import pair_affinity, pair_indices, random_walk
from wsss.engines import cores
from wsss.refine import LABEL_CRF, CRFJob, crf_labels, dense_crf, label_probabilities

SIDES = (14, 28, 56, 80)  # cells along one side: 112, 224, 448 and 640 px
DENSE_UP_TO = 56  # the dense walk on 80 x 80 cells takes about a minute
RADIUS, BETA, DOUBLINGS = 5, 14, 7
DIM, PLANES = 448, 4  # channels of the embedding; background and three classes
LABELS, IMAGES, SIZE = 21, 16, (375, 500)


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time of `function`, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


# ----------------------------------------------------------------------------------------------------- plain versions


def gathered_affinity(embedding: Tensor, radius: int) -> Tensor:
    """Affinities from a copy (B, D, O, S) of the embedding."""
    sources, partners = pair_indices(embedding.shape[2:], radius)
    flat = embedding.flatten(2)
    return torch.exp(-(flat[:, :, None, sources] - flat[:, :, partners]).abs().mean(1))


def dense_walk(maps: Tensor, affinity: Tensor, radius: int, beta: float, doublings: int) -> Tensor:
    """The walk by the power of a matrix (B, N, N)."""
    sources, partners = pair_indices(maps.shape[2:], radius)
    sources = sources.expand_as(partners)
    matrix = torch.eye(maps[0, 0].numel()).repeat(len(maps), 1, 1)
    matrix[:, sources, partners] = matrix[:, partners, sources] = affinity
    matrix = matrix**beta
    matrix = matrix / matrix.sum(1, keepdim=True)
    for _ in range(doublings):
        matrix = matrix @ matrix
    return (maps.flatten(2) @ matrix).view_as(maps)


# -------------------------------------------------------------------------------------------------------- measurement


def affinity_pass(form: str, side: int) -> Callable[[], Tensor]:
    """One forward and backward pass on one image; returns the gradient."""
    torch.manual_seed(0)
    embedding = torch.randn(1, DIM, side, side)
    function = {"pairs": pair_affinity, "gathered": gathered_affinity}[form]

    def run() -> Tensor:
        leaf = embedding.clone().requires_grad_()
        function(leaf, RADIUS).square().sum().backward()
        return leaf.grad

    return run


def walk_pass(form: str, side: int) -> Callable[[], Tensor]:
    """The walk of one image."""
    torch.manual_seed(0)
    affinity = pair_affinity(0.1 * torch.randn(1, 16, side, side), RADIUS)
    maps = torch.rand(1, PLANES, side, side)
    function = {"sparse": random_walk, "dense": dense_walk}[form]
    return lambda: function(maps, affinity, RADIUS, BETA, DOUBLINGS)


PASSES = {"affinity": affinity_pass, "walk": walk_pass}


def peak(what: str, form: str, side: int, connection) -> None:
    """Send the megabytes that a pass adds to the process."""
    torch.set_num_threads(1)
    run = PASSES[what](form, side)
    PASSES[what](form, 6)()  # libraries are loaded on first use
    before = status("VmRSS")
    run()
    connection.send(status("VmHWM") - before)


def status(field: str) -> float:
    """A field of Linux' account of this process in megabytes: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def megabytes(what: str, form: str, side: int) -> float:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peak, args=(what, form, side, there))
    process.start()
    process.join()
    return here.recv()


def compare(what: str, ours: str, plain: str, up_to: int) -> None:
    """Print times and memory of both forms, of the plain one on grids of `up_to` cells along a side."""
    print(f"\n   grid | {plain:>9s}, ms | {ours:>7s}, ms | ratio | {plain:>9s}, MB | {ours:>7s}, MB")
    for side in SIDES:
        fast = PASSES[what](ours, side)
        own, memory = 1000 * seconds(fast), megabytes(what, ours, side)
        if side > up_to:
            print(f"{side:2d} x {side:2d} | {'-':>13s} | {own:11.1f} | {'-':>5s} | {'-':>13s} | {memory:11.0f}")
            continue
        slow = PASSES[what](plain, side)
        torch.testing.assert_close(fast(), slow(), rtol=1e-4, atol=1e-5)
        other, much = 1000 * seconds(slow, 1), megabytes(what, plain, side)
        times = f"{other:13.1f} | {own:11.1f} | {other / own:5.1f}"
        print(f"{side:2d} x {side:2d} | {times} | {much:13.0f} | {memory:11.0f}")


def time_crf() -> None:
    """Label maps of smooth images, each with two of twenty classes."""
    height, width = SIZE
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros(SIZE, np.int64)
    labels[60:200, 80:240], labels[150:330, 260:460] = 3, 15
    image = np.stack([x % 256, y % 256, 100 * (labels > 0)], -1) + rng.integers(0, 12, (*SIZE, 3))
    image = image.clip(0, 255).astype(np.uint8)
    probabilities = label_probabilities(labels, LABELS)
    merged = seconds(lambda: dense_crf(image, probabilities, **LABEL_CRF), 1)
    # Planes that hardly differ are computed one by one.
    apart = probabilities * (1 + 1e-6 * torch.arange(LABELS)[:, None, None])
    single = seconds(lambda: dense_crf(image, apart, **LABEL_CRF), 1)
    print(f"\nCRF of a label map, {height} x {width}; s\n\n{LABELS} labels one by one | those that no pixel has as one")
    print(f"{single:20.2f} | {merged:30.2f}")

    def folder(workers: int) -> None:
        jobs = [CRFJob(str(index), image, labels) for index in range(IMAGES)]
        assert len(list(crf_labels(jobs, LABEL_CRF, LABELS, workers, progress=False))) == IMAGES

    print(f"\nCRF over {IMAGES} of them\n\nworkers | images/s")
    for workers in sorted({1, cores()}):
        print(f"{workers:7d} | {IMAGES / seconds(lambda: folder(workers), 1):8.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"affinities of one image, {DIM} channels, radius {RADIUS}; forward and backward")
    compare("affinity", "pairs", "gathered", max(SIDES))
    print(f"\nrandom walk of one image, {PLANES} planes, {2**DOUBLINGS} steps")
    compare("walk", "sparse", "dense", DENSE_UP_TO)
    time_crf()
