"""The segmentation decoders of the single-stage papers: patch tokens as a map -> logits, on the patch grid."""

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


class ASPP(nn.Module):
    """The classifier of DeepLabV2 (SeCo, Implementing Details): the sum of four parallel 3x3 convolutions with bias.

    Args:
        in_channels: D, channels of the patch tokens.
        num_outputs: output channels, the C classes and the background.
        dilation: of the first convolution, in tokens; the others have 2, 3 and 4 times as much.
    """

    def __init__(self, in_channels: int, num_outputs: int, dilation: int = 6):
        super().__init__()
        rates = [dilation * factor for factor in (1, 2, 3, 4)]
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_outputs, 3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Patch tokens as a map (B, D, h, w) -> logits (B, num_outputs, h, w)."""
        return sum(branch(features) for branch in self.branches)


def build_decoder(in_channels: int, num_outputs: int, width: int, dilation: int) -> nn.Module:
    """`LargeFOV` with `width` channels between its convolutions, or `ASPP`, which has none, for a width of 0."""
    return LargeFOV(in_channels, num_outputs, width, dilation) if width else ASPP(in_channels, num_outputs, dilation)
