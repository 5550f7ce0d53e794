"""A run whose batches several processes share: `python -m wsss.launch --devices 4 EXPERIMENT.json --runs DIR`.

A notebook or script gets the same from `wsss.experiments.run(..., devices=4)`. Both let torchrun start this module
in every process; there Lightning Fabric connects them, by nccl on GPUs and by gloo without. EXPERIMENT.json holds the
fields of `wsss.experiments.Experiment`, for example

    {"method": "more", "variant": "released", "dataset": "voc2012", "seed": 0, "overrides": [["precision", "bf16"]]}
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from wsss.experiments import Experiment, check_known, run, run_share


def main(argv: Sequence[str] | None = None) -> int:
    """Run an experiment, or a process's share of it when torchrun has started this one, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wsss.launch", description="One run in many processes.")
    parser.add_argument("experiment", metavar="EXPERIMENT.json", type=Path)
    parser.add_argument("--runs", metavar="DIR", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", metavar="DIR", help="folder of the dataset, default: its place in the repository")
    parser.add_argument("--devices", type=int, default=1, help="GPUs that share every batch; CPU cores without a GPU")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which each of them takes its share")
    given = parser.parse_args(argv)
    if torch.distributed.is_torchelastic_launched():
        return _share(given)
    try:
        record = run(read_experiment(given.experiment), given.runs, given.data, True, given.devices, given.accumulate)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"wsss.launch: {error}", file=sys.stderr)
        return 1
    print(given.runs / record.name)
    return 0


def _share(given: argparse.Namespace) -> int:
    """What this process does of a run. An error is left beside the experiment, for the process that waits for all."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        fabric = processes(int(os.environ["LOCAL_WORLD_SIZE"]), accelerator)
        fabric.launch()
        run_share(read_experiment(given.experiment), given.runs, given.data, fabric, given.accumulate)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        given.experiment.with_name(f"{os.environ['RANK']}.error").write_text(told)
        raise
    return 0


def processes(devices: int, accelerator: str, **options: object) -> Fabric:
    """Processes that share every batch, to be launched.

    Args:
        devices: how many.
        accelerator: "cuda", a GPU each, or "cpu".
        options: of Fabric's `DDPStrategy`, for example `start_method`.
    """
    # Terms that are off, and parts that do not train yet, leave parameters without a gradient.
    strategy = DDPStrategy(find_unused_parameters=True, **options)
    return Fabric(accelerator=accelerator, strategy=strategy, devices=devices)


def read_experiment(path: Path) -> Experiment:
    """The experiment in a JSON file.

    Raises:
        ValueError: the file is no JSON object, or has a field that an experiment does not have.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: this is not valid JSON: {error}") from error
    return _experiment(content, str(path))


def _experiment(content: object, where: str) -> Experiment:
    known = {field.name for field in fields(Experiment)}
    if not isinstance(content, dict) or not {"method", "variant", "dataset"} <= set(content):
        raise ValueError(f"{where}: an experiment is an object with method, variant and dataset, not {content}")
    for name in content:
        check_known(name, known, where, "field")
    source = content.get("source") and _experiment(content["source"], f"{where}, source")
    overrides = tuple((name, value) for name, value in content.get("overrides", ()))
    return Experiment(**content | {"overrides": overrides, "source": source})


if __name__ == "__main__":
    sys.exit(main())
