"""The segmentation decoder that the single-stage papers share."""

from torch import Tensor, nn


class LargeFOV(nn.Module):
    """DeepLab-LargeFOV (MoRe, Implementation Details): two dilated 3x3 convolutions and a 1x1 classifier, without bias.

    Args:
        in_channels: D, channels of the patch tokens.
        num_outputs: output channels, the C classes and the background.
        width: channels between the convolutions.
        dilation: dilation of both 3x3 convolutions, in tokens.
    """

    def __init__(self, in_channels: int, num_outputs: int, width: int = 512, dilation: int = 5):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, num_outputs, 1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Patch tokens as a map (B, D, h, w) -> logits (B, num_outputs, h, w)."""
        return self.layers(features)
