"""The common baseline: class activation maps of a vision transformer and a decoder trained on them in the same stage.

`Cam` is what the single-stage papers on plain vision transformers (ToCo, SeCo, MoRe) have in common: a patch classifier
with global max pooling on the last block, an auxiliary one on an earlier block, patch token contrast, and a LargeFOV
decoder supervised by the refined CAM. A method of this family derives from it and adds its terms.

Shapes: B images, C classes, (h, w) patches, (H, W) pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data.transforms import denormalise
from wsss.losses import dense_energy_loss, ptc_loss, segmentation_loss
from wsss.maps import UNCERTAIN, minmax, multi_scale, resize, three_way
from wsss.methods.common import Method, check_choice, full_precision
from wsss.methods.decoder import build_decoder
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
        decoder_width, decoder_dilation: see `build_decoder`; a width of 0 takes the decoder of DeepLabV2.
        weight_energy: dense energy loss of the decoder, in units of 1e-7.
        energy_sigma_rgb, energy_sigma_xy, energy_scale: its kernel widths (grey levels, pixels) and reduced size.
        pooling: what the global max pooling of the class scores sees: the "scores" of the patches, or their "features",
            channel by channel, before the classifier (as the released codes have it). Recipes may leave it out.
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
    pooling: str = field(default="scores", metadata={"optional": True})

    def __post_init__(self):
        check_choice("pooling", self.pooling, ("scores", "features"))
        check_choice("cam_activation", self.cam_activation, ("relu", "minmax"))


class Cam(Method):
    """The baseline.

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: vision transformer; its class tokens are not used here.

    Attributes:
        seed_maps: the maps that supervise.
        label_map: the one among them that becomes the decoder's pseudo label.
    """

    Config = CamConfig
    map_names = ("cam", "cam_aux")
    crf_maps = ("cam",)
    mask_map = "cam"
    seed_maps = ("cam", "cam_aux")
    label_map = "cam"
    strict = False  # where a score exactly at a threshold belongs, see `maps.three_way`

    def __init__(self, config: CamConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.classifier = nn.Linear(backbone.embed_dim, num_classes, bias=False)
        self.aux_classifier = nn.Linear(backbone.embed_dim, num_classes, bias=False)
        self.decoder = None
        if config.weight_seg:
            self.decoder = build_decoder(
                backbone.embed_dim, num_classes + 1, config.decoder_width, config.decoder_dilation
            )
        self.par = PAR(config.par_dilations, config.par_iterations)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted terms that are on at `step`, by name.

        Args:
            batch: "image" (B, 3, H, W), normalised; "label" (B, C) of 0/1.
            step: optimiser steps so far.

        Raises:
            ValueError: labels of another shape, or that are not 0 or 1.
        """
        images, labels = batch["image"], batch["label"]
        if labels.shape != (len(images), self.num_classes) or not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                f"labels must be 0 or 1, one for each of {len(images)} images and {self.num_classes} classes; they have "
                f"the shape {tuple(labels.shape)} and the values {labels.unique().tolist()[:8]}"
            )
        tokens = self.encode(images)
        with full_precision(images):
            maps = self.token_maps(tokens)
            seeds = self.seeds(images, maps)
            terms = self.classification_losses(tokens, maps, labels)
        terms |= self.relation_losses(batch, tokens, seeds, step)
        with full_precision(images):
            return terms | self.dense_losses(batch, tokens, seeds, step)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Raw maps (B, C, h, w) of images (B, 3, H, W) by name, and "class_logits" (B, C, 1, 1)."""
        tokens = self.encode(images)
        maps = self.token_maps(tokens)
        return maps | {"class_logits": self.class_logits(tokens, maps)["cls"][..., None, None]}

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

    def class_logits(self, tokens: Tokens, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Image-level logits (B, C) of the classifier, "cls", and of the auxiliary one, "aux"."""
        if self.config.pooling == "scores":
            return {"cls": maps["cam"].amax((-2, -1)), "aux": maps["cam_aux"].amax((-2, -1))}
        tap = tokens.taps[self.config.aux_tap]
        return {"cls": self.classifier(tokens.patches.amax(1)), "aux": self.aux_classifier(tap.amax(1))}

    def classification_losses(self, tokens: Tokens, maps: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Multi-label soft margin of the image-level logits: L_cls and its auxiliary counterpart."""
        logits = self.class_logits(tokens, maps)
        terms = {"cls": F.multilabel_soft_margin_loss(logits["cls"], labels)}
        if self.config.weight_aux:
            terms["aux"] = self.config.weight_aux * F.multilabel_soft_margin_loss(logits["aux"], labels)
        return terms

    def relation_losses(
        self, batch: dict[str, Tensor], tokens: Tokens, seeds: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """The terms that a method adds, in the precision that it needs; the baseline has none."""
        return {}

    def dense_losses(
        self, batch: dict[str, Tensor], tokens: Tokens, seeds: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """Patch token contrast, and the decoder's segmentation and energy losses, as far as they are on.

        Pixels outside the image, where the batch says which ("valid"), get no label and no energy.
        """
        config, images, labels, valid = self.config, batch["image"], batch["label"], batch.get("valid")
        features = tokens.as_map(tokens.patches)
        terms = {}
        if config.weight_ptc and step >= config.ptc_start:
            label = self.cell_labels(seeds["cam_aux"], tokens, labels, config.ptc_thresholds)
            terms["ptc"] = config.weight_ptc * self.patch_contrast(features, label)
        if self.decoder is not None and step >= config.seg_start:
            size = images.shape[-2:]
            rgb = denormalise(images).clamp(0, 255)
            seed = resize(seeds[self.label_source(step)], size)
            # PAR sees whole grey levels, as in the references.
            label = refine_with_background(
                self.par, rgb.floor(), seed, labels, *config.label_thresholds, config.par_down_scale
            )
            if valid is not None:
                label = label.masked_fill(~valid, UNCERTAIN)
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
                    valid,
                )
        return terms

    def patch_contrast(self, features: Tensor, label: Tensor) -> Tensor:
        """L_ptc of patch tokens (B, D, h, w) with the labels (B, h, w); methods may have another form of it."""
        return ptc_loss(features, label)

    def label_source(self, step: int) -> str:
        """The seed map that becomes the decoder's pseudo label at `step`."""
        return self.label_map

    def cell_labels(self, seed: Tensor, tokens: Tokens, labels: Tensor, thresholds: Sequence[float]) -> Tensor:
        """A seed map of any size as a three-way label map (B, h, w) of the patches."""
        high, low = thresholds
        return three_way(resize(seed, tokens.grid), labels, high, low, self.strict)
