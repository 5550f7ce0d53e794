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

from wsss.maps import predict
from wsss.metrics import ConfusionMatrix, ThresholdSweep, classification_f1


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


def test_golden_transcam_miou(golden):
    data = golden("transcam_miou")
    matrix = ConfusionMatrix(len(data["confusion"]))
    matrix.update(data["pred"], data["gt"])
    assert torch.equal(matrix.counts, data["confusion"])
    scores = matrix.scores()
    assert_equal_scores(scores.iou.nan_to_num(0), data["iou"])
    assert_equal_scores(scores.mean_iou("all"), data["miou"])
    assert_equal_scores(scores.mean_iou("union"), data["miou_union_present"])
    assert_equal_scores(scores.mean_iou("truth"), data["miou_gt_present"])
    assert scores.mean_iou() == scores.miou
    # The rates of wrong pixels, per union, follow from what `Scores` has.
    assert_equal_scores((scores.iou / scores.precision - scores.iou)[data["TP"] > 0], data["fp_rate"][data["TP"] > 0])
    assert_equal_scores((scores.iou / scores.recall - scores.iou)[data["TP"] > 0], data["fn_rate"][data["TP"] > 0])


def sweep_of(data, strict):
    """The curve's arrays, counted one image at a time."""
    sweep = ThresholdSweep(data["iou_curve"].shape[1], data["thresholds"], strict)
    for cam, label, truth in zip(data["cams"], data["labels"], data["gt"], strict=True):
        sweep.update(cam[None], label[None], truth[None])
    return sweep


@pytest.mark.parametrize("strict", [True, False])
def test_golden_transcam_pseudo_labels(golden, strict):
    data = golden("transcam_pseudo")
    rule = "strict" if strict else "ge"
    keys = [key for key in data if key.startswith(f"pred_{rule}_t")]
    assert len(keys) >= 4
    for key in keys:
        prediction = predict(data["cams"], data["labels"], int(key[-3:]) / 100, strict)
        assert torch.equal(prediction, data[key].long()), key


@pytest.mark.parametrize("strict", [True, False])
def test_golden_transcam_threshold_curve(golden, strict):
    data = golden("transcam_pseudo")
    suffix = "" if strict else "_ge"
    sweep = sweep_of(data, strict)
    miou, iou = sweep.curve(over="all")
    assert_equal_scores(miou, data[f"miou_curve{suffix}"])
    if strict:
        assert_equal_scores(iou.nan_to_num(0), data["iou_curve"])
        assert sweep.best(over="all")[1] == pytest.approx(data["best_miou"], abs=1e-9)
    assert sweep.best(over="all")[0] == data[f"best_threshold{suffix}"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("strict", [True, False])
def test_a_sweep_equals_predictions_at_each_threshold(strict, dtype):
    torch.manual_seed(0)
    thresholds = [0.0, 0.1, 0.25, 0.3, 0.7, 1.0]
    maps = torch.randint(-2, 21, (4, 5, 9, 7)).to(dtype) / 20  # many scores lie exactly on a threshold
    labels = (torch.rand(4, 5) < 0.5).float()
    labels[0] = 0
    truth = torch.randint(5, (4, 9, 7))  # class 5 is never there, but predicted
    truth[torch.rand(truth.shape) < 0.1] = 255
    sweep = ThresholdSweep(6, thresholds, strict)
    sweep.update(maps[:2], labels[:2], truth[:2])
    sweep.update(maps[2:], labels[2:], truth[2:].numpy())
    for index, threshold in enumerate(thresholds):
        matrix = ConfusionMatrix(6)
        matrix.update(predict(maps, labels, threshold, strict), truth)
        assert torch.equal(sweep.matrices()[index], matrix.counts)
        for over in ("truth", "union", "all"):
            miou, iou = sweep.curve(over)
            assert miou[index] == matrix.scores().mean_iou(over)
            torch.testing.assert_close(iou[index], matrix.scores().iou, rtol=0, atol=0, equal_nan=True)
    miou = sweep.curve()[0]
    assert sweep.best() == (thresholds[miou.argmax()], miou.max())


def test_a_sweep_counts_more_pixels_than_32_bits():
    sweep = ThresholdSweep(2, [0.5])
    sweep.update(torch.tensor([0.2, 0.9]).view(1, 1, 1, 2), torch.ones(1, 1), torch.tensor([[[0, 1]]]))
    sweep.counts *= 2**32
    assert sweep.matrices().tolist() == [[[2**32, 0], [0, 2**32]]]
    assert sweep.best() == (0.5, 1.0)


def test_bad_input_of_sweeps_is_named():
    maps, labels, truth = torch.rand(2, 3, 4, 4), torch.ones(2, 3), torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes is 1"):
        ThresholdSweep(1, [0.5])
    for thresholds in ([], [0.5, 0.5], [[0.5]]):
        with pytest.raises(ValueError, match="must ascend"):
            ThresholdSweep(4, thresholds)
    sweep = ThresholdSweep(4, [0.5])
    with pytest.raises(ValueError, match="no pixels were counted"):
        sweep.best()
    with pytest.raises(ValueError, match=r"ThresholdSweep.update: labels have shape \(2, 2\)"):
        sweep.update(maps, labels[:, :2], truth)
    with pytest.raises(ValueError, match="resize the maps"):
        sweep.update(maps, labels, truth[:, :2])
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        sweep.update(maps[:, :2], labels[:, :2], truth)
    with pytest.raises(ValueError, match="truth has values 4..4"):
        sweep.update(maps, labels, truth + 4)
    with pytest.raises(TypeError, match="ThresholdSweep.update: truth must hold class indices"):
        sweep.update(maps, labels, truth.float())
    assert not sweep.counts.any(), "a refused batch leaves no trace"
    sweep.update(maps, labels, truth)
    with pytest.raises(ValueError, match="over 'classes' is unknown; choose one of truth, union, all"):
        sweep.curve("classes")
