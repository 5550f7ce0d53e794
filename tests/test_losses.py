import pytest
import torch
import torch.nn.functional as F

from wsss import losses
from wsss.data.transforms import denormalise
from wsss.losses import dense_energy_loss, pairwise_affinity, ptc_loss, segmentation_loss

EXACT = {"rtol": 1e-7, "atol": 1e-9}


def with_gradient(loss, leaf):
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def test_golden_more_seg_loss(golden):
    data = golden("more_seg_loss_released")
    logits = data["logits"].requires_grad_()
    loss, gradient = with_gradient(segmentation_loss(logits, data["label"]), logits)
    torch.testing.assert_close(loss.item(), data["loss"], **EXACT)
    torch.testing.assert_close(gradient, data["grad_logits"], **EXACT)


def test_golden_more_seg_loss_without_background_and_all_ignored(golden):
    data = golden("more_seg_loss_released")
    logits = data["logits"].requires_grad_()
    loss = segmentation_loss(logits, data["label_no_background"])
    torch.testing.assert_close(loss.item(), data["loss_no_background"], **EXACT)
    loss, gradient = with_gradient(segmentation_loss(logits, torch.full_like(data["label"], 255)), logits)
    assert loss == data["loss_all_ignored"] == 0
    assert (gradient == 0).all()


def test_golden_more_ptc(golden):
    data = golden("more_ptc_released")
    affinity = pairwise_affinity(data["label"])
    assert affinity.dtype == torch.uint8
    assert torch.equal(affinity, data["affinity"])
    assert (affinity == 1).sum() == data["n_pos"]
    assert (affinity == 0).sum() == data["n_neg"]
    features = data["feature_map"].requires_grad_()
    loss, gradient = with_gradient(ptc_loss(features, data["label"]), features)
    torch.testing.assert_close(loss.item(), data["loss"], **EXACT)
    torch.testing.assert_close(gradient, data["grad_feature_map"], **EXACT)


def relative(reference):
    """The tolerance of values around 1e-6: 1e-5 of each value, and of the largest where a gradient passes zero."""
    return {"rtol": 1e-5, "atol": 1e-5 * torch.as_tensor(reference).abs().max().item()}


@pytest.mark.parametrize("kernel_entries", [2**24, 1000, 1])
def test_golden_more_energy(golden, monkeypatch, kernel_entries):
    monkeypatch.setattr(losses, "KERNEL_ENTRIES", kernel_entries)
    data = golden("more_energy_released")
    logits = data["logits"].requires_grad_()
    settings = [data[name] for name in ("label", "weight", "sigma_rgb", "sigma_xy", "scale_factor")]
    loss, gradient = with_gradient(dense_energy_loss(denormalise(data["image_normalised"]), logits, *settings), logits)
    torch.testing.assert_close(loss.item(), data["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, data["grad_logits"], **relative(data["grad_logits"]))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_golden_seco_energy_exact_filter(golden, dtype, rtol):
    data = golden("seco_energy_exact_filter")
    logits = data["logits"].to(dtype).requires_grad_()
    valid = torch.zeros(data["label"].shape, dtype=torch.bool)
    for inside, (top, bottom, left, right) in zip(valid, data["img_box"].tolist(), strict=True):
        inside[top:bottom, left:right] = True
    loss = dense_energy_loss(
        denormalise(data["images_normalised"].to(dtype)),
        logits,
        data["label"].long(),
        weight=1,
        sigma_rgb=data["sigma_rgb"],
        sigma_xy=data["sigma_xy"],
        scale_factor=data["scale_factor"],
        valid=valid,
    )
    loss, gradient = with_gradient(loss, logits)
    torch.testing.assert_close(loss.item(), data["loss_over_weight"], rtol=rtol, atol=0)
    expected = data["grad_logits_over_weight"].to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


ENERGY = {"weight": 1.0, "sigma_rgb": 15.0, "sigma_xy": 100.0, "scale_factor": 1.0}


def energy_example(dtype=torch.float64, height=5, width=7):
    generator = torch.Generator().manual_seed(0)
    rgb = 255 * torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64) * 0.3
    logits = torch.randn(2, 4, height, width, generator=generator, dtype=torch.float64)
    label = torch.randint(4, (2, height, width), generator=generator)
    label[:, 0] = 255
    return rgb.to(dtype), logits.to(dtype), label


def test_energy_equals_its_double_sum():
    rgb, logits, label = energy_example()
    loss = dense_energy_loss(rgb, logits, label, **ENERGY)
    scores = logits.softmax(1)
    total = 0.0
    for image in range(2):
        cells = [(y, x) for y in range(5) for x in range(7)]
        for y, x in cells:
            gate = 1.0 if label[image, y, x] == 255 else 1 - scores[image, :, y, x].max().item()
            for v, u in cells:
                position = ((y - v) ** 2 + (x - u) ** 2) / ENERGY["sigma_xy"] ** 2
                colour = ((rgb[image, :, y, x] - rgb[image, :, v, u]) / ENERGY["sigma_rgb"]).square().sum().item()
                kernel = torch.exp(torch.tensor(-(position + colour) / 2, dtype=torch.float64))
                total -= (scores[image, :, y, x] @ scores[image, :, v, u] * kernel * gate).item() / 2
    torch.testing.assert_close(loss.item(), total, rtol=1e-12, atol=0)


def test_energy_gradient_is_that_of_a_symmetric_sum_where_the_gate_is_open():
    # With every gate open the released gradient -2 K S is the true one of the quadratic form.
    rgb, logits, label = energy_example(height=2, width=3)
    label[:] = 255
    assert torch.autograd.gradcheck(
        lambda leaf: dense_energy_loss(rgb, leaf, label, **ENERGY), logits.requires_grad_(), atol=1e-7
    )


def test_energy_gets_no_gradient_from_padding():
    rgb, logits, label = energy_example(height=6, width=8)
    label[:, :, 4:] = 255
    valid = torch.ones_like(label, dtype=torch.bool)
    valid[:, :, 4:] = False
    logits.requires_grad_()
    loss, gradient = with_gradient(dense_energy_loss(rgb, logits, label, **ENERGY, valid=valid), logits)
    assert (gradient[..., 4:] == 0).all()
    inside, inside_gradient = with_gradient(
        dense_energy_loss(rgb[..., :4], logits[..., :4], label[..., :4], **ENERGY), logits
    )
    torch.testing.assert_close(loss, inside)
    torch.testing.assert_close(gradient, inside_gradient)


def test_energy_keeps_full_precision_under_autocast():
    rgb, logits, label = energy_example(torch.float32)
    expected = dense_energy_loss(rgb, logits, label, **ENERGY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(dense_energy_loss(rgb, logits, label, **ENERGY), expected)


def test_energy_scales_with_its_weight_and_the_upstream_gradient():
    rgb, logits, label = energy_example()
    logits.requires_grad_()
    _, once = with_gradient(dense_energy_loss(rgb, logits, label, **ENERGY), logits)
    _, scaled = with_gradient(dense_energy_loss(rgb, logits, label, **(ENERGY | {"weight": 0.5})) * 6, logits)
    torch.testing.assert_close(scaled, 3 * once)


def test_segmentation_loss_is_the_mean_of_two_cross_entropies():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 4, 6, 6), torch.randint(4, (2, 6, 6))
    label[:, :2] = 255
    background = F.cross_entropy(logits, label.where(label == 0, 255), ignore_index=255)
    foreground = F.cross_entropy(logits, label.where(label != 0, 255), ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, label), (background + foreground) / 2)


