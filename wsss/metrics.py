"""Scores of segmentations from one confusion matrix, or one for each threshold, and F1 of image-level predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wsss.maps import strongest_class

AVERAGES = ("truth", "union", "all")
IGNORE = 255  # the label of void pixels


@dataclass(frozen=True)
class Scores:
    """What one confusion matrix says; fractions (not percent), float64 tensors of shape (K,) with class 0 = background.

    Per class, with TP, FP, FN in pixels (0 / 0 is NaN, x / 0 is infinite):
        iou: TP / (TP + FP + FN). NaN if the class is neither in the truth nor predicted.
        precision: TP / (TP + FP). NaN if the class is never predicted.
        recall: TP / (TP + FN). NaN if the class is not in the truth.
        confusion_ratio: FP / TP, "confusion ratio" of SeCo and MoRe. Infinite if only wrong pixels have the class.
        present: bool, whether the truth has pixels of the class.

    Over classes: `miou`, `mean_precision`, `mean_recall` and `mean_confusion_ratio` are plain means over exactly the
    classes that are present in the truth, background included. A class that is only predicted enters no mean (its
    pixels lower the scores of the classes they were taken from). A present class whose own value is undefined makes
    the mean undefined too: one never predicted makes `mean_precision` NaN, one never hit makes `mean_confusion_ratio`
    infinite or NaN. Leaving it out would reward a model for missing a class altogether.

    `pixel_accuracy` is the share of all scored pixels with the right class.
    """

    iou: Tensor
    precision: Tensor
    recall: Tensor
    confusion_ratio: Tensor
    present: Tensor
    miou: float
    pixel_accuracy: float
    mean_precision: float
    mean_recall: float
    mean_confusion_ratio: float

    def mean_iou(self, over: str = "truth") -> float:
        """Mean IoU over one of `AVERAGES`.

        - "truth": classes present in the truth; this is `miou`.
        - "union": classes present in the truth or predicted; one that is only predicted counts 0.
        - "all": all K classes, absent ones count 0 (released TransCAM). Below the others where classes are absent.
        """
        return _mean_iou(self.iou, self.present, over).item()


class ConfusionMatrix:
    """Streamed pixel counts of (true class, predicted class): `counts`, int64 (K, K) on the CPU, rows = truth.

    Args:
        num_classes: K, background included.
    """

    def __init__(self, num_classes: int):
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: num_classes is {num_classes}; give the classes with background, >= 1")
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(
        self,
        prediction: Tensor | np.ndarray,
        truth: Tensor | np.ndarray,
        ignore: int = IGNORE,
        drop_unlabelled: bool = False,
    ) -> None:
        """Count the pixels of one image or batch.

        Args:
            prediction: integers of any shape, values 0..K-1.
            truth: integers of the same shape, values 0..K-1 or `ignore`. Pixels of truth `ignore` are left out.
            ignore: the label of void pixels.
            drop_unlabelled: also leave out pixels whose *prediction* is `ignore`, as is done for pseudo masks that
                leave uncertain pixels open. Such scores look only at what the mask dares to say.

        Raises:
            TypeError: an input does not hold integers.
            ValueError: the shapes differ, or a counted value is not a class.
        """
        caller = "ConfusionMatrix.update"
        prediction, truth = _integers(prediction, caller, "prediction"), _integers(truth, caller, "truth")
        if prediction.shape != truth.shape:
            raise ValueError(
                f"{caller}: prediction has shape {tuple(prediction.shape)}, truth {tuple(truth.shape)}; "
                "resize the scores to the size of the truth before the arg max"
            )
        prediction = prediction.to(truth.device)
        counted = truth != ignore
        if drop_unlabelled:
            counted &= prediction != ignore
        prediction, truth = prediction[counted], truth[counted]
        _check_range(truth, self.num_classes, caller, "truth", f"; void pixels must have the label {ignore}")
        hint = "" if drop_unlabelled else "; pseudo masks with open pixels need drop_unlabelled=True"
        _check_range(prediction, self.num_classes, caller, "prediction", hint)
        pairs = truth * self.num_classes + prediction
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.counts += counts.view(self.num_classes, self.num_classes).cpu()

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """The matrix of both sets of pixels (e.g. of two workers)."""
        if self.num_classes != other.num_classes:
            raise ValueError(f"cannot add confusion matrices of {self.num_classes} and {other.num_classes} classes")
        total = ConfusionMatrix(self.num_classes)
        total.counts = self.counts + other.counts
        return total

    def scores(self) -> Scores:
        """All scores of the counts so far; see `Scores` for the classes that enter each mean. NaN without pixels."""
        true_positive = self.counts.diagonal().double()
        in_truth = self.counts.sum(1).double()
        predicted = self.counts.sum(0).double()
        present = in_truth > 0
        iou = _iou(self.counts)
        precision = true_positive / predicted
        recall = true_positive / in_truth
        confusion_ratio = (predicted - true_positive) / true_positive
        return Scores(
            iou=iou,
            precision=precision,
            recall=recall,
            confusion_ratio=confusion_ratio,
            present=present,
            miou=_mean_iou(iou, present, "truth").item(),
            pixel_accuracy=(true_positive.sum() / in_truth.sum()).item(),
            mean_precision=precision[present].mean().item(),
            mean_recall=recall[present].mean().item(),
            mean_confusion_ratio=confusion_ratio[present].mean().item(),
        )


class ThresholdSweep:
    """Scores of thresholded class maps at many thresholds, from one look at every pixel.

    What `maps.predict` makes of a pixel depends on its strongest class and on how many thresholds that class passes: so
    pixels are counted by truth, strongest class and that number. `counts`, int64 (K, K - 1, T + 1) on the CPU, holds
    them all.

    Args:
        num_classes: K, background included.
        thresholds: T background scores, ascending.
        strict: whether a score exactly at a threshold is background; see `maps.predict`.

    Raises:
        ValueError: fewer than two classes, or thresholds that are none or not ascending.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] | Tensor, strict: bool = True):
        self.thresholds = torch.as_tensor(thresholds, dtype=torch.float64)
        if num_classes < 2:
            raise ValueError(f"ThresholdSweep: num_classes is {num_classes}; give the classes with background, >= 2")
        if self.thresholds.ndim != 1 or not len(self.thresholds) or (self.thresholds.diff() <= 0).any():
            raise ValueError(f"ThresholdSweep: thresholds {self.thresholds.tolist()} must ascend, and be at least one")
        self.num_classes, self.strict = num_classes, strict
        self.counts = torch.zeros(num_classes, num_classes - 1, len(self.thresholds) + 1, dtype=torch.int64)

    def update(self, maps: Tensor, labels: Tensor, truth: Tensor | np.ndarray) -> None:
        """Count the pixels of one batch.

        Args:
            maps: (B, K - 1, H, W) scores; thresholds are compared in their precision.
            labels: (B, K - 1) of 0/1, the image-level labels that the maps may use.
            truth: integers (B, H, W), 0..K-1 or 255. Pixels of truth 255 are left out.

        Raises:
            TypeError: the truth does not hold integers.
            ValueError: shapes that do not fit, or a truth that is not a class.
        """
        caller = "ThresholdSweep.update"
        score, strongest = strongest_class(maps, labels, caller)
        truth = _integers(truth, caller, "truth").to(maps.device)
        if maps.shape[1] != self.num_classes - 1 or truth.shape != score.shape:
            raise ValueError(
                f"{caller}: maps {tuple(maps.shape)} and truth {tuple(truth.shape)} must be "
                f"(B, {self.num_classes - 1}, H, W) and (B, H, W); resize the maps to the size of the truth"
            )
        counted = truth != IGNORE
        truth = truth[counted]
        _check_range(truth, self.num_classes, caller, "truth", f"; void pixels must have the label {IGNORE}")
        thresholds = self.thresholds.to(maps)
        passed = torch.bucketize(score[counted], thresholds, right=not self.strict)
        cells = (truth * (self.num_classes - 1) + strongest[counted] - 1) * (len(thresholds) + 1) + passed
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts).cpu()

    def matrices(self) -> Tensor:
        """The confusion matrix at every threshold, int64 (T, K, K), rows = truth."""
        above = self.counts.flip(2).cumsum(2).flip(2)  # pixels that pass as many thresholds or more
        foreground = above[:, :, 1:].permute(2, 0, 1)
        background = above[:, :, 0].sum(1) - foreground.sum(2)
        return torch.cat([background[:, :, None], foreground], dim=2)

    def curve(self, over: str = "truth") -> tuple[Tensor, Tensor]:
        """mIoU (T,), over one of `AVERAGES` (see `Scores.mean_iou`), and IoU per class (T, K), at all `thresholds`."""
        matrices = self.matrices()
        iou = _iou(matrices)
        return _mean_iou(iou, matrices[0].sum(1) > 0, over), iou

    def best(self, over: str = "truth") -> tuple[float, float]:
        """The threshold of the largest mIoU, the lowest such, and that mIoU.

        Raises:
            ValueError: no pixels were counted.
        """
        if not self.counts.any():
            raise ValueError("ThresholdSweep.best: no pixels were counted; call `update` first")
        miou = self.curve(over)[0]
        index = miou.argmax()
        return self.thresholds[index].item(), miou[index].item()


