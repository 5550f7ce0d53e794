"""APC: image labels from a few patches of a vision transformer, and contrast between patches.

In the order of the paper: the refined encoder (HV-BiLSTM), adaptive-K pooling (algorithm 1, eq. 2) and its rivals, the
classification error (eq. 3), patch contrast (eqs. 4-6), patch to pixel, the decoder, and the whole method (eqs. 1, 7).
No code of APC is public; what the paper leaves open follows its ancestor ViT-PCM, and recipes/apc.toml says where.

Shapes: B images, s = h * w patches in row-major order, e channels, C classes *including the background*, which is class
0 (so that C is `num_classes` + 1). Image labels t (B, C) hold 0/1; every image has background, t_0 = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data import Sample
from wsss.maps import resize
from wsss.methods.common import Method, check_choice, full_precision
from wsss.representations import describe_patches, describe_sizes

POOLINGS = ("adaptive", "average", "max", "topk")
CANDIDATES = ("running", "anchor", "score")
CLIP = 1e-7  # ViT-PCM keeps pooled scores this far from 0 and 1 before it takes logarithms


# ---------------------------------------------------------------------------------------------------- refined encoder


class HVBiLSTM(nn.Module):
    """Two bidirectional LSTMs, one along the rows and one along the columns of the patch grid (APC 3.2, ViT-PCM).

    Each has e / 4 channels a direction, so that rows and columns, forward and backward, make up e channels again. All
    rows share their weights, and so do all columns; the states start at zero. There is no residual and no norm: outputs
    lie in -1..1.

    Args:
        channels: e, a multiple of 4.
        dropout: share of the input channels that each sequence is trained without.

    Raises:
        ValueError: e is not a multiple of 4.
    """

    def __init__(self, channels: int, dropout: float = 0.2):
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"HVBiLSTM: {channels} channels cannot be shared by 2 axes x 2 directions; use a multiple of 4"
            )
        self.rows, self.columns = (
            nn.LSTM(channels, channels // 4, batch_first=True, bidirectional=True) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        for lstm in (self.rows, self.columns):
            _as_in_keras(lstm)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, e) -> (B, h, w, e): rows forward, rows backward, columns forward, columns backward."""
        along_rows = self._run(self.rows, features)
        along_columns = self._run(self.columns, features.transpose(1, 2)).transpose(1, 2)
        return torch.cat([along_rows, along_columns], dim=-1)

    def _run(self, lstm: nn.LSTM, lines: Tensor) -> Tensor:
        """Every line (B, n, length, e) is a sequence of its own."""
        sequences = lines.flatten(0, 1)
        kept = self.dropout(sequences.new_ones(len(sequences), 1, sequences.shape[2]))  # the same along a sequence
        return lstm(sequences * kept)[0].unflatten(0, lines.shape[:2])


def _as_in_keras(lstm: nn.LSTM) -> None:
    """ViT-PCM's initial weights: Glorot, orthogonal, forget gates open; one bias instead of torch's two."""
    hidden = lstm.hidden_size
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                nn.init.ones_(parameter.data[hidden : 2 * hidden])
            else:
                parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------ pooling


def adaptive_k_pooling(
    scores: Tensor, max_k: int = 6, theta: float = 0.9, candidates: str = "running"
) -> tuple[Tensor, Tensor]:
    """Image scores from the k best patches of each class, k chosen by how close they are (APC algorithm 1, eq. 2).

    With sorted scores v_1 >= v_2 >= ... and the mean M_i of the first i, the set grows from i - 1 to i patches while

    - "running": M_i > theta M_(i-1), the algorithm as printed. Its reference moves along: k = 6 is possible with v_6 at
      0.45 of v_1.
    - "anchor": M_i > theta v_1, the same with the first selection as reference.
    - "score": v_i > theta v_1, what the paper's prose suggests.

    In all three, no candidate is accepted after one was refused: M_i never grows with i.

    Args:
        scores: Z (B, s, C) in 0..1.
        max_k: K, the largest k; images with fewer patches use all of them at most.
        theta: in 0..1; 1 gives max pooling, 0 the mean of the K best.
        candidates: one of `CANDIDATES`.

    Returns:
        y (B, C), and k (B, C) int64, which has no gradient; dy/dZ is 1/k on the chosen patches.

    Raises:
        ValueError: K < 1, theta outside 0..1, unknown candidates, or scores that are not (B, s, C) with s >= 1.
    """
    if scores.ndim != 3 or not scores.shape[1]:
        raise ValueError(f"adaptive_k_pooling: scores have shape {tuple(scores.shape)}; expected (B, s, C), s >= 1")
    if max_k < 1:
        raise ValueError(f"adaptive_k_pooling: max_k = {max_k}; K must be at least 1")
    if not 0 <= theta <= 1:
        raise ValueError(f"adaptive_k_pooling: theta = {theta} must lie in 0..1")
    check_choice("APC: candidates", candidates, CANDIDATES)
    ranked = scores.topk(min(max_k, scores.shape[1]), dim=1).values
    sizes = torch.arange(1, ranked.shape[1] + 1, device=scores.device)[:, None]
    means = ranked.cumsum(1) / sizes
    tried = ranked if candidates == "score" else means
    reference = means[:, :-1] if candidates == "running" else means[:, :1]
    accepted = tried[:, 1:] > theta * reference  # as a product, so that 0 / 0 refuses
    k = 1 + accepted.cumprod(1).sum(1)
    return means.gather(1, k[:, None] - 1)[:, 0], k


