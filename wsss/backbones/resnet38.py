"""ResNet38: the wide residual network of the second stages of weak supervision (PSA's affinity network, DeepLab).

Model A1 of Wu, Shen and van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition": residual
blocks with the activation in front, and dilation in place of the last strides. Parameters carry the names of the widely
used PyTorch port (`b4_2.conv_branch2a.weight`), so that its weights load as they are.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wsss.backbones.weights import load_weights, read_weights

RESNET = "resnet38"
TINY_RESNET = "resnet38_tiny_scenes"
DATA = Path(__file__).parents[2] / "data"
WEIGHTS = {RESNET: DATA / "resnet38.pth", TINY_RESNET: DATA / f"{TINY_RESNET}.safetensors"}
REMEDY = {
    RESNET: "put there the ImageNet weights of github.com/itijyou/ademxapp (model A1), named as in PSA's PyTorch port",
    TINY_RESNET: "restore it with git, or make it with `wsss pretrain`",
}
SIZES = {
    RESNET: {},
    TINY_RESNET: {
        "widths": (16, 24, 48, 64, 128, 160, 192),
        "blocks": (1, 1, 2, 1),
        "strides": (2, 2, 1),
        "dropout": (0.0, 0.0),
    },
}
CLASSIFIERS = ("fc8", "linear1000")  # what files may hold besides the network
NARROWEST = 16  # channels that a block with a stride may get
TAPS = {"b5": "conv4", "b6": "conv5"}  # the activated input of a block -> the tap's name


class Block(nn.Module):
    """Two 3x3 convolutions: in -> mid (stride, `first_dilation`) -> out (`dilation`), each after BN and ReLU.

    The shortcut is the input itself, or a 1x1 convolution of the activated input where its shape changes.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
    ):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(
            in_channels, mid_channels, 3, stride, padding=first_dilation, dilation=first_dilation, bias=False
        )
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = nn.Conv2d(mid_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv_branch1 = None
        if in_channels != out_channels or stride != 1:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in, h, w) -> (B, out, h', w'), and the input after BN and ReLU (B, in, h, w)."""
        active = self.bn_branch2a(x).relu()
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(active)
        branch = self.conv_branch2a(active)
        branch = self.conv_branch2b1(self.bn_branch2b1(branch).relu())
        return shortcut + branch, active


class Bottleneck(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolution: in -> out / 4 -> out / 2 -> out, with dropout of whole channels."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float):
        super().__init__()
        quarter, half = out_channels // 4, out_channels // 2
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in, h, w) -> (B, out, h, w), and the input after BN and ReLU (B, in, h, w)."""
        active = self.bn_branch2a(x).relu()
        branch = self.conv_branch2a(active)
        branch = self.conv_branch2b1(self.dropout(self.bn_branch2b1(branch).relu()))
        branch = self.conv_branch2b2(self.dropout(self.bn_branch2b2(branch).relu()))
        return self.conv_branch1(active) + branch, active


