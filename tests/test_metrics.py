import json

import numpy as np
import pytest
import torch
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.classification import binary_f1_score

from wsss.metrics import ConfusionMatrix, classification_f1


def tally(data, kind, num_classes, **options):
    matrix = ConfusionMatrix(num_classes)
    for i in range(data["n_images"]):
        matrix.update(data[f"{kind}_{i}"], data[f"gt_{i}"], **options)
    return matrix


def assert_equal_scores(actual, expected):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_golden_more_eval_confusion_matrix_and_scores(golden):
    data = golden("more_eval_released")
    matrix = tally(data, "pred", data["num_classes"])
    assert torch.equal(matrix.counts, data["hist"])
    scores = matrix.scores()
    for ours, theirs in {
        "iou": "iou",
        "precision": "precision",
        "recall": "recall",
        "confusion_ratio": "confusion_ratio",
        "miou": "miou",
        "pixel_accuracy": "pacc",
        "mean_recall": "macc",
    }.items():
        assert_equal_scores(getattr(scores, ours), data[theirs])
    assert torch.equal(scores.present, data["hist"].sum(1) > 0)


def test_golden_more_eval_pseudo_masks_drop_unlabelled_predictions(golden):
    data = golden("more_eval_released")
    scores = tally(data, "pseudo", data["num_classes"], drop_unlabelled=True).scores()
    assert_equal_scores(scores.miou, data["pseudo_miou"])
    assert_equal_scores(scores.iou, data["pseudo_iou"])


def test_golden_more_eval_means_over_all_present_classes(golden):
    data = golden("more_eval_released")
    classes = data["num_classes_full"]
    full = data | {
        f"pred_{i}": data[f"pred_{i}"].where(data[f"pred_{i}"] != classes, 0) for i in range(data["n_images"])
    }
    scores = tally(full, "pred", classes).scores()
    assert scores.present.all()
    for name in ("miou", "mean_confusion_ratio", "mean_precision", "mean_recall"):
        assert_equal_scores(getattr(scores, name), data[f"full_{name}"])


def test_golden_more_classification_f1(golden):
    data = golden("more_eval_released")
    f1 = classification_f1(data["cls_logits"], data["cls_labels"])
    assert_equal_scores(f1, data["cls_f1"])
    assert_equal_scores(f1.mean(), data["cls_score"])


def test_confusion_matrix_and_scores_equal_torchmetrics():
    torch.manual_seed(0)
    classes = 6
    prediction = torch.randint(classes, (4, 31, 29))
    truth = prediction.where(torch.rand(prediction.shape) < 0.6, torch.randint(classes, prediction.shape))
    truth[torch.rand(truth.shape) < 0.1] = 255
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction, truth)
    scores = matrix.scores()
    options = {"num_classes": classes, "ignore_index": 255}
    assert torch.equal(matrix.counts, MulticlassConfusionMatrix(**options)(prediction, truth))
    for name, metric in (
        ("iou", MulticlassJaccardIndex),
        ("precision", MulticlassPrecision),
        ("recall", MulticlassRecall),
    ):
        expected = metric(average=None, **options)(prediction, truth).double()
        torch.testing.assert_close(getattr(scores, name), expected, rtol=1e-6, atol=0)


def test_classification_f1_equals_torchmetrics_and_is_zero_without_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 20), (torch.rand(8, 20) < 0.3).float()
    logits[0], labels[0] = -1, 0
    f1 = classification_f1(logits, labels)
    expected = torch.stack([binary_f1_score((row > 0).int(), label.int()) for row, label in zip(logits, labels)])
    torch.testing.assert_close(f1, expected.double(), rtol=1e-6, atol=0)
    assert f1[0] == 0


def test_counts_hold_more_pixels_than_32_bits():
    matrix = ConfusionMatrix(2)
    matrix.counts = torch.tensor([[2**31, 2**31], [0, 2**32]])
    total = matrix + matrix
    assert total.counts.dtype == torch.int64
    assert total.counts.tolist() == [[2**32, 2**32], [0, 2**33]]
    assert total.scores().recall.tolist() == [0.5, 1.0]
    assert total.scores().pixel_accuracy == 0.75


