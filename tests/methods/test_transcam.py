"""TransCAM and BNR: the equations, parity with the reference, the method."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from base import CLASSES, SIDE, ClassifierTester
from conformers import golden_conformer, golden_weights, small_conformer
from torch.testing import assert_close

from wsss.data.scenes import Scenes
from wsss.experiments import Experiment
from wsss.methods.transcam import (
    TransCAM,
    TransCAMConfig,
    add_noise,
    between_patches,
    image_logits,
    refine,
    sum_attention,
)
from wsss.training import TrainConfig, train

HEADS = {"conv_cls_head": "conv_head", "trans_cls_head": "token_head"}
STUB_TOLERANCES = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def assert_near(found, expected, tolerance):
    """The reference's tolerance: of the largest value, or of 1 where that is smaller."""
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert_close(found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


def as_dtype(data, dtype):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in data.items()
    }


# ------------------------------------------------------------------------------------------------ parity: the equations


@STUB_TOLERANCES
def test_golden_transcam_refined_map(golden, dtype, tolerance):
    data = as_dtype(golden("transcam_refine"), dtype)
    attention = sum_attention(data["attn"])
    star, cam = between_patches(attention), data["cam"]
    assert star.dtype == dtype
    assert_near(data["attn"].mean(2), data["attn_headmean"], tolerance)
    assert_near(attention, data["attn_sum"], tolerance)
    assert torch.equal(attention, sum_attention(data["attn"].mean(2))), "heads may be averaged before"
    assert_near(star, data["A_star"], tolerance)
    assert_near(star.sum(2), data["row_sums"], tolerance)
    assert_near(refine(cam, star), data["cam_refined"], tolerance)
    assert_near(refine(cam, star.mT), data["cam_attnagg"], tolerance)
    of_class = attention[:, None, 0, 1:].unflatten(2, cam.shape[2:])
    assert_near(of_class * cam, data["cam_clsattn"], tolerance)


def bnr_loss(data, attention, cam, noise, mode="multiply", noise_gradient=True):
    """(M**, z, L_M) of the stub inputs."""
    star = between_patches(sum_attention(attention))
    mean = star / len(attention)
    noisy = add_noise(refine(cam, star), mean if noise_gradient else mean.detach(), noise, mode)
    return noisy, noisy.mean((2, 3)), F.multilabel_soft_margin_loss(image_logits(noisy), data["y"])


@STUB_TOLERANCES
def test_golden_transcam_bnr_noise(golden, dtype, tolerance):
    data = as_dtype(golden("transcam_bnr"), dtype)
    cam, attention = data["cam"], sum_attention(data["attn"])
    assert_near(between_patches(attention), data["A_star"], tolerance)
    assert_near(attention / len(data["attn"]), data["A_bar"], tolerance)
    assert_near(between_patches(attention) / len(data["attn"]), data["A_bar_star"], tolerance)
    assert_near(refine(cam, between_patches(attention)), data["cam_refined"], tolerance)
    assert_near(cam.mean((2, 3)), data["conv_logits"], tolerance)
    loss_cls = F.multilabel_soft_margin_loss(image_logits(cam) + data["trans_logits"][:, 1:], data["y"])
    assert_near(loss_cls, data["loss_cls"], tolerance)
    for noise in (0, 1, 2):
        noisy, z, loss = bnr_loss(data, data["attn"], cam, noise)
        assert_near(noisy, data[f"cam_noise_x{noise}"], tolerance)
        assert_near(z, data[f"z_x{noise}"], tolerance)
        assert_near(image_logits(noisy), data[f"z_x{noise}"][:, 1:], tolerance)
        assert_near(loss, data[f"loss_m_x{noise}"], tolerance)
        assert_near(loss_cls + loss, data[f"loss_total_x{noise}"], tolerance)
    for noise, mode, name in ((2, "power", "power2"), (1, "add", "additive1"), (2, "add", "additive2")):
        _, z, loss = bnr_loss(data, data["attn"], cam, noise, mode)
        assert_near(z, data[f"alt_z_{name}"], tolerance)
        assert_near(loss, data[f"alt_loss_m_{name}"], tolerance)


@STUB_TOLERANCES
@pytest.mark.parametrize("noise, noise_gradient", [(0, True), (1, True), (1, False), (2, True)])
def test_golden_transcam_bnr_gradients(golden, dtype, tolerance, noise, noise_gradient):
    data = as_dtype(golden("transcam_bnr"), dtype)
    attention, cam = data["attn"].requires_grad_(), data["cam"].requires_grad_()
    bnr_loss(data, attention, cam, noise, noise_gradient=noise_gradient)[2].backward()
    suffix = f"x{noise}" + ("" if noise_gradient else "_detach")
    assert_near(cam.grad, data[f"grad_cam_x{noise}"], tolerance)
    assert not cam.grad[:, 0].any(), "no loss trains the background"
    assert_near(attention.grad.norm(), data[f"grad_attn_norm_{suffix}"], tolerance)
    if noise == 1:
        assert_near(attention.grad, data[f"grad_attn_{suffix}"], tolerance)
    assert not attention.grad[..., 0, :].any() and not attention.grad[..., 0].any()


