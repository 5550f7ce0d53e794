"""TransCAM, and background noise reduction (BNR) on top of it.

TransCAM refines the class activation map of Conformer's convolutional branch by the attention of its transformer
branch. BNR puts the refined map into the training loss. In the order of the paper: the attention map (eqs. 2-4), the
refined map (eq. 5), the noise (eqs. 6, 7), the losses (eqs. 8, 9).

Shapes: B images, (h, w) patches, N = h * w, T = 1 + N tokens, L blocks, S = C + 1 classes, the background is class 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.backbones.conformer import Conformer, Features, init_weights
from wsss.data import Sample
from wsss.methods.common import Method, check_choice, check_variant, full_precision
from wsss.representations import describe_activation

NOISE_MODES = ("multiply", "power", "add")


# --------------------------------------------------------------------------------------------------- the attention map


def sum_attention(attention: Sequence[Tensor]) -> Tensor:
    """A: the attention of all blocks, averaged over heads and summed over blocks (BNR eqs. 3, 4).

    Args:
        attention: of every block, (B, T, T) averaged over heads or (B, heads, T, T).

    Returns:
        (B, T, T). Nothing is normalised: a row sums to L.
    """
    return sum(weights.mean(1) if weights.ndim == 4 else weights for weights in attention)


def between_patches(attention: Tensor) -> Tensor:
    """A*: A (B, T, T) without the row and column of the class token, (B, N, N); rows sum to a little less than L."""
    return attention[:, 1:, 1:]


def refine(cam: Tensor, attention: Tensor) -> Tensor:
    """M* = A* M: every patch takes over the scores of the patches that it attends to (BNR eq. 5).

    Args:
        cam: M (B, S, h, w).
        attention: A* (B, N, N), rows are queries. Its transpose spreads scores to the patches that are attended to.

    Returns:
        (B, S, h, w).

    Raises:
        ValueError: attention of another grid.
    """
    if attention.shape[1:] != (cam[0, 0].numel(),) * 2:
        raise ValueError(
            f"refine: attention {tuple(attention.shape)} does not fit maps {tuple(cam.shape)}: (B, N, N) with "
            "N = h * w; take the class token out first (`between_patches`)"
        )
    return (attention @ cam.flatten(2).mT).mT.unflatten(2, cam.shape[2:])


def add_noise(refined: Tensor, attention: Tensor, noise: float, mode: str = "multiply") -> Tensor:
    """M**: the refined map with the attention as noise, used in training only (BNR eq. 6).

    The noise is not random: it is the attention itself, averaged over blocks. The paper says that it is "added" and
    prints a product, and does not say what two times the noise is; hence the modes.

    Args:
        refined: M* (B, S, h, w).
        attention: the mean attention A-bar* = A* / L (B, N, N) (BNR eq. 7).
        noise: k, how much of it; 0 leaves M* as it is ("without noise", BNR table 5).
        mode: "multiply": k A-bar* M*, as printed. "power": A-bar* applied k times. "add": M* + k A-bar* M*.

    Returns:
        (B, S, h, w).

    Raises:
        ValueError: an unknown mode, negative noise, or a power that is no whole number.
    """
    check_choice("BNR: noise_mode", mode, NOISE_MODES)
    if noise < 0 or (mode == "power" and noise != int(noise)):
        raise ValueError(f'BNR: noise = {noise} with noise_mode "{mode}": it must be >= 0, and whole for "power"')
    if noise == 0:
        return refined
    if mode == "power":
        for _ in range(int(noise)):
            refined = refine(refined, attention)
        return refined
    noisy = noise * refine(refined, attention)
    return refined + noisy if mode == "add" else noisy


def image_logits(maps: Tensor) -> Tensor:
    """z: the spatial mean of maps (B, S, h, w), for the foreground classes only: (B, S - 1)."""
    return maps[:, 1:].mean((2, 3))


# ---------------------------------------------------------------------------------------------------------- the method


@dataclass(frozen=True)
class TransCAMConfig:
    """Hyper-parameters; the defaults are those of BNR.

    Attributes:
        variant: "published" follows BNR's text; "released" is TransCAM as its code has it (BNR's is not public).
        weight_refined: of the loss on the refined map (eq. 9); 0 is TransCAM.
        noise, noise_mode: see `add_noise`.
        noise_gradient: whether the attention that serves as noise gets a gradient.
    """

    variant: str = "published"
    weight_refined: float = 1.0
    noise: float = 1.0
    noise_mode: str = "multiply"
    noise_gradient: bool = True

    def __post_init__(self):
        check_variant(self.variant, "TransCAM")
        check_choice("BNR: noise_mode", self.noise_mode, NOISE_MODES)
        if self.variant == "released" and self.weight_refined:
            raise ValueError(
                f"TransCAM: weight_refined = {self.weight_refined} in the variant \"released\", which is TransCAM's "
                'code and has no such loss; use the variant "published"'
            )


class TransCAM(Method):
    """TransCAM and BNR: a classifier whose maps are seeds for later stages.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes. The heads have a background channel too, which no loss trains.
        backbone: Conformer whose last map has the size of the patch grid.
    """

    Config = TransCAMConfig
    map_names = ("transcam", "cam")
    crf_maps = ("transcam",)
    mask_map = "transcam"
    segments = ""

    def __init__(self, config: TransCAMConfig, num_classes: int, backbone: Conformer):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.conv_head = nn.Conv2d(backbone.num_features, num_classes + 1, 3, padding=1)
        self.token_head = nn.Linear(backbone.embed_dim, num_classes + 1)
        for head in (self.conv_head, self.token_head):
            init_weights(head)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The terms of eq. 9: "cls", on the summed logits of both heads, and "refined", on M**."""
        config, labels = self.config, batch["label"]
        features = self.backbone.forward_features(batch["image"])
        with full_precision(batch["image"]):  # sums over N patches and L blocks
            cam = self.cam(features)
            terms = {"cls": F.multilabel_soft_margin_loss(self.class_logits(features, cam), labels)}
            if config.weight_refined:
                noisy = self.noisy_map(features, cam)
                terms["refined"] = config.weight_refined * F.multilabel_soft_margin_loss(image_logits(noisy), labels)
        return terms

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The raw maps "transcam", M*, and "cam", M, (B, C, h, w), and "class_logits" (B, C, 1, 1)."""
        features = self.backbone.forward_features(images)
        cam = self.cam(features)
        logits = self.class_logits(features, cam)[..., None, None]
        return {"transcam": self.refined_map(features, cam)[:, 1:], "cam": cam[:, 1:], "class_logits": logits}

    def cam(self, features: Features) -> Tensor:
        """M (B, S, h, w), the map of the convolutional branch (eq. 1); TransCAM's code: a 3x3 convolution with bias."""
        return self.conv_head(self._full(features.map))

    def class_logits(self, features: Features, cam: Tensor) -> Tensor:
        """Image-level logits (B, C): the spatial mean of M plus the head on the class token."""
        return image_logits(cam) + self.token_head(self._full(features.tokens[:, 0]))[:, 1:]

    def patch_attention(self, features: Features) -> Tensor:
        """A* (B, N, N)."""
        return between_patches(sum_attention([self._full(weights) for weights in features.attention]))

    def refined_map(self, features: Features, cam: Tensor) -> Tensor:
        """M* (B, S, h, w)."""
        return refine(cam, self.patch_attention(features))

    def noisy_map(self, features: Features, cam: Tensor) -> Tensor:
        """M** (B, S, h, w)."""
        attention = self.patch_attention(features)
        mean = attention / len(features.attention)
        mean = mean if self.config.noise_gradient else mean.detach()
        return add_noise(refine(cam, attention), mean, self.config.noise, self.config.noise_mode)

    def received_attention(self, images: Tensor) -> Tensor:
        """How much attention each patch gets from all patches, column sums of A* over their mean: (B, h, w)."""
        features = self.backbone.forward_features(images)
        received = self.patch_attention(features).sum(1)
        return (received / received.mean(1, keepdim=True)).unflatten(1, features.grid)

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """See `describe_activation`."""
        return describe_activation(self, dataset, images)

    def _full(self, values: Tensor) -> Tensor:
        """In the precision of the heads, where the backbone has used a lower one."""
        return values.to(self.conv_head.weight.dtype)