def test_merging_and_streaming_give_the_counts_of_all_pixels():
    torch.manual_seed(0)
    prediction, truth = torch.randint(3, (2, 2, 50))
    whole, first, second = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(3)
    whole.update(prediction, truth)
    first.update(prediction[:, :20], truth[:, :20])
    second.update(prediction[:, 20:], truth[:, 20:])
    assert torch.equal((first + second).counts, whole.counts)
    first.update(prediction[:, 20:], truth[:, 20:])
    assert torch.equal(first.counts, whole.counts)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_arrays_of_any_integer_type_count_alike(dtype):
    prediction, truth = np.array([[0, 1], [2, 15]], dtype), np.array([[0, 1], [1, 255]], dtype)
    matrix = ConfusionMatrix(16)
    matrix.update(prediction, truth)
    assert matrix.counts.sum() == 3
    assert matrix.counts[1, 2] == 1


def test_a_class_only_predicted_enters_no_mean_and_one_never_predicted_is_not_hidden():
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    matrix = ConfusionMatrix(5)
    matrix.update(torch.tensor([0, 0, 3, 1, 0, 0]), truth)
    scores = matrix.scores()
    assert scores.present.tolist() == [True, True, True, False, False]
    assert scores.miou == pytest.approx((2 / 5 + 1 / 2 + 0) / 3)
    assert scores.mean_recall == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert np.isnan(scores.mean_precision)
    assert scores.confusion_ratio[3] == float("inf")
    assert json.loads(json.dumps(scores.recall[:3].tolist())) == pytest.approx([2 / 3, 1 / 2, 0])


def test_without_pixels_scores_are_undefined():
    scores = ConfusionMatrix(3).scores()
    assert np.isnan([scores.miou, scores.pixel_accuracy, scores.mean_confusion_ratio]).all()


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        ([0, 1], [0, 1, 1], ValueError, "resize"),
        ([0, 3], [0, 1], ValueError, "prediction has values 0..3"),
        ([0, 255], [0, 1], ValueError, "drop_unlabelled=True"),
        ([0, 1], [0, 7], ValueError, "truth has values 0..7"),
        ([0, 1], [-1, 0], ValueError, "truth has values -1..0"),
        ([0.0, 1.0], [0, 1], TypeError, "integers"),
    ],
)
def test_bad_input_is_named(prediction, truth, error, message):
    with pytest.raises(error, match=message):
        ConfusionMatrix(3).update(torch.tensor(prediction), torch.tensor(truth))


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="3 and 4 classes"):
        ConfusionMatrix(3) + ConfusionMatrix(4)
    with pytest.raises(ValueError, match="num_classes is 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and labels \(2, 4\)"):
        classification_f1(torch.zeros(2, 3), torch.zeros(2, 4))


def test_golden_seco_metrics(golden):
    data = golden("seco_metrics_released")
    matrix = ConfusionMatrix(data["num_classes"])
    for prediction, truth in zip(data["predictions"], data["labels"], strict=True):
        matrix.update(prediction, truth)
    scores = matrix.scores()
    for name in ("iou", "precision", "recall", "confusion_ratio", "miou", "pixel_accuracy"):
        assert_equal_scores(getattr(scores, name), data[name])
    assert_equal_scores(scores.mean_recall, data["mean_accuracy"])


def test_golden_seco_metrics_of_pseudo_masks(golden):
    data = golden("seco_metrics_released")
    matrix = ConfusionMatrix(data["num_classes"])
    matrix.update(data["predictions_with_ignore"], data["labels"], drop_unlabelled=True)
    assert_equal_scores(matrix.scores().miou, data["pseudo_miou"])
    assert_equal_scores(matrix.scores().iou, data["pseudo_iou"])


def test_golden_seco_metrics_of_image_labels(golden):
    data = golden("seco_metrics_released")
    f1 = classification_f1(data["cls_pred"] - 0.5, data["cls_true"])
    assert_equal_scores(f1, data["cls_f1"])
