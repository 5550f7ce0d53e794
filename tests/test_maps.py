import re

import pytest
import torch
import torch.nn.functional as F

from wsss import maps as maps_module
from wsss.maps import (
    add_background,
    merge_labels,
    minmax,
    minmax_transcam,
    multi_scale,
    multi_scale_logits,
    multi_scale_mean,
    multi_scale_probabilities,
    multi_scale_sum,
    predict,
    resize,
    three_way,
    token_similarity,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


class StubNetwork:
    """Returns recorded maps, one dict a call, and checks the images that each call gets."""

    def __init__(self, images, scales, recorded, flip=True, mode="bilinear"):
        self.images, self.scales, self.recorded, self.flip, self.calls = images, scales, recorded, flip, 0
        self.mode = mode

    def __call__(self, inputs):
        scale, maps = self.scales[self.calls], self.recorded[self.calls]
        self.calls += 1
        height, width = (int(scale * length) for length in self.images.shape[2:])
        batch = self.images.shape[0]
        assert inputs.shape == (batch * (2 if self.flip else 1), 3, height, width)
        torch.testing.assert_close(inputs[:batch], F.interpolate(self.images, size=(height, width), mode=self.mode))
        if self.flip:
            assert torch.equal(inputs[batch:], inputs[:batch].flip(-1))
        return maps


def stub_images(data, batch):
    height, width = data["image_size"].tolist()
    return torch.rand(batch, 3, height, width, dtype=torch.float64)


def test_golden_more_ms_cam(golden):
    data = golden("more_ms_cam_released")
    scales = data["order"].tolist()
    assert sorted(scales) == sorted(data["scales"].tolist())
    recorded = [
        {"cam": data[f"raw_cam_{i}"], "cam_aux": data[f"raw_cam_aux_{i}"], "class_logits": torch.zeros(1)}
        for i in range(len(scales))
    ]
    images = stub_images(data, data["cam"].shape[0])
    network = StubNetwork(images, scales, recorded)
    maps = multi_scale(network, images, scales, relu={"cam": True, "cam_aux": True})
    assert network.calls == len(scales)
    assert set(maps) == {"cam", "cam_aux"}
    for name in maps:
        torch.testing.assert_close(maps[name], data[name], **EXACT)


def test_golden_more_lam_multi_scale(golden):
    data = golden("more_lam_released")
    scales = data["order"].tolist()
    images = stub_images(data, data["lam_single"].shape[0])
    recorded = [
        {"lam": token_similarity(data[f"feature_{i}"], data[f"tokens_{i}"], "dot")} for i in range(len(scales))
    ]
    for name, used in (("lam_single", [scales.index(1)]), ("lam_multi", range(len(scales)))):
        factors = [scales[i] for i in used]
        network = StubNetwork(images, factors, [recorded[i] for i in used])
        maps = multi_scale(network, images, factors, relu={"lam": False})
        torch.testing.assert_close(maps["lam"], data[name], **EXACT)


def test_golden_more_lam_validation_path(golden):
    data = golden("more_lam_released")
    batch = data["lam_single"].shape[0]
    full_size = data["order"].tolist().index(1)
    raw = token_similarity(data[f"feature_{full_size}"][:batch], data[f"tokens_{full_size}"][:batch], "dot")
    torch.testing.assert_close(raw, data["score_map_raw"], **EXACT)
    images = stub_images(data, batch)
    network = StubNetwork(images, [1.0], [{"lam": raw}], flip=False)
    single = multi_scale(network, images, [1.0], relu={"lam": False}, flip=False)
    torch.testing.assert_close(single["lam"], data["score_map_image_size"], **EXACT)
    val_size = tuple(data["val_size"].tolist())
    score_map = minmax(resize(raw, val_size))
    torch.testing.assert_close(score_map, data["val_score_map"], **EXACT)
    fused = minmax(score_map * data["val_cam"])
    torch.testing.assert_close(fused, data["val_fused"], **EXACT)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(predict(score_map.to(dtype), data["labels"].to(dtype), 0.5), data["val_label"])
    assert torch.equal(predict(fused, data["labels"], 0.5), data["val_fused_label"])


def test_golden_more_lam_published_is_the_cosine(golden):
    data = golden("more_lam_published")
    lam = token_similarity(data["feature_map"], data["class_tokens"], "cosine")
    torch.testing.assert_close(lam, data["lam_cosine"], **EXACT)
    torch.testing.assert_close(minmax(lam), data["lam_minmax"], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_more_cam_to_label(golden, dtype):
    data = golden("more_cam_to_label_released")
    cam, labels = data["cam"].to(dtype), data["labels"].to(dtype)
    torch.testing.assert_close(cam * labels[:, :, None, None], data["valid_cam"].to(dtype), **EXACT)
    bands = {key: re.fullmatch(r"label_h(\d+)_l(\d+)", key) for key in data}
    bands = {key: [int(percent) / 100 for percent in match.groups()] for key, match in bands.items() if match}
    assert bands
    for key, (high, low) in bands.items():
        assert torch.equal(three_way(cam, labels, high, low), data[key]), key
    assert torch.equal(predict(cam, labels, 0.5), data["label_b50"])


def test_golden_more_masks_published(golden):
    data = golden("more_masks_published")
    high, low = data["lambda_high"], data["lambda_low"]
    mask = three_way(data["cam"], data["labels"], high, low, strict=True)
    assert torch.equal(mask, data["M_a"])
    assert torch.equal(mask.where(mask != 255, 0), data["M_c"])
    assert torch.equal((mask == 255).long(), data["M_u"])
    assert torch.equal(three_way(data["cam"], data["labels"], 0.5, 0.25, strict=True), data["M_a_high50_low25"])


def test_scores_at_a_threshold():
    cam = torch.tensor([0.8, 0.75, 0.5, 0.25, 0.2])[None, None, None]
    label = torch.ones(1, 1)
    assert three_way(cam, label, 0.75, 0.25).tolist() == [[[1, 255, 255, 0, 0]]]
    assert three_way(cam, label, 0.75, 0.25, strict=True).tolist() == [[[1, 255, 255, 255, 0]]]
    assert predict(cam, label, 0.5).tolist() == [[[1, 1, 0, 0, 0]]]
    assert predict(cam, label, 0.5, strict=False).tolist() == [[[1, 1, 1, 0, 0]]]


def test_absent_classes_never_appear():
    torch.manual_seed(0)
    cam = torch.rand(2, 4, 9, 9)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    assert set(three_way(cam, labels, 0.5, 0.25)[0].unique().tolist()) <= {0, 2, 4, 255}
    assert (three_way(cam, labels, 0.5, 0.25)[1] == 0).all()
    assert (predict(cam, labels, 0.5)[1] == 0).all()
    at_zero = predict(cam - 0.5, labels, 0.0, strict=False)
    assert set(at_zero[0].unique().tolist()) == {0, 2, 4}
    assert (at_zero[1] == 0).all()


def test_minmax_spans_every_map_and_survives_constant_ones():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, 7) * torch.tensor([1.0, 100.0, 0.0])[:, None, None]
    scaled = minmax(maps)
    assert (scaled.amin((2, 3)) == 0).all()
    torch.testing.assert_close(scaled.amax((2, 3))[:, :2], torch.ones(2, 2), rtol=0, atol=1e-4)
    assert (scaled[:, 2] == 0).all()


def test_multi_scale_of_a_mirror_image_is_the_mirrored_map():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 24)
    kernel = torch.randn(4, 3, 4, 4)

    def forward(inputs):
        return {"cam": torch.nn.functional.conv2d(inputs, kernel, stride=4)}

    options = {"scales": (1, 0.5), "relu": {"cam": True}}
    straight = multi_scale(forward, images, **options)["cam"]
    mirrored = multi_scale(forward, images.flip(-1), **options)["cam"]
    torch.testing.assert_close(straight, mirrored.flip(-1))
    assert not torch.allclose(straight, multi_scale(forward, images, flip=False, **options)["cam"])


