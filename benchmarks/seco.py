"""What SeCo costs: `python benchmarks/seco.py`, about two minutes on one CPU core.

1. One training step of both variants against the step of the plain baseline with the same backbone and decoder, on the
   embedded benchmark's recipe: milliseconds, the ratio, and SeCo's own parts.
2. The contrast of a step (rectification and L_LiL, eqs. 6-8, forward and backward) against plain loops over queries and
   slots, which compute the same numbers, at a reservoir of 4608 slots.
3. The memory of that reservoir, and what a step of the contrast needs on top of it.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from more import seconds
from torch import Tensor

from wsss.data.scenes import Scenes
from wsss.data.transforms import normalise
from wsss.experiments import Experiment
from wsss.methods.cam import Cam, CamConfig
from wsss.methods.seco import (
    UNCERTAIN,
    Reservoir,
    SeCo,
    cut,
    draw_corners,
    ema_update,
    local_contrast_loss,
    local_contrast_loss_released,
    rectify_tags,
)
from wsss.training import TrainConfig, build_optimizer

SLOTS, DIM, CLASSES, SIGMA, TEMPERATURE = 4608, 768, 20, 10 / 11, 0.08
QUERIES = 48  # 4 images of 12 rows, the batch on VOC


def time_a_step() -> None:
    scenes = Scenes("train", images=Experiment("seco", "published", "embedded").recipe()["batch_size"])
    images = normalise(scenes.images)
    table = {variant: _parts(variant, scenes, images) for variant in ("published", "released")}
    size = " x ".join(map(str, images.shape[-2:]))
    print(f"one training step on {len(images)} images of {size}, all terms on; milliseconds\n")
    print(f"{'part':<44} | published | released")
    for name in table["published"]:
        cells = [table[variant].get(name) for variant in ("published", "released")]
        print(f"{name:<44} | {cells[0]:9.2f} | {cells[1]:8.2f}")


def _parts(variant: str, scenes: Scenes, images: Tensor) -> dict[str, float]:
    """Milliseconds by part; the last three rows are the steps and their ratio."""
    torch.manual_seed(0)
    experiment = Experiment("seco", variant, "embedded")
    training = experiment.config(TrainConfig)
    method: SeCo = experiment.build(len(scenes.classes), pretrained=False).train()
    config, labels, last = method.config, scenes.labels, training.steps - 1
    views = [method.views(original, image) for original, image in zip(scenes.images, images)]
    batch = {"image": images, "label": labels} | {key: torch.stack([v[key] for v in views]) for key in views[0]}

    # The baseline has the same backbone, heads and decoder, and none of SeCo's own parts.
    shared = {name: getattr(config, name) for name in CamConfig.__dataclass_fields__}
    backbone = experiment.build(len(scenes.classes), pretrained=False).backbone
    baseline = Cam(CamConfig(**shared), len(scenes.classes), backbone).train()

    def step(trained: Cam) -> Callable[[], None]:
        optimizer = build_optimizer(trained, training)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            sum(trained.losses(batch, last).values()).backward()
            optimizer.step()

        return run

    tokens = method.encode(images)
    seeds = method.seeds(images, method.token_maps(tokens))
    mask = method.tag_mask(images, seeds["cam_aux"], labels)
    corners = draw_corners(mask, config.patch_size, config.patches)
    crops = [cut(view, corners, config.patch_size) for view in (images, batch["strong"])]
    patches, strong = (crop.flatten(0, 1) for crop in crops)
    tags = method.tags(mask, corners).flatten()
    with torch.no_grad():
        queries, keys = method.represent(tokens.classes[:, 0], *crops, batch.get("second"))
    queries, keys = queries.flatten(0, 1).requires_grad_(), keys.flatten(0, 1)

    def crop_and_tag() -> None:
        mask = method.tag_mask(images, seeds["cam_aux"], labels)
        corners = draw_corners(mask, config.patch_size, config.patches)
        method.tags(mask, corners)
        cut(images, corners, config.patch_size), cut(batch["strong"], corners, config.patch_size)

    def student() -> None:
        loss = method.student_head(method.backbone(patches).classes).mean()
        if "second" in batch:
            loss = loss + method.backbone(batch["second"]).classes.mean()
        loss.backward()

    @torch.no_grad()
    def teacher() -> None:
        method.teacher_head(method.teacher(strong).classes)

    def average() -> None:
        ema_update(method.teacher.parameters(), method.backbone.parameters(), config.ema_momentum)
        ema_update(method.teacher_head.parameters(), method.student_head.parameters(), config.ema_momentum)

    parts = {
        "global teacher: whole images, with gradient": seconds(
            lambda: method.backbone(images).classes.mean().backward()
        ),
        "views of the data loader": seconds(lambda: [method.views(o, i) for o, i in zip(scenes.images, images)]),
        "crops and tags": seconds(crop_and_tag),
        "student: patches (second view), with gradient": seconds(student),
        "local teacher: strong patches": seconds(teacher),
        "EMA": seconds(average),
        "prototypes (eq. 3)": seconds(lambda: method._update_prototypes(tokens.classes[:, 0].detach(), labels)),
        "rectification, reservoir, L_LiG, L_LiL": seconds(
            lambda: sum(method.contrast(queries, keys, tags).values()).backward()
        ),
    }
    # In turns, so that a busy machine slows both down.
    runs = step(method), step(baseline)
    own, plain = (statistics.median(times) for times in zip(*([seconds(run, 1) for run in runs] for _ in range(7))))
    parts |= {"whole step": own, "whole step of the baseline": plain}
    return {name: 1000 * value for name, value in parts.items()} | {"ratio": own / plain}


def looped_contrast(queries: Tensor, tags: Tensor, keys: Tensor, key_tags: Tensor) -> tuple[Tensor, list[int]]:
    """Eqs. 6-8 word by word: the loss and the rectified tags."""
    rectified, terms = [], []
    for q, tag in zip(queries, tags.tolist()):
        products = [q @ k for k in keys]
        own = [product for product, u in zip(products, key_tags.tolist()) if u == tag != UNCERTAIN]
        mean = sum(own) / max(len(own), 1)
        if own and sum(bool(product < mean) for product in own) / len(own) > SIGMA:
            tag = UNCERTAIN
        rectified.append(tag)
        if tag == UNCERTAIN:
            continue
        scores = [product / TEMPERATURE for product in products]
        total = torch.stack([s for s, u in zip(scores, key_tags.tolist()) if u != UNCERTAIN]).logsumexp(0)
        terms += [s - total for s, u in zip(scores, key_tags.tolist()) if u == tag]
    return -torch.stack(terms).mean(), rectified


def compare_with_loops() -> None:
    torch.manual_seed(0)
    queries, keys = (F.normalize(torch.randn(n, DIM), dim=1) for n in (QUERIES, SLOTS))
    tags, key_tags = (torch.randint(UNCERTAIN, CLASSES + 1, (n,)) for n in (QUERIES, SLOTS))
    queries.requires_grad_()

    def vectorised() -> tuple[Tensor, list[int]]:
        revised = rectify_tags(queries, tags, keys, key_tags, SIGMA).tags
        return local_contrast_loss(queries, revised, keys, key_tags, TEMPERATURE), revised.tolist()

    def released() -> tuple[Tensor, Tensor]:
        return local_contrast_loss_released(queries, tags, keys, key_tags, TEMPERATURE)

    looped = lambda: looped_contrast(queries, tags, keys, key_tags)
    (fast, fast_tags), (slow, slow_tags) = vectorised(), looped()
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert fast_tags == slow_tags
    times = {
        "plain loops": seconds(lambda: looped()[0].backward(), repeats=1),
        "vectorised": seconds(lambda: vectorised()[0].backward()),
        "vectorised, as released": seconds(lambda: released()[0].backward()),
    }
    what = f"{QUERIES} queries, {SLOTS} slots, {DIM} channels"
    print(f"\nrectification and L_LiL, forward and backward, {what}; milliseconds\n")
    for name, time in times.items():
        print(f"{name:<24} | {1000 * time:10.2f} | {times['plain loops'] / time:6.0f} x")


def weigh_the_reservoir() -> None:
    memory = Reservoir(SLOTS, DIM)
    own = sum(buffer.numel() * buffer.element_size() for buffer in memory.buffers())
    need = SLOTS * DIM * 4
    queries = F.normalize(torch.randn(QUERIES, DIM), dim=1).requires_grad_()
    tags = torch.randint(CLASSES + 1, (QUERIES,))
    memory.enqueue(queries.detach(), tags)
    kept = []  # what autograd keeps for the backward pass besides the inputs
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (queries, memory.keys)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            inputs.add(storage.data_ptr())
            kept.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        local_contrast_loss(queries, tags, memory.keys, memory.tags, TEMPERATURE)
    print(f"\nreservoir of {SLOTS} x {DIM}\n")
    print(f"keys as float32            {need / 2**20:8.3f} MiB")
    print(f"state of the module        {own / 2**20:8.3f} MiB (tags and pointer besides)")
    print(f"kept for a backward pass   {sum(kept) / 2**20:8.3f} MiB ({QUERIES} x {SLOTS} pairs; no copy of the keys)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_a_step()
    compare_with_loops()
    weigh_the_reservoir()
