"""Affinity of neighbouring cells (PSA): which pairs there are, what they should be, and the random walk along them.

Cells lie on a grid (h, w). A pair has a source and one of O partners at the offsets of `pair_offsets`, below it or to
its right; every one of the S sources has all O partners, so cells near the left, right and lower border are no sources.
Values of pairs have the shape (B, O, S).
"""

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.maps import UNCERTAIN

EPSILON = 1e-5  # added to affinities before the logarithm, and to the number of pairs
MERGE_RULES = ("transcam", "psa")


# -------------------------------------------------------------------------------------------------------------- pairs


def pair_offsets(radius: int) -> Tensor:
    """Offsets (dy, dx) of a source's partners, row by row: half of those with dy^2 + dx^2 < radius^2, as -d is d seen
    from the partner.

    Returns:
        int64 (O, 2); radius 5 has 34, radius 1 none.

    Raises:
        ValueError: radius < 1.
    """
    if radius < 1:
        raise ValueError(f"pair_offsets: radius is {radius}; give at least 1 cell")
    dy, dx = torch.meshgrid(torch.arange(radius), torch.arange(1 - radius, radius), indexing="ij")
    kept = (dy**2 + dx**2 < radius**2) & ((dy > 0) | (dx > 0))
    return torch.stack([dy[kept], dx[kept]], dim=1)


