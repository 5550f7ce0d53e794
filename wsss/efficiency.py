"""What the arms of a comparison cost: timed in turn, in one process, on one machine.

Times of two runs say little about two methods: other work on the machine slows one of them down and not the other. So
all arms do a few steps, then all of them a few more, and so on; the median over the rounds is what an arm costs, and
the range says how steady the machine was.
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from wsss import plan
from wsss.experiments import RECIPE_DATASETS, Experiment, environment

ROUNDS = 3
NUMBERS = ["backbone", "trained", "parameters", "step_s", "step_s_low", "step_s_high", "image_ms", "memory_gb"]
PLACE = ["machine", "threads", "torch", "load"]


def parameters(experiment: Experiment) -> dict[str, int]:
    """Parameters of an experiment's network: of its `backbone`, those that are `trained`, and all `parameters`.

    Those that are not trained are frozen or, as SeCo's teacher, follow a mean of others.
    """
    with torch.device("meta"):
        method = experiment.build(len(plan.CLASSES[RECIPE_DATASETS[experiment.dataset]]), pretrained=False)
    numbers = lambda found: sum(parameter.numel() for parameter in found)
    return {
        "backbone": numbers(method.backbone.parameters()),
        "trained": numbers(p for p in method.parameters() if p.requires_grad),
        "parameters": numbers(method.parameters()),
    }


def take_turns(arms: Sequence[Experiment], device: torch.device, rounds: int = ROUNDS) -> pd.DataFrame:
    """Measure every arm in each of the rounds, see `plan.measure`: on noise of the data's size, late in training.

    Args:
        arms: with labels of their own.
        rounds: how often each arm has its turn, >= 1.

    Returns:
        One row an arm: `arm`, `NUMBERS` and `PLACE`. `step_s`: seconds of an optimiser step of the whole batch, the
        median over the rounds, with its range; `image_ms`: milliseconds of all maps and logits of one image, at all
        scales, without a CRF; `memory_gb`: at the peak of a step, measured on a GPU and counted elsewhere; `load`: how
        many processes wanted a core in the minute before (0 on a machine that had nothing else to do).

    Raises:
        ValueError: no rounds, or two arms have one label.
    """
    names = [arm.arm for arm in arms]
    if rounds < 1 or len(set(names)) < len(names):
        raise ValueError(f"take_turns: rounds = {rounds} must be 1 or more, and the labels {names} must differ")
    load = round(os.getloadavg()[0], 1)
    turns = [arm for _ in range(rounds) for arm in arms]
    found: dict[str, list[plan.Cost]] = {name: [] for name in names}
    for arm in tqdm(turns, desc="timing", unit="turn"):
        found[arm.arm].append(plan.measure(arm, device))
    about = environment(device)
    place = {"machine": about["machine"], "threads": about["threads"], "torch": about["torch"], "load": load}
    rows = []
    for arm in arms:
        steps = [cost.step for cost in found[arm.arm]]
        image = 1000 * statistics.median(cost.image for cost in found[arm.arm])
        times = {"step_s": statistics.median(steps), "step_s_low": min(steps), "step_s_high": max(steps)}
        times |= {"image_ms": round(image, 2), "memory_gb": max(cost.gigabytes for cost in found[arm.arm])}
        rows.append({"arm": arm.arm, **parameters(arm), **times, **place})
    return pd.DataFrame(rows)[["arm", *NUMBERS, *PLACE]]


def read(path: Path, arms: Sequence[Experiment]) -> pd.DataFrame:
    """What `take_turns` found for the arms, from a CSV file.

    Raises:
        ValueError: the file has not exactly these arms, or lacks a column; the message names the file and the remedy.
    """
    table = pd.read_csv(path)
    missing = [column for column in ("arm", *NUMBERS, *PLACE) if column not in table.columns]
    wanted, there = {arm.arm for arm in arms}, set(table.get("arm", ()))
    if missing or wanted != there:
        wrong = f"no column {', '.join(missing)}" if missing else f"other arms: {', '.join(sorted(wanted ^ there))}"
        raise ValueError(f"{path}: {wrong}; delete the file, and the arms are timed anew")
    return table
