"""Losses that more than one paper uses: segmentation, patch-token contrast, dense energy.

Label maps are int64 with 0 background, 1..C class, 255 ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = 255

# Entries of the Gaussian kernel that exist at once in the dense energy loss (64 MiB in float32).
KERNEL_ENTRIES = 2**24


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy averaged over all labelled pixels of the batch; a batch without any gives 0.

    Args:
        logits: (B, C + 1, H, W).
        label: int64 (B, H, W), 255 where there is none.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_label(logits, label, "pixel_cross_entropy: logits")
    total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy averaged over background and over foreground pixels separately (L_seg of MoRe and SeCo, released).

    0.5 (sum over background / (n_bg + 1e-6) + sum over foreground / (n_fg + 1e-6)), counted over the whole batch, so
    that the background cannot drown small objects. A group without pixels, or a batch without labels, gives 0.

    Args:
        logits: (B, C + 1, H, W).
        label: int64 (B, H, W).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_label(logits, label, "segmentation_loss: logits")
    pixel = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    background = label == 0
    foreground = ~background & (label != IGNORE)
    groups = [pixel.where(group, 0).sum() / (group.sum() + 1e-6) for group in (background, foreground)]
    return 0.5 * sum(groups)


def pairwise_affinity(label: Tensor) -> Tensor:
    """Which pairs of cells share a label: (B, h, w) -> uint8 (B, L, L), L = h * w in row-major order.

    1 for equal labels, 0 for different ones, 255 (left out) if either label is 255 and for a cell with itself.
    """
    label = label.flatten(1)
    ignored = label == IGNORE
    left_out = ignored[:, :, None] | ignored[:, None, :]
    left_out |= torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    return (label[:, :, None] == label[:, None, :]).to(torch.uint8).masked_fill(left_out, IGNORE)


def ptc_loss(features: Tensor, label: Tensor) -> Tensor:
    """Patch token contrast of ToCo, as MoRe and SeCo release it: equal cells attract, different ones repel.

    With s the absolute cosine of two patch tokens: 0.5 (1 - sum_equal s / (N_equal + 1)) + 0.5 sum_different s /
    (N_different + 1), over the pairs of the whole batch. Without any pair it is the constant 0.5.

    Args:
        features: (B, D, h, w) patch tokens as a map.
        label: int64 (B, h, w).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_label(features, label, "ptc_loss: features")
    features = F.normalize(features.flatten(2), dim=1)
    similarity = (features.mT @ features).abs()
    affinity = pairwise_affinity(label)
    equal, different = affinity == 1, affinity == 0
    attraction = similarity.where(equal, 0).sum() / (equal.sum() + 1)
    repulsion = similarity.where(different, 0).sum() / (different.sum() + 1)
    return 0.5 * (1 - attraction) + 0.5 * repulsion


