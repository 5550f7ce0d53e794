"""APC: parity of its parts with the reference arrays, its edge cases, and the three faces of the whole method."""

import math

import pytest
import torch
import torch.nn.functional as F
from base import CLASSES, SIDE, MethodTester
from torch.testing import assert_close

from wsss.backbones.vit import MultiTokenViT
from wsss.data.scenes import Scenes
from wsss.evaluation import EvalConfig
from wsss.experiments import Experiment, recipe_table
from wsss.maps import merge_labels
from wsss.methods.apc import (
    APC,
    CANDIDATES,
    POOLINGS,
    APCConfig,
    HVBiLSTM,
    MultiLevelMLP,
    adaptive_k_pooling,
    classification_error,
    confidence_sets,
    patch_contrast,
    patch_labels,
    patches_to_pixels,
    pool,
    selected_patches,
)
from wsss.training import TrainConfig, rate_factor

TOLERANCE = {torch.float64: dict(rtol=0, atol=1e-9), torch.float32: dict(rtol=0, atol=2e-5)}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
REFERENCE = {"average": "avg_y", "max": "max_y", "topk": "topk_y"}
READINGS = {"running": "akp", "anchor": "alt_anchor", "score": "alt_score"}


def close(found, expected, dtype):
    assert found.dtype == dtype
    assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), **TOLERANCE[dtype])


def cases(data):
    """name -> its arrays, without the prefix."""
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in data.items() if key.startswith(f"{name}.")}
        for name in {key.partition(".")[0] for key in data if "." in key}
    }


# ------------------------------------------------------------------------------------------------------------ pooling


@DTYPES
def test_golden_apc_pooling(golden, dtype):
    data = golden("apc_pooling")
    own = cases(data)
    assert set(own) == set(data["case_names"])
    for name, case in own.items():
        scores = case["Z"].to(dtype)
        for candidates, prefix in READINGS.items():
            y, k = adaptive_k_pooling(scores, case["K"], case["theta"], candidates)
            close(y, case[f"{prefix}_y"], dtype)
            assert torch.equal(k, case[f"{prefix}_k"]), (name, candidates)
        for pooling, key in REFERENCE.items():
            close(pool(scores, pooling, case["K"])[0], case[key], dtype)


@DTYPES
def test_golden_apc_pooling_chooses_these_patches_and_sends_them_the_gradient(golden, dtype):
    for name, case in cases(golden("apc_pooling")).items():
        scores = case["Z"].to(dtype).requires_grad_()
        y, k = pool(scores, "adaptive", case["K"], case["theta"])
        tried = torch.arange(2, case["K"] + 1)
        accepted = (tried <= k[..., None]).long()
        accepted[..., tried > scores.shape[1]] = -1
        assert torch.equal(accepted, case["accepted"]), name
        if "selected" in case:
            assert torch.equal(selected_patches(scores, k), case["selected"].bool()), name
            (gradient,) = torch.autograd.grad(y.sum(), scores)
            close(gradient, case["selected"].double() / case["akp_k"][:, None], dtype)


def test_golden_apc_pooling_limits(golden):
    for name, case in cases(golden("apc_pooling")).items():
        pooled = {pooling: pool(case["Z"].double(), pooling, case["K"], case["theta"])[0] for pooling in POOLINGS}
        for above, below in (("max", "adaptive"), ("adaptive", "topk"), ("topk", "average")):
            assert (pooled[above] >= pooled[below] - 1e-12).all(), name
        if case["theta"] == 1 or case["K"] == 1:
            assert_close(pooled["adaptive"], pooled["max"])
        if case["theta"] == 0:
            assert_close(pooled["adaptive"], pooled["topk"])


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_pooling_is_the_printed_loop(candidates):
    """Algorithm 1 word by word, on scores with many near ties."""
    torch.manual_seed(0)
    scores = torch.rand(3, 12, 5, dtype=torch.float64) ** torch.tensor([0.1, 0.5, 1.0, 3.0, 8.0])
    y, k = adaptive_k_pooling(scores, 6, 0.9, candidates)
    for image, c in [(image, c) for image in range(3) for c in range(5)]:
        values = sorted(scores[image, :, c].tolist(), reverse=True)
        selected = values[:1]
        for i in range(2, 7):
            current = values[:i]
            mean = sum(current) / i
            ratio = {
                "running": mean / (sum(selected) / len(selected)),
                "anchor": mean / values[0],
                "score": values[i - 1] / values[0],
            }
            if ratio[candidates] > 0.9:
                selected = current
        assert k[image, c] == len(selected)
        assert math.isclose(y[image, c], sum(selected) / len(selected))
    assert k.min() == 1 and k.max() == 6


