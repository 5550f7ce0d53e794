"""What training and evaluation cost at the papers' sizes: `python benchmarks/scale.py`, on the GPU where there is one.

1. One training step of every method with all terms on, by the recipe for VOC (ViT-B/16 at 448 px, Conformer-S at 512
   px, ResNet38 at 448 px): the whole step, its forward pass, all passes of the backbone, forwards and backwards, the
   share that is not the backbone, and the peak memory. The batch is the recipe's, halved until it fits; one image on a
   CPU. On a GPU in full and in mixed precision.
2. Parts of the methods against straightforward versions that give the same numbers, on one image and one CPU core.
3. Images per second of multi-scale inference, all maps and the decoder, and of the CRF on one core and on all.

`--methods more apc` takes the rows of these methods alone. `--small` takes the networks and sizes of the embedded
benchmark and 4 images: a few minutes on two CPU cores. Weights and images are random. Each row of 1 and 3 runs in a
process of its own, so that its memory is its own.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from apc import EPSILON, confident_scores, looped_pooling, pairwise_contrast
from more import KERNEL, PROPORTION, looped_graph, looped_uncertain_loss
from torch import Tensor, nn
from transcam import RADIUS, gathered_affinity

from wsss.affinity import pair_affinity
from wsss.data import Sample
from wsss.data.transforms import normalise
from wsss.engines import cores
from wsss.evaluation import BATCH, EvalConfig, all_scores
from wsss.experiments import Experiment, score_plan
from wsss.maps import UNCERTAIN
from wsss.methods.apc import adaptive_k_pooling, patch_contrast
from wsss.methods.more import GraphCategoryRepresentation, kernel_search, uncertain_relation_loss
from wsss.refine import CRFJob, crf_labels
from wsss.training import PRECISIONS, TrainConfig, build_optimizer

ROWS = (
    ("cam", "published"),
    ("more", "published"),
    ("more", "released"),
    ("seco", "published"),
    ("seco", "released"),
    ("apc", "published"),
    ("transcam", "published"),
    ("affinity", "released"),
    ("deeplab", "released"),
)
REPEATS = 5
CLASSES = 20


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time of `function`, after two calls that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def experiment_of(method: str, variant: str, small: bool) -> Experiment:
    dataset = "embedded" if small else "voc2012"
    source = Experiment("transcam", "published", dataset) if method in ("affinity", "deeplab") else None
    return Experiment(method, variant, dataset, source=source)


def alone(function: Callable, images: int, *arguments: object) -> object:
    """`function(images, *arguments)` in a process of its own, with half the images as often as memory runs out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wsss.experiments"])
    while True:
        with context.Pool(1) as pool:
            try:
                return pool.apply(function, (images, *arguments))
            except torch.OutOfMemoryError:
                if images == 1:
                    raise
        images //= 2


# ------------------------------------------------------------------------------------------------------- training steps