def pool(
    scores: Tensor, pooling: str = "adaptive", max_k: int = 6, theta: float = 0.9, candidates: str = "running"
) -> tuple[Tensor, Tensor]:
    """Image scores by one of `POOLINGS` (APC table 7): the mean of k patches of each class.

    "adaptive" chooses k (`adaptive_k_pooling`), "topk" always takes min(K, s), "max" 1, "average" all s.

    Returns:
        y (B, C) and k (B, C), of scores (B, s, C).
    """
    check_choice("APC: pooling", pooling, POOLINGS)
    if pooling == "adaptive":
        return adaptive_k_pooling(scores, max_k, theta, candidates)
    if pooling == "average":
        count, y = scores.shape[1], scores.mean(1)
    else:
        count = 1 if pooling == "max" else min(max_k, scores.shape[1])
        y = scores.topk(count, dim=1).values.mean(1)
    return y, torch.full_like(y, count, dtype=torch.int64)


def selected_patches(scores: Tensor, k: Tensor) -> Tensor:
    """Which patches are pooled: the k (B, C) best of each class, the first ones of equal scores; bool (B, s, C)."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < k[:, None]


# ------------------------------------------------------------------------------------------------------------- losses


def classification_error(image_scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of y (B, C), clipped to 1e-7 .. 1 - 1e-7, and t (B, C); its mean is MCE (APC eq. 3).

    Returns:
        (B, C) in nats.
    """
    return F.binary_cross_entropy(image_scores.clamp(CLIP, 1 - CLIP), labels, reduction="none")