def test_pooling_of_one_confident_patch_and_of_none():
    scores = torch.full((1, 9, 2), 0.01)
    scores[0, 4, 0] = 0.99
    y, k = adaptive_k_pooling(scores)
    assert_close(y, torch.tensor([[0.99, 0.01]]))
    assert k.tolist() == [[1, 6]], "one outlier stays alone; equal scores are all close"


@pytest.mark.parametrize("pooling, count", [("average", 9), ("max", 1), ("topk", 6)])
def test_rivals_pool_a_fixed_number_of_patches(pooling, count):
    scores = torch.rand(2, 9, 3)
    y, k = pool(scores, pooling)
    assert k.shape == (2, 3) and (k == count).all()
    assert_close(y, (scores * selected_patches(scores, k)).sum(1) / count)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"theta": 1.1}, "theta = 1.1 must lie in 0..1"),
        ({"theta": -0.1}, "theta = -0.1 must lie in 0..1"),
        ({"theta": math.nan}, "theta = nan must lie in 0..1"),
        ({"max_k": 0}, "max_k = 0; K must be at least 1"),
        ({"candidates": "all"}, "candidates 'all' is unknown; choose one of running, anchor, score"),
    ],
)
def test_pooling_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        adaptive_k_pooling(torch.rand(1, 4, 2), **settings)


def test_pooling_needs_patches_and_a_known_name():
    for shape in ((4, 2), (1, 0, 2)):
        with pytest.raises(ValueError, match=r"expected \(B, s, C\), s >= 1"):
            adaptive_k_pooling(torch.rand(shape))
    with pytest.raises(ValueError, match="pooling 'min' is unknown; choose one of adaptive, average, max, topk"):
        pool(torch.rand(1, 4, 2), "min")


# ------------------------------------------------------------------------------------------------------------- losses