def random_batch(network: nn.Module, images: int, side: int) -> dict[str, Tensor]:
    """What `train` hands to a method: two classes an image, labelled blocks of 16 pixels."""
    raw = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    label = torch.zeros(images, network.num_classes)
    label[:, :2] = 1
    blocks = torch.randint(0, network.num_classes + 1, (images, -(-side // 16), -(-side // 16)))
    mask = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :side, :side]
    known = {"mask": mask, "valid": torch.ones_like(mask, dtype=torch.bool)}
    batch = {"image": normalise(raw), "label": label} | {field: known[field] for field in network.batch_fields}
    if network.views:
        views = [network.views(*pair) for pair in zip(raw, batch["image"])]
        batch |= {name: torch.stack([view[name] for view in views]) for name in views[0]}
    return {name: values.to(device()) for name, values in batch.items()}


@contextmanager
def recorded(network: nn.Module) -> Iterator[list]:
    """The calls of the backbone, and of copies of it: (function, arguments, options, whether with gradient)."""
    calls, encoders = [], [m for m in network.modules() if type(m) is type(network.backbone)]
    for encoder in encoders:
        name = "forward_features" if hasattr(encoder, "forward_features") else "forward"

        def record(*arguments, plain=getattr(encoder, name), **options):
            calls.append((plain, arguments, options, torch.is_grad_enabled()))
            return plain(*arguments, **options)

        setattr(encoder, name, record)
    yield calls
    for encoder in encoders:
        delattr(encoder, "forward_features" if hasattr(encoder, "forward_features") else "forward")


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in the output of a backbone that have a gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        yield from (tensor for inner in value.values() for tensor in tensors(inner))
    elif isinstance(value, list | tuple):
        yield from (tensor for inner in value for tensor in tensors(inner))
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def measure_step(images: int, method: str, variant: str, small: bool, precision: str) -> dict[str, float]:
    """Seconds and megabytes of a training step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experiment, dtype = experiment_of(method, variant, small), PRECISIONS[precision]
    config = experiment.config(TrainConfig)
    network = experiment.build(CLASSES, pretrained=False).to(device()).train()
    optimizer, batch = build_optimizer(network, config), random_batch(network, images, config.crop)
    mixed = lambda: torch.autocast(device().type, dtype, enabled=dtype is not None)

    def forward() -> Tensor:
        with mixed():
            return sum(network.losses(batch, config.steps - 1).values())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    def backbone() -> None:
        optimizer.zero_grad(set_to_none=True)
        for call, arguments, options, gradient in calls:
            with torch.set_grad_enabled(gradient), mixed():
                means = [tensor.float().mean() for tensor in tensors(call(*arguments, **options))]
            if means:
                sum(means).backward()

    found = {"images": images, "step": seconds(step)}
    if device().type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with recorded(network) as calls:
        forward()
    return found | {"passes": len(calls), "forward": seconds(forward), "backbone": seconds(backbone)}


def time_steps(rows: Sequence[tuple[str, str]], small: bool) -> None:
    precisions = ("fp32", "bf16") if device().type == "cuda" else ("fp32",)
    print("\n1. One training step with all terms on\n")
    print(
        f"{'method':18s} {'precision':>9s} {'crop':>5s} {'batch':>8s} {'step, ms':>9s} {'forward':>8s} "
        f"{'backbone':>9s} {'passes':>6s} {'rest, %':>7s} {'images/s':>9s} {'peak, MB':>9s}"
    )
    for row in rows:
        recipe = experiment_of(*row, small).recipe()
        whole = recipe["batch_size"]
        for precision in precisions:
            images = 4 if small else whole if device().type == "cuda" else 1
            found = alone(measure_step, images, *row, small, precision)
            milliseconds = (1000 * found[part] for part in ("step", "forward", "backbone"))
            times = "{:9.0f} {:8.0f} {:9.0f}".format(*milliseconds)
            rest, rate = 100 * (1 - found["backbone"] / found["step"]), found["images"] / found["step"]
            batch = f"{found['images']} of {whole}"
            print(
                f"{'.'.join(row):18s} {precision:>9s} {recipe['crop']:5d} {batch:>8s} {times} {found['passes']:6d} "
                f"{rest:7.0f} {rate:9.1f} {found['peak']:9.0f}",
                flush=True,
            )


# ----------------------------------------------------------------------------------------------------- plain versions


def plain_versions(side: int, dim: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Part -> (plain version, ours), on one image of `side` x `side` patches or cells with `dim` channels."""
    torch.manual_seed(0)
    classes, patches = torch.randn(1, CLASSES, dim), torch.randn(1, side * side, dim)
    labels, scores = torch.zeros(1, CLASSES), confident_scores(1, side * side)
    labels[:, :2] = 1
    mask = torch.tensor([0, 1, UNCERTAIN])[torch.randint(3, (1, side, side))]
    graph = GraphCategoryRepresentation(dim, "published", neighbour_ratio=0.5)
    embedding = torch.randn(1, dim, side, side)

    def uncertain() -> Tensor:
        return uncertain_relation_loss(classes, patches, labels, kernel_search(mask, KERNEL, PROPORTION)[1])

    return {
        "MoRe, category graph": (lambda: looped_graph(graph, classes, patches), lambda: graph(classes, patches)),
        "MoRe, L_ure": (lambda: looped_uncertain_loss(classes, patches, mask, labels), uncertain),
        "APC, adaptive-K pooling": (lambda: looped_pooling(scores), lambda: adaptive_k_pooling(scores)[0]),
        "APC, patch contrast": (
            lambda: torch.stack(pairwise_contrast(patches, scores, EPSILON)),
            lambda: torch.stack(patch_contrast(patches, scores, EPSILON)),
        ),
        "AffinityNet, affinities": (
            lambda: gathered_affinity(embedding, RADIUS),
            lambda: pair_affinity(embedding, RADIUS),
        ),
    }


@torch.no_grad()
def compare(small: bool) -> None:
    side, dim = (10, 96) if small else (28, 768)
    print(f"\n2. Against plain versions: one image, {side} x {side} patches, {dim} channels, forward, one CPU core\n")
    print(f"{'part':24s} {'plain, ms':>10s} {'ours, ms':>9s} {'ratio':>6s}")
    for part, (plain, ours) in plain_versions(side, dim).items():
        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-5)
        slow, fast = 1000 * seconds(plain, 1), 1000 * seconds(ours)
        print(f"{part:24s} {slow:10.1f} {fast:9.2f} {slow / fast:6.0f}", flush=True)


# ----------------------------------------------------------------------------------------------------------- evaluation


def random_samples(count: int, size: tuple[int, int]) -> list[Sample]:
    image = lambda: torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return [Sample(image(), torch.ones(CLASSES), None, str(index)) for index in range(count)]


def measure_inference(images: int, method: str, variant: str, small: bool) -> tuple[int, float]:
    """Images, and how many of them are done in a second."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experiment = experiment_of(method, variant, small)
    config, plan = experiment.config(EvalConfig), score_plan(experiment)
    names = {request.map for _, _, requests in plan for request in requests}
    network = experiment.build(CLASSES, pretrained=False).to(device()).eval()
    samples = random_samples(images, (80, 80) if small else (375, 500))
    with torch.no_grad():
        return images, images / seconds(lambda: all_scores(network, samples, names, config, device()), 3)


def time_inference(rows: Sequence[tuple[str, str]], small: bool) -> None:
    print("\n3. Multi-scale inference, all maps and the decoder\n")
    print(f"{'method':18s} {'batch':>6s} {'scales':>7s} {'images/s':>9s}")
    for row in rows:
        if row[0] == "affinity":  # scored by its random walk, see benchmarks/transcam.py
            continue
        images, rate = alone(measure_inference, BATCH if device().type == "cuda" else 1, *row, small)
        config = experiment_of(*row, small).config(EvalConfig)
        scales = f"{len(config.map_scales)}, {len(config.decoder_scales)}"
        print(f"{'.'.join(row):18s} {images:6d} {scales:>7s} {rate:9.2f}", flush=True)


def time_crf(small: bool) -> None:
    size, settings = (80, 80) if small else (375, 500), experiment_of("cam", "published", small).config(EvalConfig).crf
    torch.manual_seed(0)
    count = 4 * cores()
    samples = random_samples(count, size)
    jobs = [CRFJob(sample.name, sample.image.permute(1, 2, 0), torch.rand(4, *size)) for sample in samples]
    print(f"\nCRF, {size[1]} x {size[0]} pixels, background and 3 classes\n")
    for workers in sorted({1, cores()}):
        start = time.perf_counter()
        for _ in crf_labels(jobs, settings, workers=workers, progress=False):
            pass
        print(f"{workers:2d} cores {count / (time.perf_counter() - start):9.2f} images/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What training and evaluation cost at the papers' sizes.")
    known = list(dict.fromkeys(method for method, _ in ROWS))
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--small", action="store_true", help="the embedded benchmark's networks and sizes")
    given = parser.parse_args()
    chosen = [row for row in ROWS if row[0] in given.methods]
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if device().type == "cuda" else f"CPU, 1 of {cores()} cores a row"
    print(f"{machine}, torch {torch.__version__}")
    time_steps(chosen, given.small)
    compare(given.small)
    time_inference(chosen, given.small)
    time_crf(given.small)