def test_multi_scale_logits_adds_the_mirror_and_takes_the_best_scale():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 12)
    scales = (1.0, 1.5)
    logits = [torch.randn(4, 3, 2, 3), torch.randn(4, 3, 3, 4)]
    fused = multi_scale_logits(StubNetwork(images, scales, logits), images, scales, size=(10, 14))
    sums = [resize(x[:2], (10, 14)) + resize(x[2:].flip(-1), (10, 14)) for x in logits]
    torch.testing.assert_close(fused, torch.stack(sums).amax(0))
    alone = multi_scale_logits(
        StubNetwork(images, scales, [x[:2] for x in logits], flip=False), images, scales, size=(10, 14), flip=False
    )
    torch.testing.assert_close(alone, torch.maximum(*[resize(x[:2], (10, 14)) for x in logits]))


def test_add_background_is_what_the_classes_leave():
    maps = torch.tensor([0.2, 0.7])[None, :, None, None]
    assert add_background(maps)[0, :, 0, 0].tolist() == pytest.approx([0.3, 0.2, 0.7])


def test_bad_input_is_named():
    cam, images = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\).*need \(2, 3\)"):
        three_way(cam, torch.zeros(2, 4), 0.7, 0.25)
    with pytest.raises(ValueError, match=r"low = 0.9"):
        three_way(cam, torch.zeros(2, 3), 0.7, 0.9)
    with pytest.raises(ValueError, match=r"predict: maps have shape \(3, 4, 4\)"):
        predict(cam[0], torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"expected \(B, C, h, w\)"):
        minmax(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="same B and D"):
        token_similarity(torch.zeros(2, 8, 4, 4), torch.zeros(2, 3, 6), "dot")
    with pytest.raises(ValueError, match='"cosine" or "dot"'):
        token_similarity(torch.zeros(2, 8, 4, 4), torch.zeros(2, 3, 8), "euclid")
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        multi_scale(dict, torch.zeros(3, 8, 8), [1], relu={})
    with pytest.raises(ValueError, match="scales is empty"):
        multi_scale(lambda x: {"cam": x}, images, [], relu={"cam": True})