def pair_indices(
    size: tuple[int, int], radius: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Flat indices of all pairs on a grid of `size` (h, w), row by row; the radius shrinks on narrow grids (PSA).

    Returns:
        sources int64 (S,) and partners int64 (O, S).

    Raises:
        ValueError: radius < 1.
    """
    height, width = size
    radius = _radius_on(size, radius)
    offsets = pair_offsets(radius).to(device)
    cells = torch.arange(height * width, device=device).view(height, width)
    sources = cells[: height - radius + 1, radius - 1 : width - radius + 1].flatten()
    return sources, sources + (offsets[:, :1] * width + offsets[:, 1:])


def _radius_on(size: tuple[int, int], radius: int) -> int:
    """The radius that a grid has room for: (shortest side - 1) // 2 at most, and 1, which means no pairs, at least."""
    return min(radius, max(1, (min(size) - 1) // 2))


# ----------------------------------------------------------------------------------------------------- training labels


def merge_crf_labels(
    confident: Tensor, generous: Tensor, padding: Tensor | None = None, rule: str = "transcam"
) -> Tensor:
    """One label map from two, which a CRF made of seeds with a high and with a low threshold (PSA, TransCAM).

    - "transcam" (released): a class where `confident` has one, background where both have it, 255 elsewhere. Padding is
      background.
    - "psa" (the original): background wherever `generous` has it, then as above. Padding is 255.

    Args:
        confident: int64 (...), labels of the high threshold: what they call a class is one.
        generous: int64 (...), labels of the low threshold: what they call background is background.
        padding: bool (...), pixels outside the image.
        rule: one of `MERGE_RULES`.

    Returns:
        int64 (...).

    Raises:
        ValueError: shapes that differ, or an unknown rule.
    """
    if confident.shape != generous.shape:
        raise ValueError(
            f"merge_crf_labels: confident {tuple(confident.shape)} and generous {tuple(generous.shape)} must have the "
            "same shape"
        )
    if rule not in MERGE_RULES:
        raise ValueError(f"merge_crf_labels: rule {rule!r} is unknown; choose one of {', '.join(MERGE_RULES)}")
    background = generous == 0
    if rule == "transcam":
        background &= confident == 0
    merged = confident.masked_fill(confident == 0, UNCERTAIN).masked_fill(background, 0)
    if padding is not None:
        merged = merged.masked_fill(padding, 0 if rule == "transcam" else UNCERTAIN)
    return merged


class PairTargets(NamedTuple):
    """What pairs should be, each bool (B, O, S); pairs with a pixel of label 255 are in none of them.

    Attributes:
        background: both cells are background.
        foreground: both cells are of the same class.
        different: the cells have different labels.
    """

    background: Tensor
    foreground: Tensor
    different: Tensor


def affinity_targets(labels: Tensor, radius: int) -> PairTargets:
    """Targets of all pairs of a label map (PSA).

    Args:
        labels: int64 (B, h, w), 0 background, 1..C class, 255 ignored. On images, every 8th pixel of a label map.
        radius: see `pair_indices`.

    Raises:
        ValueError: labels of another shape.
    """
    if labels.ndim != 3:
        raise ValueError(f"affinity_targets: labels have shape {tuple(labels.shape)}; expected (B, h, w)")
    sources, partners = pair_indices(labels.shape[1:], radius, labels.device)
    flat = labels.flatten(1)
    source, partner = flat[:, None, sources], flat[:, partners]
    known = (source != UNCERTAIN) & (partner != UNCERTAIN)
    same = known & (source == partner)
    return PairTargets(same & (source == 0), same & (source != 0), known & (source != partner))


# ----------------------------------------------------------------------------------------------------------- affinity


def pair_affinity(embedding: Tensor, radius: int) -> Tensor:
    """Affinity exp(-mean over channels of |f_i - f_j|) of all pairs (PSA), without a copy of f for every offset.

    Args:
        embedding: f (B, D, h, w). Half precision is computed in float32: the loss takes logarithms.
        radius: see `pair_indices`.

    Returns:
        (B, O, S) in 0..1; once differentiable.

    Raises:
        ValueError: an embedding of another shape.
    """
    if embedding.ndim != 4:
        raise ValueError(f"pair_affinity: the embedding has shape {tuple(embedding.shape)}; expected (B, D, h, w)")
    full = torch.promote_types(embedding.dtype, torch.float32)
    return _PairAffinity.apply(embedding.to(full), _radius_on(embedding.shape[2:], radius)).flatten(2)


class _PairAffinity(torch.autograd.Function):
    """Keeps f and the affinities for the backward pass; plain autograd keeps the differences, O times the size of f."""

    @staticmethod
    def forward(ctx, embedding: Tensor, radius: int) -> Tensor:
        source, *partners = _shifted(embedding, radius)
        affinity = embedding.new_empty(len(embedding), len(partners), *source.shape[2:])
        for index, partner in enumerate(partners):
            affinity[:, index] = (source - partner).abs_().mean(1)
        affinity.neg_().exp_()
        ctx.save_for_backward(embedding, affinity)
        ctx.radius = radius
        return affinity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        embedding, affinity = ctx.saved_tensors
        scale = -gradient * affinity / embedding.shape[1]
        result = torch.zeros_like(embedding)
        source, *partners = _shifted(embedding, ctx.radius)
        source_gradient, *partner_gradients = _shifted(result, ctx.radius)
        for index, partner in enumerate(partners):
            own = (source - partner).sign_().mul_(scale[:, index, None])
            source_gradient.add_(own)
            partner_gradients[index].sub_(own)
        return result, None


def _shifted(values: Tensor, radius: int) -> list[Tensor]:
    """Views of `values` (B, D, h, w): the sources, then their partners at every offset."""
    height, width = values.shape[2] - radius + 1, values.shape[3] - 2 * radius + 2
    offsets = [(0, 0), *pair_offsets(radius).tolist()]
    return [values[:, :, dy : dy + height, radius - 1 + dx : radius - 1 + dx + width] for dy, dx in offsets]


class AffinityLoss(NamedTuple):
    """Loss of the affinity network, scalars in nats: background / 4 + foreground / 4 + different / 2, and its parts."""

    total: Tensor
    background: Tensor
    foreground: Tensor
    different: Tensor


def affinity_loss(affinity: Tensor, targets: PairTargets) -> AffinityLoss:
    """Loss of pair affinities (PSA): -log(a) where pairs are alike, -log(1 - a) where they differ.

    Each part is the mean over its pairs in the whole batch; a part without pairs is 0.

    Args:
        affinity: a (B, O, S) in 0..1, of `pair_affinity`.
        targets: of `affinity_targets`, with the same grid and radius.

    Raises:
        ValueError: shapes that differ.
    """
    if affinity.shape != targets.background.shape:
        raise ValueError(
            f"affinity_loss: the affinity has shape {tuple(affinity.shape)}, its targets "
            f"{tuple(targets.background.shape)}; both need the same grid and radius"
        )
    alike, unlike = -torch.log(affinity + EPSILON), -torch.log(1 + EPSILON - affinity)

    def mean(loss: Tensor, pairs: Tensor) -> Tensor:
        return (loss * pairs).sum() / (pairs.sum(dtype=loss.dtype) + EPSILON)

    background, foreground = mean(alike, targets.background), mean(alike, targets.foreground)
    different = mean(unlike, targets.different)
    return AffinityLoss(background / 4 + foreground / 4 + different / 2, background, foreground, different)


# -------------------------------------------------------------------------------------------------------- random walk


def pad_to_stride(images: Tensor, stride: int = 8) -> Tensor:
    """Pad images or maps (B, K, H, W) with zeros at the right and below, to multiples of `stride` pixels."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % stride, 0, -height % stride))


def psa_background(maps: Tensor, alpha: float) -> Tensor:
    """Background plane (1 - max)^alpha of class maps, (B, C, H, W) in 0..1 -> (B, 1, H, W) (PSA)."""
    return (1 - maps.amax(1, keepdim=True).clamp(min=0)) ** alpha


def pool_for_walk(maps: Tensor, background: float | Tensor, stride: int = 8) -> Tensor:
    """Class maps with a background plane, on the grid of the affinity network.

    The planes are padded as the network's input is (`pad_to_stride`), all of them with 0, and averaged.

    Args:
        maps: (B, C, H, W) scores in 0..1; only the classes of the image are needed, as absent ones stay 0.
        background: a constant score (TransCAM: 0.42), or (B, 1, H, W) (PSA: `psa_background(maps, 16)`).
        stride: pixels along one side of a cell.

    Returns:
        (B, C + 1, ceil(H / stride), ceil(W / stride)), plane 0 = background.

    Raises:
        ValueError: maps or a background of another shape.
    """
    if maps.ndim != 4:
        raise ValueError(f"pool_for_walk: maps have shape {tuple(maps.shape)}; expected (B, C, H, W)")
    plane = (len(maps), 1, *maps.shape[2:])
    background = torch.as_tensor(background, dtype=maps.dtype, device=maps.device)
    if background.ndim and background.shape != plane:
        raise ValueError(f"pool_for_walk: the background has shape {tuple(background.shape)}; give a number or {plane}")
    planes = torch.cat([background.expand(plane), maps], dim=1)
    return F.avg_pool2d(pad_to_stride(planes, stride), stride)


def transition_matrix(affinity: Tensor, size: tuple[int, int], radius: int, beta: float) -> Tensor:
    """Transition probabilities of the random walk (PSA): affinity^beta of both directions of a pair and 1 of a cell
    with itself, divided by their sum at the cell where a step ends.

    Args:
        affinity: (B, O, S), of `pair_affinity`.
        size: (h, w) of the grid.
        radius: that of the affinity.
        beta: exponent; a larger one forgets weak affinities.

    Returns:
        Sparse CSR (B h w, B h w), image after image along the diagonal; rows are cells where a step ends, columns those
        where it began. Rows sum to 1.

    Raises:
        ValueError: the affinity does not belong to this grid and radius.
    """
    batch, cells = len(affinity), size[0] * size[1]
    sources, partners = pair_indices(size, radius, affinity.device)
    if affinity.shape[1:] != partners.shape:
        raise ValueError(
            f"transition_matrix: the affinity has shape {tuple(affinity.shape)}, but a grid of {size[0]} x {size[1]} "
            f"cells with radius {radius} needs (B, {partners.shape[0]}, {partners.shape[1]})"
        )
    sources, partners = sources.expand_as(partners).flatten(), partners.flatten()
    itself = torch.arange(cells, device=affinity.device)
    end, begin = torch.cat([sources, partners, itself]), torch.cat([partners, sources, itself])
    weight = affinity.flatten(1) ** beta
    weight = torch.cat([weight, weight, weight.new_ones(batch, cells)], dim=1)
    weight = weight / weight.new_zeros(batch, cells).index_add(1, end, weight)[:, end]
    first = cells * torch.arange(batch, device=affinity.device)[:, None]
    indices = torch.stack([(first + end).flatten(), (first + begin).flatten()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        size = (batch * cells,) * 2
        return torch.sparse_coo_tensor(indices, weight.flatten(), size, check_invariants=False).to_sparse_csr()


@torch.no_grad()
def random_walk_states(maps: Tensor, affinity: Tensor, radius: int, beta: float) -> Iterator[Tensor]:
    """The maps after 1, 2, 3 ... steps of the random walk, without end; see `random_walk`."""
    if maps.ndim != 4:
        raise ValueError(f"random_walk: maps have shape {tuple(maps.shape)}; expected (B, K, h, w)")
    batch, planes, height, width = maps.shape
    transition = transition_matrix(affinity, (height, width), radius, beta)
    state = maps.movedim(1, 3).reshape(-1, planes)
    if len(state) != len(transition):
        raise ValueError(f"random_walk: {batch} images have maps, but {len(affinity)} have affinities")
    while True:
        state = transition @ state
        yield state.view(batch, height, width, planes).movedim(3, 1)


def random_walk(maps: Tensor, affinity: Tensor, radius: int, beta: float, doublings: int) -> Tensor:
    """Let scores flow between cells that belong together, for 2^doublings steps (PSA), without gradient.

    In each step a cell gets the mean of the cells it is paired with and of itself, weighted by affinity^beta. The
    reference squares the dense matrix of all cells; the planes only need its product with them, step by step.

    Args:
        maps: (B, K, h, w) scores, of `pool_for_walk`.
        affinity: (B, O, S), of `pair_affinity` on the same grid.
        radius: that of the affinity.
        beta: exponent of the affinity (TransCAM 14, PSA 8).
        doublings: TransCAM 7 (128 steps), PSA 8.

    Returns:
        (B, K, h, w). A cell without pairs keeps its scores.

    Raises:
        ValueError: shapes that do not fit.
    """
    return next(islice(random_walk_states(maps, affinity, radius, beta), 2**doublings - 1, None))
