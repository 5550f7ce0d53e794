"""recipe x dataset x seed -> a run: trained, scored, and kept in a folder named by its content.

`Experiment` says what is to be run. `run_all` trains what is missing and returns the records, `load_records` only reads
them. A run's folder holds `record.json` (recipe, seed, versions, machine, history, metrics) and `state.json`, which is
written last; weights (`checkpoint.pt`) lie beside them and are not committed.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from wsss import backbones, methods, states
from wsss.backbones.weights import FINGERPRINT, fingerprint
from wsss.data import Sample, load_dataset
from wsss.engines import cores
from wsss.evaluation import DECODER, EvalConfig, Request, evaluate
from wsss.files import write_json
from wsss.floors import floors, sentence
from wsss.methods.common import Method
from wsss.metrics import Scores, ThresholdSweep
from wsss.stages import Trained, affinity_labels, pseudo_masks, relabel, score_masks
from wsss.training import TrainConfig, check_total_batch, load_checkpoint, train

if TYPE_CHECKING:
    from lightning_fabric import Fabric

RECIPES = Path(__file__).parent / "recipes"
RECIPE_DATASETS = {"embedded": "embedded", "voc2012": "voc2012", "voc2012-cpu": "voc2012", "coco2014": "coco2014"}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless")


@dataclass(frozen=True)
class BackboneConfig:
    """The fields of a recipe that build the backbone; the last three are of vision transformers, see `MultiTokenViT`.

    Attributes:
        backbone: its name.
        weights: file with weights to start from; "" takes those that belong to the name.
    """

    backbone: str
    weights: str = field(default="", metadata={"optional": True})
    registers: int = field(default=0, metadata={"optional": True})
    token_init: str = field(default="copy", metadata={"optional": True})
    pos_resize: str = field(default="bicubic", metadata={"optional": True})


# ---------------------------------------------------------------------------------------------------------- recipes


@lru_cache
def _layers(method: str) -> dict:
    path = RECIPES / f"{method}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"{path.name}: there is no recipe for the method {method!r}; known: {known}")
    try:
        own = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: this is not valid TOML: {error}") from error
    inherited = own.pop("inherits", None)
    return _laid_over(_only(_layers(inherited), _field_names(method)), own) if inherited else own


def _only(layers: dict, known: set[str]) -> dict:
    """Layers without the fields that are not `known`."""
    entry = lambda value: isinstance(value, dict) and "value" in value
    return {
        name: _only(value, known) if isinstance(value, dict) and not entry(value) else value
        for name, value in layers.items()
        if not entry(value) or name in known
    }


def _laid_over(below: dict, above: dict) -> dict:
    """Two trees of layers in one; where both have an entry, that of `above` stands."""
    if set(above) & {"value", "source"} or not isinstance(below, dict):
        return above
    return below | {
        name: _laid_over(below.get(name), layer) if isinstance(layer, dict) else layer for name, layer in above.items()
    }


def recipe_entries(method: str, variant: str, dataset: str) -> dict[str, dict]:
    """Every number of a recipe with the place it comes from: name -> {"value", "source"}.

    The layers of the TOML file are laid over each other: base, variant, dataset, variant of the dataset. A file that
    `inherits` another method's goes on top of it, as far as it has the same fields, a dataset that is `like` another
    one on top of that one.

    Raises:
        ValueError: unknown variant or dataset, a field that no config knows, or one that is missing.
    """
    variants = methods.find(method).variants
    if variant not in variants:
        raise ValueError(f"variant {variant!r} of {method} is not one of {', '.join(variants)}")
    layers = _layers(method)
    if dataset not in layers["dataset"]:
        raise ValueError(f"{method}.toml has no recipe for {dataset!r}; it has {', '.join(layers['dataset'])}")
    chain = [layers["dataset"][dataset]]
    while (like := chain[0].get("like")) is not None:
        if layers["dataset"].get(like) in (None, *chain):
            raise ValueError(f"{method}.toml [dataset.{dataset}]: like = {like!r} is no other recipe of this file")
        chain.insert(0, layers["dataset"][like])
    stack = [layers["base"], layers.get("variant", {}).get(variant, {})]
    for own in chain:
        stack += [own, own.get("variant", {}).get(variant, {})]
    entries = {}
    for layer in stack:
        entries |= {name: entry for name, entry in layer.items() if name not in ("variant", "like")}
    known = _field_names(method)
    for name, entry in entries.items():
        check_known(name, known, f"{method}.toml")
        if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
            raise ValueError(f"{method}.toml: {name} needs exactly `value` and `source`, not {entry}")
    missing = sorted(known - set(entries) - set(_optional(method)))
    if missing:
        raise ValueError(f"{method}.toml [{dataset}, {variant}]: missing {', '.join(missing)}")
    return {name: entries[name] for name in sorted(entries)}


def _configs(method: str) -> tuple[type, ...]:
    return BackboneConfig, TrainConfig, EvalConfig, methods.find(method).Config


def _optional(method: str) -> dict[str, object]:
    """Fields that a recipe may leave out, with their defaults: without them a run has the name it had before them."""
    return {f.name: f.default for config in _configs(method) for f in fields(config) if "optional" in f.metadata}


def _field_names(method: str) -> set[str]:
    return {f.name for config in _configs(method) for f in fields(config)} - {"variant"}


def check_known(name: str, known: set[str], where: str, what: str = "recipe field") -> None:
    """Raise ValueError, which names the nearest one, where `name` is none of the `known`."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"{where}: unknown {what} `{name}`; {hint}")


