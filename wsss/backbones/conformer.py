"""Conformer: a convolutional and a transformer branch that feed each other (BNR 3.1), with taps for maps and attention.

Sizes Ti, S and B are registered with timm; their parameter names are those of the public ImageNet checkpoints, which
load unchanged. There is no position embedding, the convolutions tell tokens where they are, so any multiple of the patch
size will do as height and width.

Shapes: B images, (h, w) = image size / patch size, N = h * w patch tokens, T = 1 + N tokens (class token first), E token
channels, L blocks, A attention heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_model
from torch import Tensor, nn

from wsss.backbones.weights import load_weights, read_weights

TINY_CONFORMER = "conformer_tiny_scenes"
TINY_CONFORMER_WEIGHTS = Path(__file__).parents[2] / "data" / f"{TINY_CONFORMER}.safetensors"
HEADS = ("conv_cls_head.", "trans_cls_head.")

_BatchNorm = partial(nn.BatchNorm2d, eps=1e-6)
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


# ------------------------------------------------------------------------------------------------------ the two branches


class Bottleneck(nn.Module):
    """Residual block of the convolutional branch: 1x1, 3x3 and 1x1 convolution, a quarter of the channels inside.

    Args:
        in_channels, out_channels: C, C'.
        stride: of the 3x3 convolution.
        residual_conv: whether the residual passes a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, residual_conv: bool = False):
        super().__init__()
        inner = out_channels // 4
        self.conv1, self.bn1 = nn.Conv2d(in_channels, inner, 1, bias=False), _BatchNorm(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), _BatchNorm(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out_channels, 1, bias=False), _BatchNorm(out_channels)
        self.residual = residual_conv
        if residual_conv:
            self.residual_conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.residual_bn = _BatchNorm(out_channels)

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) -> map (B, C', H', W') and what its 3x3 convolution gave (B, C' / 4, H', W').

        Args:
            added: (B, C' / 4, H, W), what the tokens add to the input of the 3x3 convolution.
        """
        inner = self.bn1(self.conv1(x)).relu()
        inner = inner if added is None else inner + added
        inner = self.bn2(self.conv2(inner)).relu()
        kept = self.residual_bn(self.residual_conv(x)) if self.residual else x
        return (self.bn3(self.conv3(inner)) + kept).relu(), inner


class Attention(nn.Module):
    """Multi-head self-attention that also returns its weights, after the softmax (BNR eq. 2)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E) -> (B, T, E), and the weights (B, A, T, T), rows are queries."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query * self.scale @ key.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2)), weights


class TransformerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.attn = _LayerNorm(channels), Attention(channels, heads)
        self.norm2, self.mlp = _LayerNorm(channels), Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, E) -> (B, T, E), and its attention (B, A, T, T)."""
        update, weights = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path(update)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens))), weights


class Squeeze(nn.Module):
    """Feature coupling downwards: a map becomes patch tokens."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv_project, self.ln = nn.Conv2d(in_channels, channels, 1), _LayerNorm(channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h * stride, w * stride) -> (B, N, E)."""
        pooled = F.avg_pool2d(self.conv_project(x), self.stride)
        return F.gelu(self.ln(pooled.flatten(2).transpose(1, 2)))


