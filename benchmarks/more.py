"""How long MoRe's parts take: `python benchmarks/more.py`, less than a minute on one CPU core.

1. L_ure (eqs. 8, 9) and the category graph (eqs. 1-5) against plain loops over images, classes, patches and
   neighbours, which compute the same numbers, as the number of patches grows.
2. One training step of both variants, part by part, on the embedded benchmark's network.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.backbones.vit import MultiTokenViT
from wsss.maps import UNCERTAIN
from wsss.methods.more import GraphCategoryRepresentation, MoRe, MoReConfig, kernel_search, uncertain_relation_loss

SIDES = (7, 10, 14, 20, 28)  # patches along one side; 28 is that of a 448 px crop
IMAGES, CLASSES, DIM, KERNEL, PROPORTION = 2, 10, 96, 5, 1.0


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of `function`, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def looped_uncertain_loss(class_tokens: Tensor, patch_tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Eqs. 8 and 9 word by word."""
    height, width = mask.shape[1:]
    total = class_tokens.new_zeros(())
    for image in range(len(mask)):
        positive, negative = [], []
        for i in range(height):
            for j in range(width):
                if mask[image, i, j] != UNCERTAIN:
                    continue
                top, left = i - KERNEL // 2, j - KERNEL // 2
                window = mask[image, max(top, 0) : top + KERNEL, max(left, 0) : left + KERNEL]
                count = (window == UNCERTAIN).sum() + 2 * ((window > 0) & (window != UNCERTAIN)).sum()
                if count <= PROPORTION * KERNEL**2:
                    continue
                for c in range(class_tokens.shape[1]):
                    cosine = F.cosine_similarity(class_tokens[image, c], patch_tokens[image, i * width + j], dim=0)
                    (positive if labels[image, c] else negative).append(cosine)
        if positive:
            total = total + (1 - torch.stack(positive)).mean()
        if negative:
            total = total + torch.stack(negative).mean()
    return total / len(mask)


def looped_graph(module: GraphCategoryRepresentation, class_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
    """Eqs. 1-5 word by word."""
    heads, tails = module.head(class_tokens), module.tail(patch_tokens)
    count = module.count_neighbours(class_tokens.shape[1], patch_tokens.shape[1])
    rows = []
    for image in range(len(heads)):
        for h in heads[image]:
            similarity = torch.stack([F.cosine_similarity(h, t, dim=0) for t in tails[image]])
            scores, neighbours = similarity.topk(count)
            products = []
            for r, j in zip(scores.softmax(0), neighbours):
                t = tails[image, j]
                edge = r * t + (1 - r) * h
                products.append(t @ torch.tanh(h + edge))
            weights = torch.stack(products).softmax(0)
            a = sum(weight * tails[image, j] for weight, j in zip(weights, neighbours))
            q = F.leaky_relu(module.sum_projection(h + a)) + F.leaky_relu(module.product_projection(a * h))
            rows.append(q)
    return torch.stack(rows).view_as(heads)


def compare_with_loops() -> None:
    print(f"{IMAGES} images, {CLASSES} classes, {DIM} channels; milliseconds, forward pass\n")
    print("patches | L_ure loop | vectorised |  ratio | graph loop | vectorised |  ratio")
    module = GraphCategoryRepresentation(DIM, "published", neighbour_ratio=0.5)
    for side in SIDES:
        torch.manual_seed(0)
        tokens, patches = torch.randn(IMAGES, CLASSES, DIM), torch.randn(IMAGES, side * side, DIM)
        labels = F.one_hot(torch.arange(IMAGES), CLASSES).float()
        choices = torch.tensor([0, 1, UNCERTAIN])
        mask = choices[torch.randint(3, (IMAGES, side, side))]

        def loss() -> Tensor:
            return uncertain_relation_loss(tokens, patches, labels, kernel_search(mask, KERNEL, PROPORTION)[1])

        pairs = (
            (lambda: looped_uncertain_loss(tokens, patches, mask, labels), loss),
            (lambda: looped_graph(module, tokens, patches), lambda: module(tokens, patches)),
        )
        cells = []
        with torch.no_grad():
            for loop, fast in pairs:
                torch.testing.assert_close(fast(), loop(), rtol=1e-4, atol=1e-5)
                slow, quick = seconds(loop, repeats=1), seconds(fast)
                cells.append(f"{1000 * slow:10.1f} | {1000 * quick:10.2f} | {slow / quick:6.0f}")
        print(f"{side * side:7d} | {' | '.join(cells)}")


def time_a_step(images: int = 8) -> None:
    print(f"\none training step, {images} images of 80 x 80, all terms on; milliseconds\n")
    table = {variant: _parts(variant, images) for variant in ("published", "released")}
    print("part                                    | published | released")
    for name in table["published"]:
        print(f"{name:<39} | {table['published'][name]:9.1f} | {table['released'][name]:8.1f}")


def _parts(variant: str, images: int) -> dict[str, float]:
    """Milliseconds of each part; the last row is the whole step."""
    torch.manual_seed(0)
    config = MoReConfig(
        variant=variant,
        cam_scales=(1.0,),
        cam_flip=False,
        cam_activation="minmax",
        seg_start=0,
        mask_switch=0,
        neighbour_ratio=0.5,
        kernel_size=3,
        par_dilations=(1, 2, 4),
        par_iterations=5,
        decoder_width=128,
        decoder_dilation=2,
        energy_scale=0.25,
    )
    backbone = MultiTokenViT(class_tokens=CLASSES, token_init="noise", pretrained=False)
    method = MoRe(config, CLASSES, backbone)
    labels = F.one_hot(torch.arange(images) % CLASSES, CLASSES).float()
    batch = {"image": torch.randn(images, 3, 80, 80), "label": labels}
    tokens = method.encode(batch["image"])
    maps = method.token_maps(tokens)
    seeds = method.seeds(batch["image"], maps)
    plain = backbone(batch["image"])
    parts = {
        "backbone": lambda: backbone(batch["image"]),
        "category graph (eqs. 1-5)": lambda: method.gcr(plain.classes, plain.patches),
        "CAM, auxiliary CAM, LAM": lambda: method.token_maps(tokens),
        "maps that supervise": lambda: method.seeds(batch["image"], maps),
        "L_mct, L_cre, L_ure (eqs. 6-9)": lambda: method.relation_losses(batch, tokens, seeds, 0),
        "L_ptc, L_seg with refinement, energy": lambda: method.dense_losses(batch, tokens, seeds, 0),
        "whole step, forward": lambda: method.losses(batch, 0),
        "whole step, forward and backward": lambda: sum(method.losses(batch, 0).values()).backward(),
    }
    return {name: 1000 * seconds(part) for name, part in parts.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_with_loops()
    time_a_step()