@pytest.mark.parametrize(
    "fuse",
    [
        lambda forward, images: multi_scale(forward, images, [1], {"lam": True}),
        lambda forward, images: multi_scale_sum(forward, [images], ["lam"], (8, 8)),
        lambda forward, images: multi_scale_probabilities(forward, images, [1], ["lam"]),
    ],
    ids=["multi_scale", "multi_scale_sum", "multi_scale_probabilities"],
)
def test_an_unknown_map_is_named_with_those_that_there_are(fuse, request):
    with pytest.raises(ValueError, match=rf'{request.node.callspec.id}: no map "lam"; this method returns aux, cam'):
        fuse(lambda images: {"cam": images, "aux": images}, torch.zeros(2, 3, 8, 8))


def test_golden_seco_multiscale_cam(golden):
    data = golden("seco_multiscale_cam_released")
    scales, names = data["scales"].tolist(), ("cam", "cam_aux")
    sizes = [[int(scale * side) for side in data["image_hw"].tolist()] for scale in scales]
    assert sizes == data["call_hw"].tolist()
    recorded = [{name: data[f"{name}_logits_{i}"] for name in names} for i in range(len(scales))]
    images = torch.rand(len(data["cam"]), 3, *data["image_hw"].tolist())
    network = StubNetwork(images, scales, recorded)
    maps = multi_scale(network, images, scales, relu=dict.fromkeys(names, True))
    assert network.calls == len(scales)
    for name in names:
        torch.testing.assert_close(maps[name], data[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_seco_pseudo_mask(golden, dtype):
    """The labels that have 255 or no band; the mask that tags are read from is `seco.pseudo_mask`."""
    data = golden("seco_pseudo_mask_released")
    cam, labels = data["cam"].to(dtype), data["image_labels"].to(dtype)
    torch.testing.assert_close(cam * labels[:, :, None, None], data["valid_cam"].to(dtype), rtol=0, atol=0)
    outside = torch.ones(cam.shape[0], *cam.shape[2:], dtype=torch.bool)
    for one, (top, bottom, left, right) in zip(outside, data["img_box"].tolist(), strict=True):
        one[top:bottom, left:right] = False
    # Some scores equal a threshold as float32 has it.
    high, low, background = (
        torch.tensor(data[f"{name}_threshold"]).to(dtype).item() for name in ("high", "low", "background")
    )
    plain = predict(cam, labels, background)
    assert torch.equal(plain, data["label_plain"])
    assert torch.equal(plain.masked_fill(outside, 255), data["label_box"])
    banded = three_way(cam, labels, high, low).masked_fill(outside, 255)
    assert torch.equal(banded, data["label_box_ignore_mid"])


def test_golden_seco_seg_inference_fusion(golden):
    data = golden("seco_seg_inference_fusion_released")
    scales, size = data["scales"].tolist(), data["label_hw"].tolist()
    side = round(data["call_hw"][0, 0].item() / scales[0])
    assert [[int(scale * side)] * 2 for scale in scales] == data["call_hw"].tolist()
    images = torch.rand(len(data["fused_logits"]), 3, side, side)
    network = StubNetwork(images, scales, [data[f"logits_{i}"] for i in range(len(scales))])
    fused = multi_scale_logits(network, images, scales, size=tuple(size))
    torch.testing.assert_close(fused, data["fused_logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.argmax(1), data["prediction"].long())


def test_golden_transcam_segmentation_fusion(golden):
    data = golden("transcam_msfuse")
    count = sum(re.fullmatch(r"seg_logits_s\d+_f0", key) is not None for key in data)
    recorded = [torch.stack([data[f"seg_logits_s{i}_f{flipped}"] for flipped in (0, 1)]) for i in range(count)]
    size, scales = data["seg_prob"].shape[1:], [0.5 * (i + 1) for i in range(count)]
    images = torch.rand(1, 3, *size)
    network = StubNetwork(images, scales, recorded, mode="bicubic")
    fused = multi_scale_mean(network, images, scales, size)
    assert network.calls == count > 1
    torch.testing.assert_close(fused.softmax(1)[0].double(), data["seg_prob"], rtol=0, atol=1e-5)
    assert torch.equal(fused.argmax(1)[0], data["seg_pred_nocrf"].long())


def test_multi_scale_mean_without_mirror_images():
    torch.manual_seed(0)
    images, logits = torch.rand(2, 3, 8, 12), [torch.randn(2, 3, 2, 3), torch.randn(2, 3, 8, 12)]
    network = StubNetwork(images, [0.5, 1.0], logits, flip=False, mode="bicubic")
    fused = multi_scale_mean(network, images, [0.5, 1.0], (8, 12), flip=False)
    small = F.interpolate(logits[0], size=(8, 12), mode="bilinear", align_corners=True)
    torch.testing.assert_close(fused, (small + logits[1]) / 2)
    with pytest.raises(ValueError, match="scales is empty"):
        multi_scale_mean(network, images, [], (8, 12))


def test_probabilities_are_averaged_on_the_grid_of_the_first_scale():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    recorded = [{"patch": torch.rand(4, 5, *grid).softmax(1).double()} for grid in ((4, 6), (2, 3))]
    network = StubNetwork(images, [1.0, 0.5], recorded)
    found = multi_scale_probabilities(network, images, [1.0, 0.5], ["patch"])["patch"]
    halves = [(maps["patch"][:2] + maps["patch"][2:].flip(-1)) / 2 for maps in recorded]
    torch.testing.assert_close(found, (halves[0] + resize(halves[1], (4, 6))) / 2)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 4, 6, dtype=torch.float64))


def test_probabilities_of_one_scale_are_those_of_the_network():
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    recorded = torch.rand(2, 5, 4, 6)
    network = StubNetwork(images, [1.0], [{"patch": recorded}], flip=False)
    assert torch.equal(multi_scale_probabilities(network, images, [1.0], ["patch"], flip=False)["patch"], recorded)
    with pytest.raises(ValueError, match="scales is empty"):
        multi_scale_probabilities(network, images, [], ["patch"])


def test_merged_labels_by_hand():
    background, a, b = [0.5, 0.25], [0.4, 0.5], [0.1, 0.25]
    maps = torch.tensor([background, a, b])[None, :, None]
    merged = merge_labels(maps, torch.tensor([[1.0, 0.0]]))[0, :, 0]
    torch.testing.assert_close(merged, torch.tensor([[1 / 1.8, 0.5 / 1.5], [0.8 / 1.8, 1 / 1.5], [0, 0]]))
    nothing = merge_labels(torch.zeros(1, 3, 1, 2), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(nothing, torch.zeros(1, 3, 1, 2)), "0 / 0 is 0"
    alone = merge_labels(maps, torch.zeros(1, 2))[0, :, 0]
    assert torch.equal(alone, torch.tensor([[1.0, 1], [0, 0], [0, 0]])), "an image without classes is background"


def test_merged_labels_must_fit():
    with pytest.raises(ValueError, match=r"merge_labels: labels have shape \(1, 3\).* need \(1, 2\)"):
        merge_labels(torch.rand(1, 3, 4, 4), torch.ones(1, 3))


def transcam_inputs(data, dtype, flip=True):
    """(a network that returns the recorded maps, images at every scale, channels of the image's classes)."""
    recorded, sides = [], data["sq_sizes"].tolist()
    for index in range(len(sides)):
        both = [data[f"cam_s{index}_f{mirrored}"][1:] for mirrored in range(1 + flip)]
        recorded.append({"transcam": torch.stack(both).to(dtype)})
    calls = iter(zip(sides, recorded))
    images = [torch.rand(1, 3, side, side, dtype=dtype) for side in sides]

    def network(inputs):
        side, maps = next(calls)
        assert inputs.shape == (1 + flip, 3, side, side)
        assert not flip or torch.equal(inputs[1], inputs[0].flip(-1))
        return maps

    present = data["label"].nonzero()[:, 0]
    assert torch.equal(present, data["classes"])
    return network, images, present


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_transcam_sum_over_scales(golden, monkeypatch, dtype):
    """The reference multiplies by the image's labels as well: it keeps the classes of the image."""
    data = golden("transcam_msfuse")
    network, images, present = transcam_inputs(data, dtype)
    monkeypatch.setattr(maps_module, "minmax_transcam", lambda maps: maps)
    total = multi_scale_sum(network, images, ["transcam"], data["size"].tolist())["transcam"][0, present]
    torch.testing.assert_close(total.double(), data["sum_cam"].relu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flip", [True, False])
def test_golden_transcam_normalised_sum(golden, flip, dtype):
    data = golden("transcam_msfuse")
    expected = data["norm_cam" if flip else "norm_cam_noflip"]
    network, images, present = transcam_inputs(data, dtype, flip)
    found = multi_scale_sum(network, images, ["transcam"], data["size"].tolist(), flip)["transcam"]
    assert found.dtype == dtype and found.shape[0] == 1
    wrong = (found[0, present].double() - expected).abs() > 1e-5
    lowest = expected.flatten(1).argsort(1)[:, :2]  # where float32 may put the minimum
    assert not wrong.flatten(1).scatter(1, lowest, False).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_transcam_minmax(golden, dtype):
    data = golden("transcam_msfuse")
    maps = data["sum_cam"].relu()[None].to(dtype)
    error = (minmax_transcam(maps)[0].double() - data["norm_cam"]).abs().flatten(1)
    assert (error.sort(1).values[:, :-2] < 1e-5).all(), "all but two pixels of a class"
    if dtype == torch.float64:
        assert error.max() < 1e-9


def test_minmax_of_transcam_by_hand():
    maps = torch.tensor([[0.0, 1, 4], [2, 3, 6], [5, 5, 5]], dtype=torch.float64)[None, :, None]
    scaled = minmax_transcam(maps)[0, :, 0]
    assert scaled[0].tolist() == pytest.approx([-1e-5 / 4, 0.25, 1], abs=1e-5) and scaled[0, 0] < 0 and scaled[0, 2] < 1
    assert scaled[1].tolist() == pytest.approx([-2 / 4, 0.25, 1], abs=1e-5), "a positive minimum falls far below 0"
    assert (scaled[2] < -1e5).all(), "a constant map"


def test_sums_cancel_across_scales_and_are_rectified_once():
    """(1, -2) at one scale and (1, 1) at the other: the second pixel of the sum is negative."""
    images = [torch.rand(1, 3, side, side) for side in (4, 8)]
    maps = iter([torch.tensor([1.0, -2]), torch.tensor([1.0, 1])])
    forward = lambda inputs: {"cam": next(maps).view(1, 1, 1, 2), "other": torch.zeros(1)}
    found = multi_scale_sum(forward, images, ["cam"], (1, 2), flip=False)
    assert set(found) == {"cam"}
    assert found["cam"].flatten().tolist() == pytest.approx([1, 0], abs=1e-4)


def test_the_sum_of_a_mirror_image_is_the_mirrored_sum():
    torch.manual_seed(0)
    kernel, images = torch.randn(4, 3, 4, 4), [torch.rand(2, 3, side, side) for side in (16, 24)]
    forward = lambda inputs: {"cam": torch.nn.functional.conv2d(inputs, kernel, stride=4)}
    straight = multi_scale_sum(forward, images, ["cam"], (10, 12))["cam"]
    mirrored = multi_scale_sum(forward, [image.flip(-1) for image in images], ["cam"], (10, 12))["cam"]
    torch.testing.assert_close(straight, mirrored.flip(-1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(straight, multi_scale_sum(forward, images, ["cam"], (10, 12), flip=False)["cam"])


def test_a_sum_needs_images():
    with pytest.raises(ValueError, match="multi_scale_sum: no inputs; give the images at one scale or more"):
        multi_scale_sum(dict, [], ["cam"], (4, 4))
    with pytest.raises(ValueError, match=r"multi_scale_sum: images have shape \(3, 8, 8\); expected \(B, 3, H, W\)"):
        multi_scale_sum(dict, [torch.zeros(3, 8, 8)], ["cam"], (4, 4))
    with pytest.raises(ValueError, match=r"minmax_transcam: maps have shape \(3, 3\)"):
        minmax_transcam(torch.zeros(3, 3))
