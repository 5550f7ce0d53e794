import itertools
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss.affinity import psa_background
from wsss.data.transforms import MEAN, STD, denormalise
from wsss.maps import UNCERTAIN, add_background, resize
from wsss.refine import (
    DEEPLAB_CRF,
    IN_FLIGHT,
    LABEL_CRF,
    PAR,
    PSA_CRF,
    CRFJob,
    crf_labels,
    dense_crf,
    label_probabilities,
    refine_with_background,
)

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, {"rtol": 0, "atol": 1e-5})])
def test_golden_more_par_outputs(golden, dtype, tolerance):
    data = golden("more_par_released")
    runs = {key: re.fullmatch(r"out_iter(\d+)(_from_low)?", key) for key in data}
    assert sum(match is not None for match in runs.values()) == 3
    for key, match in runs.items():
        if match:
            par = PAR(data["dilations"].tolist(), iterations=int(match[1]))
            masks = data["mask_low"] if match[2] else data["mask"]
            torch.testing.assert_close(par(data["image"].to(dtype), masks.to(dtype)), data[key].to(dtype), **tolerance)


def test_golden_more_par_weights(golden):
    data = golden("more_par_released")
    par = PAR(data["dilations"].tolist())
    torch.testing.assert_close(par.position_weight(data["image"]), data["position_weight"], **EXACT)
    affinity = par.affinity(data["image"][:1])[0].float()
    torch.testing.assert_close(affinity, data["affinity_first_image"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 0.0), (torch.float32, 0.001)])
@pytest.mark.parametrize("key", ["label", "label_high65"])
def test_golden_more_refine_bkg(golden, key, dtype, allowed):
    data = golden("more_refine_bkg_released")
    high = data["high"] if key == "label" else int(key.removeprefix("label_high")) / 100
    cams = data["valid_cam"]
    torch.testing.assert_close(cams, data["cam"] * data["labels"][:, :, None, None], **EXACT)
    label = refine_with_background(
        PAR(),
        data["image"].to(dtype),
        cams.to(dtype),
        data["labels"].to(dtype),
        high,
        data["low"],
        data["down_scale"],
    )
    assert label.dtype == torch.int64
    assert (label != data[key]).double().mean() <= allowed


def crf_settings(data):
    return {
        "iterations": data["iters"],
        "gaussian": (data["pos_w"], data["pos_xy_std"]),
        "bilateral": (data["bi_w"], data["bi_xy_std"], data["bi_rgb_std"]),
    }


def test_golden_more_crf_of_class_maps(golden):
    data = golden("more_crf_released")
    posterior = dense_crf(data["image"], add_background(data["lam"]), **crf_settings(data))
    torch.testing.assert_close(posterior, data["lam_posterior"], rtol=0, atol=1e-3)
    classes = F.pad(data["keys"] + 1, (1, 0))
    assert (classes[posterior.argmax(0)] == data["lam_label"]).double().mean() >= 0.995


def test_golden_more_crf_of_the_decoder(golden):
    data = golden("more_crf_released")
    posterior = dense_crf(data["image"].numpy(), data["seg_logits"].softmax(0).numpy(), **crf_settings(data))
    torch.testing.assert_close(posterior, data["seg_posterior"], rtol=0, atol=1e-3)
    assert (posterior.argmax(0) == data["seg_label"]).double().mean() >= 0.995


def par_by_loops(image, mask, dilations, iterations):
    """PAR of one image, one pixel and one neighbour at a time: image (3, H, W), mask (M, H, W)."""
    height, width = image.shape[1:]
    offsets = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distance = torch.tensor([math.sqrt(dy**2 + dx**2) for dy, dx in offsets], dtype=image.dtype)
    position = torch.softmax(-((distance / (distance.std() + 1e-8) / 0.3) ** 2), 0)

    def around(values, y, x):
        return torch.stack(
            [values[:, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)] for dy, dx in offsets]
        )

    weights = {}
    for y in range(height):
        for x in range(width):
            neighbours = around(image, y, x)
            ratio = (neighbours - image[:, y, x]) / (neighbours.std(0) + 1e-8) / 0.3
            weights[y, x] = torch.softmax(-(ratio**2).mean(1), 0) + 0.01 * position
    for _ in range(iterations):
        mask = torch.stack(
            [torch.stack([weights[y, x] @ around(mask, y, x) for x in range(width)], 1) for y in range(height)], 1
        )
    return mask