@DTYPES
def test_golden_apc_mce(golden, dtype):
    data = golden("apc_mce")
    for name, case in cases(data).items():
        if name == "saturated" and dtype == torch.float32:
            continue  # 1 - 1e-7 is no float32
        errors = classification_error(case["y"].to(dtype), case["t"].to(dtype))
        close(errors, case["per_class"], dtype)
        close(errors.mean(1), case["per_image"], dtype)
        close(errors.mean(), case["loss"], dtype)
        if "loss_foreground_only" in case:
            close(errors[:, 1:].mean(), case["loss_foreground_only"], dtype)
    nearly = classification_error(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    assert nearly.item() == pytest.approx(-math.log(data["clip"]))


@DTYPES
def test_golden_apc_pcl(golden, dtype):
    data = golden("apc_pcl")
    own = cases(data)
    assert set(own) == set(data["case_names"])
    for case in own.values():
        features, scores = case["F"].to(dtype).requires_grad_(), case["Z"].to(dtype).requires_grad_()
        high, low = confidence_sets(scores, case["epsilon"])
        assert torch.equal(high.sum(1), case["n_high"]) and torch.equal(low.sum(1), case["n_low"])
        pull, push = patch_contrast(features, scores, case["epsilon"])
        close(pull, case["pos"], dtype)
        close(push, case["neg"], dtype)
        close(pull + push, case["per_class"], dtype)
        loss = (pull + push).sum(1).mean()
        close(loss, case["loss"], dtype)
        if "loss_present_only" in case:
            close(((pull + push) * case["t"].to(dtype)).sum(1).mean(), case["loss_present_only"], dtype)
        if "grad_F" in case:
            gradient, none = torch.autograd.grad(loss, (features, scores), allow_unused=True)
            close(gradient, case["grad_F"], dtype)
            assert none is None, "the sets are no function of the scores to differentiate"


def test_contrast_is_the_sum_over_pairs():
    torch.manual_seed(0)
    features, scores = torch.randn(2, 30, 8, dtype=torch.float64), torch.rand(2, 30, 4, dtype=torch.float64)
    similarity = (1 + F.cosine_similarity(features[:, :, None], features[:, None], dim=3)) / 2
    pull, push = patch_contrast(features, scores, 0.7)
    for image, c in [(image, c) for image in range(2) for c in range(4)]:
        high = [i for i in range(30) if scores[image, i, c] > 0.7]
        low = [i for i in range(30) if scores[image, i, c] < 1 - 0.7]
        same = [1 - similarity[image, i, j] for i in high for j in high if i != j]
        other = [similarity[image, i, j] for i in high for j in low]
        assert_close(pull[image, c], sum(same) / len(same))
        assert_close(push[image, c], sum(other) / len(other))


def test_contrast_without_pairs_is_zero_with_a_gradient_of_zero():
    features = torch.randn(1, 6, 4, requires_grad=True)
    loss = sum(patch_contrast(features, torch.full((1, 6, 3), 0.5))).sum()
    loss.backward()
    assert loss == 0 and torch.equal(features.grad, torch.zeros_like(features))


def test_contrast_refuses_features_of_other_patches():
    with pytest.raises(ValueError, match=r"features \(1, 5, 4\) must be \(B, s, e\) and scores \(1, 6, 3\)"):
        patch_contrast(torch.rand(1, 5, 4), torch.rand(1, 6, 3))


@DTYPES
def test_golden_apc_seg(golden, dtype):
    data = golden("apc_seg")
    scores, labels, grid = data["Z"].to(dtype), data["t"].to(dtype), (data["grid"],) * 2
    own = patch_labels(scores, labels).unflatten(1, grid)
    assert torch.equal(own, data["patch_label"])
    free = patch_labels(scores, labels, present_only=False).unflatten(1, grid)
    assert torch.equal(free, data["patch_label_unmasked"])
    pixels = patches_to_pixels(own, data["patch"])
    assert torch.equal(pixels, data["pixel_label"])
    close(F.cross_entropy(data["decoder_logits"].to(dtype), pixels), data["seg_loss"], dtype)
    for prefix in ("", "zero."):
        maps = data[f"{prefix}Z"].to(dtype).transpose(1, 2).unflatten(2, grid)
        merged = merge_labels(maps, data[f"{prefix}t"][:, 1:].to(dtype))
        close(merged.flatten(2).transpose(1, 2), data[f"{prefix}merged"], dtype)


# ------------------------------------------------------------------------------------------------------------ network


def load_lstm(lstm, case):
    for direction, suffix in (("forward", ""), ("backward", "_reverse")):
        own = {key.removeprefix(f"{direction}."): value for key, value in case.items() if key.startswith(direction)}
        for source, name in (("weight_ih", "weight_ih"), ("weight_hh", "weight_hh"), ("bias", "bias_ih")):
            getattr(lstm, f"{name}_l0{suffix}").data.copy_(own[source])


@DTYPES
def test_golden_apc_hvbilstm(golden, dtype):
    data = golden("apc_hvbilstm")
    own = cases(data)
    module = HVBiLSTM(own["square"]["x"].shape[-1]).to(dtype).eval()
    load_lstm(module.rows, own["rows"])
    load_lstm(module.columns, own["cols"])
    weight = own["classifier"]["weight"].to(dtype)
    for name in ("square", "rect"):
        refined = module(own[name]["x"].to(dtype))
        close(refined, own[name]["y"], dtype)
        close((refined @ weight).softmax(-1), own[name]["Z"], dtype)


def test_hvbilstm_of_vit_b_is_that_of_vit_pcm():
    module = HVBiLSTM(768)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 2_952_192
    for lstm in (module.rows, module.columns):
        bias = lstm.bias_ih_l0.view(4, 192)
        assert torch.equal(bias, torch.tensor([0.0, 1, 0, 0])[:, None].expand(4, 192)) and not lstm.bias_hh_l0.any()
        assert_close(lstm.weight_hh_l0.T @ lstm.weight_hh_l0, torch.eye(192), atol=1e-5, rtol=0)


def test_hvbilstm_drops_the_same_channels_along_a_sequence():
    torch.manual_seed(0)
    module, seen = HVBiLSTM(8, dropout=0.5), []
    module.rows.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    module(torch.ones(2, 3, 5, 8))
    [sequences] = seen
    assert sequences.shape == (6, 5, 8) and set(sequences.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(sequences, sequences[:, :1].expand_as(sequences))


def test_hvbilstm_refuses_channels_that_it_cannot_share():
    with pytest.raises(ValueError, match="6 channels cannot be shared by 2 axes x 2 directions; use a multiple of 4"):
        HVBiLSTM(6)


def test_decoder_sees_every_level_and_no_neighbour():
    torch.manual_seed(0)
    decoder = MultiLevelMLP(8, 3, levels=2, width=16, dropout=0.1).eval()
    tokens = [torch.randn(1, 6, 8) for _ in range(2)]
    plain = decoder(tokens, (2, 3))
    assert plain.shape == (1, 3, 2, 3)
    for level in range(2):
        changed = [t.clone() for t in tokens]
        changed[level][0, 4] += torch.randn(8)
        differs = (decoder(changed, (2, 3)) != plain).any(1)[0]
        assert differs.tolist() == [[False, False, False], [False, True, False]]


# -------------------------------------------------------------------------------------------------------------- whole


def small(num_classes=CLASSES, **settings):
    torch.manual_seed(0)
    backbone = MultiTokenViT(class_tokens=1, registers=2, image_size=SIDE, token_init="noise", pretrained=False)
    return APC(APCConfig(**SETTINGS | settings), num_classes, backbone)


SETTINGS = {
    "frozen_steps": 0, "trainable_blocks": 6, "decoder_taps": (1, 3, 5), "decoder_width": 16,
    "weight_seg": 1.0, "weight_pcl": 1.0, "weight_l2": 0.01, "epsilon": 0.3, "dropout": 0.0, "decoder_dropout": 0.0,
}  # fmt: skip


@DTYPES
def test_golden_apc_total(golden, dtype):
    data = golden("apc_total")
    features, weight, logits = (data[key].to(dtype).requires_grad_() for key in ("F", "W", "decoder_logits"))
    labels, grid = data["t"].to(dtype), (data["grid"],) * 2
    settings = {"max_k": data["K"], "theta": data["theta"], "epsilon": data["epsilon"], "weight_l2": 0.0}
    settings |= {"weight_seg": data["lambda1"], "weight_pcl": data["lambda2"]}
    method = small(labels.shape[1] - 1, **settings)
    scores = (features @ weight).softmax(2)
    close(scores, data["Z"], dtype)
    y, k = method.pool(scores)
    close(y, data["y"], dtype)
    assert torch.equal(k, data["akp_k"])
    for found, key in zip(confidence_sets(scores, data["epsilon"]), ("n_high", "n_low"), strict=True):
        assert torch.equal(found.sum(1), data[key])
    pixels = patches_to_pixels(patch_labels(scores, labels).unflatten(1, grid), data["patch"])
    assert torch.equal(pixels, data["pixel_label"])

    terms = method.terms(features, scores, labels, logits, grid)
    close(terms["mce"], data["loss_mce"], dtype)
    close(terms["seg"], data["lambda1"] * data["loss_seg"], dtype)
    close(terms["pcl"], data["lambda2"] * data["loss_pce"], dtype)
    total = sum(terms.values())
    close(total, data["loss_total"], dtype)
    gradients = torch.autograd.grad(total, (features, weight, logits), retain_graph=True)
    for name, gradient in zip(("F", "W", "decoder_logits"), gradients, strict=True):
        close(gradient, data[f"grad_{name}"], dtype)

    present = small(labels.shape[1] - 1, **settings, pcl_present_only=True)
    found = present.terms(features, scores, labels, logits, grid)["pcl"]
    close(found, data["lambda2"] * data["loss_pce_present_only"], dtype)
    for pooling, suffix in (("average", "avg"), ("max", "max"), ("topk", "topk")):
        rival = small(labels.shape[1] - 1, **settings, pooling=pooling)
        close(rival.terms(features, scores, labels, logits, grid)["mce"], data[f"loss_mce_{suffix}"], dtype)


class TestAPC(MethodTester):
    name = "apc"
    settings = SETTINGS
    terms = {"mce", "seg", "pcl", "l2"}
    always = {"mce"}

    def test_maps_have_one_channel_per_class(self, method, batch):
        maps = method.eval().maps(batch["image"])
        assert maps["class_logits"].shape == (2, CLASSES, 1, 1)
        assert maps["patch"].shape == (2, CLASSES + 1, 8, 8), "the background has a channel"
        assert_close(maps["patch"].sum(1), torch.ones(2, 8, 8))
        _, scores = method.patch_scores(batch["image"])
        assert torch.equal(maps["patch"].flatten(2).transpose(1, 2), scores)
        assert_close(maps["class_logits"].flatten(1).sigmoid(), method.pool(scores)[0][:, 1:])

    def test_maps_follow_the_size_of_the_image(self, method, batch):
        wide = F.interpolate(batch["image"], size=(48, 80))
        assert method.eval().maps(wide)["patch"].shape == (2, CLASSES + 1, 6, 10)

    def test_terms_start_at_their_step(self, batch):
        """All are on from the start; what waits is the backbone."""
        method = self.make(frozen_steps=5)
        backbone, heads = method.backbone.blocks[5].mlp.fc1.weight, method.classifier.weight
        for step, moves in ((4, False), (5, True)):
            method.zero_grad()
            terms = method.losses(batch, step)
            sum(terms.values()).backward()
            assert set(terms) == self.terms and heads.grad.any()
            assert (backbone.grad is not None) == moves

    def test_every_parameter_gets_a_gradient(self, method, batch):
        sum(method.losses(batch, 0).values()).backward()
        without = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
        assert all("bias_hh" in name for name in without), "all but the second bias that Keras' LSTM does not have"

    def test_half_precision_backbone_gives_about_the_same_losses(self, method, batch):
        exact = method.losses(batch, 0)
        with torch.autocast("cpu", torch.bfloat16):
            half = method.losses(batch, 0)
        for name in ("mce", "pcl", "l2"):
            assert_close(half[name], exact[name], rtol=0.05, atol=0.02)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in half.values())

    def test_supervision_has_no_gradient_and_one_scale_needs_one_pass(self, method, batch):
        """The patch labels of the decoder come from the training pass and do not train the scores."""
        passes = []
        method.backbone.register_forward_hook(lambda *_: passes.append(1))
        terms = method.losses(batch, 0)
        assert len(passes) == 1
        (gradient,) = torch.autograd.grad(terms["seg"], method.classifier.weight, allow_unused=True)
        assert gradient is None

    test_two_scales_with_mirror_images_take_two_passes_more = None  # what supervises APC has one scale
    test_unknown_activation_is_an_error = None  # there is no activation map

    def test_background_may_be_left_out_of_the_classification_error(self, batch):
        with_it, without = self.make(), self.make(mce_background=False)
        _, scores = with_it.patch_scores(batch["image"])
        labels = F.pad(batch["label"], (1, 0), value=1.0)
        errors = classification_error(with_it.pool(scores)[0], labels)
        assert_close(with_it.losses(batch, 0)["mce"], errors.mean())
        assert_close(without.losses(batch, 0)["mce"], errors[:, 1:].mean())

    def test_contrast_may_leave_absent_classes_out(self, batch):
        every, present = self.make(), self.make(pcl_present_only=True)
        contrast = sum(patch_contrast(*every.patch_scores(batch["image"]), 0.3))
        batch = batch | {"label": torch.zeros(2, CLASSES)}
        labels = F.pad(batch["label"], (1, 0), value=1.0)
        assert_close(every.losses(batch, 0)["pcl"], contrast.sum(1).mean())
        assert_close(present.losses(batch, 0)["pcl"], (contrast * labels).sum(1).mean())
        assert present.losses(batch, 0)["pcl"] < every.losses(batch, 0)["pcl"]

    def test_patch_labels_may_be_any_class(self):
        torch.manual_seed(0)
        features, scores, logits = torch.randn(1, 64, 96), torch.rand(1, 64, 4).softmax(2), torch.randn(1, 4, 16, 16)
        for settings, labels in (({}, [1.0, 0, 1, 0]), ({"label_present_only": False}, [1.0, 1, 1, 1])):
            found = self.make(**settings).terms(features, scores, torch.tensor([[1.0, 0, 1, 0]]), logits, (8, 8))
            own = patch_labels(scores, torch.tensor([labels])).view(1, 8, 8)
            assert_close(found["seg"], F.cross_entropy(logits, patches_to_pixels(own, 2)))

    def test_squared_weights_of_the_classifier(self, method, batch):
        assert_close(method.losses(batch, 0)["l2"], 0.01 * method.classifier.weight.pow(2).sum())

    @pytest.mark.parametrize("pooling, candidates", [*((p, "running") for p in POOLINGS), ("adaptive", "score")])
    def test_poolings_are_drop_in_alternatives(self, batch, pooling, candidates):
        method = self.make(pooling=pooling, candidates=candidates)
        _, scores = method.patch_scores(batch["image"])
        expected, k = pool(scores, pooling, candidates=candidates)
        assert torch.equal(method.pool(scores)[0], expected) and torch.equal(method.pool(scores)[1], k)

    def test_describes_its_patches_and_sizes(self):
        scenes = Scenes("train", 4)
        told = small(len(scenes.classes)).describe(scenes, 4)
        assert told["sizes"] == [64, 80, 96, 112] and len(told["size_miou"]) == 4
        assert len(told["k_shares"]) == 6 and len(told["heat"]) == 4 and 0 <= told["outlier_error"] <= 1
        bare = small(len(scenes.classes), weight_seg=0.0).describe(scenes, 4)
        assert "sizes" not in bare and bare["boundary_miou"] is None

    def test_without_bilstm_the_classifier_sees_the_patch_tokens(self, batch):
        method = self.make(bilstm=False).eval()
        features, scores = method.patch_scores(batch["image"])
        assert torch.equal(features, method.backbone(batch["image"]).patches)
        assert_close(scores, (features @ method.classifier.weight.T).softmax(2))

    def test_which_blocks_train(self):
        for count in (0, 2, 6, 12):
            method = self.make(trainable_blocks=count)
            trained = {name for name, p in method.backbone.named_parameters() if p.requires_grad}
            blocks = {int(name.split(".")[1]) for name in trained if name.startswith("blocks")}
            assert blocks == set(range(max(0, 6 - count), 6))
            assert ("norm.weight" in trained) == (count > 0)
            assert ("pos_embed" in trained) == ("cls_token" in trained) == (count >= 6)

    def test_image_that_is_no_multiple_of_the_patch_is_an_error(self, method, batch):
        with pytest.raises(ValueError, match="image size 60x64 is not a multiple of the patch size 8"):
            method.losses(batch | {"image": batch["image"][:, :, :60]}, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"theta": 0.0}, "theta = 0.0 must be above 0 and at most 1"),
        ({"theta": 1.5}, "theta = 1.5 must be above 0 and at most 1"),
        ({"theta": math.nan}, "theta = nan must be above 0"),
        ({"max_k": 0}, "max_k = 0; K must be at least 1"),
        ({"pooling": "mean"}, "pooling 'mean' is unknown; choose one of adaptive, average, max, topk"),
        ({"candidates": "all"}, "candidates 'all' is unknown; choose one of running, anchor, score"),
        ({"trainable_blocks": -1}, "trainable_blocks = -1 is negative"),
        ({"variant": "released"}, "no code was released, so there is no variant 'released'"),
    ],
)
def test_configuration_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        APCConfig(**settings)