def confidence_sets(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Patches of high and low confidence of each class, Z > epsilon and Z < 1 - epsilon (APC 3.4); bool (B, s, C)."""
    return scores > epsilon, scores < 1 - epsilon


def patch_contrast(features: Tensor, scores: Tensor, epsilon: float = 0.85) -> tuple[Tensor, Tensor]:
    """Patch contrast of each class within each image (APC eqs. 4-6), exactly, without a matrix of all pairs.

    With unit vectors u and cosines S, the sum of S over ordered pairs in H is |sum_H u|^2 - sum_H |u|^2, and over H x L
    it is the product of two sums: O(s e C) instead of O(s^2 (e + C)).

    Args:
        features: F_out (B, s, e). The gradient flows to both members of a pair.
        scores: Z (B, s, C). They only decide who is in H and L, so they get no gradient.
        epsilon: confidence threshold of `confidence_sets`.

    Returns:
        pull (B, C): mean of (1 - S) / 2 over ordered pairs of different patches in H; 0 where H has fewer than two.
        push (B, C): mean of (1 + S) / 2 over H x L; 0 where one is empty. Their sum is L_PCE of eq. 6.

    Raises:
        ValueError: features and scores do not have the same images and patches.
    """
    if features.ndim != 3 or scores.ndim != 3 or features.shape[:2] != scores.shape[:2]:
        raise ValueError(
            f"patch_contrast: features {tuple(features.shape)} must be (B, s, e) and scores {tuple(scores.shape)} "
            "(B, s, C) with the same B and s"
        )
    unit = F.normalize(features, dim=2)  # clamps the norm at 1e-12
    sets = torch.cat(confidence_sets(scores, epsilon), dim=2).to(unit.dtype)
    high_count, low_count = sets.sum(1).chunk(2, dim=1)
    high, low = (sets.transpose(1, 2) @ unit).chunk(2, dim=1)  # sums of unit vectors (B, C, e)
    itself = (unit.square().sum(2, keepdim=True) * sets[..., : scores.shape[2]]).sum(1)
    same_pairs, other_pairs = high_count * (high_count - 1), high_count * low_count
    same = (high.square().sum(2) - itself) / same_pairs.clamp(min=1)
    other = (high * low).sum(2) / other_pairs.clamp(min=1)
    return (1 - same) / 2 * (same_pairs > 0), (1 + other) / 2 * (other_pairs > 0)


def patch_labels(scores: Tensor, labels: Tensor, present_only: bool = True) -> Tensor:
    """The class of every patch, int64 (B, s): arg max of Z (B, s, C), over the classes with t = 1 or over all."""
    if present_only:
        scores = scores.masked_fill(labels[:, None] == 0, -1)
    return scores.argmax(2)


def patches_to_pixels(labels: Tensor, patch: int) -> Tensor:
    """Copy every patch's label (B, h, w) onto its patch x patch pixels: (B, h * patch, w * patch) (APC 3.2)."""
    return labels.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


# ------------------------------------------------------------------------------------------------------------ decoder


class MultiLevelMLP(nn.Module):
    """The decoder: one linear map a level, and two on all levels together (APC 3, a head like SegFormer's).

    Args:
        channels: e, of every level.
        num_outputs: C.
        levels: number of token levels; all have the same grid.
        width: channels of each level and of the hidden layer.
        dropout: before the last layer.
    """

    def __init__(self, channels: int, num_outputs: int, levels: int, width: int, dropout: float):
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(channels, width) for _ in range(levels))
        self.fuse = nn.Sequential(
            nn.Conv2d(levels * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, num_outputs, 1),
        )

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h * w, e) of every level -> logits (B, C, h, w)."""
        features = torch.cat([level(own) for level, own in zip(self.levels, tokens, strict=True)], dim=2)
        return self.fuse(features.transpose(1, 2).unflatten(2, grid))


# ------------------------------------------------------------------------------------------------------------- method


@dataclass(frozen=True)
class APCConfig:
    """Hyper-parameters; the defaults are those of the paper on VOC, and where it is silent the reading of the recipe.

    A term of weight 0 is not computed. Steps count optimiser steps from 0.

    Attributes:
        variant: "published"; no code of APC was released.
        bilstm: whether HV-BiLSTM refines the patch tokens.
        dropout: before HV-BiLSTM, of its inputs, and before the classifier.
        pooling: one of `POOLINGS`.
        max_k, theta, candidates: see `adaptive_k_pooling`; here theta must be above 0 (0 is the pooling "topk").
        mce_background: whether the background counts as a class in eq. 3.
        epsilon: confidence threshold of eq. 6.
        pcl_present_only: patch contrast over the classes of the image instead of all of them (eq. 7 sums over all).
        label_present_only: patches may only get classes of the image when they supervise the decoder.
        weight_seg: lambda_1; 0 means no decoder.
        weight_pcl: lambda_2.
        weight_l2: of the squared weights of the classifier (ViT-PCM has 0.01; not in eq. 7).
        decoder_taps: blocks whose tokens the decoder sees; negative ones count from the end.
        decoder_width, decoder_dropout: see `MultiLevelMLP`.
        frozen_steps: the backbone does not train before this step.
        trainable_blocks: how many of the last blocks train, with the final norm; the number of blocks or more means
            the whole backbone, 0 nothing of it.
    """

    variant: str = "published"
    bilstm: bool = True
    dropout: float = 0.2
    pooling: str = "adaptive"
    max_k: int = 6
    theta: float = 0.9
    candidates: str = "running"
    mce_background: bool = True
    epsilon: float = 0.85
    pcl_present_only: bool = False
    label_present_only: bool = True
    weight_seg: float = 0.02
    weight_pcl: float = 0.01
    weight_l2: float = 0.0
    decoder_taps: Sequence[int] = (2, 5, 8, 11)
    decoder_width: int = 256
    decoder_dropout: float = 0.1
    frozen_steps: int = 1322
    trainable_blocks: int = 5

    def __post_init__(self):
        if self.variant != "published":
            raise ValueError(f'APC: no code was released, so there is no variant {self.variant!r}; use "published"')
        check_choice("APC: pooling", self.pooling, POOLINGS)
        check_choice("APC: candidates", self.candidates, CANDIDATES)
        if not 0 < self.theta <= 1:
            raise ValueError(f'APC: theta = {self.theta} must be above 0 and at most 1 (for 0 use pooling = "topk")')
        if self.max_k < 1:
            raise ValueError(f"APC: max_k = {self.max_k}; K must be at least 1")
        if self.trainable_blocks < 0:
            raise ValueError(f"APC: trainable_blocks = {self.trainable_blocks} is negative; 0 trains no block")


class APC(Method):
    """The whole method: patch scores instead of class activation maps, one stage.

    Args:
        config: hyper-parameters.
        num_classes: foreground classes; there is one class more, the background.
        backbone: vision transformer; its class token takes part in attention and is dropped after the final norm.
    """

    Config = APCConfig
    variants = ("published",)
    map_names = ("patch",)
    crf_maps = ("patch",)
    probability_maps = ("patch",)
    mask_map = "patch"

    def __init__(self, config: APCConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone, self.patch_size = backbone, backbone.patch_size
        self.dropout = nn.Dropout(config.dropout)
        self.bilstm = HVBiLSTM(backbone.embed_dim, config.dropout) if config.bilstm else None
        self.classifier = nn.Linear(backbone.embed_dim, num_classes + 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.05)  # ViT-PCM
        self.decoder = None
        if config.weight_seg:
            levels = len(config.decoder_taps)
            self.decoder = MultiLevelMLP(
                backbone.embed_dim, num_classes + 1, levels, config.decoder_width, config.decoder_dropout
            )
        if config.trainable_blocks < backbone.depth:
            backbone.requires_grad_(False)
            for part in (*backbone.blocks[backbone.depth - config.trainable_blocks :], backbone.norm):
                part.requires_grad_(config.trainable_blocks > 0)

    def losses(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The weighted terms of eq. 7, by name.

        Args:
            batch: "image" (B, 3, H, W), normalised; "label" (B, num_classes) of 0/1.
            step: optimiser steps so far.
        """
        images, labels = batch["image"], F.pad(batch["label"], (1, 0), value=1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= self.config.frozen_steps):
            tokens = self.encode(images)
        with full_precision(images):  # for 1 - 1e-7 and sums over pairs; the backbone may run in half of it
            features, scores = self.token_scores(tokens)
            logits = None if self.decoder is None else resize(self.decode(tokens), images.shape[-2:])
            return self.terms(features, scores, labels, logits, tokens.grid)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """"patch" (B, C, h, w), probabilities with the background as channel 0, and "class_logits" (B, C - 1, 1, 1),
        the logits of the pooled foreground scores, of images (B, 3, H, W).
        """
        tokens = self.encode(images)
        _, scores = self.token_scores(tokens)
        pooled = self.pool(scores)[0][:, 1:, None, None]
        return {"patch": tokens.as_map(scores), "class_logits": pooled.logit(CLIP)}

    def segment(self, images: Tensor) -> Tensor | None:
        """Decoder logits (B, C, h, w) of images (B, 3, H, W); None without a decoder."""
        return None if self.decoder is None else self.decode(self.encode(images))

    def patch_scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """F_out (B, s, e) and Z (B, s, C) of images (B, 3, H, W)."""
        return self.token_scores(self.encode(images))

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """See `describe_patches` and, with a decoder, `describe_sizes` at 0.8 to 1.4 times the size of the images."""
        told = describe_patches(self, dataset, images)
        if self.decoder is not None:
            patch, side = self.backbone.patch_size, dataset[0].image.shape[-1]
            sizes = [patch * round(factor * side / patch) for factor in (0.8, 1, 1.2, 1.4)]
            told |= describe_sizes(self, dataset, images, sizes)
        return told

    def pool(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """y and k (B, C) of Z (B, s, C), by the pooling of the config."""
        config = self.config
        return pool(scores, config.pooling, config.max_k, config.theta, config.candidates)

    def encode(self, images: Tensor) -> Tokens:
        """Tokens of images (B, 3, H, W), with the taps of the decoder."""
        return self.backbone(images, taps=self.config.decoder_taps)

    def token_scores(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """F_out (B, s, e), after HV-BiLSTM, and Z = softmax(F_out W) (B, s, C) (APC eq. 1)."""
        features = tokens.patches
        if self.bilstm is not None:
            features = self.bilstm(self.dropout(features).unflatten(1, tokens.grid)).flatten(1, 2)
        return features, self.classifier(self.dropout(features)).softmax(2)

    def decode(self, tokens: Tokens) -> Tensor:
        """Decoder logits (B, C, h, w)."""
        return self.decoder([tokens.taps[block] for block in self.config.decoder_taps], tokens.grid)

    def terms(
        self, features: Tensor, scores: Tensor, labels: Tensor, logits: Tensor | None, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The weighted terms of eq. 7 from their ingredients.

        Args:
            features: F_out (B, s, e).
            scores: Z (B, s, C).
            labels: t (B, C).
            logits: of the decoder, (B, C, H, W); H and W are the same multiple of the grid.
            grid: (h, w).
        """
        config = self.config
        errors = classification_error(self.pool(scores)[0], labels)
        terms = {"mce": errors[:, 0 if config.mce_background else 1 :].mean()}
        if logits is not None:
            own = patch_labels(scores.detach(), labels, config.label_present_only).unflatten(1, grid)
            pixels = patches_to_pixels(own, logits.shape[-1] // grid[1])
            terms["seg"] = config.weight_seg * F.cross_entropy(logits, pixels)
        if config.weight_pcl:
            contrast = sum(patch_contrast(features, scores, config.epsilon))
            counted = contrast * labels if config.pcl_present_only else contrast
            terms["pcl"] = config.weight_pcl * counted.sum(1).mean()
        if config.weight_l2:
            terms["l2"] = config.weight_l2 * self.classifier.weight.square().sum()
        return terms
