"""What a reproduction takes, before it is started: `wsss plan`.

The runs of a notebook are read off its code: the statements that lead from its parameters to what it asks
`experiments.obtain` for are executed, and nothing else, so that a plan needs neither data nor a GPU. What a step
costs is measured where the machine in question is at hand, and counted elsewhere; the plan says which.
"""

import argparse
import ast
import hashlib
import json
import os
import statistics
import symtable
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from wsss import backbones, experiments, methods
from wsss.data import Sample, coco, scenes, voc
from wsss.data.classes import COCO_CLASSES, SCENE_CLASSES, VOC_CLASSES
from wsss.data.transforms import normalise
from wsss.evaluation import BATCH, DECODER, EvalConfig, all_scores
from wsss.experiments import RECIPE_DATASETS, TRAIN_SPLIT, Experiment, score_plan
from wsss.files import write_json
from wsss.methods.common import Method
from wsss.refine import dense_crf
from wsss.reproduce import RESULTS, ReproduceError, Task, chosen_tasks
from wsss.training import PRECISIONS, TrainConfig, train


COSTS = "costs.json"  # in the folder of the results
COUNTED = Path(__file__).parent / "recipes" / "counted.json"  # such a file with what the papers' recipes cost


class PlanError(ReproduceError):
    """A plan cannot be made; the message says why and what to do."""


# ------------------------------------------------------------------------------------------ the runs of a notebook


@dataclass(frozen=True)
class Asked:
    """What a notebook trains.

    Attributes:
        runs: those behind its tables, each once, with the runs that they build on before them.
        shown: short trainings that pictures come from; they are not kept, and done again in every execution.
        tables: the published tables that it reproduces, for example "more 3".
    """

    runs: list[Experiment]
    shown: list[Experiment]
    tables: list[str]


def asked(task: Task) -> Asked:
    """Read off the code of a notebook what it trains with the parameters of a task, at the scale of the recipe named.

    Raises:
        PlanError: it cannot be told without executing the notebook, or an override names an unknown recipe field.
    """
    namespace, statements = _code(task)
    obtained, shown, tables = [], [], []
    with patch.object(experiments, "recipe_for", lambda dataset: dataset):  # the plan may be for another machine
        for position, statement in enumerate(statements):
            for name, call in _calls(statement):
                if name == "obtain":
                    obtained += _value(task, call, statements[:position], namespace)
                elif name == "train_experiment":
                    shown.append(_value(task, call, statements[:position], namespace))
                elif name == "published" and all(isinstance(argument, ast.Constant) for argument in call.args):
                    tables.append(" ".join(str(argument.value) for argument in call.args))
    try:
        runs = {run.name: run for wanted in obtained for run in (*reversed(wanted.chain()), wanted)}
    except ValueError as error:
        raise PlanError(f"{task.notebook.name}: {error}") from error
    return Asked(list(runs.values()), shown, list(dict.fromkeys(tables)))


def _code(task: Task) -> tuple[dict[str, object], list[ast.stmt]]:
    """The parameters of a notebook, with those of the task, and the statements of its other cells."""
    parameters, statements = {}, []
    for cell in nbformat.read(task.notebook, as_version=4).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, parameters)
        elif cell.cell_type == "code":
            statements += ast.parse(cell.source).body
    return parameters | task.parameters, statements


def _calls(statement: ast.stmt) -> Iterator[tuple[str, ast.Call]]:
    """Calls with an argument, with the name of the function, whatever module it is called from."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
            yield node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node


def _value(task: Task, call: ast.Call, before: Sequence[ast.stmt], namespace: dict[str, object]) -> object:
    """First argument of a call, from the statements before it that have a part in it."""
    argument = call.args[0]
    _, wanted = _names(ast.Expr(argument))
    needed = []
    for statement in reversed(before):
        changed, used = _names(statement)
        if changed & wanted - set(namespace):
            needed.insert(0, statement)
            wanted |= used
    try:
        if any(name in ("obtain", "train_experiment") for part in needed for name, _ in _calls(part)):
            raise ValueError("it depends on what was trained before")
        scope = dict(namespace)
        exec(compile(ast.Module(needed, []), task.notebook.name, "exec"), scope)
        return eval(compile(ast.Expression(argument), task.notebook.name, "eval"), scope)
    except Exception as error:
        raise PlanError(
            f"{task.notebook.name}: cannot tell what `{ast.unparse(call)}` trains without executing the notebook "
            f"({type(error).__name__}: {error}); compute its first argument from the parameters alone"
        ) from error


def _names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """The names that a statement binds or changes, and all that it uses; those inside comprehensions are their own."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    symbols = table.get_symbols()
    changed = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    used, inner = {symbol.get_name() for symbol in symbols}, table.get_children()
    while inner:
        scope = inner.pop()
        used |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        inner += scope.get_children()
    for node in ast.walk(statement):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # list.append(x)
            node = node.value.func
        elif not isinstance(getattr(node, "ctx", None), ast.Store):  # name[key] = x
            continue
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.value, ast.Name):
            changed.add(node.value.id)
    return changed, used


