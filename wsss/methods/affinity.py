"""AffinityNet (PSA: Ahn and Kwak, CVPR 2018), the second stage of BNR and TransCAM: which cells belong together.

It is trained on pairs of cells whose labels a CRF made certain (`wsss.affinity.merge_crf_labels`), and its affinities
lead the random walk that refines the maps of the first stage (`wsss.affinity.random_walk`).

Shapes: B images, (H, W) pixels, (h, w) cells of `backbone.stride` pixels, D channels of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.affinity import affinity_loss, affinity_targets, pair_affinity
from wsss.backbones.resnet38 import ResNet38
from wsss.methods.common import Method, check_variant


@dataclass(frozen=True)
class AffinityConfig:
    """Hyper-parameters; the defaults are those of the released TransCAM code on VOC.

    Attributes:
        variant: what padding around an image is. "released" (TransCAM): background, which makes pairs. "published"
            (PSA): nothing, its pairs do not count.
        tap_widths: channels that each of the backbone's three taps is reduced to.
        embedding_width: D.
        radius: pairs are closer than that many cells.
        frozen_stages: parts of the backbone that do not train, see `ResNet38.freeze`.
        frozen_norm: whether batch norm keeps its statistics, scale and shift.
        threshold_high, threshold_low: background scores that make confident and generous labels of the seeds.
        background: score of the background in the random walk.
        beta, doublings: see `wsss.affinity.random_walk`.
        images: how many training images it learns from; 0 takes all.
    """

    variant: str = "released"
    tap_widths: Sequence[int] = (64, 128, 256)
    embedding_width: int = 448
    radius: int = 5
    frozen_stages: Sequence[str] = ("conv1a", "b2")
    frozen_norm: bool = True
    threshold_high: float = 0.6
    threshold_low: float = 0.25
    background: float = 0.42
    beta: float = 14.0
    doublings: int = 7
    images: int = 0

    def __post_init__(self):
        check_variant(self.variant, "AffinityNet")
        if self.threshold_low > self.threshold_high:
            raise ValueError(
                f"AffinityNet: threshold_low = {self.threshold_low} must not be above "
                f"threshold_high = {self.threshold_high}"
            )
        if self.radius < 2:
            raise ValueError(f"AffinityNet: radius = {self.radius} leaves no pairs; give at least 2 cells")


class AffinityNet(Method):
    """An embedding of cells, in which those of one object or region lie close together.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes; the embedding does not depend on it.
        backbone: network with three taps.
    """

    Config = AffinityConfig
    batch_fields = ("mask", "valid")
    stage = "affinity"
    segments = ""

    def __init__(self, config: AffinityConfig, num_classes: int, backbone: ResNet38):
        super().__init__()
        self.config, self.num_classes, self.backbone = config, num_classes, backbone
        if len(config.tap_widths) != len(backbone.out_channels):
            raise ValueError(
                f"AffinityNet: tap_widths = {tuple(config.tap_widths)} needs one width for each tap of the backbone: "
                f"{', '.join(backbone.out_channels)}"
            )
        backbone.freeze(config.frozen_stages, config.frozen_norm)
        self.reduce = nn.ModuleDict(
            {
                tap: nn.Conv2d(channels, width, 1, bias=False)
                for (tap, channels), width in zip(backbone.out_channels.items(), config.tap_widths)
            }
        )
        self.fuse = nn.Conv2d(sum(config.tap_widths), config.embedding_width, 1, bias=False)
        for layer in self.reduce.values():
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.fuse.weight, gain=4)  # as PSA has it: distances in the embedding start large

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss of all pairs, "affinity".

        Args:
            batch: "image" (B, 3, H, W); "mask" int64 (B, H, W), the merged labels: 0 background, 1..C class, 255
                ignored; "valid" (B, H, W), False where the image was padded.
        """
        labels = batch["mask"]
        if self.config.variant == "released":
            labels = labels.masked_fill(~batch["valid"], 0)
        targets = affinity_targets(self.cell_labels(labels), self.config.radius)
        affinity = pair_affinity(self.embed(batch["image"]), self.config.radius)
        return {"affinity": affinity_loss(affinity, targets).total}

    def cell_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, H, W) of pixels -> (B, h, w), those of the pixel at the upper left of every cell."""
        every = self.backbone.stride
        return labels[:, ::every, ::every]

    def embed(self, images: Tensor) -> Tensor:
        """Embedding (B, D, h, w) of images (B, 3, H, W)."""
        return self.fuse_taps(self.backbone(images))

    def fuse_taps(self, taps: dict[str, Tensor]) -> Tensor:
        """Embedding (B, D, h, w) of the backbone's taps: every one reduced, all of them together, ELU after each."""
        reduced = [F.elu(layer(taps[tap])) for tap, layer in self.reduce.items()]
        return F.elu(self.fuse(torch.cat(reduced, 1)))