def test_par_equals_plain_loops_also_where_dilations_exceed_the_image():
    torch.manual_seed(0)
    images, masks = torch.rand(2, 3, 5, 6, dtype=torch.float64), torch.rand(2, 2, 5, 6, dtype=torch.float64)
    images[1, :, :3] = 0.5
    refined = PAR((1, 3, 8), iterations=2)(images, masks)
    for image, mask, ours in zip(images, masks, refined, strict=True):
        torch.testing.assert_close(ours, par_by_loops(image, mask, (1, 3, 8), 2), **EXACT)


def test_par_mass_colour_units_and_inputs():
    torch.manual_seed(0)
    images, masks = torch.rand(1, 3, 12, 9), torch.rand(1, 2, 12, 9)
    before = masks.clone()
    par = PAR((1, 2), iterations=4)
    refined = par(images, masks)
    assert torch.equal(masks, before)
    torch.testing.assert_close(par(255 * images, masks), refined)
    torch.testing.assert_close(par(images, torch.ones(1, 1, 12, 9)), torch.full((1, 1, 12, 9), 1.01**4))
    assert torch.equal(PAR((1, 2), iterations=0)(images, masks), masks)


def test_par_gradient_reaches_the_masks():
    torch.manual_seed(0)
    images, masks = torch.rand(1, 3, 4, 5, dtype=torch.float64), torch.rand(1, 2, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda leaf: PAR((1, 2), iterations=2)(images, leaf), masks.requires_grad_())


