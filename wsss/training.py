"""The one loop that trains every method.

A run is a pure function of (method, data, recipe, seed): the order of the images follows from the seed, every random
crop from (seed, step, place in the batch), and a checkpoint holds everything else, so that a run that was killed goes
on with the same bits as one that was not.

One process trains, or several that share every batch. Their number is no part of a recipe: `batch_size` is the total.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from wsss.data import Sample
from wsss.data.transforms import PADDING, TrainTransform
from wsss.files import write_atomic

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from wsss.methods.common import Method

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and augmentation: the same fields for every method.

    Attributes:
        crop: side of the training crop in pixels.
        batch_size: images in one optimiser step, in total.
        steps: optimiser steps.
        lr: base rate of the optimiser, used for the backbone.
        head_lr_multiplier: rate of all other parameters, as a multiple of `lr`.
        weight_decay: of every parameter whose group, see `Method.parameter_groups`, has none of its own.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: share of the rate at step 0.
        poly_power: exponent of the polynomial decay.
        clip_norm: largest norm of the gradient; 0 switches clipping off.
        precision: "fp32", "bf16" or "fp16" (mixed).
        crop_mode, crop_scale, crop_ratio, jitter, jitter_probability: see `TrainTransform`.
        checkpoint_every: steps between checkpoints.
        first_steps, first_factor: a first phase of that many steps, at a constant multiple of all rates. Recipes may
            leave it out.
        optimizer: "adamw" or "sgd". Recipes may leave it out.
        momentum: of SGD. Recipes may leave it out.
    """

    crop: int
    batch_size: int
    steps: int
    lr: float
    head_lr_multiplier: float
    weight_decay: float
    warmup_steps: int
    warmup_ratio: float
    poly_power: float
    clip_norm: float
    precision: str
    crop_mode: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    jitter: tuple[float, float, float, float]
    jitter_probability: float
    checkpoint_every: int
    first_steps: int = field(default=0, metadata={"optional": True})
    first_factor: float = field(default=1.0, metadata={"optional": True})
    optimizer: str = field(default="adamw", metadata={"optional": True})
    momentum: float = field(default=0.0, metadata={"optional": True})

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"recipe field optimizer = {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.momentum < 1 or self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"recipe field momentum = {self.momentum} with optimizer = {self.optimizer!r}: give 0 or more and "
                'below 1, and only to "sgd"'
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"recipe field precision = {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        for field in ("crop", "batch_size", "steps", "checkpoint_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"recipe field {field} = {getattr(self, field)} must be at least 1")

    def transform(self) -> TrainTransform:
        return TrainTransform(
            self.crop, self.crop_scale, self.crop_ratio, self.jitter, self.jitter_probability, self.crop_mode
        )


def rate_factor(step: int, config: TrainConfig) -> float:
    """Learning rate in optimiser step `step` (from 0) as a share of the base rate.

    A constant first phase where the recipe has one, else linear warm-up, then polynomial decay counted from step 0, so
    that the factor drops a little where warm-up ends (as the released codes of MoRe and SeCo have it). Steps beyond the
    last keep its value.
    """
    if step < config.first_steps:
        return config.first_factor
    if step < config.warmup_steps:
        return 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_ratio)
    return (1 - min(step, config.steps - 1) / config.steps) ** config.poly_power


class _Augmented(Dataset):
    """Training view of a dataset, with what a method asks for; an item is asked for by (index, seed of its crop)."""

    def __init__(self, dataset: Dataset, transform: TrainTransform, method: "Method"):
        self.dataset, self.transform = dataset, transform
        self.wanted, self.views = method.batch_fields, method.views

    def __getitem__(self, request: tuple[int, int]) -> dict[str, Tensor]:
        index, seed = request
        sample = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item = {"label": sample.label} | self._crop(sample)
            return item | (self.views(sample.image, item["image"]) if self.views else {})

    def _crop(self, sample: Sample) -> dict[str, Tensor]:
        if not self.wanted:
            return {"image": self.transform(sample.image)}
        maps = {"valid": torch.zeros(sample.image.shape[-2:], dtype=torch.int64)}
        if "mask" in self.wanted:
            if sample.mask is None:
                raise ValueError(
                    f"{sample.name}: this image has no mask, and the method learns from masks; "
                    "take a split that has them"
                )
            maps["mask"] = sample.mask
        image, cropped = self.transform.with_mask(sample.image, torch.stack(list(maps.values())))
        crops = dict(zip(maps, cropped))
        crops["valid"] = crops["valid"] != PADDING
        return {"image": image} | {field: crops[field] for field in self.wanted}