# -------------------------------------------------------------------------------------------- parity: the whole network


def golden_transcam(data, dtype=torch.float64, **settings):
    """The network of `transcam_conformer`, without drop path."""
    method = TransCAM(TransCAMConfig(**settings), data["cfg.num_classes"] - 1, golden_conformer(data)).to(dtype)
    weights = golden_weights(data)
    for theirs, ours in HEADS.items():
        method.get_submodule(ours).load_state_dict({kind: weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")})
    return method


def their_name(name):
    """The reference's name of one of our parameters."""
    ours = next((ours for ours in HEADS.values() if name.startswith(ours)), "backbone.")
    return name.replace(ours, next((theirs for theirs in HEADS if HEADS[theirs] == ours), ""), 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_transcam_network(golden, dtype, tolerance):
    data = golden("transcam_conformer")
    method, images = golden_transcam(data, dtype).eval(), data["x"].to(dtype)
    with torch.no_grad():
        features = method.backbone.forward_features(images)
        cam, maps = method.cam(features), method.maps(images)
        star = method.patch_attention(features)
        assert cam.dtype == dtype
        assert_near(cam, data["cam_raw"], tolerance)
        assert_near(cam.mean((2, 3)), data["conv_logits"], tolerance)
        assert_near(method.token_head(features.tokens[:, 0]), data["trans_logits"], tolerance)
        assert_near(method.class_logits(features, cam), (data["conv_logits"] + data["trans_logits"])[:, 1:], tolerance)
        assert_near(method.refined_map(features, cam), data["cam_transcam"], tolerance)
        assert_near(refine(cam, star.mT), data["cam_attnagg"], tolerance)
        of_class = sum_attention(features.attention)[:, None, 0, 1:].unflatten(2, cam.shape[2:])
        assert_near(of_class * cam, data["cam_clsattn"], tolerance)
    assert_near(maps["transcam"], data["cam_transcam"][:, 1:], tolerance)
    assert_near(maps["cam"], data["cam_raw"][:, 1:], tolerance)
    assert_near(maps["class_logits"][..., 0, 0], (data["conv_logits"] + data["trans_logits"])[:, 1:], tolerance)


@pytest.mark.parametrize("dtype, tolerance, of_norms", [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-4, 1e-3)])
@pytest.mark.parametrize("noise", [0, 1, 2])
def test_golden_transcam_training_step(golden, noise, dtype, tolerance, of_norms):
    data = golden("transcam_conformer")
    method = golden_transcam(data, dtype, noise=float(noise)).train()
    images, names = data["x"].to(dtype), data["train.gradnorm_names"]
    terms = method.losses({"image": images, "label": data["y"].to(dtype)}, 0)
    sum(terms.values()).backward()
    assert_near(terms["cls"], data["train.loss_cls"], tolerance)
    assert_near(terms["refined"], data[f"train.loss_m_x{noise}"], tolerance)
    norms = {their_name(name): p.grad.norm() for name, p in method.named_parameters()}
    found, expected = torch.stack([norms[name] for name in names]), data[f"train.gradnorm_x{noise}"]
    assert_near(found, expected, of_norms)
    if dtype == torch.float64:  # the small ones as well
        assert_close(found, expected, rtol=of_norms, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_golden_transcam_training_mode(golden, dtype, tolerance):
    data = golden("transcam_conformer")
    method = golden_transcam(data, dtype).train()
    with torch.no_grad():
        features = method.backbone.forward_features(data["x"].to(dtype))
        cam = method.cam(features)
        assert_near(cam.mean((2, 3)), data["train.conv_logits"], tolerance)
        assert_near(method.token_head(features.tokens[:, 0]), data["train.trans_logits"], tolerance)
        assert_near(method.refined_map(features, cam), data["train.cam"], tolerance)
        for noise in (0, 1, 2):
            method.config = dataclasses.replace(method.config, noise=noise)
            assert_near(method.noisy_map(features, cam).mean((2, 3)), data[f"train.z_x{noise}"], tolerance)
    assert_near(method.backbone.bn1.running_mean, data["train.bn1_running_mean_after"], tolerance)
    assert_near(method.backbone.bn1.running_var, data["train.bn1_running_var_after"], tolerance)


# ------------------------------------------------------------------------------------------------------------ equations


def test_a_patch_takes_over_the_scores_that_it_attends_to():
    """Against loops; rows are queries."""
    torch.manual_seed(0)
    attention, cam = torch.rand(2, 6, 6), torch.randn(2, 3, 2, 3)
    found, back = refine(cam, attention), refine(cam, attention.mT)
    for image, channel, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(6)).tolist():
        scores = cam[image, channel].flatten()
        expected = sum(attention[image, i, j] * scores[j] for j in range(6))
        assert_close(found[image, channel].flatten()[i], expected)
        spread = sum(attention[image, j, i] * scores[j] for j in range(6))
        assert_close(back[image, channel].flatten()[i], spread)


def test_attention_with_the_class_token_does_not_fit():
    with pytest.raises(ValueError, match=r"attention \(2, 7, 7\) does not fit maps \(2, 3, 2, 3\).*`between_patches`"):
        refine(torch.zeros(2, 3, 2, 3), torch.zeros(2, 7, 7))


def test_noise_modes_by_definition():
    torch.manual_seed(0)
    refined, mean = torch.randn(1, 2, 2, 2), torch.rand(1, 4, 4)
    once = refine(refined, mean)
    assert torch.equal(add_noise(refined, mean, 1), once)
    assert_close(add_noise(refined, mean, 2.5), 2.5 * once)
    assert_close(add_noise(refined, mean, 2.5, "add"), refined + 2.5 * once)
    assert torch.equal(add_noise(refined, mean, 1, "power"), once)
    assert_close(add_noise(refined, mean, 3, "power"), refine(refine(once, mean), mean))
    for mode in ("multiply", "add", "power"):
        assert add_noise(refined, mean, 0, mode) is refined, "without noise the refined map itself is trained"


@pytest.mark.parametrize("noise, mode", [(-1, "multiply"), (-1, "add"), (1.5, "power")])
def test_noise_that_makes_no_sense_is_refused(noise, mode):
    with pytest.raises(ValueError, match=rf'noise = {noise} with noise_mode "{mode}": it must be >= 0, and whole'):
        add_noise(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), noise, mode)


def test_unknown_modes_and_variants_are_named():
    with pytest.raises(ValueError, match="BNR: noise_mode 'random' is unknown; choose one of multiply, power, add"):
        TransCAMConfig(noise_mode="random")
    with pytest.raises(ValueError, match="BNR: noise_mode 'random' is unknown"):
        add_noise(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), 1, "random")
    with pytest.raises(ValueError, match="TransCAM: variant 'printed' is unknown"):
        TransCAMConfig(variant="printed")