# ------------------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class GPU:
    """Peak rates of a GPU in TFLOPS, without sparsity, and its memory in GB: its maker's data sheet."""

    fp32: float
    half: float
    memory: float


GPUS = {
    "T4": GPU(8.1, 65, 16),
    "V100": GPU(15.7, 125, 32),
    "RTX 2080 Ti": GPU(13.4, 54, 11),
    "RTX 3090": GPU(35.6, 71, 24),
    "RTX 4090": GPU(82.6, 165, 24),
    "RTX A6000": GPU(38.7, 155, 48),
    "A100": GPU(19.5, 312, 80),
    "L40S": GPU(91.6, 362, 48),
    "H100": GPU(67, 989, 80),
    "H200": GPU(67, 989, 141),
}
PAPERS_GPU = "RTX 3090"  # of MoRe and SeCo
# Share of the peak that training reaches: an assumption. With it, counted training takes 6.6 h (MoRe, released) and
# 8.1 h (SeCo, released) on an RTX 3090; the papers report 6.2 h and 7.0 h.
UTILISATION = 0.2

PHOTOGRAPH = {"embedded": (scenes.SIZE, scenes.SIZE), "voc2012": (375, 500), "coco2014": (480, 640)}  # the usual (H, W)
CLASSES = {"embedded": SCENE_CLASSES, "voc2012": VOC_CLASSES, "coco2014": COCO_CLASSES}
IMAGES = {
    "embedded": {split: law.images for split, law in scenes.SPLITS.items()},
    "voc2012": voc.OFFICIAL,
    "coco2014": coco.OFFICIAL,
}

# An arm costs what the whole method costs at the same size: the parts that it leaves out are small, or make it cheaper.
SIZES = ("backbone", "crop", "batch_size", "precision", "eval_size", "eval_flip", "map_scales", "decoder_scales")
PHASES = ("frozen_steps", "first_steps", "warmup_steps")  # and *_start: until when something is off
STEPS, WARM_UP = 8, 3  # steps of a measurement, and how many of them are left out


@dataclass(frozen=True)
class Cost:
    """What a method costs at the size of an experiment.

    Attributes:
        step: of one optimiser step of the whole batch, late in training, when all losses are on.
        image: of all maps and decoder logits of one image, at all scales, without a CRF.
        gigabytes: of memory at the peak, measured on a GPU and counted elsewhere; inf where the GPU had less.

    `step` and `image` are seconds where they are measured, FLOP where they are counted.
    """

    step: float
    image: float
    gigabytes: float


def sized(experiment: Experiment) -> Experiment:
    """The whole method at the size of an experiment: what its costs follow from."""
    source = experiment.source and sized(experiment.source)
    overrides = tuple((name, value) for name, value in experiment.overrides if name in SIZES)
    return replace(experiment, seed=0, arm="", overrides=overrides, source=source)


def cost_name(experiment: Experiment) -> str:
    """Names the costs of an experiment by the content of its recipe, whatever run it builds on."""
    whole = sized(experiment)
    recipe = whole.recipe()
    content = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    size = f"{recipe['backbone']}_{recipe['crop']}_b{recipe['batch_size']}"
    return f"{whole.method}.{whole.variant}_{size}_{whole.dataset}-{content}"