class ResNet38(nn.Module):
    """The network without a classifier; the defaults are the paper's size (105,070,912 parameters, output stride 8).

    Args:
        widths: channels of the first convolution, of the four stages of plain blocks (b2 .. b5), and of the two
            bottlenecks (b6, b7). Inside, the blocks of b5 are as wide as b4. Where a stride follows, 16 or more.
        blocks: number of blocks in b2, b3, b4, b5.
        strides: of the first block of b2, b3, b4; their product is the output stride.
        dropout: rates of b6 and b7.
        pretrained: file of weights to load, or None.

    Attributes:
        out_channels: tap -> its channels, from the earliest to the last.
        stride: pixels per cell of the taps.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096),
        blocks: Sequence[int] = (3, 3, 6, 3),
        strides: Sequence[int] = (2, 2, 2),
        dropout: Sequence[float] = (0.3, 0.5),
        pretrained: str | Path | None = None,
    ):
        super().__init__()
        if (len(widths), len(blocks), len(strides), len(dropout)) != (7, 4, 3, 2):
            raise ValueError(
                "ResNet38 needs 7 widths, 4 numbers of blocks, 3 strides and 2 rates of dropout, not "
                f"{tuple(widths)}, {tuple(blocks)}, {tuple(strides)} and {tuple(dropout)}"
            )
        entering = [width for width, stride in zip(widths, strides) if stride > 1]  # blocks that halve the map
        if entering and min(entering) < NARROWEST:
            raise ValueError(
                f"ResNet38: a block with a stride gets {min(entering)} channels; give it {NARROWEST} or more, since with "
                "fewer a strided 1x1 convolution writes beyond its memory on some processors (uxlfoundation/oneDNN, issue "
                "6035)"
            )
        self.conv1a = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block_names = []
        for stage, count in enumerate(blocks[:3]):
            self._add(stage + 2, 0, Block(widths[stage], widths[stage + 1], widths[stage + 1], strides[stage]))
            for index in range(1, count):
                self._add(stage + 2, index, Block(*3 * [widths[stage + 1]]))
        for index in range(blocks[3]):
            before, first_dilation = (widths[4], 2) if index else (widths[3], 1)
            self._add(5, index, Block(before, widths[3], widths[4], 1, first_dilation, 2))
        self._add(6, 0, Bottleneck(widths[4], widths[5], 4, dropout[0]))
        self._add(7, 0, Bottleneck(widths[5], widths[6], 4, dropout[1]))
        self.bn7 = nn.BatchNorm2d(widths[6])
        self.out_channels = {"conv4": widths[3], "conv5": widths[4], "conv6": widths[6]}
        self.stride = strides[0] * strides[1] * strides[2]
        self.frozen_norm = False
        if pretrained is not None:
            load_weights(self, read_weights(pretrained), pretrained, CLASSIFIERS)

    def _add(self, stage: int, index: int, block: nn.Module) -> None:
        name = f"b{stage}_{index}" if index else f"b{stage}"
        self.add_module(name, block)
        self.block_names.append(name)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Taps of images (B, 3, H, W): name -> (B, D, h, w), with h and w the sides over the stride, rounded up.

        "conv4" and "conv5" are the inputs of b5 and b6 after BN and ReLU, "conv6" is the last map, after BN and ReLU.
        """
        x = self.conv1a(images.contiguous(memory_format=torch.channels_last))  # a sixth faster on a CPU
        taps = {}
        for name in self.block_names:
            x, active = self.get_submodule(name)(x)
            if name in TAPS:
                taps[TAPS[name]] = active
        return taps | {"conv6": self.bn7(x).relu()}

    def freeze(self, stages: Sequence[str] = (), norm: bool = False) -> None:
        """Exclude parts from training, for good.

        Args:
            stages: whose parameters stay as they are: among "conv1a", "b2" .. "b7".
            norm: whether every batch norm keeps its scale and shift, and uses its running statistics in training too.

        Raises:
            ValueError: an unknown stage.
        """
        known = dict.fromkeys(name.split("_")[0] for name in ("conv1a", *self.block_names))
        for stage in stages:
            if stage not in known:
                raise ValueError(f"ResNet38 has no stage {stage!r} to freeze; choose among {', '.join(known)}")
        for name, module in self.named_modules():
            if name.split(".")[0].split("_")[0] in stages or norm and isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.frozen_norm = norm
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet38":
        """As any module, except that frozen batch norm stays in evaluation mode."""
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def build_resnet38(name: str, pretrained: bool = True, weights: str | Path = "") -> ResNet38:
    """The network of the paper's size, "resnet38", or that of the embedded benchmark, "resnet38_tiny_scenes".

    Args:
        pretrained: load weights.
        weights: the file that holds them; "" takes that in `data/`, see `WEIGHTS`.

    Raises:
        ValueError: unknown name, or weights of another network.
        FileNotFoundError: there are no weights; the message says where to get them.
    """
    if name not in SIZES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of {', '.join(SIZES)}")
    if pretrained and not weights and not WEIGHTS[name].exists():
        raise FileNotFoundError(f"{WEIGHTS[name]} is missing: {REMEDY[name]}")
    return ResNet38(**SIZES[name], pretrained=(weights or WEIGHTS[name]) if pretrained else None)
