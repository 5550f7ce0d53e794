"""Conformers for tests: a small one, and the one of the reference arrays."""

import torch

from wsss.backbones.conformer import HEADS, Conformer
from wsss.backbones.weights import load_weights

CONFIG = ("patch_size", "channel_ratio", "embed_dim", "depth", "num_heads", "mlp_ratio")


def small_conformer(**options) -> Conformer:
    """Three blocks, one a stage, with patches of 8 pixels."""
    shape = dict(base_channels=16, channel_ratio=1, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2, drop_path_rate=0)
    return Conformer(8, **(shape | dict(num_classes=0, last_stride=1) | options))


def golden_weights(data: dict) -> dict[str, torch.Tensor]:
    """The state dict of `transcam_conformer`, in float64; its step counters are left out."""
    tensors = {name[2:]: value for name, value in data.items() if name.startswith("w.")}
    return {name: value.double() for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def golden_conformer(data: dict) -> Conformer:
    """The backbone of `transcam_conformer`, in float64."""
    config = {name: data[f"cfg.{name}"] for name in CONFIG}
    backbone = Conformer(
        base_channels=data["cfg.base_channel"], drop_path_rate=0, num_classes=0, last_stride=1, **config
    ).double()
    load_weights(backbone, golden_weights(data), "transcam_conformer.npz", HEADS)
    return backbone
