"""The protocols, against loops over pixels in numpy and a method whose maps are known functions of the pixels."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from wsss import evaluation
from wsss.data import Sample
from wsss.data.transforms import MEAN, STD, normalise, squash
from wsss.evaluation import EvalConfig, Request, all_scores, batches_of_one_size, evaluate, predict_masks
from wsss.experiments import Experiment
from wsss.maps import minmax_transcam
from wsss.methods.common import Method
from wsss.metrics import ConfusionMatrix, ThresholdSweep
from wsss.refine import dense_crf

CLASSES = 3
NATIVE = EvalConfig(
    eval_size=0,
    map_scales=(1.0,),
    decoder_scales=(1.0,),
    eval_flip=False,
    map_relu=(),
    threshold_cam=0.6,
    threshold_lam=0.3,
    threshold_fused=0.2,
    crf_gaussian=(3, 1),
    crf_bilateral=(4, 5, 20),
    train_images=0,
    decoder_crf=False,
)
SQUASHED = replace(
    NATIVE, eval_size=16, map_scales=(0.5, 1.0), decoder_scales=(1.0, 0.5), eval_flip=True, map_relu=("cam", "lam")
)
GIVEN = [Request("maps-given-labels", name) for name in ("cam", "cam_aux", "lam", "fused")]
PREDICTED = [Request("maps-predicted-labels", name) for name in ("cam", "lam")]
DECODER = Request("decoder")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# What the method gives: functions of normalised images (..., 3, H, W), arrays, on a grid half as fine. A ramp from left
# to right keeps a mirror image from giving the mirrored map.


def pooled(x):
    height, width = x.shape[-2:]
    x = x.reshape(*x.shape[:-2], height // 2, 2, width // 2, 2).mean((-3, -1))
    return x + np.linspace(0, 1, width // 2)


MAPS = {
    "cam": lambda x: pooled(x) - 0.5,
    "cam_aux": lambda x: -pooled(x),
    "lam": lambda x: pooled(x)[..., [1, 2, 0], :, :] ** 3,
}


def class_logits(x):
    return x.mean((-2, -1), keepdims=True)


def decoder_logits(x):
    x = pooled(x)
    return x[..., [0, 1, 2, 0], :, :] + 0.7 * x[..., [1, 2, 0, 2], :, :]


class Stub(Method):
    """A method with these maps that counts its forward passes by kind and batch shape."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def _apply_to(self, function, images):
        return torch.from_numpy(np.ascontiguousarray(function(images.double().numpy()))).float()

    def maps(self, images):
        self.calls["maps", tuple(images.shape)] += 1
        return {name: self._apply_to(f, images) for name, f in (MAPS | {"class_logits": class_logits}).items()}

    def segment(self, images):
        self.calls["segment", tuple(images.shape)] += 1
        return self._apply_to(decoder_logits, images)


class Toy(torch.utils.data.Dataset):
    """Images of two sizes, each channel bright or dark, with void pixels in the masks."""

    identity, classes = "toy", ("a", "b", "c")

    def __init__(self, split="train", sizes=((8, 12), (8, 12), (12, 8), (8, 12)), masks=True):
        self.split, self.samples = split, []
        rng = np.random.default_rng(0)
        for index, size in enumerate(sizes):
            bias = rng.permutation([50, 90, 150])[:, None, None]
            image = (bias + rng.integers(0, 100, (3, *size))).astype(np.uint8)
            mask = rng.choice([0, 1, 2, 255], size=size)
            label = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]][index], np.float32)
            mask = torch.from_numpy(mask) if masks else None
            self.samples.append(Sample(torch.from_numpy(image), torch.from_numpy(label), mask, str(index)))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


# The same in plain numpy, one image at a time, pixel by pixel.