@pytest.mark.parametrize("dataset", ["embedded", "voc2012", "voc2012-cpu", "coco2014"])
def test_recipe_is_complete(dataset):
    experiment = Experiment("apc", "published", dataset)
    config, train = experiment.config(APCConfig), experiment.config(TrainConfig)
    assert config.variant == "published" and experiment.config(EvalConfig)
    assert config.frozen_steps == train.first_steps < train.steps
    assert set(recipe_table("apc", dataset)["field"]) >= {"theta", "max_k", "epsilon"}
    with pytest.raises(ValueError, match="variant 'released' of apc is not one of published"):
        Experiment("apc", "released", dataset).recipe()


def test_recipe_of_voc_holds_the_papers_numbers():
    experiment = Experiment("apc", "published", "voc2012")
    recipe, train = experiment.recipe(), experiment.config(TrainConfig)
    numbers = ("max_k", "theta", "epsilon", "weight_seg", "weight_pcl", "batch_size", "crop", "eval_size")
    assert [recipe[name] for name in numbers] == [6, 0.9, 0.85, 0.02, 0.01, 16, 384, 960]
    rates = [train.lr * rate_factor(step, train) for step in (0, 1321, 1322, 9919)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4]), "two constant phases"
    assert experiment.config(APCConfig) == APCConfig(), "the defaults of the configuration are the paper's numbers"
