"""How long APC's parts take, and how much memory: `python benchmarks/apc.py`, about a minute on one CPU core.

1. Adaptive-K pooling (algorithm 1) against plain loops over images and classes, and against max pooling.
2. Patch contrast (eqs. 4-6) against its form over all pairs of patches, as the number of patches grows to that of a
   960 px image. Both compute the same numbers. Memory is the peak of a forward and backward pass, measured in a process
   of its own (Linux).
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.methods.apc import adaptive_k_pooling, confidence_sets, patch_contrast, pool

SIDES = (24, 36, 48, 60)  # patches along one side: 384, 576, 768 and 960 px
CLASSES, DIM, EPSILON = 21, 768, 0.85
IMAGES = 16  # a training batch; the contrast is measured on one image


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `function`, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def looped_pooling(scores: Tensor, max_k: int = 6, theta: float = 0.9) -> Tensor:
    """Algorithm 1 word by word."""
    rows = []
    for image in scores:
        for column in image.T:
            ranked = column.sort(descending=True).values
            selected = ranked[:1]
            for i in range(2, min(max_k, len(ranked)) + 1):
                if ranked[:i].mean() / selected.mean() > theta:
                    selected = ranked[:i]
            rows.append(selected.mean())
    return torch.stack(rows).view(len(scores), -1)


def pairwise_contrast(features: Tensor, scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Eqs. 4-6 over the matrix of all pairs."""
    unit = F.normalize(features, dim=2)
    similarity = (1 + unit @ unit.transpose(1, 2)) / 2
    high, low = (own.to(unit.dtype) for own in confidence_sets(scores, epsilon))
    different = 1 - torch.eye(scores.shape[1])
    same = torch.einsum("bic,bij,bjc->bc", high, (1 - similarity) * different, high)
    other = torch.einsum("bic,bij,bjc->bc", high, similarity, low)
    high_count, low_count = high.sum(1), low.sum(1)
    return same / (high_count * (high_count - 1)).clamp(min=1), other / (high_count * low_count).clamp(min=1)


def confident_scores(images: int, patches: int) -> Tensor:
    """Z as a trained network has it: most patches are sure of one class."""
    torch.manual_seed(0)
    return (8 * torch.randn(images, patches, CLASSES)).softmax(2)


def time_pooling() -> None:
    print(f"pooling of {IMAGES} images and {CLASSES} classes; milliseconds, forward and backward\n")
    print("patches |       loop | adaptive-K |  ratio |    max | adaptive-K / max")
    for side in SIDES:
        scores = confident_scores(IMAGES, side * side).requires_grad_()
        torch.testing.assert_close(adaptive_k_pooling(scores)[0], looped_pooling(scores))
        ways = (looped_pooling, lambda z: adaptive_k_pooling(z)[0], lambda z: pool(z, "max")[0])
        loop, adaptive, maximum = (1000 * seconds(lambda: way(scores).sum().backward(), 3) for way in ways)
        times = f"{loop:10.1f} | {adaptive:10.1f} | {loop / adaptive:6.0f} | {maximum:6.1f} | {adaptive / maximum:5.1f}"
        print(f"{side**2:7d} | {times}")


def contrast_of(form: str, patches: int) -> Callable[[], None]:
    """One forward and backward pass on one image."""
    scores, features = confident_scores(1, patches), torch.randn(1, patches, DIM, requires_grad=True)
    function = {"sums": patch_contrast, "pairs": pairwise_contrast}[form]
    return lambda: sum(function(features, scores, EPSILON)).sum().backward()


def peak(form: str, patches: int, connection) -> None:
    """Send the megabytes that the pass adds to the process."""
    torch.set_num_threads(1)
    run = contrast_of(form, patches)
    contrast_of(form, 4)()  # libraries are loaded on first use
    before = status("VmRSS")
    run()
    connection.send(status("VmHWM") - before)


def status(field: str) -> float:
    """A field of Linux' account of this process in megabytes: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def megabytes(form: str, patches: int) -> float:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peak, args=(form, patches, there))
    process.start()
    process.join()
    return here.recv()


def time_contrast() -> None:
    print(f"\npatch contrast of one image, {CLASSES} classes, {DIM} channels; forward and backward\n")
    print("patches | pairs, ms | sums, ms |  ratio | pairs, MB | sums, MB")
    for side in SIDES:
        patches = side * side
        features, scores = torch.randn(1, patches, DIM), confident_scores(1, patches)
        for fast, slow in zip(patch_contrast(features, scores), pairwise_contrast(features, scores, EPSILON)):
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
        pairs, sums = (1000 * seconds(contrast_of(form, patches), 3) for form in ("pairs", "sums"))
        memory = [megabytes(form, patches) for form in ("pairs", "sums")]
        print(f"{patches:7d} | {pairs:9.1f} | {sums:8.1f} | {pairs / sums:6.0f} | {memory[0]:9.0f} | {memory[1]:8.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_pooling()
    time_contrast()