class Expand(nn.Module):
    """Feature coupling upwards: patch tokens become a map."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv_project, self.bn = nn.Conv2d(channels, out_channels, 1), _BatchNorm(out_channels)

    def forward(self, patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """(B, N, E) -> (B, C, H, W), each patch repeated over its pixels."""
        x = self.conv_project(patches.transpose(1, 2).unflatten(2, grid))
        return F.interpolate(self.bn(x).relu(), size)


class CoupledBlock(nn.Module):
    """A block of both branches with its two couplings.

    Args:
        in_channels, out_channels, stride: of the convolutional branch.
        token_stride: side of a patch on the map that its convolutions leave.
        last: the last block; its second bottleneck has `last_stride` and a residual convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        token_stride: int,
        embed_dim: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        last: bool,
        last_stride: int,
    ):
        super().__init__()
        self.cnn_block = Bottleneck(in_channels, out_channels, stride, residual_conv=in_channels != out_channels)
        self.squeeze_block = Squeeze(out_channels // 4, embed_dim, token_stride)
        self.trans_block = TransformerBlock(embed_dim, heads, mlp_ratio, drop_path)
        self.expand_block = Expand(embed_dim, out_channels // 4)
        self.fusion_block = Bottleneck(out_channels, out_channels, last_stride if last else 1, residual_conv=last)

    def forward(self, x: Tensor, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, C, H, W) and tokens (B, T, E) -> map, tokens, attention (B, A, T, T)."""
        x, inner = self.cnn_block(x)
        # The class token is added to itself, and so doubled: the checkpoints were trained that way.
        tokens = torch.cat([tokens[:, :1], self.squeeze_block(inner)], 1) + tokens
        tokens, attention = self.trans_block(tokens)
        added = self.expand_block(tokens[:, 1:], grid, inner.shape[-2:])
        return self.fusion_block(x, added)[0], tokens, attention


# ------------------------------------------------------------------------------------------------------------ the whole


@dataclass
class Features:
    """What a forward pass gives.

    Attributes:
        map: (B, C, h, w) last map of the convolutional branch (smaller where `last_stride` is 2).
        tokens: (B, T, E) after the final norm, class token first.
        grid: (h, w).
        attention: of every block, after the softmax: (B, T, T) averaged over heads (BNR eq. 3), or (B, A, T, T).
        taps: block index -> (map, tokens) as that block left them.
    """

    map: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    attention: list[Tensor]
    taps: dict[int, tuple[Tensor, Tensor]]


class Conformer(nn.Module):
    """Conformer, as an ImageNet classifier or (`num_classes` 0) as a backbone.

    The blocks come in three stages of equal length, of 1, 2 and 4 times `base_channels * channel_ratio` channels. Block 1
    is not coupled. The map starts at a quarter of the image size and is halved at every further stage until it has the size
    of the patch grid.

    Args:
        patch_size: side of a patch, a multiple of 4.
        base_channels: of the stem.
        channel_ratio: see above.
        embed_dim: E.
        depth: L, a multiple of 3.
        num_heads: A.
        mlp_ratio: hidden channels of the MLPs, as a multiple of E.
        drop_path_rate: of the last block; it rises linearly from 0.
        num_classes: of the two heads, or 0 for none.
        last_stride: of the last 3x3 convolution: 2 in the ImageNet classifier, 1 for maps on the patch grid (TransCAM).

    Raises:
        ValueError: a patch size or depth that does not fit.
    """

    def __init__(
        self,
        patch_size: int = 16,
        base_channels: int = 64,
        channel_ratio: float = 4,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.1,
        num_classes: int = 1000,
        last_stride: int = 2,
    ):
        super().__init__()
        if patch_size % 4 or depth % 3:
            raise ValueError(f"Conformer: patch_size {patch_size} must be a multiple of 4 and depth {depth} one of 3")
        self.patch_size, self.embed_dim, self.depth, self.num_classes = patch_size, embed_dim, depth, num_classes
        self.conv1, self.bn1 = nn.Conv2d(3, base_channels, 7, 2, 3, bias=False), nn.BatchNorm2d(base_channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        token_stride = patch_size // 4
        self.trans_patch_conv = nn.Conv2d(base_channels, embed_dim, token_stride, token_stride)
        drop_path = [drop_path_rate * index / (depth - 1) for index in range(depth)]
        width = int(base_channels * channel_ratio)
        self.conv_1 = Bottleneck(base_channels, width, residual_conv=True)
        self.trans_1 = TransformerBlock(embed_dim, num_heads, mlp_ratio, drop_path[0])
        before = width
        for index in range(2, depth + 1):
            stage, first = divmod(index - 1, depth // 3)
            stride = 2 if stage and not first and token_stride > 1 else 1
            token_stride //= stride
            after = width << stage
            shape = before, after, stride, token_stride, embed_dim, num_heads, mlp_ratio, drop_path[index - 1]
            setattr(self, f"conv_trans_{index}", CoupledBlock(*shape, last=index == depth, last_stride=last_stride))
            before = after
        self.num_features = before
        self.trans_norm = nn.LayerNorm(embed_dim)
        if num_classes:
            self.trans_cls_head, self.conv_cls_head = nn.Linear(embed_dim, num_classes), nn.Linear(before, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, 3, H, W): the sum of both heads'."""
        features = self.forward_features(images)
        return self.conv_cls_head(features.map.mean((2, 3))) + self.trans_cls_head(features.tokens[:, 0])

    def forward_features(self, images: Tensor, taps: Sequence[int] = (), heads: bool = False) -> Features:
        """Run images (B, 3, H, W).

        Args:
            taps: blocks, from 1, whose map and tokens are kept.
            heads: keep the attention of every head instead of their mean.

        Raises:
            ValueError: H or W is not a multiple of the patch size, or a block does not exist.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            fixed = tuple(max(1, round(n / self.patch_size)) * self.patch_size for n in (height, width))
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"resize or crop to {fixed[0]}x{fixed[1]} (recipe field `crop` or `eval_size`)"
            )
        if wrong := [index for index in taps if not 1 <= index <= self.depth]:
            raise ValueError(f"block {wrong[0]} does not exist: this Conformer has the blocks 1..{self.depth}")
        grid = (height // self.patch_size, width // self.patch_size)
        x = self.maxpool(self.bn1(self.conv1(images)).relu())
        tokens = self.trans_patch_conv(x).flatten(2).transpose(1, 2)
        tokens, weights = self.trans_1(torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1))
        x = self.conv_1(x)[0]
        attention, kept = [], {}
        for index in range(1, self.depth + 1):
            if index > 1:
                x, tokens, weights = getattr(self, f"conv_trans_{index}")(x, tokens, grid)
            attention.append(weights if heads else weights.mean(1))
            if index in taps:
                kept[index] = x, tokens
        return Features(x, self.trans_norm(tokens), grid, attention, kept)


def init_weights(module: nn.Module) -> None:
    """Initial weights of Conformer and of new heads on it: truncated normal (0.02) for linear, Kaiming for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def tiny_conformer(**options) -> Conformer:
    """The embedded benchmark's Conformer, without weights: 6 blocks of 96 token channels and 3 heads, patch 8."""
    model = Conformer(8, base_channels=32, channel_ratio=2, embed_dim=96, depth=6, num_heads=3, mlp_ratio=2, **options)
    return model.to(memory_format=torch.channels_last)  # a sixth faster on a CPU


# ----------------------------------------------------------------------------------------------------- names and weights


@register_model
def conformer_tiny_patch16_224(pretrained: bool = False, **options) -> Conformer:
    """Conformer-Ti/16, 23.5 million parameters."""
    return _create(Conformer(channel_ratio=1, **_for_us(options)), pretrained)


@register_model
def conformer_small_patch16_224(pretrained: bool = False, **options) -> Conformer:
    """Conformer-S/16, 37.7 million parameters; the backbone of TransCAM and BNR."""
    return _create(Conformer(channel_ratio=4, **_for_us(options)), pretrained)


@register_model
def conformer_base_patch16_224(pretrained: bool = False, **options) -> Conformer:
    """Conformer-B/16, 83.3 million parameters."""
    return _create(Conformer(channel_ratio=6, embed_dim=576, num_heads=9, **_for_us(options)), pretrained)


def _for_us(options: dict) -> dict:
    """Without what timm hands to every model function and Conformer has no use for."""
    return {name: value for name, value in options.items() if not name.startswith("pretrained_cfg") and name != "cache_dir"}


def _create(model: Conformer, pretrained: bool) -> Conformer:
    if pretrained:
        raise FileNotFoundError(
            "Conformer: no copy of the ImageNet weights can be downloaded without a browser. Fetch the file of this size "
            "from the page of github.com/pengzhiliang/Conformer and pass its path: `build_conformer(name, weights=path)`, "
            "or in a run the recipe field `weights`"
        )
    return model


def build_conformer(name: str, pretrained: bool = True, weights: str | Path = "") -> Conformer:
    """A Conformer as backbone: without heads, its last map on the patch grid.

    Args:
        name: `TINY_CONFORMER` or a name that timm knows from this module.
        weights: file with an ImageNet checkpoint under its own names; the tiny one has its weights in the repository.

    Raises:
        ValueError: unknown name, or weights with missing or extra keys.
        FileNotFoundError: no weights.
    """
    if name == TINY_CONFORMER:
        model, weights = tiny_conformer(num_classes=0, last_stride=1), weights or TINY_CONFORMER_WEIGHTS
    else:
        model = timm.create_model(name, pretrained=pretrained and not weights, num_classes=0, last_stride=1)
    if pretrained:
        load_weights(model, read_weights(weights), weights, HEADS)
    return model