def dense_energy_loss(
    rgb: Tensor,
    logits: Tensor,
    label: Tensor,
    weight: float,
    sigma_rgb: float,
    sigma_xy: float,
    scale_factor: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Dense energy (regularised) loss: neighbours of similar colour should have similar probabilities.

    With S the class probabilities, K the Gaussian kernel over position and colour of all pairs of pixels, and G a gate
    that is open where the network is unsure: -weight / B * sum S G (K S). As in the released MoRe and SeCo, the
    gradient treats the gate as constant and is -2 weight / B * G (K S). Both work at a reduced size (`scale_factor`).

    K S is the exact sum where the references approximate it by a permutohedral lattice. Time grows with the square of
    the pixels, memory does not: K is made in slices of at most 2**24 entries, 64 MiB in float32, on top of a few
    arrays of the size of the probabilities. (A batch of 4 at 448 px and scale 0.5 has 50,176 pixels an image; its whole
    kernel would take 40 GB.) The exponents need full float32 products: leave TF32 off. Autocast is switched off inside.

    Args:
        rgb: (B, 3, H, W) colours in grey levels, 0..255.
        logits: (B, C + 1, H, W), at the size of the image.
        label: int64 (B, H, W); where it is 255 the gate is fully open.
        weight: factor of the loss; the references use 1e-7.
        sigma_rgb: width of the kernel in grey levels.
        sigma_xy: width of the kernel in pixels of the full size.
        scale_factor: factor of height and width for the computation, bilinear for the probabilities, else nearest.
        valid: bool (B, H, W), False for padding, which then neither counts nor gets gradient. None: all valid.

    Returns:
        The loss, a scalar <= 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_label(logits, label, "dense_energy_loss: logits")
    if rgb.shape != (logits.shape[0], 3, *logits.shape[2:]):
        raise ValueError(
            f"dense_energy_loss: rgb {tuple(rgb.shape)} must be (B, 3, H, W) with the B, H, W of the logits "
            f"{tuple(logits.shape)}; resize the logits to the image first"
        )
    if valid is not None and valid.shape != label.shape:
        raise ValueError(f"dense_energy_loss: valid {tuple(valid.shape)} must be (B, H, W) = {tuple(label.shape)}")

    def nearest(values: Tensor) -> Tensor:
        return F.interpolate(values.to(rgb.dtype), scale_factor=scale_factor, mode="nearest")

    scores = F.interpolate(logits.softmax(1), scale_factor=scale_factor, mode="bilinear", align_corners=False)
    gate = 1 - scores.detach().amax(1)
    if valid is not None:
        inside = nearest(valid[:, None])[:, 0]
        scores = scores * inside[:, None]
        gate = gate * inside
    gate = gate.clamp(min=0).masked_fill(nearest(label[:, None])[:, 0] == IGNORE, 1)

    batch, _, height, width = scores.shape
    y, x = torch.meshgrid(
        torch.arange(height, dtype=scores.dtype, device=scores.device),
        torch.arange(width, dtype=scores.dtype, device=scores.device),
        indexing="ij",
    )
    position = torch.stack([x, y]).expand(batch, -1, -1, -1) / (sigma_xy * scale_factor)
    features = torch.cat([position, nearest(rgb).to(scores.dtype) / sigma_rgb], dim=1)
    return weight * _DenseEnergy.apply(scores.flatten(2), features.flatten(2).mT, gate.flatten(1))


class _DenseEnergy(torch.autograd.Function):
    """Energy -1/B sum S G (K S) of scores S (B, C, N), features (B, N, F) of the kernel K, gate G (B, N)."""

    @staticmethod
    def forward(ctx, scores: Tensor, features: Tensor, gate: Tensor) -> Tensor:
        filtered = _gaussian_filter(scores, features) * gate[:, None]
        ctx.save_for_backward(filtered)
        return -(scores * filtered).sum() / scores.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (filtered,) = ctx.saved_tensors
        return (-2 / filtered.shape[0]) * upstream * filtered, None, None


def _gaussian_filter(values: Tensor, features: Tensor) -> Tensor:
    """Exact sum_j exp(-|f_i - f_j|^2 / 2) values_j: values (B, C, N), features (B, N, F) -> (B, C, N).

    The exponent f_i.f_j - |f_i|^2/2 - |f_j|^2/2 is one matrix product of features with two more columns. Features are
    centred first, which keeps the three terms small and so the rounding of their sum.
    """
    features = features - features.mean(1, keepdim=True)
    half_norm = features.square().sum(2, keepdim=True) / 2
    one = torch.ones_like(half_norm)
    left = torch.cat([features, -half_norm, one], dim=2)
    right = torch.cat([features, one, -half_norm], dim=2).mT
    batch, pixels, _ = features.shape
    rows = max(1, KERNEL_ENTRIES // (batch * pixels))
    # Half-precision exponents would be off by whole units. Raising them to -80 changes the kernel by 1e-35 and spares
    # the CPU the slow exponentials that underflow.
    with torch.autocast(values.device.type, enabled=False):
        slices = [torch.bmm(part, right).clamp_(min=-80).exp_() @ values.mT for part in left.split(rows, dim=1)]
    return torch.cat(slices, dim=1).mT


def _check_label(maps: Tensor, label: Tensor, what: str) -> None:
    if maps.ndim != 4 or label.shape != (maps.shape[0], *maps.shape[2:]):
        raise ValueError(
            f"{what} {tuple(maps.shape)} must be (B, channels, h, w) and the label {tuple(label.shape)} (B, h, w) of "
            "the same size; resize one of them"
        )
