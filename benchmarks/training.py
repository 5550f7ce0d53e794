"""One training step of every method and variant: `python benchmarks/training.py`, about a minute on one CPU core.

On the embedded benchmark's recipe (batch 32, 80 px, the step in which all terms are on): milliseconds of the whole step
and of the backbone alone (forward and backward), images per second, and the peak memory of the process. Each row runs
in a process of its own, so that the memory is its own.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch

from wsss.data.scenes import Scenes
from wsss.data.transforms import normalise
from wsss.experiments import Experiment
from wsss.training import TrainConfig, build_optimizer

ROWS = (("cam", "published"), ("more", "published"), ("more", "released"))
THREADS, REPEATS = 1, 7


def seconds(function: Callable[[], object]) -> float:
    """Median wall time of `function`, after one call that is not counted."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(row: tuple[str, str]) -> str:
    """One line of the table."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    experiment = Experiment(*row, "embedded")
    config = experiment.config(TrainConfig)
    scenes = Scenes("train", images=config.batch_size)
    batch = {"image": normalise(scenes.images), "label": scenes.labels}
    method = experiment.build(len(scenes.classes)).train()
    optimizer = build_optimizer(method, config)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(method.losses(batch, config.steps - 1).values()).backward()
        optimizer.step()

    def backbone() -> None:
        method.backbone(batch["image"]).patches.mean().backward()

    whole, alone = seconds(step), seconds(backbone)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{'.'.join(row):16s} {1e3 * whole:9.0f} {1e3 * alone:9.0f} {config.batch_size / whole:9.0f} {peak:9.0f}"


if __name__ == "__main__":
    print(f"batch of 32 at 80 px, {THREADS} thread, torch {torch.__version__}")
    print(f"{'method':16s} {'step, ms':>9s} {'backbone':>9s} {'images/s':>9s} {'peak, MB':>9s}")
    for row in ROWS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(measure, (row,)), flush=True)
