"""DeepLab on ResNet38, the last stage of BNR and TransCAM: a second network that learns from pseudo masks.

BNR and TransCAM only name it; all settings are those of TransCAM's released code. There nothing ever calls `train()` on
the network, whose backbone would then freeze its first convolution and the statistics of its batch norm. So everything
but batch norm's scale and shift trains, and batch norm uses the statistics of the batch.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.backbones.resnet38 import ResNet38
from wsss.losses import pixel_cross_entropy
from wsss.methods.common import Method
from wsss.training import TrainConfig


@dataclass(frozen=True)
class DeepLabConfig:
    """Hyper-parameters; the defaults are those of the released TransCAM code on VOC.

    Attributes:
        width: channels of the head.
        dilation: of its 3x3 convolution, in cells.
        dropout: before the classifier.
        norm_momentum: share of a new batch in the running statistics of every batch norm. They are what the trained
            network uses, so their number of steps, 1 / momentum, must be smaller than that of the training.
        crf_masks: whether the pseudo masks pass a CRF.
        images: how many training images it learns from; 0 takes all.
    """

    width: int = 512
    dilation: int = 12
    dropout: float = 0.5
    norm_momentum: float = 0.0003
    crf_masks: bool = True
    images: int = 0


class DeepLab(Method):
    """DeepLab-v1 with a LargeFOV head.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: the network below the head.
    """

    Config = DeepLabConfig
    variants = ("released",)
    batch_fields = ("mask",)
    stage = "retrained"
    segments = "retrained"

    def __init__(self, config: DeepLabConfig, num_classes: int, backbone: ResNet38):
        super().__init__()
        self.config, self.num_classes, self.backbone = config, num_classes, backbone
        channels, width = backbone.out_channels["conv6"], config.width
        self.head = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=config.dilation, dilation=config.dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Conv2d(width, num_classes + 1, 1),
        )
        for module in self.head:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.norm_momentum
                module.requires_grad_(False)

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """Backbone at the base rate, head at `head_lr_multiplier` times it, its bias at twice that and not decayed."""
        trained = lambda module: [p for p in module.parameters() if p.requires_grad]
        head_lr, bias = config.lr * config.head_lr_multiplier, self.head[-1].bias
        return [
            {"params": trained(self.backbone), "base_lr": config.lr},
            {"params": [p for p in trained(self.head) if p is not bias], "base_lr": head_lr},
            {"params": [bias], "base_lr": 2 * head_lr, "weight_decay": 0.0},
        ]

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cross entropy "seg" of "image" (B, 3, H, W) against "mask" int64 (B, H, W), in which 255 does not count."""
        return {"seg": pixel_cross_entropy(self.segment(batch["image"]), batch["mask"])}

    def segment(self, images: Tensor) -> Tensor:
        """Logits (B, C + 1, H, W) of images (B, 3, H, W), interpolated with aligned corners from the grid of cells."""
        logits = self.head(self.backbone(images)["conv6"])
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)
