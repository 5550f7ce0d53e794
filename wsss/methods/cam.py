"""The common baseline: class activation maps of a vision transformer and a decoder trained on them in the same stage.

`Cam` is what the single-stage papers on plain vision transformers (ToCo, SeCo, MoRe) have in common: a patch classifier
with global max pooling on the last block, an auxiliary one on an earlier block, patch token contrast, and a LargeFOV
decoder supervised by the refined CAM. A method of this family derives from it and adds its terms.

Shapes: B images, C classes, (h, w) patches, (H, W) pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data.transforms import denormalise
from wsss.losses import dense_energy_loss, ptc_loss, segmentation_loss
from wsss.maps import minmax, multi_scale, resize, three_way
from wsss.methods.decoder import LargeFOV
from wsss.refine import PAR, refine_with_background

ENERGY_UNIT = 1e-7  # scale of the dense energy in the references; `weight_energy` counts in it


@dataclass(frozen=True)
class CamConfig:
    """Hyper-parameters of the baseline; the defaults are MoRe's released ones on VOC.

    A term of weight 0 is not computed. Steps count optimiser steps from 0; a term is on from its `..._start` on.
    Thresholds are (high, low) on maps in 0..1: class above high, background below low, uncertain between.

    Attributes:
        aux_tap: block whose patch tokens the auxiliary classifier sees; negative counts from the end.
        cam_scales: image scales of the maps that supervise.
        cam_flip: whether they see mirror images too.
        cam_activation: "relu" cuts negative class scores off before the maps are normalised; "minmax" keeps them.
        weight_aux: of the auxiliary classification loss.
        weight_ptc, ptc_start, ptc_thresholds: patch token contrast, on labels from the auxiliary CAM.
        weight_seg, seg_start: segmentation loss of the decoder; 0 means no decoder. The energy starts with it.
        label_thresholds: background scores of its pseudo labels.
        par_dilations, par_iterations, par_down_scale: refinement of the pseudo labels.
        decoder_width, decoder_dilation: of LargeFOV.
        weight_energy: dense energy loss of the decoder, in units of 1e-7.
        energy_sigma_rgb, energy_sigma_xy, energy_scale: its kernel widths (grey levels, pixels) and reduced size.
    """

    aux_tap: int = -3
    cam_scales: Sequence[float] = (1.0, 0.5, 0.75, 1.5)
    cam_flip: bool = True
    cam_activation: str = "relu"
    weight_aux: float = 1.0
    weight_ptc: float = 0.3
    ptc_start: int = 0
    ptc_thresholds: Sequence[float] = (0.7, 0.25)
    weight_seg: float = 0.12
    seg_start: int = 2001
    label_thresholds: Sequence[float] = (0.7, 0.25)
    par_dilations: Sequence[int] = (1, 2, 4, 8, 12, 24)
    par_iterations: int = 10
    par_down_scale: int = 2
    decoder_width: int = 512
    decoder_dilation: int = 5
    weight_energy: float = 0.05
    energy_sigma_rgb: float = 15.0
    energy_sigma_xy: float = 100.0
    energy_scale: float = 0.5

    def __post_init__(self):
        if self.cam_activation not in ("relu", "minmax"):
            raise ValueError(f"cam_activation {self.cam_activation!r} is unknown; choose one of relu, minmax")


class Cam(nn.Module):
    """The baseline.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: vision transformer; its class tokens are not used here.

    Attributes:
        map_names: the maps that can be scored.
        seed_maps: the maps that supervise.
        label_map: the one among them that becomes the decoder's pseudo label.
    """

    Config = CamConfig
    map_names = ("cam", "cam_aux")
    seed_maps = ("cam", "cam_aux")
    label_map = "cam"
    strict = False  # where a score exactly at a threshold belongs, see `maps.three_way`

    def __init__(self, config: CamConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, num_classes, bias=False)
        self.aux_classifier = nn.Linear(backbone.embed_dim, num_classes, bias=False)
        self.decoder = (
            LargeFOV(backbone.embed_dim, num_classes + 1, config.decoder_width, config.decoder_dilation)
            if config.weight_seg
            else None
        )
        self.par = PAR(config.par_dilations, config.par_iterations)

    @staticmethod
    def class_tokens(num_classes: int) -> int:
        """How many class tokens the backbone needs for C classes."""
        return 1

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted terms that are on at `step`, by name.

        Args:
            batch: "image" (B, 3, H, W), normalised; "label" (B, C) of 0/1.
            step: optimiser steps so far.
        """
        images, labels = batch["image"], batch["label"]
        tokens = self.encode(images)
        # The backbone may run in half precision; contrasts and thresholds of cosines need full precision.
        with torch.autocast(images.device.type, enabled=False):
            maps = self.token_maps(tokens)
            seeds = self.seeds(images, maps)
            return (
                self.classification_losses(maps, labels)
                | self.relation_losses(tokens, seeds, labels, step)
                | self.dense_losses(images, tokens, seeds, labels, step)
            )

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Raw maps (B, C, h, w) of images (B, 3, H, W) by name, and "class_logits" (B, C, 1, 1)."""
        maps = self.token_maps(self.encode(images))
        return maps | {"class_logits": maps["cam"].amax((-2, -1), keepdim=True)}

    def segment(self, images: Tensor) -> Tensor | None:
        """Decoder logits (B, C + 1, h, w) of images (B, 3, H, W); None without a decoder."""
        if self.decoder is None:
            return None
        tokens = self.backbone(images)
        return self.decoder(tokens.as_map(tokens.patches))

    def encode(self, images: Tensor) -> Tokens:
        """Tokens of images (B, 3, H, W), with the tap of the auxiliary classifier."""
        return self.backbone(images, taps=(self.config.aux_tap,))

    def token_maps(self, tokens: Tokens) -> dict[str, Tensor]:
        """The raw maps "cam" and "cam_aux" (B, C, h, w): class weights times patch tokens."""
        return {
            "cam": tokens.as_map(self.classifier(tokens.patches)),
            "cam_aux": tokens.as_map(self.aux_classifier(tokens.taps[self.config.aux_tap])),
        }

    def seeds(self, images: Tensor, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """The maps that supervise, without gradient: `seed_maps` by name, (B, C, H, W) in 0..1.

        They are fused over `cam_scales` and mirror images. With a single scale of 1 and no mirror images they are those
        of the training pass, `maps`, at the size of the patch grid (B, C, h, w): nothing runs twice.
        """
        config = self.config
        relu = {name: config.cam_activation == "relu" and name.startswith("cam") for name in self.seed_maps}
        if tuple(config.cam_scales) == (1.0,) and not config.cam_flip:
            own = {name: maps[name].detach() for name in self.seed_maps}
            return {name: minmax(values.relu() if relu[name] else values) for name, values in own.items()}
        forward = lambda inputs: self.token_maps(self.encode(inputs))
        return multi_scale(forward, images, config.cam_scales, relu, config.cam_flip)

    def classification_losses(self, maps: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Multi-label soft margin of the maps' maxima: L_cls and its auxiliary counterpart."""
        terms = {"cls": _soft_margin(maps["cam"], labels)}
        if self.config.weight_aux:
            terms["aux"] = self.config.weight_aux * _soft_margin(maps["cam_aux"], labels)
        return terms

    def relation_losses(
        self, tokens: Tokens, seeds: dict[str, Tensor], labels: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Terms between class and patch tokens; the baseline has none."""
        return {}

    def dense_losses(
        self, images: Tensor, tokens: Tokens, seeds: dict[str, Tensor], labels: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Patch token contrast, and the decoder's segmentation and energy losses, as far as they are on."""
        config = self.config
        features = tokens.as_map(tokens.patches)
        terms = {}
        if config.weight_ptc and step >= config.ptc_start:
            label = self.cell_labels(seeds["cam_aux"], tokens, labels, config.ptc_thresholds)
            terms["ptc"] = config.weight_ptc * ptc_loss(features, label)
        if self.decoder is not None and step >= config.seg_start:
            size = images.shape[-2:]
            rgb = denormalise(images).clamp(0, 255)
            seed = resize(seeds[self.label_map], size)
            # PAR sees whole grey levels, as in the references.
            label = refine_with_background(
                self.par, rgb.floor(), seed, labels, *config.label_thresholds, config.par_down_scale
            )
            logits = resize(self.decoder(features), size)
            terms["seg"] = config.weight_seg * segmentation_loss(logits, label)
            if config.weight_energy:
                terms["energy"] = dense_energy_loss(
                    rgb,
                    logits,
                    label,
                    config.weight_energy * ENERGY_UNIT,
                    config.energy_sigma_rgb,
                    config.energy_sigma_xy,
                    config.energy_scale,
                )
        return terms

    def cell_labels(self, seed: Tensor, tokens: Tokens, labels: Tensor, thresholds: Sequence[float]) -> Tensor:
        """A seed map of any size as a three-way label map (B, h, w) of the patches."""
        high, low = thresholds
        return three_way(resize(seed, tokens.grid), labels, high, low, self.strict)


def _soft_margin(maps: Tensor, labels: Tensor) -> Tensor:
    return F.multilabel_soft_margin_loss(maps.amax((-2, -1)), labels)