def bilinear(x, size):
    """Bilinear resize of (..., h, w) with pixel centres at half coordinates, clamped at the border."""
    for axis, target in zip((-2, -1), size):
        length = x.shape[axis]
        place = np.clip((np.arange(target) + 0.5) * length / target - 0.5, 0, length - 1)
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, length - 1), place - low
        share = share[:, None] if axis == -2 else share
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def network_input(sample, config):
    x = (sample.image.numpy() / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    return bilinear(x, (config.eval_size,) * 2) if config.eval_size else x


def minmax(x):
    low, high = x.min((-2, -1), keepdims=True), x.max((-2, -1), keepdims=True)
    return (x - low) / (high - low + 1e-5)


def fused_map(name, sample, config):
    if name == "fused":
        return minmax(fused_map("cam", sample, config) * fused_map("lam", sample, config))
    x = network_input(sample, config)
    total = 0
    for scale in config.map_scales:
        scaled = bilinear(x, [int(scale * n) for n in x.shape[-2:]])
        merged = bilinear(MAPS[name](scaled), x.shape[-2:])
        if config.eval_flip:
            merged = np.maximum(merged, bilinear(MAPS[name](scaled[..., ::-1]), x.shape[-2:])[..., ::-1])
        total = total + (np.maximum(merged, 0) if name in config.map_relu else merged)
    return minmax(total)


def fused_logits(sample, config):
    x, best = network_input(sample, config), -np.inf
    for scale in config.decoder_scales:
        scaled = bilinear(x, [int(scale * n) for n in x.shape[-2:]])
        logits = bilinear(decoder_logits(scaled), sample.mask.shape)
        if config.eval_flip:
            logits = logits + bilinear(decoder_logits(scaled[..., ::-1]), sample.mask.shape)[..., ::-1]
        best = np.maximum(best, logits)
    return best


def present_classes(request, sample, config):
    given = request.protocol == "maps-given-labels"
    scores = sample.label.numpy() if given else class_logits(network_input(sample, config))[:, 0, 0]
    return [c for c in range(CLASSES) if scores[c] > 0]


def predicted_mask(request, sample, config):
    if request.map == "decoder":
        return fused_logits(sample, config).argmax(0)
    scores = bilinear(fused_map(request.map, sample, config), sample.mask.shape)
    threshold = request.threshold
    if threshold is None:
        own = {"lam": config.threshold_lam, "fused": config.threshold_fused}
        threshold = own.get(request.map, config.threshold_cam)
    mask = np.zeros(scores.shape[-2:], int)
    for i, j in np.ndindex(mask.shape):
        best = max(present_classes(request, sample, config), key=lambda c: scores[c, i, j], default=None)
        if best is not None and scores[best, i, j] > threshold:
            mask[i, j] = best + 1
    return mask


def expected_iou(predictions, samples):
    counts = np.zeros((CLASSES + 1, CLASSES + 1))
    for prediction, sample in zip(predictions, samples):
        for truth, guess in zip(sample.mask.numpy().ravel(), prediction.ravel()):
            if truth != 255:
                counts[truth, guess] += 1
    union = [counts[k].sum() + counts[:, k].sum() - counts[k, k] for k in range(CLASSES + 1)]
    return [counts[k, k] / union[k] if union[k] else np.nan for k in range(CLASSES + 1)]


@pytest.mark.parametrize("config", [NATIVE, SQUASHED], ids=["native", "squashed"])
def test_every_protocol_against_loops_over_pixels(config):
    dataset, requests = Toy(), [*GIVEN, *PREDICTED, DECODER, Request("maps-given-labels", "cam", threshold=0.3)]
    scores = evaluate(Stub(), dataset, requests, config, progress=False)
    assert list(scores) == [request.key for request in requests]
    for request in requests:
        iou = expected_iou([predicted_mask(request, s, config) for s in dataset.samples], dataset.samples)
        np.testing.assert_allclose(scores[request.key].iou, iou, rtol=1e-12, err_msg=request.key)
    assert len({tuple(s.iou.nan_to_num(-1).tolist()) for s in scores.values()}) == len(requests), "all differ"
    assert scores["decoder/decoder"].present.tolist() == [True, True, True, False], "void is no class"


def test_only_the_first_images_are_scored_when_asked():
    dataset = Toy()
    scores = evaluate(Stub(), dataset, GIVEN, NATIVE, images=3, progress=False)
    for request in GIVEN:
        masks = [predicted_mask(request, s, NATIVE) for s in dataset.samples[:3]]
        np.testing.assert_allclose(scores[request.key].iou, expected_iou(masks, dataset.samples[:3]), rtol=1e-12)


def test_the_classes_that_the_method_predicts_filter_the_maps(monkeypatch):
    method, dataset, lam = Stub(), Toy("test"), Request("maps-predicted-labels", "lam")
    for logits in product([-1.0, 1.0], repeat=CLASSES):
        column = np.array(logits)[:, None, None]
        monkeypatch.setitem(globals(), "class_logits", lambda x: np.repeat(column[None], len(x), 0))
        precision = evaluate(method, dataset, [lam], NATIVE, progress=False)[lam.key].precision
        appearing = [value > 0 for value in logits]
        assert (~precision[1:].isnan()).tolist() == appearing, "a class appears where its logit is above 0, only there"


def test_requests_share_one_forward_pass_a_scale():
    method, scales = Stub(), replace(NATIVE, map_scales=(1.0, 0.5), decoder_scales=(1.0, 1.5), eval_flip=True)
    sweep = [Request("maps-given-labels", "cam", threshold=t) for t in (0.1, 0.5, 0.9)]
    evaluate(method, Toy(), [*GIVEN, *PREDICTED, DECODER, *sweep], scales, progress=False)
    runs = [(3, (8, 12)), (1, (12, 8))]  # images of one size share a batch
    expected = Counter()
    for kind, factor in [("maps", 1), ("maps", 0.5), ("segment", 1), ("segment", 1.5)]:
        for images, size in runs:
            expected[kind, (2 * images, 3, *(int(factor * n) for n in size))] += 1
    assert method.calls == expected


def test_predicted_labels_come_from_the_images_own_size_whatever_the_scales():
    method = Stub()
    evaluate(method, Toy(), PREDICTED, replace(SQUASHED, map_scales=(0.5,)), progress=False)
    assert {shape[-1] for _, shape in method.calls} == {8, 16}


def test_a_network_on_patches_sees_whole_patches_of_images_at_their_own_size():
    method, config = Stub(), replace(NATIVE, decoder_scales=(1.0, 1.25), map_scales=(0.5, 1.0))
    method.patch_size = 4
    [sample] = Toy(sizes=[(9, 14)]).samples
    scores = all_scores(method, [sample], {"cam", "decoder"}, config)
    assert scores["decoder"].shape == (1, CLASSES + 1, 9, 14)
    assert set(method.calls) == {
        ("segment", (1, 3, 8, 16)),  # 9 x 14; 14 is half way between 12 and 16, and even wins
        ("segment", (1, 3, 12, 16)),  # 11 x 17
        ("maps", (1, 3, 4, 8)),  # 4 x 7
        ("maps", (1, 3, 8, 16)),
    }
    assert scores["labels"].shape == (1, CLASSES)
    tiny = evaluation.whole_patches(torch.rand(1, 3, 1, 1), 4)
    assert tiny.shape == (1, 3, 4, 4), "at least one patch"
    fitting = torch.rand(1, 3, 8, 12)
    assert evaluation.whole_patches(fitting, 4) is fitting


@pytest.mark.parametrize("name, variant", [("cam", "published"), ("apc", "published"), ("transcam", "published")])
def test_every_method_on_patches_takes_images_at_their_own_size(name, variant):
    """As COCO's recipes ask for, whose images have all sizes."""
    torch.manual_seed(0)
    method = Experiment(name, variant, "embedded").build(CLASSES, pretrained=False).eval()
    config = replace(NATIVE, decoder_scales=(1.0, 1.25, 1.5))
    [sample] = Toy(sizes=[(83, 61)]).samples
    names = {method.mask_map} | ({"decoder"} if method.segments else set())
    scores = all_scores(method, [sample], names, config)
    assert all(torch.isfinite(values).all() for values in scores.values())
    if method.segments:
        assert scores["decoder"].shape[-2:] == (83, 61)


def test_eval_size_squashes_what_the_network_sees():
    squashed, native = Stub(), Stub()
    evaluate(squashed, Toy(), [DECODER, *GIVEN], SQUASHED, progress=False)
    evaluate(native, Toy(), [DECODER, *GIVEN], NATIVE, progress=False)
    assert {shape[-2:] for _, shape in squashed.calls} == {(16, 16), (8, 8)}
    assert {shape[-2:] for _, shape in native.calls} == {(8, 12), (12, 8)}


@pytest.mark.parametrize("plain_request", [GIVEN[0], GIVEN[3], *PREDICTED], ids=lambda r: r.key)
def test_a_crf_refines_the_classes_that_may_appear(plain_request):
    dataset, request = Toy(), replace(plain_request, crf=True)
    scores = evaluate(Stub(), dataset, [request], SQUASHED, progress=False)[request.key]
    masks = []
    for sample in dataset.samples:
        kept = present_classes(request, sample, SQUASHED)
        maps = bilinear(fused_map(request.map, sample, SQUASHED), sample.mask.shape)[kept]
        background = 1 - maps.max(0, keepdims=True, initial=0)
        image, options = sample.image.permute(1, 2, 0), (SQUASHED.crf_gaussian, SQUASHED.crf_bilateral)
        refined = dense_crf(image, np.concatenate([background, maps]), 10, *options).argmax(0).numpy()
        masks.append(np.array([0, *(c + 1 for c in kept)])[refined])
    np.testing.assert_allclose(scores.iou, expected_iou(masks, dataset.samples), rtol=1e-12)
    plain = evaluate(Stub(), dataset, [plain_request], SQUASHED, progress=False)[plain_request.key]
    assert scores.iou.tolist() != plain.iou.tolist()


@pytest.mark.parametrize("label", [[0, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_no_absent_class_comes_out_of_the_crf(label):
    dataset, request = Toy(sizes=((8, 12),)), Request("maps-given-labels", "lam", crf=True)
    dataset.samples[0].label = torch.tensor(label, dtype=torch.float32)
    precision = evaluate(Stub(), dataset, [request], NATIVE, progress=False)[request.key].precision
    assert precision[1:][torch.tensor(label) == 0].isnan().all(), "never predicted"
    assert not precision[0].isnan()


def test_the_decoder_after_a_crf():
    dataset, request = Toy("test"), Request("decoder", crf=True)
    scores = evaluate(Stub(), dataset, [request, DECODER], NATIVE, progress=False)
    masks = []
    for sample in dataset.samples:
        logits = np.exp(fused_logits(sample, NATIVE))
        image, options = sample.image.permute(1, 2, 0), (NATIVE.crf_gaussian, NATIVE.crf_bilateral)
        masks.append(dense_crf(image, logits / logits.sum(0), 10, *options).argmax(0).numpy())
    refined, plain = scores["decoder/decoder+crf"].iou, scores["decoder/decoder"].iou
    np.testing.assert_allclose(refined, expected_iou(masks, dataset.samples), rtol=1e-12)
    assert refined.tolist() != plain.tolist()


def test_labels_on_a_held_out_split_only_on_request():
    with pytest.raises(ValueError, match="maps-given-labels on the split .val. .* at test time; use maps-predicted"):
        evaluate(Stub(), Toy("val"), [DECODER, *GIVEN], NATIVE, progress=False)
    asked = evaluate(Stub(), Toy("val"), GIVEN, NATIVE, labels_on_held_out=True, progress=False)
    usual = evaluate(Stub(), Toy("train_aug"), GIVEN, NATIVE, progress=False)
    assert all(torch.equal(asked[key].iou, usual[key].iou) for key in usual)
    assert evaluate(Stub(), Toy("val"), [DECODER, *PREDICTED], NATIVE, progress=False)


def test_a_split_without_masks_is_refused():
    with pytest.raises(ValueError, match="toy: the split 'test' has no masks"):
        evaluate(Stub(), Toy("test", masks=False), [DECODER], NATIVE, progress=False)


def test_a_method_without_decoder_is_refused_and_its_maps_are_not():
    method = Stub()
    method.segment = lambda images: None
    with pytest.raises(ValueError, match="Stub has no decoder: the protocol `decoder` does not apply"):
        evaluate(method, Toy(), [DECODER], NATIVE, progress=False)
    assert evaluate(method, Toy(), GIVEN, NATIVE, progress=False)


def test_an_unknown_map_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no map \"attention\"; this method returns cam, cam_aux, class_logits, lam"):
        evaluate(Stub(), Toy(), [Request("maps-given-labels", "attention")], NATIVE, progress=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"protocol": "oracle"}, "'oracle' is not one of decoder, maps-given-labels, maps-predicted-labels"),
        ({"protocol": "decoder", "map": "cam"}, "'decoder' cannot score the map 'cam'"),
        ({"protocol": "maps-given-labels"}, "'maps-given-labels' cannot score the map 'decoder'"),
        ({"protocol": "decoder", "threshold": 0.5}, "decoder/decoder@0.5: only a map without a CRF has a threshold"),
        ({"protocol": "maps-given-labels", "map": "cam", "crf": True, "threshold": 0.5}, "leave `threshold` out"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_no_requests_is_an_error():
    with pytest.raises(ValueError, match="no requests"):
        evaluate(Stub(), Toy(), [], NATIVE, progress=False)


def test_keys_name_protocol_map_crf_and_threshold():
    assert DECODER.key == "decoder/decoder"
    assert Request("maps-given-labels", "lam", crf=True).key == "maps-given-labels/lam+crf"
    assert Request("maps-predicted-labels", "cam", threshold=0.25).key == "maps-predicted-labels/cam@0.25"


def test_thresholds_by_map_name():
    assert [NATIVE.threshold(name) for name in ("cam", "cam_aux", "lam", "fused")] == [0.6, 0.6, 0.3, 0.2]


def test_golden_seco_seg_inference_fusion_as_a_protocol(golden):
    """Squares of the recorded sizes go in; what comes out at the size of the truth is the recorded prediction."""
    arrays = golden("seco_seg_inference_fusion_released")
    scales, sizes, prediction = arrays["scales"].tolist(), arrays["call_hw"].tolist(), arrays["prediction"][0].long()
    method, dataset = Stub(), Toy(sizes=())
    height, width = arrays["label_hw"].tolist()
    dataset.classes = tuple(map(str, range(arrays["fused_logits"].shape[1] - 1)))
    dataset.samples = [Sample(torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(1), prediction, "golden")]
    seen = []

    def segment(images):
        seen.append(list(images.shape[2:]))
        return arrays[f"logits_{len(seen) - 1}"]

    method.segment = segment
    config = replace(NATIVE, eval_size=round(sizes[0][0] / scales[0]), decoder_scales=tuple(scales), eval_flip=True)
    scores = evaluate(method, dataset, [DECODER], config, progress=False)[DECODER.key]
    assert seen == sizes
    assert scores.pixel_accuracy == 1


class Probable(Stub):
    """Its map "patch" has a background channel."""

    probability_maps = ("patch",)

    def maps(self, images):
        return super().maps(images) | {"patch": self._apply_to(patch_probabilities, images)}


def patch_probabilities(x):
    scores = np.exp(2 * decoder_logits(x))
    return scores / scores.sum(-3, keepdims=True)


def merged_mask(request, sample, config, crf=False):
    """The arg max of averaged probabilities after the labels are merged in, and before that the CRF's input."""
    x, total = network_input(sample, config), 0
    for scale in config.map_scales:
        scaled = bilinear(x, [int(scale * n) for n in x.shape[-2:]])
        own = patch_probabilities(scaled)
        if config.eval_flip:
            own = (own + patch_probabilities(scaled[..., ::-1])[..., ::-1]) / 2
        total = total + (own if scale == config.map_scales[0] else bilinear(own, total.shape[-2:]))
    present = [0, *(c + 1 for c in present_classes(request, sample, config))]
    merged = np.zeros_like(total)
    for c in present:
        merged[c] = total[c] / total[c].max()
    merged = bilinear(merged / merged.sum(0), sample.mask.shape)
    if not crf:
        return merged.argmax(0)
    options = (config.crf_gaussian, config.crf_bilateral)
    refined = dense_crf(sample.image.permute(1, 2, 0), merged[present], 10, *options).argmax(0).numpy()
    return np.array(present)[refined]


@pytest.mark.parametrize("crf", [False, True], ids=["plain", "crf"])
@pytest.mark.parametrize("config", [NATIVE, SQUASHED], ids=["native", "squashed"])
@pytest.mark.parametrize("protocol", ["maps-given-labels", "maps-predicted-labels"])
def test_probabilities_with_a_background_are_merged_with_labels(protocol, config, crf):
    dataset, request = Toy(), Request(protocol, "patch", crf=crf)
    scores = evaluate(Probable(), dataset, [request], config, progress=False)[request.key]
    masks = [merged_mask(request, sample, config, crf) for sample in dataset.samples]
    np.testing.assert_allclose(scores.iou, expected_iou(masks, dataset.samples), rtol=1e-12)


def test_probabilities_and_other_maps_in_one_call():
    both = [Request("maps-given-labels", "patch"), *GIVEN]
    scores = evaluate(Probable(), Toy(), both, SQUASHED, progress=False)
    for request in both:
        alone = evaluate(Probable(), Toy(), [request], SQUASHED, progress=False)[request.key]
        assert torch.equal(scores[request.key].iou.nan_to_num(-1), alone.iou.nan_to_num(-1))


def test_no_threshold_for_a_map_with_a_background():
    swept = Request("maps-given-labels", "patch", threshold=0.5)
    with pytest.raises(ValueError, match="maps-given-labels/patch@0.5: the map 'patch' has a background channel"):
        evaluate(Probable(), Toy(), [swept], NATIVE, progress=False)


# ---------------------------------------------------------------------------------------- other ways to fuse and choose

SUMMED = replace(NATIVE, eval_size=16, map_scales=(0.5, 1.0, 1.5), map_fusion="sum")


def summed_map(name, sample, config):
    """TransCAM's fusion: the maps of squashed images and their mirror images, added up and only then rectified."""
    total = 0
    for scale in config.map_scales:
        x = normalise(squash(sample.image, round(scale * config.eval_size))).double().numpy()
        total = total + bilinear(MAPS[name](x), sample.mask.shape)
        if config.eval_flip:
            total = total + bilinear(MAPS[name](x[..., ::-1]), sample.mask.shape)[..., ::-1]
    return minmax_transcam(torch.from_numpy(np.maximum(total, 0))[None])[0].numpy()


@pytest.mark.parametrize("flip", [False, True])
def test_maps_that_are_summed_over_squashed_images(flip):
    config, dataset = replace(SUMMED, eval_flip=flip), Toy()
    for samples in batches_of_one_size(dataset, range(len(dataset))):
        scores = all_scores(Stub(), samples, ["cam", "lam"], config)
        for name in ("cam", "lam"):
            expected = np.stack([summed_map(name, sample, config) for sample in samples])
            np.testing.assert_allclose(scores[name], expected, rtol=1e-4, atol=1e-4)
    request = Request("maps-given-labels", "lam")
    scores = evaluate(Stub(), dataset, [request], config, progress=False)[request.key]
    masks = []
    for sample in dataset.samples:
        maps = summed_map("lam", sample, config).astype(np.float32)
        maps[sample.label.numpy() == 0] = -np.inf
        masks.append(np.where(maps.max(0) > np.float32(config.threshold_lam), maps.argmax(0) + 1, 0))
    np.testing.assert_allclose(scores.iou, expected_iou(masks, dataset.samples), rtol=1e-12)


def test_predicted_labels_of_summed_maps_come_from_the_squashed_image():
    dataset, request = Toy("test"), Request("maps-predicted-labels", "lam")
    method = Stub()
    evaluate(method, dataset, [request], SUMMED, progress=False)
    assert {shape[-2:] for _, shape in method.calls} == {(8, 8), (16, 16), (24, 24)}
    for sample in dataset.samples:
        found = all_scores(method, [sample], ["lam"], SUMMED)["labels"][0]
        logits = class_logits(normalise(squash(sample.image, 16)).double().numpy())[:, 0, 0]
        assert found.tolist() == (logits > 0).tolist()


def test_decoder_logits_may_be_averaged_over_scales():
    """One scale in its own size and no mirror image is the plain decoder; the mean of two lies between them."""
    sample = Toy(sizes=((8, 12),)).samples[0]
    mean = replace(NATIVE, decoder_fusion="mean")
    logits = lambda config: all_scores(Stub(), [sample], ["decoder"], config)["decoder"]
    one, half, both = (logits(replace(mean, decoder_scales=scales)) for scales in ((1.0,), (0.5,), (1.0, 0.5)))
    torch.testing.assert_close(both, (one + half) / 2)
    mirrored = replace(sample, image=sample.image.flip(-1))
    other = all_scores(Stub(), [mirrored], ["decoder"], mean)["decoder"].flip(-1)
    torch.testing.assert_close(logits(replace(mean, eval_flip=True)), (one + other) / 2)
    x = network_input(sample, mean)
    grid = torch.from_numpy(decoder_logits(x)).float()[None]
    aligned = torch.nn.functional.interpolate(grid, (8, 12), mode="bilinear", align_corners=True)
    torch.testing.assert_close(one, aligned, rtol=1e-4, atol=1e-4)


def test_a_second_network_is_scored_as_a_decoder():
    decoder, retrained = (
        evaluate(Stub(), Toy("test"), [Request(name), Request(name, crf=True)], NATIVE, progress=False)
        for name in ("decoder", "retrained")
    )
    assert list(retrained) == ["retrained/decoder", "retrained/decoder+crf"]
    for theirs, own in zip(decoder.values(), retrained.values()):
        assert torch.equal(theirs.iou, own.iou)


def test_the_crf_takes_the_iterations_of_the_recipe():
    dataset, request = Toy("test"), Request("decoder", crf=True)
    found = {}
    for iterations in (0, 1, 10):
        config = replace(NATIVE, crf_iterations=iterations)
        assert config.crf == {"iterations": iterations, "gaussian": (3, 1), "bilateral": (4, 5, 20)}
        scores = evaluate(Stub(), dataset, [request], config, progress=False)[request.key]
        masks = []
        for sample in dataset.samples:
            logits = torch.from_numpy(fused_logits(sample, NATIVE)).float()
            posterior = dense_crf(sample.image.permute(1, 2, 0), logits.softmax(0), iterations, (3, 1), (4, 5, 20))
            masks.append(posterior.argmax(0).numpy())
        np.testing.assert_allclose(scores.iou, expected_iou(masks, dataset.samples), rtol=1e-12)
        found[iterations] = tuple(scores.iou.tolist())
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"map_fusion": "mean"}, "recipe field map_fusion 'mean' is unknown; choose one of max, sum"),
        ({"decoder_fusion": "sum"}, "recipe field decoder_fusion 'sum' is unknown; choose one of max, mean"),
        ({"map_fusion": "sum"}, 'eval_size = 0: with map_fusion = "sum" images are squashed, so it needs a side'),
        ({"threshold_split": "train"}, "threshold_split = 'train': seeds are scored there"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(NATIVE, **change)


THRESHOLDS = (0.0, 0.25, 0.5, 0.6, 0.9)


@pytest.mark.parametrize("config", [NATIVE, SQUASHED, SUMMED], ids=["native", "squashed", "summed"])
def test_a_sweep_says_what_predictions_at_every_threshold_score(config):
    dataset = Toy()
    sweeps = {name: ThresholdSweep(CLASSES + 1, THRESHOLDS) for name in ("cam", "lam")}
    single = Request("maps-given-labels", "cam")
    alone = evaluate(Stub(), dataset, [single], config, progress=False)
    assert evaluate(Stub(), dataset, [], config, progress=False, sweeps=sweeps) == {}
    for name, sweep in sweeps.items():
        miou, iou = sweep.curve()
        for index, threshold in enumerate(THRESHOLDS):
            matrix, request = ConfusionMatrix(CLASSES + 1), Request("maps-given-labels", name, threshold=threshold)
            for samples in batches_of_one_size(dataset, range(len(dataset))):
                scores = all_scores(Stub(), samples, [name], config)
                for mask, sample in zip(predict_masks(request, scores, samples, config), samples):
                    matrix.update(mask, sample.mask)
            expected = matrix.scores()
            torch.testing.assert_close(iou[index], expected.iou, equal_nan=True)
            assert miou[index].item() == pytest.approx(expected.miou)
    torch.testing.assert_close(sweeps["cam"].curve()[1][3], alone[single.key].iou, equal_nan=True)


def test_a_sweep_shares_the_forward_passes_and_the_images_of_the_requests():
    method, sweep = Stub(), ThresholdSweep(CLASSES + 1, THRESHOLDS)
    with_sweep = evaluate(method, Toy(), GIVEN, NATIVE, images=3, progress=False, sweeps={"lam": sweep})
    assert set(method.calls.values()) == {1}, "one pass a batch"
    without = evaluate(Stub(), Toy(), GIVEN, NATIVE, images=3, progress=False)
    assert all(torch.equal(with_sweep[key].iou, without[key].iou) for key in without)
    counted = sum((sample.mask != 255).sum().item() for sample in Toy().samples[:3])
    assert sweep.counts.sum() == counted


def test_a_sweep_on_a_held_out_split_needs_permission():
    sweeps = {"cam": ThresholdSweep(CLASSES + 1, THRESHOLDS)}
    with pytest.raises(ValueError, match="maps-given-labels on the split 'val' would use its image-level ground truth"):
        evaluate(Stub(), Toy("val"), [], NATIVE, progress=False, sweeps=sweeps)
    assert not sweeps["cam"].counts.any()
    evaluate(Stub(), Toy("val"), [], NATIVE, labels_on_held_out=True, progress=False, sweeps=sweeps)
    assert sweeps["cam"].counts.any()


def test_batches_hold_every_image_once_and_one_size_each(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 3)
    monkeypatch.setattr(evaluation, "WAITING", 5)
    random = np.random.default_rng(0)
    widths, read = random.integers(1, 5, 40).tolist(), []
    samples = [Sample(torch.zeros(3, 2, width), None, None, str(index)) for index, width in enumerate(widths)]

    class Reading(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    given = 0
    for batch in batches_of_one_size(Reading(samples), range(4, 40)):
        given += len(batch)
        assert len(batch) <= 3 and len({sample.image.shape for sample in batch}) == 1
        assert len(read) - given < 5, "few images wait"
    assert read == list(range(4, 40)) and given == 36
    names = [s.name for batch in batches_of_one_size(samples, [7, 3, 9]) for s in batch]
    assert sorted(names) == ["3", "7", "9"]