def test_ptc_gradient_and_a_batch_without_pairs():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[[0, 1, 255], [1, 2, 0]], [[255, 255, 255], [0, 0, 1]]])
    assert torch.autograd.gradcheck(lambda leaf: ptc_loss(leaf, label), features)
    loss, gradient = with_gradient(ptc_loss(features, torch.full_like(label, 255)), features)
    assert loss == 0.5
    assert (gradient == 0).all()


def test_bad_shapes_are_named():
    logits, label, rgb = torch.zeros(2, 4, 6, 8), torch.zeros(2, 6, 8, dtype=torch.long), torch.zeros(2, 3, 6, 8)
    with pytest.raises(ValueError, match=r"segmentation_loss: logits .*label \(2, 3, 4\)"):
        segmentation_loss(logits, label[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"ptc_loss: features"):
        ptc_loss(logits[0], label)
    with pytest.raises(ValueError, match=r"resize the logits"):
        dense_energy_loss(rgb[..., :4], logits, label, **ENERGY)
    with pytest.raises(ValueError, match=r"valid \(2, 3, 8\)"):
        dense_energy_loss(rgb, logits, label, **ENERGY, valid=label[:, :3].bool())


# SeCo's arrays are float32 results of its released code.
RELEASED = {"rtol": 1e-4, "atol": 1e-5}
RELEASED_GRADIENT = {"rtol": 1e-4, "atol": 1e-6}


def test_golden_seco_seg_loss(golden):
    data = golden("seco_seg_loss_released")
    cases = sorted({key.split("_")[0] for key in data})
    assert {f"{case}_{part}" for case in cases for part in ("logits", "label", "loss", "grad_logits")} == set(data)
    for case in cases:
        logits = data[f"{case}_logits"].requires_grad_()
        loss, gradient = with_gradient(segmentation_loss(logits, data[f"{case}_label"]), logits)
        torch.testing.assert_close(loss.item(), data[f"{case}_loss"], **RELEASED)
        torch.testing.assert_close(gradient, data[f"{case}_grad_logits"], **RELEASED_GRADIENT)


def test_golden_seco_ptc(golden):
    data = golden("seco_ptc_released")
    assert torch.equal(pairwise_affinity(data["token_label"]).long(), data["affinity_mask"])
    features = data["features"].requires_grad_()
    loss, gradient = with_gradient(ptc_loss(features, data["token_label"]), features)
    torch.testing.assert_close(loss.item(), data["loss"], **RELEASED)
    torch.testing.assert_close(gradient, data["grad_features"], **RELEASED_GRADIENT)
