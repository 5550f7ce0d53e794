"""Patch token contrast (PTC) of ToCo, on the common baseline.

Ru, Zheng, Zhan, Du: Token Contrast for Weakly-Supervised Semantic Segmentation, CVPR 2023. The second half of the
paper, class token contrast (CTC), is not here: no score of this method is a replication of one of ToCo's.

Shapes: B images, D channels, (h, w) patches, L = h * w.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.data.transforms import normalise
from wsss.losses import pairwise_affinity
from wsss.methods.cam import Cam, CamConfig
from wsss.methods.common import check_variant


def patch_token_contrast(features: Tensor, label: Tensor) -> Tensor:
    """L_ptc as printed: patches of equal label attract, patches of different labels repel (ToCo, patch token contrast).

    With s the cosine of two patch tokens: the mean of 1 - s over the positive pairs plus the mean of s over the
    negative ones; a mean without pairs is 0. What the formula leaves open is as in `wsss.losses.ptc_loss`, the released
    form: the pairs of all images of the batch count together, and a patch makes no pair with itself. That form differs
    in three things: it takes |s|, so that negative pairs stop at a right angle; it halves the sum; it divides by the
    number of pairs plus one.

    Args:
        features: (B, D, h, w) patch tokens as a map.
        label: int64 (B, h, w): 0 background, 1..C class, 255 uncertain; pairs with an uncertain patch are left out.

    Returns:
        The loss, a scalar in -1..3.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 4 or label.shape != (len(features), *features.shape[2:]):
        raise ValueError(
            f"patch_token_contrast: features {tuple(features.shape)} must be (B, D, h, w) and the label "
            f"{tuple(label.shape)} (B, h, w) of the same size; resize one of them"
        )
    unit, affinity = F.normalize(features.flatten(2), dim=1), pairwise_affinity(label)
    similarity, positive, negative = unit.mT @ unit, affinity == 1, affinity == 0
    attraction = (1 - similarity).where(positive, 0).sum() / positive.sum().clamp(min=1)
    repulsion = similarity.where(negative, 0).sum() / negative.sum().clamp(min=1)
    return attraction + repulsion


def mean_similarity(patches: Tensor) -> Tensor:
    """Mean cosine of two different patches of an image: (B, L, D) tokens -> (B,); near 1 they are over-smoothed."""
    unit, length = F.normalize(patches, dim=2), patches.shape[1]
    return ((unit @ unit.mT).sum((1, 2)) - length) / (length * (length - 1))


@dataclass(frozen=True)
class ToCoConfig(CamConfig):
    """Hyper-parameters: those of the baseline.

    Attributes:
        variant: "published" has the contrast as printed, "released" as the public code has it, which is the baseline's.
    """

    variant: str = "published"

    def __post_init__(self):
        super().__post_init__()
        check_variant(self.variant, "ToCo")


class ToCo(Cam):
    """The baseline with ToCo's patch token contrast, and without its class token contrast."""

    Config = ToCoConfig
    batch_fields = ("valid",)

    def patch_contrast(self, features: Tensor, label: Tensor) -> Tensor:
        """L_ptc in the form of the variant."""
        if self.config.variant == "released":
            return super().patch_contrast(features, label)
        return patch_token_contrast(features, label)

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """`block_similarity`: for each block the mean of `mean_similarity` over images, see `block_similarity`."""
        samples = [dataset[i] for i in range(min(images, len(dataset)))]
        inputs = torch.stack([normalise(sample.image) for sample in samples]).to(self.classifier.weight.device)
        found = torch.cat([self.eval().block_similarity(part) for part in inputs.split(50)])
        return {"block_similarity": [round(value, 4) for value in found.mean(0).tolist()]}

    @torch.no_grad()
    def block_similarity(self, images: Tensor) -> Tensor:
        """How alike the patches of images (B, 3, H, W) are after each block, (B, blocks); after the last, normed."""
        tokens = self.backbone(images, taps=range(self.backbone.depth - 1))
        return torch.stack([mean_similarity(patches) for patches in (*tokens.taps.values(), tokens.patches)], dim=1)