def test_the_released_code_has_no_refined_loss():
    with pytest.raises(ValueError, match='weight_refined = 1.0 in the variant "released".*use the variant "published"'):
        TransCAMConfig(variant="released")
    assert TransCAMConfig(variant="released", weight_refined=0.0).weight_refined == 0
    with pytest.raises(ValueError, match="no such loss"):
        Experiment("transcam", "released", "embedded", overrides=(("weight_refined", 0.5),)).config(TransCAMConfig)


# ----------------------------------------------------------------------------------------------------------- the method


class TestTransCAM(ClassifierTester):
    name = "transcam"
    settings = {}
    terms = {"cls", "refined"}
    always = {"cls"}

    def backbone(self, method):
        return small_conformer()

    def test_without_a_decoder(self, method, batch):
        assert method.segment(batch["image"]) is None and method.segments == ""

    def test_the_network_runs_once_a_step(self, method, batch):
        passes = []
        inner = method.backbone.forward_features
        method.backbone.forward_features = lambda images: passes.append(1) or inner(images)
        method.losses(batch, 0)
        assert passes == [1]
        method.maps(batch["image"])
        assert passes == [1, 1]

    def gradients(self, batch, **settings):
        method = self.make(**settings)
        sum(method.losses(batch, 0).values()).backward()
        return {name: p.grad for name, p in method.named_parameters()}

    def test_without_the_refined_loss_it_is_transcam(self, batch):
        """Step for step: what is left of BNR leaves no trace in the gradients."""
        published = self.gradients(batch, weight_refined=0.0)
        released = self.gradients(batch, weight_refined=0.0, variant="released", noise=2.0)
        whole = self.gradients(batch)
        assert all(torch.equal(gradient, released[name]) for name, gradient in published.items())
        changed = {name for name, gradient in whole.items() if not torch.equal(gradient, published[name])}
        unchanged = {f"{part}.{kind}" for part in ("token_head", "backbone.trans_norm") for kind in ("weight", "bias")}
        assert set(whole) - changed == unchanged, "the class token after the last block is not in M**"

    def test_weight_of_the_refined_loss(self, batch):
        one, two = (self.make(weight_refined=weight).losses(batch, 0) for weight in (1.0, 2.0))
        assert_close(two["refined"], 2 * one["refined"])
        assert torch.equal(two["cls"], one["cls"])

    def test_noise_settings_reach_the_loss(self, batch):
        settings = [
            {"noise": 0.0},
            {"noise": 1.0},
            {"noise": 2.0},
            {"noise": 2.0, "noise_mode": "power"},
            {"noise": 1.0, "noise_mode": "add"},
        ]
        losses = {self.make(**own).losses(batch, 0)["refined"].item() for own in settings}
        assert len(losses) == len(settings)

    def test_the_noise_gradient_is_a_switch_and_changes_no_value(self, batch):
        on, off = (self.gradients(batch, noise_gradient=switch) for switch in (True, False))
        assert any(not torch.equal(on[name], off[name]) for name in on if "attn.qkv" in name)
        assert torch.equal(on["conv_head.weight"], off["conv_head.weight"]), "M is upstream of the noise"
        values = [self.make(noise_gradient=switch).losses(batch, 0)["refined"] for switch in (True, False)]
        assert torch.equal(*values)

    def test_no_loss_trains_the_background(self, batch):
        gradients = self.gradients(batch)
        for head in ("conv_head", "token_head"):
            assert not gradients[f"{head}.weight"][0].any() and not gradients[f"{head}.bias"][0].any()
            assert all(gradients[f"{head}.weight"][c].any() for c in range(1, CLASSES + 1))

    def test_maps_are_those_of_the_equations(self, method, batch):
        method.eval()
        with torch.no_grad():
            features = method.backbone.forward_features(batch["image"], heads=True)
            maps = method.maps(batch["image"])
            attention = torch.stack(features.attention).mean(2).sum(0)[:, 1:, 1:]
            cam = method.conv_head(features.map)
            assert_close(maps["cam"], cam[:, 1:])
            expected = torch.einsum("bij,bsj->bsi", attention, cam[:, 1:].flatten(2)).unflatten(2, (8, 8))
            assert_close(maps["transcam"], expected)
            logits = cam.mean((2, 3)) + method.token_head(features.tokens[:, 0])
            assert_close(maps["class_logits"].flatten(1), logits[:, 1:])

    def test_received_attention_is_a_multiple_of_the_mean(self, method, batch):
        method.eval()
        with torch.no_grad():
            received = method.received_attention(batch["image"][..., :40])
            features = method.backbone.forward_features(batch["image"][..., :40], heads=True)
        assert received.shape == (2, 8, 5)
        assert_close(received.mean((1, 2)), torch.ones(2))
        columns = torch.stack(features.attention).mean(2).sum(0)[:, 1:, 1:].sum(1)
        assert_close(received.flatten(1), columns / columns.mean(1, keepdim=True))

    def test_half_precision_backbone_gives_about_the_same_losses(self, method, batch):
        method.eval()  # batch norm over a few values magnifies what half precision rounds
        exact = method.losses(batch, 0)
        with torch.autocast("cpu", torch.bfloat16):
            half = method.losses(batch, 0)
        for name, value in half.items():
            assert value.dtype == torch.float32
            assert_close(value, exact[name], rtol=0.02, atol=0.02)
        sum(half.values()).backward()
        assert all(p.grad.isfinite().all() for p in method.parameters())


