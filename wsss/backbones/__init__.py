"""The networks that methods build on, by name: vision transformers, Conformers, ResNet38; each with a tiny size."""

import re
from pathlib import Path

from torch import nn

from wsss.backbones.conformer import TINY_CONFORMER, TINY_CONFORMER_WEIGHTS, build_conformer
from wsss.backbones.resnet38 import RESNET, SIZES, TINY_RESNET, WEIGHTS, build_resnet38
from wsss.backbones.vit import TINY, TINY_WEIGHTS, MultiTokenViT

TINY_FILES: dict[str, Path] = {
    TINY: TINY_WEIGHTS,
    TINY_CONFORMER: TINY_CONFORMER_WEIGHTS,
    TINY_RESNET: WEIGHTS[TINY_RESNET],
}
_STRIDES = {TINY: 8, TINY_CONFORMER: 8, TINY_RESNET: 4, RESNET: 8}


def build(name: str, pretrained: bool = True, weights: str | Path = "", **vit: object) -> nn.Module:
    """The backbone `name`, with its pretrained weights unless told otherwise.

    Args:
        weights: file to take them from; "" takes those that belong to the name.
        vit: what `MultiTokenViT` takes besides; the other networks have no such settings.

    Raises:
        ValueError: unknown name, or weights of another network; the message says what the file has and lacks.
        FileNotFoundError: there are no weights.
    """
    if name.startswith("conformer"):
        return build_conformer(name, pretrained, weights)
    if name in SIZES:
        return build_resnet38(name, pretrained, weights)
    return MultiTokenViT(name, pretrained=pretrained, weights=weights, **vit)


def stride(name: str) -> int:
    """Pixels per cell of the finest grid on which the backbone `name` gives scores."""
    return _STRIDES.get(name) or int(re.search(r"patch(\d+)", name).group(1))