class Photographs(Dataset[Sample]):
    """Noise of the size and with the classes of a dataset, for what does not depend on what is in the pictures."""

    split, identity = "train", "noise"

    def __init__(self, dataset: str, images: int):
        source = RECIPE_DATASETS[dataset]
        self.size, self.classes = PHOTOGRAPH[source], CLASSES[source]
        self.names = tuple(map(str, range(images)))
        self.labels = F.one_hot(torch.arange(images) % len(self.classes), len(self.classes)).float()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, *self.size), dtype=torch.uint8, generator=generator)
        mask = torch.zeros(self.size, dtype=torch.int64)
        mask[: self.size[0] // 2] = 1 + index % len(self.classes)
        return Sample(image, self.labels[index], mask, self.names[index])


def count(experiment: Experiment) -> Cost:
    """Count a step, on the CPU: with a batch of one image, as FLOP and memory grow with the images.

    Memory is that of parameters, gradients, moments, and what the forward pass keeps for the backward one. What lives
    for an operation only comes on top of that.
    """
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as step, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method = _train(experiment, 1, batch_size=1)
    own = {p.data_ptr() for p in method.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in own)
    size_of = lambda tensors: sum(tensor.nbytes for tensor in tensors)
    moments = 2 if experiment.config(TrainConfig).optimizer == "adamw" else 1
    trained = size_of(p for p in method.parameters() if p.requires_grad)
    static = size_of(method.parameters()) + size_of(method.buffers()) + (1 + moments) * trained
    with torch.device("meta"):
        method = experiment.build(len(CLASSES[RECIPE_DATASETS[experiment.dataset]]), pretrained=False)
    with FlopCounterMode(display=False) as image:
        _score(experiment, method, 1, "meta")
    images = experiment.config(TrainConfig).batch_size
    memory = (static + images * activations) / 2**30
    return Cost(images * step.get_total_flops(), image.get_total_flops(), round(memory, 2))


def measure(experiment: Experiment, device: torch.device) -> Cost:
    """Measure steps and images on a device, as a run does them."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    now, cuda = [], device.type == "cuda"

    def observe(*_: object) -> None:
        if cuda:
            torch.cuda.synchronize()
        now.append(time.perf_counter())

    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        workers = min(4, os.cpu_count() or 1) if cuda else 0
        method = _train(experiment, STEPS, device=device, workers=workers, observe=observe)
        step = statistics.median(later - earlier for earlier, later in zip(now[WARM_UP - 1 :], now[WARM_UP:]))
        for _ in range(2):  # the first time warms up
            observe()
            _score(experiment, method, BATCH, device)
        observe()
    except torch.OutOfMemoryError:
        return Cost(float("nan"), float("nan"), float("inf"))
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else count(experiment).gigabytes
    return Cost(round(step, 4), round((now[-1] - now[-2]) / BATCH, 5), memory)


def _train(experiment: Experiment, steps: int, batch_size: int | None = None, **settings: object) -> Method:
    """Train on noise, without the phases in which something is off."""
    recipe = experiment.recipe()
    phases = [name for name in recipe if name.endswith("_start") or name in PHASES]
    changes = dict.fromkeys(phases, 0) | {"steps": steps, "batch_size": batch_size or recipe["batch_size"]}
    trial = replace(experiment, overrides=(*experiment.overrides, *changes.items()))
    config = trial.config(TrainConfig)
    data = Photographs(experiment.dataset, config.batch_size)
    torch.manual_seed(0)  # what is masked depends on the maps, and so a little of the FLOP
    method = trial.build(len(data.classes), pretrained=False)
    train(method, data, config, 0, progress=False, **settings)
    return method


@torch.no_grad()
def _score(experiment: Experiment, method: Method, images: int, device: str | torch.device) -> None:
    """The forward passes behind the scores of some images, or behind an affinity network's random walk."""
    data = Photographs(experiment.dataset, images)
    samples = [data[index] for index in range(images)]
    method.to(device).eval()
    names = {request.map for _, _, requests in score_plan(experiment) for request in requests}
    if method.stage == "affinity":
        method.embed(torch.stack([normalise(sample.image) for sample in samples]).to(device))
    elif names:
        all_scores(method, samples, names, experiment.config(EvalConfig), device)


def costs(wanted: Sequence[Experiment], column: str, find: Callable[[Experiment], Cost], path: Path) -> dict[str, Cost]:
    """Costs by `cost_name`: those that the file `path` has for a machine, and what is missing, which is added to it.

    Args:
        column: the machine, or "counted".

    Raises:
        PlanError: the file is not what this function writes.
        PermissionError: the file cannot be written.
    """
    known = read_costs(path)
    missing = {cost_name(e): sized(e) for e in wanted if cost_name(e) not in known.get(column, {})}
    for name, experiment in tqdm(missing.items(), desc=f"costs, {column}", unit="method", disable=not missing):
        known.setdefault(column, {})[name] = find(experiment)
        write_json(path, {machine: {name: vars(cost) for name, cost in own.items()} for machine, own in known.items()})
    return known.get(column, {})


def read_costs(path: Path) -> dict[str, dict[str, Cost]]:
    """Costs by machine and `cost_name`; {} where there is no file."""
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        return {machine: {name: Cost(**cost) for name, cost in own.items()} for machine, own in known.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{path}: these are no costs of `wsss plan` ({error}); remove the file, and they are found anew"
        ) from error


# -------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Clock:
    """Turns costs into hours of a machine.

    Attributes:
        machine: a GPU, or this machine's processor, of which a run takes one core.
        memory: GB that it has; inf where that is not known.
        costs: by `cost_name`.
        rate: FLOP a second by precision where costs are counted; 1 where they are seconds.
        origin: a sentence about where the costs come from.
    """

    machine: str
    memory: float
    costs: Mapping[str, Cost]
    rate: Mapping[str, float]
    origin: str

    def cost(self, experiment: Experiment) -> Cost:
        return self.costs[cost_name(experiment)]

    def training(self, experiment: Experiment) -> float:
        """Hours of the optimiser steps."""
        recipe = experiment.recipe()
        return recipe["steps"] * self.cost(experiment).step / self.rate[recipe["precision"]] / 3600

    def scoring(self, experiment: Experiment) -> float:
        """Hours of the forward passes behind label maps and scores, in full precision."""
        return sum(images * self.cost(e).image for e, images, _ in passes(experiment)) / self.rate["fp32"] / 3600


def find_clock(wanted: Sequence[Experiment], gpu: str | None, path: Path) -> Clock:
    """The costs of experiments on a GPU.

    Measured on this machine where it is the one in question (any that can do it, if `gpu` is None), else read from
    what was measured there before, else counted.

    Raises:
        PlanError: nothing is known of `gpu`.
    """
    seconds = dict.fromkeys(PRECISIONS, 1.0)
    same = lambda machine: gpu is not None and gpu.lower() in machine.lower()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, memory = experiments.environment(device)["machine"], float("inf")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties().total_memory / 2**30
    small = all(e.recipe()["backbone"] in backbones.TINY_FILES for e in wanted)
    if same(here) or gpu is None and (small or device.type == "cuda"):
        found = costs(wanted, here, lambda experiment: measure(experiment, device), path)
        return Clock(here, memory, found, seconds, f"measured on this machine, {STEPS - WARM_UP} steps of each method")
    gpu = {name.lower(): name for name in GPUS}.get((gpu or PAPERS_GPU).lower(), gpu)
    for machine, found in read_costs(path).items():
        if same(machine) and all(cost_name(e) in found for e in wanted):
            return Clock(machine, float("inf"), found, seconds, f"measured on {machine} before")
    if gpu not in GPUS:
        raise PlanError(
            f"--gpu {gpu}: nothing is known of it; choose one of {', '.join(GPUS)}, or give this command on a machine "
            "that has it: costs are measured there"
        )
    peak = GPUS[gpu]
    origin = (
        f"counted, not measured: FLOP of a step and of an image, at an assumed {UTILISATION:.0%} of the peak of {gpu}, "
        f"{peak.fp32:g} TFLOPS (fp32) or {peak.half:g} (half); memory is what a step keeps, the least that it takes. "
        "Give this command on the GPU to have them measured"
    )
    ready = read_costs(COUNTED).get("counted", {})
    found = ready | costs([e for e in wanted if cost_name(e) not in ready], "counted", count, path)
    rate = {name: 1e12 * UTILISATION * (peak.fp32 if name == "fp32" else peak.half) for name in PRECISIONS}
    return Clock(gpu, peak.memory, found, rate, origin)


def passes(experiment: Experiment) -> list[tuple[Experiment, int, dict[int, int]]]:
    """What is done with images besides training: (whose forward passes, of how many images, {classes: CRFs of one})."""
    source, config = RECIPE_DATASETS[experiment.dataset], experiment.config(EvalConfig)
    everywhere, stage = len(CLASSES[source]) + 1, methods.find(experiment.method).stage
    of = lambda split, some: min(some or IMAGES[source][split], IMAGES[source][split])
    found = []
    for split, some, requests in score_plan(experiment):
        crf = [everywhere if request.map == DECODER else FEW for request in requests if request.crf]
        found.append((experiment, of(split, some), {classes: crf.count(classes) for classes in crf}))
    if config.threshold_split:
        found.append((experiment, of(config.threshold_split, None), {}))
    if stage:
        own = experiment.config(methods.find(experiment.method).Config)
        crf = {FEW: 2 if stage == "affinity" else int(own.crf_masks)}
        labelled = of(TRAIN_SPLIT[source], own.images)
        found += [(e, labelled, crf if e is experiment.source else {}) for e in experiment.chain()]
    if stage == "affinity":
        walked = of("train", config.train_images)
        found += [(experiment, walked, {FEW: 1}), (experiment.source, walked, {})]
    return found


FEW = 3  # classes in a CRF that knows the image labels, background included


@lru_cache
def crf_seconds(dataset: str, classes: int, iterations: int) -> float:
    """Seconds of a CRF on one core of this machine: measured, on noise of the usual size of the dataset."""
    generator = torch.Generator().manual_seed(0)
    height, width = PHOTOGRAPH[RECIPE_DATASETS[dataset]]
    image = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    blobs = F.interpolate(torch.randn(1, classes, 8, 8, generator=generator), (height, width), mode="bilinear")
    start = time.perf_counter()
    dense_crf(image, (3 * blobs[0]).softmax(0), iterations)
    return time.perf_counter() - start


def crf_hours(experiment: Experiment) -> float:
    """Hours of one core of this machine."""
    iterations = experiment.config(EvalConfig).crf_iterations
    of = lambda classes: crf_seconds(experiment.dataset, classes, iterations)
    return sum(n * many * of(classes) for _, n, crf in passes(experiment) for classes, many in crf.items()) / 3600


def table(runs: Sequence[Experiment], clock: Clock) -> pd.DataFrame:
    """One row an arm: its runs, the steps of one of them, hours of all of them, memory of one."""
    rows = [
        {
            "arm": f"{e.method}, {e.variant}, {e.arm}",
            "runs": 1,
            "steps": e.recipe()["steps"],
            "training, h": clock.training(e),
            "scoring, h": clock.scoring(e),
            "CRF, core h": crf_hours(e),
            "memory, GB": clock.cost(e).gigabytes,
        }
        for e in runs
    ]
    adding = dict.fromkeys(("runs", "training, h", "scoring, h", "CRF, core h"), "sum") | {"memory, GB": "max"}
    return pd.DataFrame(rows).groupby(["arm", "steps"], sort=False, as_index=False).agg(adding)


def text(notebooks: Mapping[str, Asked], clock: Clock) -> str:
    """The plan, notebook by notebook; a run that several of them need stands with the first."""
    first, blocks, tables = {}, [], []
    for name, own in notebooks.items():
        lines = [f"{name}: {', '.join(own.tables) or 'no published table'}"]
        new = [run for run in own.runs if run.name not in first]
        if new:
            tables.append(table(new, clock))
            lines += [tables[-1].to_string(index=False, float_format="{:.2f}".format), _sum(tables[-1], clock)]
        others = [first[run.name] for run in own.runs if run.name in first]
        lines += [f"counted with {other}: {others.count(other)}" for other in dict.fromkeys(others)]
        lines += [f"for its pictures: {_short(run, clock)}" for run in own.shown]
        first |= {run.name: name for run in new}
        blocks.append("\n".join(lines))
    if tables:
        blocks.append(f"all notebooks: {_sum(pd.concat(tables), clock)}")
    every = [run for own in notebooks.values() for run in (*own.runs, *own.shown)]
    large = dict.fromkeys(f"{e.method} at a batch of {e.recipe()['batch_size']}" for e in every if _too_large(e, clock))
    if large:
        blocks.append(f"More memory than {clock.machine} has: {', '.join(large)}.")
    return "\n\n".join([*blocks, f"Costs: {clock.origin}."])


def _sum(table: pd.DataFrame, clock: Clock) -> str:
    hours = table["training, h"].sum() + table["scoring, h"].sum()
    return (
        f"runs: {table['runs'].sum()}, hours on {clock.machine}: {hours:.1f}, "
        f"GB at most: {table['memory, GB'].max():.1f}, "
        f"core hours of CRF beside them: {table['CRF, core h'].sum():.1f} (at the speed of this machine)"
    )


def _short(run: Experiment, clock: Clock) -> str:
    recipe, minutes = run.recipe(), 60 * clock.training(run)
    size = f"{recipe['steps']} steps at a batch of {recipe['batch_size']}"
    return f"{run.method}, {run.variant}, {size}: {minutes:.1f} min, {clock.cost(run).gigabytes:.1f} GB"


def _too_large(run: Experiment, clock: Clock) -> bool:
    needed = clock.cost(run).gigabytes
    return needed > clock.memory or needed == float("inf")


# ----------------------------------------------------------------------------------------------------------- command


def command(arguments: argparse.Namespace) -> int:
    """Run `wsss plan`; 0 when the plan is printed, 2 when there is none."""
    try:
        notebooks = {task.name: asked(task) for task in chosen_tasks(arguments, {})}
        wanted = [e for own in notebooks.values() for run in (*own.runs, *own.shown) for e in (run, *run.chain())]
        print(text(notebooks, find_clock(wanted, arguments.gpu, RESULTS / COSTS)))
    except (ReproduceError, OSError) as error:
        print(f"wsss plan: {error}", file=sys.stderr)
        return 2
    return 0