def recipe_table(method: str, dataset: str) -> pd.DataFrame:
    """All variants of a recipe side by side: field | published | released | source."""
    variants = {variant: recipe_entries(method, variant, dataset) for variant in methods.find(method).variants}
    rows, first = [], next(iter(variants))
    for name in variants[first]:
        entries = {variant: recipe[name] for variant, recipe in variants.items()}
        same = all(entry == entries[first] for entry in entries.values())
        source = "; ".join(f"{variant}: {entry['source']}" for variant, entry in entries.items())
        source = entries[first]["source"] if same else source
        rows.append({"field": name} | {v: str(entry["value"]) for v, entry in entries.items()} | {"source": source})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Experiment:
    """One run to be: a method in a variant, on a dataset's recipe, with a seed.

    Attributes:
        dataset: name of a recipe: "embedded", "voc2012", "voc2012-cpu" (real photographs, tiny backbone) or "coco2014".
        arm: label of the table row, for example "w/o L_cre"; not part of the content.
        overrides: (field, value) pairs laid over the recipe.
        source: the run that a later stage builds on: the classifier of an affinity network; for a second segmentation
            network that affinity network, or any method with maps.
    """

    method: str
    variant: str
    dataset: str
    seed: int = 0
    arm: str = "full"
    overrides: tuple[tuple[str, object], ...] = ()
    source: "Experiment | None" = None

    def __post_init__(self):
        stage = methods.find(self.method).stage
        if bool(stage) != bool(self.source):
            need = "learns from another run: name it as `source`" if stage else "is a first stage: leave `source` out"
            raise ValueError(f"Experiment: {self.method} {need}")
        source = stage and methods.find(self.source.method)
        if source and not source.mask_map and (stage == "affinity" or source.stage != "affinity"):
            need = "a method with maps" + ("" if stage == "affinity" else ", or an affinity network,")
            raise ValueError(f"Experiment: {self.method} needs {need} as its source, not {self.source.method}")

    def recipe(self) -> dict[str, object]:
        """Flat recipe: field -> value.

        Raises:
            ValueError: an override names an unknown field or has another type than the recipe's value.
        """
        entries = recipe_entries(self.method, self.variant, self.dataset)
        recipe = {name: entry["value"] for name, entry in entries.items()}
        types = {f.name: f.type for config in _configs(self.method) for f in fields(config)}
        defaults = _optional(self.method)
        for name, value in self.overrides:
            check_known(name, {*recipe, *defaults}, "overrides")
            old = recipe[name] if name in recipe else defaults[name]
            numbers = isinstance(old, int | float) and isinstance(value, int if types[name] is int else int | float)
            same = isinstance(value, list | tuple if isinstance(old, list | tuple) else type(old))
            if isinstance(old, bool) != isinstance(value, bool) or not (numbers or same):
                raise ValueError(f"overrides: {name} = {value!r} has the wrong type; the recipe has {old!r}")
            if value != old:  # 20.0 is the recipe's 20: the same run
                recipe[name] = value
        return recipe

    def kept_recipe(self) -> dict[str, object]:
        """The recipe as records keep it: `weights` is what the file holds, wherever it lies, or a record says of it.

        Raises:
            FileNotFoundError: the recipe names weights, and there is no such file.
        """
        recipe = self.recipe()
        weights = recipe.get("weights")
        if not weights or weights.startswith(FINGERPRINT):
            return recipe
        return recipe | {"weights": fingerprint(weights)}

    @property
    def key(self) -> str:
        """Eight hexadecimal digits of the content: method, variant, dataset, seed, recipe, weights, and source."""
        recipe = self.kept_recipe()
        content = [self.method, self.variant, self.dataset, self.seed, recipe]
        if recipe["backbone"] in backbones.TINY_FILES:
            content.append(hashlib.sha256(backbones.TINY_FILES[recipe["backbone"]].read_bytes()).hexdigest())
        if self.source:
            content.append(self.source.key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """method.variant_backbone_crop_batch-steps_dataset_seed-key, the name of folder, row and checkpoint."""
        r = self.recipe()
        size = f"{r['crop']}_b{r['batch_size']}-{r['steps']}"
        return f"{self.method}.{self.variant}_{r['backbone']}_{size}_{self.dataset}_s{self.seed}-{self.key}"

    def config(self, cls: type):
        """The recipe's share of a config dataclass."""
        recipe = self.recipe() | {"variant": self.variant}
        values = {f.name: recipe[f.name] for f in fields(cls) if f.name in recipe}
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def build(self, num_classes: int, pretrained: bool = True) -> Method:
        """The method with its backbone, ready to train; draws from the global generator, so seed it first."""
        cls, b = methods.find(self.method), self.config(BackboneConfig)
        backbone = backbones.build(
            b.backbone,
            pretrained,
            b.weights,
            class_tokens=cls.class_tokens(num_classes),
            registers=b.registers,
            image_size=self.recipe()["crop"],
            token_init=b.token_init,
            pos_resize=b.pos_resize,
        )
        return cls(self.config(cls.Config), num_classes, backbone)

    def chain(self) -> list["Experiment"]:
        """The runs that this one builds on, the nearest first."""
        return [self.source, *self.source.chain()] if self.source else []

    def with_seed(self, seed: int) -> "Experiment":
        """The same with another seed, of its source as well."""
        return replace(self, seed=seed, source=self.source and self.source.with_seed(seed))


def with_seeds(experiments: Sequence[Experiment], count: int) -> list[Experiment]:
    """Every experiment with each of the seeds 0 .. count-1."""
    return [experiment.with_seed(seed) for experiment in experiments for seed in range(count)]


def worth(experiment: Experiment, split: str, data_root: str | None = None) -> str:
    """What scores on a split are worth, for captions: floors of the scored images and the patch grid's ceiling."""
    recipe = experiment.recipe()
    side = (recipe["eval_size"] or recipe["crop"]) // backbones.stride(recipe["backbone"])
    images = recipe["train_images"] or None if split.startswith("train") else None
    dataset = cached_dataset(RECIPE_DATASETS[experiment.dataset], split, data_root or None)
    return sentence(floors(dataset, (side, side), images))


def recipe_for(dataset: str) -> str:
    """The recipe that this machine can train for a dataset: the papers' scale on a GPU, else a small one."""
    return "voc2012-cpu" if dataset == "voc2012" and not torch.cuda.is_available() else dataset


# ---------------------------------------------------------------------------------------------------------- records


@dataclass
class Record:
    """What is kept of a finished run; the content of `record.json`.

    Attributes:
        metrics: "<split>/<protocol>/<map>" -> {"miou", "precision", ... (fractions), "iou": per class, ...}.
        tokens: what the method's `describe` says of its trained network; {} where it says nothing. Where thresholds
            were chosen: "thresholds" (map -> background score) and "curves" (split -> map -> mIoU at `THRESHOLDS`).
        source: name of the run that this one builds on, or "".
    """

    name: str
    method: str
    variant: str
    dataset: str
    identity: str
    classes: list[str]
    seed: int
    arm: str
    key: str
    recipe: dict
    environment: dict
    history: list[dict]
    metrics: dict[str, dict]
    tokens: dict
    wall_seconds: float
    peak_memory_mb: float
    source: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read the record of a finished run.

        Raises:
            FileNotFoundError: the run is not `done`; the message says its state and how to get it.
        """
        state = read_state(folder)["state"]
        if state != "done":
            raise FileNotFoundError(
                f"{folder}: this run is {state}, not done. Train it with `make reproduce`, "
                "or set the notebook's parameter `retrain = True`"
            )
        return cls(**json.loads((folder / "record.json").read_text()))

    def experiment(self, runs: Path) -> Experiment:
        """What this is the record of; `runs` is the folder of the run, where those that it builds on lie as well."""
        source = Record.read(Path(runs) / self.source).experiment(runs) if self.source else None
        plain = Experiment(self.method, self.variant, self.dataset, self.seed, self.arm, source=source)
        base = plain.recipe()
        return replace(plain, overrides=tuple(item for item in self.recipe.items() if item not in base.items()))


def read_state(folder: Path) -> dict:
    """A run's true state: absent, running, failed (with `error`), killed, or done."""
    return states.read_state(folder / "state.json")


def load_records(experiments: Sequence[Experiment], runs: Path) -> list[Record]:
    """Records of finished runs, in order; see `Record.read` for the error when one is missing."""
    return [_labelled(Record.read(Path(runs) / e.name), e) for e in experiments]


def _labelled(record: Record, experiment: Experiment) -> Record:
    record.arm = experiment.arm  # two tables may call one run by different names
    return record


def environment(device: torch.device) -> dict:
    """Versions, commit and machine of this process."""
    git = lambda *words: subprocess.run(
        ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    names = (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name"))
    cpu = next(names, platform.machine())
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", "../wsss")),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# ------------------------------------------------------------------------------------------------------------- runs


def run(
    experiment: Experiment,
    runs: Path,
    data_root: str | None = None,
    progress: bool = True,
    devices: int = 1,
    accumulate: int = 1,
) -> Record:
    """Train and score one experiment, or return its record when it is done; goes on where a killed run stopped.

    On a CPU every run uses one thread, so that its bits do not depend on how many run side by side.

    Args:
        devices: GPUs that share every batch, or CPU cores where there is no GPU, with a process each.
        accumulate: parts in which each of them takes its share, one after the other, to save memory. See
            `wsss.training.train` for what depends on both.

    Raises:
        ValueError: the recipe's total batch cannot be cut like this, or there are fewer devices.
        RuntimeError: one of several processes failed; the message has its error.
    """
    _check_devices(devices)
    check_total_batch(experiment.config(TrainConfig), devices, accumulate)
    folder = Path(runs) / experiment.name
    with _lock(folder) as lock:
        if read_state(folder)["state"] == "done":
            return _labelled(Record.read(folder), experiment)
        write_json(folder / "state.json", {"state": "running", "pid": os.getpid()})
        try:
            if devices > 1:
                _start_shares(experiment, runs, data_root, devices, accumulate, lock)
            else:
                record = _run(experiment, folder, data_root, progress, accumulate=accumulate)
                write_json(folder / "record.json", asdict(record))
        except BaseException as error:
            write_json(folder / "state.json", {"state": "failed", "error": f"{type(error).__name__}: {error}"})
            raise
        write_json(folder / "state.json", {"state": "done"})
    return _labelled(Record.read(folder), experiment)


def _check_devices(devices: int) -> None:
    gpus = torch.cuda.device_count()
    there, kind = (gpus, "GPUs") if gpus else (cores(), "CPU cores and no GPU")
    if not 1 <= devices <= there:
        raise ValueError(
            f"devices = {devices}: this machine has {there} {kind}; ask for 1 to {there}, and `accumulate` the rest of "
            "the batch"
        )


def _start_shares(
    experiment: Experiment, runs: Path, data_root: str | None, devices: int, accumulate: int, lock: TextIO
) -> None:
    """Train and score in processes of their own (`run_share`), which torchrun starts, and ends when one fails."""
    with tempfile.TemporaryDirectory() as scratch:
        file = write_json(Path(scratch) / "experiment.json", asdict(experiment))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        command += ["-m", "wsss.launch", str(file), f"--runs={runs}", f"--accumulate={accumulate}"]
        command += [f"--data={data_root}"] if data_root else []
        threads = {"OMP_NUM_THREADS": "1"} | os.environ
        # They hold the folder's lock too: should this process be killed, nobody else trains beside them.
        process = subprocess.Popen(command, env=threads, pass_fds=(lock.fileno(),))
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # torchrun hands it on
            process.wait()
            raise
        if code:
            errors = sorted(Path(scratch).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            found = errors[0].read_text() if errors else f"they ended with exit code {code}; see what they printed"
            raise RuntimeError(f"one of {devices} processes failed: {found}")


def run_share(
    experiment: Experiment, runs: Path, data_root: str | None, fabric: "Fabric", accumulate: int
) -> None:
    """What each of the processes of a `run` does: train with the others. The first one scores and writes the record."""
    folder = Path(runs) / experiment.name
    record = _run(experiment, folder, data_root, fabric.is_global_zero, fabric, accumulate)
    if record:
        write_json(folder / "record.json", asdict(record))


def train_experiment(
    experiment: Experiment,
    data_root: str | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
    observe: Callable[[int, Method], None] | None = None,
    runs: Path | None = None,
    fabric: "Fabric | None" = None,
    accumulate: int = 1,
) -> tuple[Method, Dataset[Sample], list[dict]]:
    """Build and train the method of an experiment; returns it with its training data and its history.

    Args:
        observe: is called with (steps done, method) after every step.
        runs: folder of the runs, which a later stage needs: there lies its source, and there go its label maps.
        fabric, accumulate: how every batch is shared, see `wsss.training.train`.

    Raises:
        FileNotFoundError: the source of a later stage is not there; the message says how to make it.
    """
    device = fabric.device if fabric else _device()
    torch.set_num_threads(1)
    torch.manual_seed(experiment.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    source = RECIPE_DATASETS[experiment.dataset]
    dataset = cached_dataset(source, TRAIN_SPLIT[source], data_root or None)
    method = experiment.build(len(dataset.classes)).to(device)
    if experiment.source:
        if runs is None:
            raise ValueError(f"{experiment.method} learns from another run: pass `runs`, the folder of the runs")
        with fabric.rank_zero_first() if fabric else contextlib.nullcontext():
            dataset = _relabelled(experiment, method, dataset, Path(runs), progress)
    config, workers = experiment.config(TrainConfig), 0 if source == "embedded" else min(4, os.cpu_count() or 1)
    history = train(
        method,
        dataset,
        config,
        experiment.seed,
        checkpoint,
        experiment.name,
        device,
        workers,
        progress,
        observe,
        fabric,
        accumulate,
    )
    return method, dataset, history


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_trained(experiment: Experiment, runs: Path) -> Trained:
    """The trained network of a finished run, with the background scores that it chose.

    Raises:
        FileNotFoundError: the run is not done, or its weights are not there (they are not committed); the message says
            how to make them.
        ValueError: the checkpoint is not of this run.
    """
    folder = Path(runs) / experiment.name
    state, weights = read_state(folder)["state"], folder / "checkpoint.pt"
    if state != "done" or not weights.exists():
        found, remedy = f"is {state}", "Make it"
        if state == "done":
            found = "is done, but its weights checkpoint.pt are not kept here"
            remedy = "Remove the folder, or choose another one for all runs, and make it"
        raise FileNotFoundError(
            f"{folder}: a later stage builds on this run ({experiment.arm}), which {found}. {remedy} with "
            "`wsss.experiments.run_all`, which trains what a stage builds on before it, or with `wsss reproduce`"
        )
    record = Record.read(folder)
    method = experiment.build(len(record.classes), pretrained=False)
    method.load_state_dict(load_checkpoint(weights, experiment.name)["method"])
    config = _with_thresholds(experiment.config(EvalConfig), record.tokens.get("thresholds", {}))
    return Trained(method.to(_device()).eval(), config)


def _with_thresholds(config: EvalConfig, chosen: dict[str, float]) -> EvalConfig:
    return replace(config, **{f"threshold_{name}": score for name, score in chosen.items()})


def _relabelled(
    experiment: Experiment, method: Method, dataset: Dataset[Sample], runs: Path, progress: bool
) -> Dataset[Sample]:
    """The training images with the label maps that the source of a later stage gives them."""
    chain, workers = [load_trained(source, runs) for source in experiment.chain()], _crf_workers(experiment)
    if method.stage == "affinity":
        stage = Trained(method, experiment.config(EvalConfig))
        make = lambda batches: affinity_labels(chain[0], stage, batches, workers)
    else:
        make = lambda batches: pseudo_masks(chain, batches, method.config.crf_masks, workers)
    return relabel(dataset, runs / experiment.name / "labels", make, method.config.images, progress)


def _crf_workers(experiment: Experiment) -> int | None:
    """Small runs stand side by side, one core each; at the papers' scale a run has the machine to itself."""
    return 1 if experiment.recipe()["backbone"] in backbones.TINY_FILES else None


def _run(
    experiment: Experiment,
    folder: Path,
    data_root: str | None,
    progress: bool,
    fabric: "Fabric | None" = None,
    accumulate: int = 1,
) -> Record | None:
    """Train and score; of several processes the first one returns the record."""
    start, runs = time.perf_counter(), folder.parent
    method, dataset, history = train_experiment(
        experiment, data_root, folder / "checkpoint.pt", progress, runs=runs, fabric=fabric, accumulate=accumulate
    )
    layout = {"processes": fabric.world_size if fabric else 1, "accumulate": accumulate}
    if fabric:
        torch.distributed.destroy_process_group()
        if not fabric.is_global_zero:
            return None
    device = next(method.parameters()).device
    metrics, tokens = score(experiment, method, data_root, device, progress, runs)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _peak_memory_mb()
    return Record(
        experiment.name,
        experiment.method,
        experiment.variant,
        experiment.dataset,
        dataset.identity,
        list(dataset.classes),
        experiment.seed,
        experiment.arm,
        experiment.key,
        experiment.kept_recipe(),
        environment(device) | {name: number for name, number in layout.items() if number != 1},
        history,
        metrics,
        tokens,
        round(time.perf_counter() - start, 1),
        round(memory),
        experiment.source.name if experiment.source else "",
    )


TRAIN_SPLIT = {"embedded": "train", "voc2012": "train_aug", "coco2014": "train"}
THRESHOLDS = tuple(round(0.01 * step, 2) for step in range(100))  # background scores among which one is chosen


def score_plan(experiment: Experiment) -> list[tuple[str, int | None, list[Request]]]:
    """What is scored after training: (split, number of images or all, requests).

    Seeds and pseudo masks are scored on training images with their image labels; everything else without labels. On a
    split whose truth has chosen the background scores, no map is scored that uses them.
    """
    config, method = experiment.config(EvalConfig), methods.find(experiment.method)
    given = [Request("maps-given-labels", name) for name in method.map_names]
    given += [Request("maps-given-labels", name, crf=True) for name in method.crf_maps]
    decoder = [Request(method.segments)] if method.segments else []
    predicted = [*decoder, *(Request("maps-predicted-labels", name) for name in method.crf_maps)]
    if decoder and config.decoder_crf:
        predicted.append(Request(method.segments, crf=True))
    plan = [("train", config.train_images or None, given)]
    if RECIPE_DATASETS[experiment.dataset] == "embedded":
        plan += [("test", None, predicted), ("test_broken", None, decoder)]
    else:
        plan += [("val", None, predicted)]
    fair = lambda request, split: request.map == DECODER or request.crf or split != config.threshold_split
    plan = [(split, images, [r for r in requests if fair(r, split)]) for split, images, requests in plan]
    for split, request in map(Request.read, config.extra_scores):
        _check_extra(experiment, request)
        known = next((requests for name, _, requests in plan if name == split), None)
        if known is None:
            plan.append((split, None, [request]))
        elif request not in known:
            known.append(request)
    return [(split, images, requests) for split, images, requests in plan if requests]


def _check_extra(experiment: Experiment, request: Request) -> None:
    method = methods.find(experiment.method)
    there = request.protocol == method.segments if request.map == DECODER else request.map in method.map_names
    if not there:
        has = ", ".join(filter(None, (*method.map_names, method.segments and f"{method.segments}/{DECODER}")))
        raise ValueError(f"recipe field extra_scores: {experiment.method} has no {request.key}; it has {has}")


def score(experiment, method, data_root, device, progress, runs=None) -> tuple[dict[str, dict], dict]:
    """Metrics of a trained method by "<split>/<protocol>/<map>", and what else its record keeps of it."""
    source, config, metrics = RECIPE_DATASETS[experiment.dataset], experiment.config(EvalConfig), {}
    told, curves, workers = {}, {}, _crf_workers(experiment)
    if config.threshold_split:
        curves[config.threshold_split] = sweeps = _sweeps(method)
        dataset = cached_dataset(source, config.threshold_split, data_root)
        evaluate(method, dataset, [], config, device, None, True, progress, sweeps, workers)
        told["thresholds"] = {name: sweep.best()[0] for name, sweep in sweeps.items()}
        config = _with_thresholds(config, told["thresholds"])
    for split, images, requests in score_plan(experiment):
        dataset = cached_dataset(source, split, data_root)
        sweeps = curves.setdefault(split, _sweeps(method)) if curves and split == "train" else {}
        asked = bool(config.extra_scores)  # of labels that are given on a held-out split
        found = evaluate(method, dataset, requests, config, device, images, asked, progress, sweeps, workers)
        metrics |= {f"{split}/{key}": _plain(scores) for key, scores in found.items()}
    if method.stage == "affinity":
        chain = [Trained(method, config), *(load_trained(e, runs) for e in experiment.chain())]
        dataset = cached_dataset(source, "train", data_root)
        found = score_masks(chain, dataset, config.train_images or None, workers)
        metrics |= {f"train/{key}": _plain(scores) for key, scores in found.items()}
    if curves:
        rounded = lambda sweep: [round(value, 4) for value in sweep.curve()[0].tolist()]
        told["curves"] = {split: {name: rounded(s) for name, s in found.items()} for split, found in curves.items()}
    if source == "embedded":
        told |= method.describe(cached_dataset(source, "train", data_root), 200)
    return metrics, told


def _sweeps(method: Method) -> dict[str, ThresholdSweep]:
    """For every map of the method that has a background score of its own."""
    own = {f.name for f in fields(EvalConfig)}
    names = [name for name in method.map_names if f"threshold_{name}" in own]
    return {name: ThresholdSweep(method.num_classes + 1, THRESHOLDS) for name in names}


def _plain(scores: Scores) -> dict:
    """Scores as numbers that JSON keeps; undefined ones as None."""
    plain = {}
    for name, value in asdict(scores).items():
        values = value.tolist() if isinstance(value, torch.Tensor) else value
        tidy = lambda v: v if isinstance(v, bool) else (round(v, 6) if np.isfinite(v) else None)
        plain[name] = [tidy(v) for v in values] if isinstance(values, list) else tidy(values)
    return plain


@lru_cache(maxsize=8)
def cached_dataset(name: str, split: str, root: str | None) -> Dataset[Sample]:
    """A split of a dataset, opened once per process."""
    return load_dataset(name, split, root)


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[TextIO]:
    """Hold a run's folder, so that two notebooks that need one run train it once; freed by the system after a kill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")
    except OSError as error:
        raise PermissionError(
            f"{folder}: cannot write run folders here ({error.strerror}); make it writable or choose another `out`"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def run_all(
    experiments: Sequence[Experiment], runs: Path, workers: int = 1, data_root: str | None = None, progress: bool = True
) -> list[Record]:
    """Train what is not done, `workers` runs side by side in processes of their own, and return all records in order.

    Runs that a missing one builds on come first, whether they are listed or not.

    Raises:
        RuntimeError: a run failed; the message names it and its error. Those that do not build on it are finished
            first.
    """
    is_done = lambda e: read_state(Path(runs) / e.name)["state"] == "done"
    stages: dict[int, dict[str, Experiment]] = {}
    for experiment in experiments:
        needed = () if is_done(experiment) else experiment.chain()
        for e in (experiment, *needed):
            stages.setdefault(len(e.chain()), {})[e.name] = e
    bar = tqdm(total=sum(map(len, stages.values())), desc="runs", unit="run", disable=not progress)
    failures: dict[str, str] = {}
    for depth in sorted(stages):
        wanted = stages[depth].values()
        lost = [e for e in wanted if any(source.name in failures for source in e.chain())]
        failures |= {e.name: f"{e.name}: not started, a run that it builds on failed" for e in lost}
        done = [e for e in wanted if is_done(e)]
        bar.update(len(done) + len(lost))
        missing = [e for e in wanted if e not in done and e not in lost]
        if missing:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
                futures = {pool.submit(run, e, runs, data_root, False): e for e in missing}
                for future in as_completed(futures):
                    error, name = future.exception(), futures[future].name
                    if error:
                        failures[name] = f"{name}: {type(error).__name__}: {error}"
                    bar.update()
    bar.close()
    if failures:
        raise RuntimeError("\n".join(["runs failed:", *failures.values()]))
    return load_records(experiments, runs)


def obtain(
    experiments: Sequence[Experiment], results: str, out: str, retrain: bool, workers: int, data_root: str
) -> tuple[list[Record], list[Record] | None]:
    """What a notebook shows: the records of `experiments`, and the committed ones to compare new ones with.

    The embedded benchmark's committed records, under <results>/embedded/runs, are read unless `retrain` is set; then,
    and for any other dataset, what is not done is trained. New runs go to <out>/runs, or to <results>/<identity>/runs
    when `out` is "" (which is not allowed for the embedded benchmark: it would overwrite the committed records).

    Returns:
        records, and when they were trained anew the committed records of the same arms, of all seeds that are there, to
        show their spread; None where there are none.
    """
    source = RECIPE_DATASETS[experiments[0].dataset]
    identity = "embedded" if source == "embedded" else cached_dataset(source, "val", data_root or None).identity
    committed = Path(results) / identity / "runs"
    if source == "embedded" and not retrain:
        return load_records(experiments, committed), None
    if source == "embedded" and not out:
        raise ValueError(
            "parameter `retrain = True` needs `out`, a folder for the new runs, for example "
            '"../results/embedded/reproduced"'
        )
    records = run_all(experiments, Path(out) / "runs" if out else committed, workers, data_root or None)
    done = lambda experiment: read_state(committed / experiment.name)["state"] == "done"
    arms = {first.name: first for first in (e.with_seed(0) for e in experiments)}.values()
    known = [e for arm in arms for e in takewhile(done, (arm.with_seed(seed) for seed in count()))]
    return records, load_records(known, committed) if source == "embedded" and known else None
