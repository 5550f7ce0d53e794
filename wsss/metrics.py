"""Scores of segmentations, all from one confusion matrix, and the F1 score of image-level predictions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
        ignore: int = 255,
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
        prediction, truth = _integers(prediction, "prediction"), _integers(truth, "truth")
        if prediction.shape != truth.shape:
            raise ValueError(
                f"ConfusionMatrix.update: prediction has shape {tuple(prediction.shape)}, truth {tuple(truth.shape)}; "
                "resize the scores to the size of the truth before the arg max"
            )
        prediction = prediction.to(truth.device)
        counted = truth != ignore
        if drop_unlabelled:
            counted &= prediction != ignore
        prediction, truth = prediction[counted], truth[counted]
        self._check_range(truth, "truth", f"; void pixels must have the label {ignore}")
        hint = "" if drop_unlabelled else "; pseudo masks with open pixels need drop_unlabelled=True"
        self._check_range(prediction, "prediction", hint)
        pairs = truth * self.num_classes + prediction
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.counts += counts.view(self.num_classes, self.num_classes).cpu()

    def _check_range(self, values: Tensor, name: str, hint: str) -> None:
        if values.numel() and (values.min() < 0 or values.max() >= self.num_classes):
            raise ValueError(
                f"ConfusionMatrix.update: {name} has values {values.min().item()}..{values.max().item()}, "
                f"but the classes are 0..{self.num_classes - 1}{hint}"
            )

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
        iou = true_positive / (in_truth + predicted - true_positive)
        precision = true_positive / predicted
        recall = true_positive / in_truth
        confusion_ratio = (predicted - true_positive) / true_positive
        return Scores(
            iou=iou,
            precision=precision,
            recall=recall,
            confusion_ratio=confusion_ratio,
            present=present,
            miou=iou[present].mean().item(),
            pixel_accuracy=(true_positive.sum() / in_truth.sum()).item(),
            mean_precision=precision[present].mean().item(),
            mean_recall=recall[present].mean().item(),
            mean_confusion_ratio=confusion_ratio[present].mean().item(),
        )


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


def _integers(values: Tensor | np.ndarray, name: str) -> Tensor:
    values = torch.as_tensor(values)
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"ConfusionMatrix.update: {name} must hold class indices (integers), not {values.dtype}")
    return values.long()