def batches(images: int, config: TrainConfig, seed: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
    """Requests (index, crop seed) of every batch from `first_step` on; epochs follow each other without a gap."""
    epoch, order = -1, None
    for step in range(first_step, config.steps):
        requests = []
        for place in range(step * config.batch_size, (step + 1) * config.batch_size):
            if place // images != epoch:
                epoch = place // images
                order = np.random.default_rng([seed, epoch]).permutation(images)
            crop_seed = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
            requests.append((int(order[place % images]), crop_seed))
        yield requests


def shares(
    batches: Iterable[list[tuple[int, int]]], processes: int, rank: int, accumulate: int
) -> Iterator[list[tuple[int, int]]]:
    """What process `rank` takes of every batch: `accumulate` parts, one after the other.

    All processes' first parts, side by side, are the beginning of the batch in its order, then come the second parts.
    """
    for requests in batches:
        size = len(requests) // (processes * accumulate)
        for first in range(rank * size, len(requests), processes * size):
            yield requests[first : first + size]


def check_total_batch(config: TrainConfig, processes: int, accumulate: int) -> None:
    """Raise ValueError where the recipe's total batch is not `processes` x `accumulate` x a whole number of images."""
    if processes < 1 or accumulate < 1 or config.batch_size % (processes * accumulate):
        raise ValueError(
            f"recipe field batch_size = {config.batch_size} is the total, and processes = {processes} x accumulate = "
            f"{accumulate} equal parts do not make it up; choose numbers whose product divides {config.batch_size}"
        )


def build_optimizer(method: "Method", config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser of the method's parameters; `train` sets the rate of a group from its "base_lr"."""
    groups = method.parameter_groups(config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True)


def train(
    method: "Method",
    dataset: Dataset,
    config: TrainConfig,
    seed: int,
    checkpoint: Path | None = None,
    identity: str = "",
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = True,
    observe: "Callable[[int, Method], None] | None" = None,
    fabric: "Fabric | None" = None,
    accumulate: int = 1,
) -> list[dict[str, float]]:
    """Train `method` in place for `config.steps` steps, or for what is left of them after its checkpoint.

    A batch may be cut into equal parts: over the processes of `fabric`, and in each of them into `accumulate` parts,
    one after the other. The images and crops of a step stay the same, and its gradient is the mean over the parts. That
    is the gradient of the whole batch for terms that are means over images: classification, L_mct, L_cre and L_ure as
    published, APC's terms, the energy. What looks across images sees a part only:

    - means over the labelled pixels or the pairs of a batch: L_ptc, the segmentation losses, L_ure as released,
      affinities, SeCo's contrasts;
    - batch norm in training mode; the running statistics are those of the first process;
    - SeCo's memory: prototypes and reservoir take in all processes' images, in the order of the batch, but part after
      part where parts are accumulated, and the teacher follows once a part.

    Random numbers that a method draws (places of patches, dropout) are drawn by every process on its own.

    Args:
        checkpoint: file to go on from when it exists and to write to; None trains without one.
        identity: name of the run; a checkpoint of another run is refused.
        device: of a single process; several have those of `fabric`.
        observe: called with (steps done, method) after every step, for example to collect prototypes.
        fabric: the processes that share every batch, see `wsss.launch`; each of them calls this function, with equal
            networks. None: this process alone.
        accumulate: parts that a process takes one after the other, to save memory.

    Returns:
        History: one dict for about every fiftieth of the run with `step`, `lr`, `loss` and every term's mean.

    Raises:
        ValueError: the total batch cannot be cut like this, or the checkpoint is not of this run.
    """
    processes, rank = (fabric.world_size, fabric.global_rank) if fabric else (1, 0)
    check_total_batch(config, processes, accumulate)
    device = fabric.device if fabric else torch.device(device)
    torch.manual_seed(np.random.SeedSequence([seed, rank]).generate_state(1)[0].item() if rank else seed)
    method.to(device).train()
    optimizer = build_optimizer(method, config)
    dtype = PRECISIONS[config.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    layout = {"processes": processes, "accumulate": accumulate}
    first, history, recent = 0, [], []
    if checkpoint and checkpoint.exists():
        first, history, recent = _restore(checkpoint, identity, layout, rank, method, optimizer, scaler)
    shared = method
    if fabric:
        shared = fabric.setup_module(method)
        shared.mark_forward_method("losses")
    loader = DataLoader(
        _Augmented(dataset, config.transform(), method),
        batch_sampler=shares(batches(len(dataset), config, seed, first), processes, rank, accumulate),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # an iterator draws from it; the global generator is the method's alone
    )
    every, parts = max(1, config.steps // 50), iter(loader)
    steps, quiet = range(first, config.steps), not progress or rank > 0
    bar = tqdm(steps, total=config.steps, initial=first, desc=identity, unit="step", disable=quiet)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor(step, config)
        optimizer.zero_grad(set_to_none=True)
        seen = []
        for part in range(accumulate):
            batch = {key: value.to(device, non_blocking=True) for key, value in next(parts).items()}
            with fabric.no_backward_sync(shared, enabled=part + 1 < accumulate) if fabric else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    terms = shared.losses(batch, step)
                    loss = sum(terms.values())
                scaler.scale(loss / accumulate).backward()
            seen.append({"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}})
        if config.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(method.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        recent.append(_over_processes(_means(seen), fabric))
        if (step + 1) % every == 0 or step + 1 == config.steps:
            history.append(_average(step + 1, optimizer.param_groups[0]["lr"], recent))
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}")
            recent = []
        if checkpoint and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
            progressed = {"step": step + 1, "history": history, "recent": recent}
            state = {"identity": identity} | layout | progressed | _random_states(device, fabric)
            if rank == 0:
                _save(checkpoint, state, method, optimizer, scaler)
        if observe:
            observe(step + 1, method)
    return history


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of every term over those in which it was on."""
    names = dict.fromkeys(name for terms in found for name in terms)
    return {name: torch.stack([t[name].float() for t in found if name in t]).mean() for name in names}


def _over_processes(means: dict[str, Tensor], fabric: "Fabric | None") -> dict[str, Tensor]:
    """Their mean over all processes; which terms are on depends on the step alone."""
    return dict(zip(means, fabric.all_reduce(torch.stack(list(means.values()))))) if fabric else means


def _average(step: int, lr: float, recent: list[dict[str, Tensor]]) -> dict[str, float]:
    means = {name: mean.item() for name, mean in _means(recent).items()}
    if not np.isfinite(means["loss"]):
        raise FloatingPointError(
            f"the loss is {means['loss']} before step {step}: {means}; lower `lr` or set `clip_norm`"
        )
    return {"step": step, "lr": lr, **means}


def _random_states(device: torch.device, fabric: "Fabric | None") -> dict[str, Tensor]:
    """States of the random generators of all processes, a row each."""
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    if fabric:
        states = {name: fabric.all_gather(state.to(device)).cpu() for name, state in states.items()}
    return {name: state.reshape(-1, state.shape[-1]) for name, state in states.items()}


def _save(path, state, method, optimizer, scaler) -> None:
    parts = {"method": method, "optimizer": optimizer, "scaler": scaler}
    buffer = io.BytesIO()
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: str) -> dict:
    """Read a checkpoint of the run `identity`.

    Raises:
        ValueError: it belongs to another run or cannot be read; the message names both and the remedy.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error}); remove it to train anew") from error
    if state.get("identity") != identity:
        raise ValueError(
            f"{path}: this checkpoint is of the run {state.get('identity')!r}, not of {identity!r}; "
            "point to the right folder, or remove the file to train anew"
        )
    return state


def _restore(path, identity, layout, rank, method, optimizer, scaler) -> tuple[int, list, list]:
    state = load_checkpoint(path, identity)
    saved = {name: state.get(name, 1) for name in layout}
    if saved != layout:
        told = lambda layout: " x ".join(f"{name} = {value}" for name, value in layout.items())
        raise ValueError(
            f"{path}: this run was started with {told(saved)}; with {told(layout)} its bits would be others. "
            "Go on as it was started, or remove the file to train anew"
        )
    method.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    # Generators read a state from the start of its memory, so that a row must be a copy.
    torch.set_rng_state(state["rng"].reshape(layout["processes"], -1)[rank].clone())
    if len(state.get("cuda_rng", ())) and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"][rank].clone())
    return state["step"], state["history"], state["recent"]