def classification_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """F1 score of the classes predicted for each image (logit > 0), the "cls score" of the MoRe and SeCo logs.

    Args:
        logits: (B, C) class scores before the sigmoid.
        labels: (B, C) of 0/1.

    Returns:
        (B,) float64, 2 TP / (2 TP + FP + FN); 0 for an image with neither a label nor a prediction. The logged score
        is its mean over all images.

    Raises:
        ValueError: the shapes differ or are not (B, C).
    """
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(
            f"classification_f1: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must both be (B, C)"
        )
    predicted, true = logits > 0, labels > 0.5
    true_positive = (predicted & true).sum(1).double()
    return 2 * true_positive / (predicted.sum(1) + true.sum(1)).clamp(min=1)


def _iou(counts: Tensor) -> Tensor:
    """IoU of every class, float64 (..., K), of confusion matrices (..., K, K); NaN where the union is empty."""
    true_positive = counts.diagonal(dim1=-2, dim2=-1).double()
    return true_positive / (counts.sum(-1) + counts.sum(-2) - true_positive)


def _mean_iou(iou: Tensor, present: Tensor, over: str) -> Tensor:
    """Mean of IoU (..., K) over classes; see `Scores.mean_iou`."""
    if over not in AVERAGES:
        raise ValueError(f"mean IoU over {over!r} is unknown; choose one of {', '.join(AVERAGES)}")
    if over == "truth":
        return iou[..., present].mean(-1)
    return iou.nanmean(-1) if over == "union" else iou.nan_to_num(0).mean(-1)


def _integers(values: Tensor | np.ndarray, caller: str, name: str) -> Tensor:
    values = torch.as_tensor(values)
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"{caller}: {name} must hold class indices (integers), not {values.dtype}")
    return values.long()


def _check_range(values: Tensor, num_classes: int, caller: str, name: str, hint: str) -> None:
    if values.numel() and (values.min() < 0 or values.max() >= num_classes):
        raise ValueError(
            f"{caller}: {name} has values {values.min().item()}..{values.max().item()}, but the classes are "
            f"0..{num_classes - 1}{hint}"
        )