def refine_by_loops(par, image, cam, label, high, low, down_scale):
    """The same for one image (3, H, W), one background score at a time, with its own classes only."""
    size = image.shape[1:]
    small = [length // down_scale for length in size]
    classes = torch.cat([torch.zeros(1, dtype=torch.long), label.nonzero()[:, 0] + 1])
    maps = []
    for background in (high, low):
        scores = torch.cat([torch.full((1, *size), background), cam[label > 0]])[None]
        refined = par(resize(image[None], small), resize(scores, small).softmax(1))
        maps.append(classes[resize(refined, size).argmax(1)[0]])
    result = maps[0].clone()
    result[maps[0] == 0] = 255
    result[(maps[0] == 0) & (maps[1] == 0)] = 0
    return result


def test_refinement_of_a_batch_equals_that_of_each_image_alone():
    torch.manual_seed(0)
    par = PAR((1, 2, 4), iterations=3)
    images, cams = torch.rand(4, 3, 20, 26), torch.rand(4, 6, 20, 26)
    labels = torch.tensor(
        [[0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]], dtype=torch.float32
    )
    batch = refine_with_background(par, images, cams, labels, 0.7, 0.25)
    assert set(batch.unique().tolist()) >= {0, 1, 2, 6, 255}
    for i in range(4):
        assert torch.equal(batch[i], refine_by_loops(par, images[i], cams[i], labels[i], 0.7, 0.25, 2)), i
    assert (batch[2] == 0).all()
    assert (refine_with_background(par, images[2:3], cams[2:3], labels[2:3], 0.7, 0.25) == 0).all()


def test_crf_without_pairwise_terms_normalises_the_probabilities():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    probabilities = rng.uniform(0.1, 1, (3, 6, 7)).astype(np.float32)
    posterior = dense_crf(image, probabilities, iterations=3, gaussian=(0, 1), bilateral=(0, 10, 5))
    expected = torch.from_numpy(probabilities / probabilities.sum(0))
    torch.testing.assert_close(posterior, expected, rtol=0, atol=1e-5)


def mean_field(image, probabilities, iterations, gaussian, bilateral):
    """Dense CRF with exact kernels, symmetrically normalised; probabilities (K, H, W)."""
    classes, height, width = probabilities.shape
    y, x = np.mgrid[:height, :width]
    position = np.stack([y, x], -1).reshape(-1, 2).astype(float)
    colour = image.reshape(-1, 3).astype(float)
    appearance = np.concatenate([position / bilateral[1], colour / bilateral[2]], 1)
    pairwise = np.zeros((height * width,) * 2)
    for features, weight in ((position / gaussian[1], gaussian[0]), (appearance, bilateral[0])):
        kernel = np.exp(-((features[:, None] - features) ** 2).sum(-1) / 2)
        norm = 1 / np.sqrt(kernel.sum(1))
        pairwise += weight * norm[:, None] * kernel * norm
    unary = np.log(probabilities.clip(1e-5, 1)).reshape(classes, -1)
    posterior = torch.from_numpy(unary).softmax(0).numpy()
    for _ in range(iterations):
        posterior = torch.from_numpy(unary + posterior @ pairwise).softmax(0).numpy()
    return posterior.reshape(classes, height, width)


def test_crf_follows_the_exact_mean_field():
    # pydensecrf filters approximately, so only labels are compared, on an image of two areas with wrong pixels.
    rng = np.random.default_rng(0)
    image = np.full((16, 16, 3), 60, np.uint8)
    image[:, 8:] = (200, 120, 40)
    image += rng.integers(0, 6, image.shape, dtype=np.uint8)
    truth = np.zeros((16, 16), int)
    truth[:, 8:] = 1
    wrong = rng.random((16, 16)) < 0.15
    foreground = np.where(truth ^ wrong, 0.7, 0.3)
    probabilities = np.stack([1 - foreground, foreground])
    settings = {"iterations": 10, "gaussian": (3, 1), "bilateral": (4, 67, 3)}
    exact = mean_field(image, probabilities, **settings).argmax(0)
    ours = dense_crf(image, probabilities, **settings).argmax(0).numpy()
    assert (probabilities.argmax(0) != truth).mean() > 0.1
    assert (ours == exact).mean() >= 0.99
    assert (ours == truth).mean() >= 0.99


def test_a_missing_pydensecrf_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pip install .*pydensecrf==1.0rc3"):
        dense_crf(np.zeros((4, 4, 3), np.uint8), np.full((2, 4, 4), 0.5))


def test_bad_input_is_named():
    images, cams, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 8, 8), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="dilations"):
        PAR(dilations=())
    with pytest.raises(ValueError, match="iterations"):
        PAR(iterations=-1)
    with pytest.raises(ValueError, match=r"masks \(5, 8, 8\)"):
        PAR()(images, cams[0])
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\)"):
        refine_with_background(PAR(), images, cams, labels[:, :4], 0.7, 0.25)
    with pytest.raises(ValueError, match="resize the cams"):
        refine_with_background(PAR(), images[..., :4], cams, labels, 0.7, 0.25)
    with pytest.raises(ValueError, match="cannot be reduced by 9"):
        refine_with_background(PAR(), images, cams, labels, 0.7, 0.25, down_scale=9)
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        dense_crf(torch.zeros(8, 8, 3), torch.full((2, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"expected \(K, H, W\) with the image's H and W, \(8, 8\)"):
        dense_crf(torch.zeros(8, 8, 3, dtype=torch.uint8), torch.full((2, 4, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_seco_par(golden, dtype):
    data = golden("seco_par_released")
    for size in ("full", "small"):
        par = PAR(data[f"dilations_{size}"].tolist(), data[f"num_iter_{size}"])
        refined = par(data["images"].to(dtype), data["masks"].to(dtype))
        torch.testing.assert_close(refined, data[f"refined_{size}"].to(dtype), rtol=0, atol=1e-5)


def test_golden_seco_refine(golden):
    """Labels as `Cam` makes them: PAR sees whole grey levels, and padding gets no label."""
    data = golden("seco_refine_released")
    grey_levels = (255 * data["images_01"]).round()
    # The arrays leave 0..255, which no image does, and the reference lets those values wrap around.
    ours = denormalise(data["images_normalised"])
    different = ours.trunc().remainder(256) != grey_levels
    assert different.double().mean() < 1e-3, "but for values that rounding moves past a whole number"
    inside = (ours >= 0) & (ours <= 255)
    assert (ours.clamp(0, 255).floor() - grey_levels)[inside].abs().max() <= 1
    label = refine_with_background(
        PAR(), grey_levels, data["valid_cam"], data["image_labels"], data["high_threshold"], data["low_threshold"]
    )
    for one, (top, bottom, left, right) in zip(label, data["img_box"].tolist(), strict=True):
        outside = torch.ones_like(one, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        one[outside] = UNCERTAIN
    wrong = label != data["refined_label"]
    assert not wrong[data["stable"]].any()
    assert wrong.double().mean() <= 0.003


def test_golden_seco_crf(golden):
    data = golden("seco_crf_released")
    posterior = dense_crf(
        data["image"],
        data["probabilities"],
        iterations=data["iterations"],
        gaussian=(data["pos_weight"], data["pos_xy_std"]),
        bilateral=(data["bilateral_weight"], data["bilateral_xy_std"], data["bilateral_rgb_std"]),
    )
    torch.testing.assert_close(posterior, data["posterior"], rtol=0, atol=1e-4)
    assert (posterior.argmax(0) == data["prediction"]).double().mean() >= 0.995


@pytest.mark.parametrize(
    ("settings", "key"), [(LABEL_CRF, "params_label"), (PSA_CRF, "params_prob"), (DEEPLAB_CRF, "params_seg")]
)
def test_golden_transcam_crf_settings(golden, settings, key):
    gaussian_weight, gaussian_width = settings["gaussian"]
    weight, width, grey_levels = settings["bilateral"]
    ours = [settings["iterations"], gaussian_width, gaussian_weight, width, grey_levels, weight]
    assert ours == golden("transcam_crf")[key][:6].tolist()


def test_golden_transcam_crf_of_labels(golden):
    data = golden("transcam_crf")
    num_labels = 21
    probabilities = label_probabilities(data["label_in"], num_labels, data["params_label"][6].item())
    posterior = dense_crf(data["img"], probabilities, **LABEL_CRF)
    torch.testing.assert_close(posterior[data["classes"]], data["label_crf_q"], rtol=0, atol=1e-3)
    jobs = [CRFJob("golden", data["img"], data["label_in"])]
    (label,) = crf_labels(jobs, LABEL_CRF, num_labels, workers=1, progress=False)
    assert (label != data["label_crf_out"]).double().mean() <= 0.002


def test_golden_transcam_crf_of_probabilities(golden):
    data = golden("transcam_crf")
    for settings, key in ((PSA_CRF, "prob_crf_q"), (DEEPLAB_CRF, "seg_crf_q")):
        posterior = dense_crf(data["img"], data["prob_in"], **settings)
        torch.testing.assert_close(posterior, data[key], rtol=0, atol=1e-3)
    cams = data["alpha_cam"]
    for alpha in (4, 32):
        planes = torch.cat([psa_background(cams[None], alpha)[0], cams])
        posterior = dense_crf(data["img"], planes, **PSA_CRF)
        torch.testing.assert_close(posterior, data[f"alpha{alpha}_crf_q"], rtol=0, atol=1e-3)


def test_golden_transcam_crf_of_a_segmentation(golden):
    data = golden("transcam_msfuse")
    # The reference normalises in float64, denormalises in float32 and truncates: many grey levels end 1 too low.
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float64)[..., None, None]
    normalised = (data["img"].permute(2, 0, 1).double() / 255 - mean) / std
    different = denormalise(normalised.float()).byte().int() - data["seg_img_denorm"].int()
    assert different.abs().max() <= 1
    assert (different != 0).double().mean() < 0.01
    image = data["seg_img_denorm"].permute(1, 2, 0)
    posterior = dense_crf(image, data["seg_prob"], **DEEPLAB_CRF)
    torch.testing.assert_close(posterior, data["seg_crf_q"], rtol=0, atol=1e-3)
    assert (posterior.argmax(0) != data["seg_pred_crf"]).double().mean() <= 0.002
    assert torch.equal(data["seg_prob"].argmax(0), data["seg_pred_nocrf"].long())


def crf_problem(seed, height=12, width=15, classes=4):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.uniform(0.1, 1, (classes, height, width)).astype(np.float32)


def test_classes_of_equal_probabilities_are_computed_as_one(monkeypatch):
    image, planes = crf_problem(0)
    copies = np.r_[0, 1, 2, 0, 3, 0, 2]
    # Few iterations: on noise, many of them amplify rounding errors, also those of another order of the classes.
    settings = LABEL_CRF | {"iterations": 3}
    posterior, alone = dense_crf(image, planes[copies], **settings), dense_crf(image, planes, **settings)
    monkeypatch.setattr("wsss.refine._distinct", lambda p: (p, np.ones(len(p), np.float32), np.arange(len(p))))
    torch.testing.assert_close(posterior, dense_crf(image, planes[copies], **settings), rtol=0, atol=1e-5)
    assert (posterior[[0, 1, 2, 4]] - alone).abs().max() > 0.1, "copies count"


def test_label_probabilities_by_hand():
    probabilities = label_probabilities(np.array([[0, 2]], np.uint8), 4, certainty=0.4)
    expected = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.2, 0.2, 0.4, 0.2]]).T[:, None]
    torch.testing.assert_close(probabilities, expected)
    with pytest.raises(ValueError, match=r"values 0..255; expected \(H, W\) with 0..20"):
        label_probabilities(torch.tensor([[0, 255]]), 21)
    with pytest.raises(ValueError, match=r"labels \(2,\)"):
        label_probabilities(torch.tensor([0, 1]), 21)
    with pytest.raises(ValueError, match="certainty is 1.0"):
        label_probabilities(torch.tensor([[0]]), 21, 1.0)


def crf_jobs(count):
    """Images of different sizes, whose classes are no plane numbers."""
    for index in range(count):
        image, planes = crf_problem(index, height=10 + index)
        yield CRFJob(f"image {index}", torch.from_numpy(image), planes, torch.tensor([0, 3, 7, 11]))


def test_crf_in_processes_equals_one_by_one_and_keeps_the_order():
    count = 7
    expected = []
    for job in crf_jobs(count):
        posterior = dense_crf(job.image, job.scores, **PSA_CRF)
        expected.append(job.classes[posterior.argmax(0)])
    for workers in (1, 2):
        found = list(crf_labels(crf_jobs(count), PSA_CRF, workers=workers, progress=False))
        assert len(found) == count
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), workers
        assert found[0].dtype == torch.int64


@pytest.mark.parametrize("workers", [1, 2])
def test_crf_reads_only_a_few_images_ahead(workers):
    read = []

    def jobs():
        for index in itertools.count():
            read.append(index)
            yield CRFJob(str(index), *crf_problem(index))

    labels = crf_labels(jobs(), DEEPLAB_CRF, workers=workers, progress=False)
    for taken in range(1, 4):
        next(labels)
        assert len(read) <= taken + IN_FLIGHT * workers
    labels.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_image_is_named(workers):
    image, planes = crf_problem(0)
    jobs = [CRFJob("2007_000032", image, planes), CRFJob("2007_000039", image, planes[:, 1:])]
    labels = crf_labels(jobs, DEEPLAB_CRF, workers=workers, progress=False)
    next(labels)
    with pytest.raises(RuntimeError, match=r"2007_000039: dense_crf: probabilities have shape \(4, 11, 15\)"):
        next(labels)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_dead_worker_is_told():
    image, planes = crf_problem(0)
    lethal = np.array([Deadly()], dtype=object)
    with pytest.raises(RuntimeError, match="a worker died while big was waited for.*fewer workers"):
        list(crf_labels([CRFJob("big", image, planes, lethal)], DEEPLAB_CRF, workers=2, progress=False))


def test_crf_shows_its_progress(capfd):
    image, planes = crf_problem(0)
    jobs = [CRFJob("one", image, planes), CRFJob("two", image, planes)]
    list(crf_labels(jobs, DEEPLAB_CRF, workers=1))
    assert "/2" in capfd.readouterr().err
    list(crf_labels(iter(jobs), DEEPLAB_CRF, workers=1, total=2))
    assert "/2" in capfd.readouterr().err
    list(crf_labels(jobs, DEEPLAB_CRF, workers=1, progress=False))
    assert not capfd.readouterr().err
    with pytest.raises(ValueError, match="workers is 0"):
        list(crf_labels(jobs, DEEPLAB_CRF, workers=0))