def test_a_backbone_that_halves_its_last_map_does_not_fit():
    method = TransCAM(TransCAMConfig(), CLASSES, small_conformer(last_stride=2))
    with pytest.raises(ValueError, match=r"refine: attention \(1, 64, 64\) does not fit maps \(1, 4, 4, 4\)"):
        method.maps(torch.zeros(1, 3, SIDE, SIDE))


def test_recipes_are_those_of_the_papers():
    published, released = (Experiment("transcam", variant, "voc2012") for variant in ("published", "released"))
    for experiment, steps, weight in ((published, 22 * 10_582 // 8, 1), (released, 20 * 10_582 // 8, 0)):
        recipe = experiment.recipe()
        assert recipe["weight_refined"] == weight
        assert abs(recipe["steps"] - steps) <= 22, "whole batches of an epoch"
        assert (recipe["lr"], recipe["weight_decay"], recipe["poly_power"]) == (5e-5, 5e-4, 0)


def test_a_short_training_on_scenes():
    torch.manual_seed(0)
    method = TransCAM(TransCAMConfig(noise=0.0), 10, small_conformer())
    settings = (("steps", 12), ("batch_size", 8), ("warmup_steps", 0), ("head_lr_multiplier", 1), ("lr", 2e-3))
    config = Experiment("transcam", "published", "embedded", overrides=settings).config(TrainConfig)
    history = train(method, Scenes("train", images=16), config, 0, progress=False)
    for term in ("cls", "refined"):
        losses = [point[term] for point in history]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), term
