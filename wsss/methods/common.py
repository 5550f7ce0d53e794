"""What methods have in common: their interface, checks of settings, full precision where half would spoil a loss."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.training import TrainConfig

VARIANTS = ("published", "released")


class Method(nn.Module):
    """What training, evaluation and later stages ask of a method: three faces, and a few facts about them.

    It is built from (config, number of foreground classes C, backbone), and has them as `config`, `num_classes` and
    `backbone`.

    Attributes:
        Config: dataclass of its hyper-parameters.
        variants: the recipes that there are: by the paper's text, and by its public code.
        batch_fields: what a training batch must hold besides image and label: "mask" (B, H, W), the label map, for
            networks that learn from masks, or "valid" (B, H, W), False where an image was padded.
        patch_size: the sides of an image must be multiples of it; networks on patches set it, others take any size.
        views: makes further views of a training image, (uint8 image, its normalised crop) -> {name: tensor}; or None.
        map_names: the maps that can be scored.
        crf_maps: those of them that are also scored after a CRF, and with the labels that the network predicts.
        probability_maps: those of them that have a background channel.
        mask_map: the one that becomes the pseudo masks of a second network; "" where there are no maps.
        stage: "" for what learns from image labels (or true masks); "affinity" and "retrained" for later stages, which
            learn from what a run before them leaves (see `wsss.stages`).
        segments: the protocol under which its decoder is scored, "decoder" or "retrained"; "" without a decoder.
    """

    Config: type
    variants = VARIANTS
    batch_fields: tuple[str, ...] = ()
    patch_size = 1
    views = None
    map_names: tuple[str, ...] = ()
    crf_maps: tuple[str, ...] = ()
    probability_maps: tuple[str, ...] = ()
    mask_map = ""
    stage = ""
    segments = "decoder"

    @staticmethod
    def class_tokens(num_classes: int) -> int:
        """How many class tokens the backbone needs for C classes."""
        return 1

    def parameter_groups(self, config: TrainConfig) -> list[dict]:
        """What the optimiser trains: dicts with "params", "base_lr" and, where it is not the recipe's, "weight_decay".

        The backbone at the base rate, and everything else at `head_lr_multiplier` times it.
        """
        backbone = list(self.backbone.parameters())
        known = {id(parameter) for parameter in backbone}
        heads = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [
            {"params": [p for p in backbone if p.requires_grad], "base_lr": config.lr},
            {"params": heads, "base_lr": config.lr * config.head_lr_multiplier},
        ]

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted terms that are on at `step`, by name.

        Args:
            batch: "image" (B, 3, H, W), normalised; "label" (B, C) of 0/1; the `batch_fields`.
            step: optimiser steps so far.
        """
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Raw maps (B, C, h, w) of images (B, 3, H, W) by name, and "class_logits" (B, C, 1, 1); {} without maps."""
        return {}

    def segment(self, images: Tensor) -> Tensor | None:
        """Decoder logits (B, C + 1, h, w) of images (B, 3, H, W); None without a decoder."""
        return None

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """What a record keeps of the trained network besides its scores, from the first `images` of a dataset."""
        return {}


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> str:
    """`value` itself, or ValueError, which names the field and the choices, when it is none of them."""
    if value not in choices:
        raise ValueError(f"{field} {value!r} is unknown; choose one of {', '.join(choices)}")
    return value


def check_variant(variant: str, paper: str) -> str:
    """`variant` itself, or ValueError when it is neither "published" nor "released"."""
    return check_choice(f"{paper}: variant", variant, VARIANTS)


def gathered(values: Tensor) -> Tensor:
    """Values (B, ...) of the images that all processes have, in the order of the batch; in one process they themselves.

    For memories that a batch leaves behind; no gradient flows back.
    """
    if not torch.distributed.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)


def full_precision(like: Tensor) -> torch.autocast:
    """A context for contrasts and thresholds of cosines, which half precision would spoil; the encoder may use it."""
    return torch.autocast(like.device.type, enabled=False)
