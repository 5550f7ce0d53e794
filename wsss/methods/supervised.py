"""The fully supervised counterpart of a single-stage method: the same backbone and decoder, trained on true masks.

It is the upper bound that papers divide their score by (SeCo table 5), not a method of weak supervision.
"""

from dataclasses import dataclass

from torch import Tensor

from wsss.backbones.vit import MultiTokenViT
from wsss.losses import pixel_cross_entropy
from wsss.maps import resize
from wsss.methods.common import Method
from wsss.methods.decoder import build_decoder


@dataclass(frozen=True)
class SupervisedConfig:
    """Hyper-parameters; see `build_decoder`."""

    decoder_width: int
    decoder_dilation: int


class Supervised(Method):
    """A decoder on patch tokens with pixel-wise cross entropy.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: vision transformer with one class token, which is not used.
    """

    Config = SupervisedConfig
    variants = ("published",)
    batch_fields = ("mask",)

    def __init__(self, config: SupervisedConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__()
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.decoder = build_decoder(
            backbone.embed_dim, num_classes + 1, config.decoder_width, config.decoder_dilation
        )

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Cross entropy "seg" of "image" (B, 3, H, W) against "mask" int64 (B, H, W), in which 255 does not count.

        A batch without any labelled pixel gives 0.
        """
        mask = batch["mask"]
        return {"seg": pixel_cross_entropy(resize(self.segment(batch["image"]), mask.shape[-2:]), mask)}

    def segment(self, images: Tensor) -> Tensor:
        """Decoder logits (B, C + 1, h, w) of images (B, 3, H, W)."""
        tokens = self.backbone(images)
        return self.decoder(tokens.as_map(tokens.patches))
