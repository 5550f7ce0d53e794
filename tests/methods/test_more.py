"""MoRe: parity of its parts with the reference arrays, its edge cases, and the three faces of the whole method."""

import pytest
import torch
from base import CLASSES, SIDE, MethodTester
from test_cam import SMALL
from torch.testing import assert_close

from wsss.backbones.vit import MultiTokenViT
from wsss.experiments import Experiment
from wsss.maps import three_way
from wsss.methods.more import (
    GraphCategoryRepresentation,
    MoRe,
    MoReConfig,
    confident_relation_loss,
    confident_relation_loss_released,
    corner_search,
    kernel_search,
    multi_class_token_loss,
    uncertain_relation_loss,
    uncertain_relation_loss_released,
    window_sums,
)

EXACT = dict(rtol=1e-7, atol=1e-9)
DIFFERENCES = dict(rtol=1e-7, atol=1e-8)  # reference gradients taken by central differences


def gradients(value, *inputs):
    """d value / d input for each input, zeros where an input does not take part."""
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def as_patches(feature_map):
    """(B, D, h, w) -> (B, L, D)"""
    return feature_map.flatten(2).transpose(1, 2)


def load_graph(arrays, **options):
    """A module with the weights of a golden file, in float64."""
    dim, count = arrays["class_tokens"].shape[-1], arrays["topk"]
    module = GraphCategoryRepresentation(dim, neighbours=count, **options).double()
    names = {
        "head.weight": "head_weight", "head.bias": "head_bias", "tail.weight": "tail_weight", "tail.bias": "tail_bias",
        "sum_projection.weight": "w1", "sum_projection.bias": "b1",
        "product_projection.weight": "w2", "product_projection.bias": "b2",
        "norm.weight": "norm_weight", "norm.bias": "norm_bias",
    }  # fmt: skip
    module.load_state_dict({ours: arrays[theirs] for ours, theirs in names.items() if theirs in arrays})
    return module


class TestGraphCategoryRepresentation:
    def test_more_gcr_released_matches_golden(self, golden):
        arrays = golden("more_gcr_released")
        module = load_graph(arrays, variant="released")
        tokens, patches = leaves(arrays["class_tokens"], arrays["patch_tokens"])
        graph, out = module.graph(tokens, patches), module(tokens, patches)
        assert torch.equal(graph.neighbours, arrays["neighbour_index"])
        assert_close(graph.similarity, arrays["neighbour_logit"], **EXACT)
        assert_close(graph.relation, arrays["r"], **EXACT)
        assert_close(graph.edges, arrays["edge"], **EXACT)
        assert_close(graph.weights, arrays["agg_weight"], **EXACT)
        assert_close(graph.aggregated, arrays["aggregated"], **EXACT)
        assert_close(out, arrays["out"], **EXACT)
        parameters = {
            "head_weight": module.head.weight, "tail_weight": module.tail.weight, "norm_weight": module.norm.weight,
            "w1": module.sum_projection.weight, "w2": module.product_projection.weight,
        }  # fmt: skip
        found = gradients((out * arrays["upstream"]).sum(), tokens, patches, *parameters.values())
        for name, gradient in zip(["class_tokens", "patch_tokens", *parameters], found):
            assert_close(gradient, arrays[f"grad_{name}"], **EXACT, msg=lambda text, name=name: f"{name}: {text}")

    def test_more_gcr_released_golden_neighbour_count_follows_the_ratio(self, golden):
        arrays = golden("more_gcr_released")
        module = GraphCategoryRepresentation(4, "released", neighbour_ratio=arrays["ratio"])
        classes, patches = arrays["class_tokens"].shape[1], arrays["patch_tokens"].shape[1]
        assert module.count_neighbours(classes, patches) == arrays["topk"]

    def test_more_gcr_released_golden_inner_product(self, golden):
        arrays = golden("more_gcr_released")
        module = load_graph(arrays, variant="released", inner_product=True)
        tokens, patches = arrays["class_tokens"], arrays["patch_tokens"]
        assert_close(module.graph(tokens, patches).weights, arrays["agg_weight_inner_product"], **EXACT)
        assert_close(module(tokens, patches), arrays["out_inner_product"], **EXACT)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_more_gcr_published_matches_golden(self, golden, similarity):
        arrays = golden("more_gcr_published")
        module = load_graph(arrays, similarity=similarity)
        tokens, patches = arrays["class_tokens"], arrays["patch_tokens"]
        graph = module.graph(tokens, patches)
        assert torch.equal(graph.neighbours, arrays[f"neighbour_index_{similarity}"])
        assert_close(graph.relation, arrays[f"r_{similarity}"], **EXACT)
        assert_close(graph.edges, arrays[f"edge_{similarity}"], **EXACT)
        assert_close(graph.weights, arrays[f"agg_weight_{similarity}"], **EXACT)
        assert_close(graph.aggregated, arrays[f"aggregated_{similarity}"], **EXACT)
        assert_close(module(tokens, patches), arrays[f"Q_{similarity}"], **EXACT)

    def test_more_gcr_published_golden_all_patches(self, golden):
        arrays = golden("more_gcr_published")
        patches = arrays["patch_tokens"].shape[1]
        module = load_graph(arrays | {"topk": patches}, similarity="dot")
        assert_close(module(arrays["class_tokens"], arrays["patch_tokens"]), arrays["Q_dot_all_patches"], **EXACT)

    def test_more_gcr_published_golden_default_is_the_recommended_reading(self, golden):
        arrays = golden("more_gcr_published")
        module = load_graph(arrays)
        assert_close(module(arrays["class_tokens"], arrays["patch_tokens"]), arrays["Q_cosine"], **EXACT)
        negative = torch.nn.functional.leaky_relu(torch.tensor(-1.0)).item()
        assert negative == pytest.approx(-arrays["leaky_slope"])

    def test_published_trains_patches_and_released_does_not(self):
        tokens, patches = torch.randn(2, 3, 8), torch.randn(2, 10, 8)
        for variant, trains in (("published", True), ("released", False)):
            (leaf,) = leaves(patches)
            (gradient,) = gradients(GraphCategoryRepresentation(8, variant)(tokens, leaf).square().sum(), leaf)
            assert bool(gradient.abs().max() > 0) == trains

    def test_ratio_follows_the_image_size(self):
        assert GraphCategoryRepresentation(4).count_neighbours(20, 784) == 392
        assert GraphCategoryRepresentation(4).count_neighbours(20, 196) == 98
        assert GraphCategoryRepresentation(4, "released").count_neighbours(20, 784) == 10
        assert GraphCategoryRepresentation(4, "released").count_neighbours(80, 784) == 40

    @pytest.mark.parametrize("neighbours, ratio", [(11, 0.5), (0, 0.5), (None, 1.2), (None, 0.01)])
    def test_more_neighbours_than_patches_or_none_is_an_error(self, neighbours, ratio):
        module = GraphCategoryRepresentation(4, neighbours=neighbours, neighbour_ratio=ratio)
        with pytest.raises(ValueError, match=r"neighbour.* = .* K = \d+ .*10 patches.*choose 1 <= K <= 10"):
            module(torch.randn(1, 3, 4), torch.randn(1, 10, 4))

    def test_unknown_options_are_errors(self):
        with pytest.raises(ValueError, match="variant 'paper' is unknown.*published, released"):
            GraphCategoryRepresentation(4, "paper")
        with pytest.raises(ValueError, match="similarity 'euclid' is unknown"):
            GraphCategoryRepresentation(4, similarity="euclid")


class TestConfidentRelation:
    @pytest.mark.parametrize("name, temperature", [("t05", 0.5), ("t01", 0.1)])
    def test_more_cre_released_matches_golden(self, golden, name, temperature):
        arrays = golden("more_cre_released")
        tokens, patches = leaves(arrays["class_tokens"], as_patches(arrays["feature_map"]))
        mask, labels = arrays["mask"], arrays["labels"]
        loss = confident_relation_loss_released(tokens, patches, mask, labels, temperature)
        assert_close(loss.item(), arrays[f"loss_{name}"], **EXACT)
        to_tokens, to_patches = gradients(loss, tokens, patches)
        assert_close(to_tokens, arrays[f"grad_class_tokens_{name}"], **EXACT)
        assert not to_patches.any()

        images, classes = labels.shape
        per_class = torch.zeros_like(labels)
        for image, single in labels.nonzero().tolist():
            only = torch.zeros_like(labels)
            only[image, single] = 1
            per_class[image, single] = images * confident_relation_loss_released(
                tokens, patches, mask, only, temperature
            ).detach()
        assert_close(per_class, arrays[f"per_class_{name}"], **EXACT)
        assert per_class[arrays["image_without_confident"], arrays["class_without_confident"]] == 0

    def test_more_cre_released_golden_stays_finite_in_float32(self, golden):
        arrays = golden("more_cre_released")
        tokens, patches = arrays["class_tokens"].float(), as_patches(arrays["feature_map"]).float()
        loss = confident_relation_loss_released(tokens, patches, arrays["mask"], arrays["labels"].float(), 0.1)
        assert_close(loss.item(), arrays["loss_t01"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_more_cre_published_matches_golden(self, golden, similarity):
        arrays = golden("more_cre_published")
        tokens, patches = arrays["class_tokens"], as_patches(arrays["feature_map"])
        mask, labels, tau = arrays["mask"], arrays["labels"], arrays["tau"]
        for reduction in ("image_mean", "pair_mean"):
            loss = confident_relation_loss(tokens, patches, mask, labels, tau, similarity, reduction)
            assert_close(loss.item(), arrays[f"loss_{reduction}_{similarity}"], **EXACT)
        singles = [
            confident_relation_loss(*(x[i : i + 1] for x in (tokens, patches, mask, labels)), tau, similarity)
            for i in range(len(labels))
        ]
        sums = torch.stack(singles) * arrays["positive_pairs_per_image"]
        assert_close(sums, arrays[f"sum_per_image_{similarity}"], **EXACT)

    def test_more_cre_published_golden_gradients_and_temperature(self, golden):
        arrays = golden("more_cre_published")
        tokens, features = leaves(arrays["class_tokens"], arrays["feature_map"])
        mask, labels = arrays["mask"], arrays["labels"]
        loss = confident_relation_loss(tokens, as_patches(features), mask, labels, arrays["tau"])
        to_tokens, to_features = gradients(loss, tokens, features)
        assert_close(to_tokens, arrays["grad_class_tokens_image_mean_cosine"], **DIFFERENCES)
        assert_close(to_features, arrays["grad_feature_map_image_mean_cosine"], **DIFFERENCES)
        sharp = confident_relation_loss(tokens, as_patches(features), mask, labels, 0.1)
        assert_close(sharp.item(), arrays["loss_image_mean_cosine_tau01"], **EXACT)

    @pytest.mark.parametrize("loss", [confident_relation_loss, confident_relation_loss_released])
    def test_nothing_confident_or_no_label_counts_zero(self, loss):
        tokens, patches = leaves(torch.randn(2, 3, 8), torch.randn(2, 4, 8))
        nothing = torch.tensor([0, 255, 0, 255]).view(1, 2, 2).repeat(2, 1, 1)
        everything = torch.ones(2, 2, 2, dtype=torch.long)
        for mask, labels in ((nothing, torch.ones(2, 3)), (everything, torch.zeros(2, 3))):
            value = loss(tokens, patches, mask, labels)
            assert value == 0
            assert all(gradient.isfinite().all() for gradient in gradients(value, tokens, patches))

    def test_more_masks_published_golden_feed_the_confident_pairs(self, golden):
        """Eq. 6 and eq. 7 agree on what 0, c and 255 mean: only the cells of M_c are positives."""
        arrays = golden("more_masks_published")
        cam, labels = arrays["cam"], arrays["labels"]
        mask = three_way(cam, labels, arrays["lambda_high"], arrays["lambda_low"], strict=True)
        assert torch.equal(mask, arrays["M_a"])
        batch, classes, height, width = cam.shape
        (tokens,) = leaves(torch.zeros(batch, classes, 4, dtype=torch.float64))
        ones = torch.ones(batch, height * width, 4, dtype=torch.float64)
        pairs = arrays["M_c"].flatten(1).gt(0).sum(1)
        loss = confident_relation_loss(tokens, ones, mask, labels)
        expected = torch.tensor(float(height * width)).double().log() * (pairs > 0).double().mean()
        assert_close(loss, expected)

    def test_falls_when_a_class_token_turns_to_its_patches(self):
        patches = torch.eye(4)[None]
        mask, labels = torch.tensor([[[1, 1], [0, 0]]]), torch.tensor([[1.0, 0.0]])
        right, wrong = (
            confident_relation_loss(torch.tensor([[direction] * 2]), patches, mask, labels)
            for direction in ([1.0, 1, 0, 0], [0.0, 0, 1, 1])
        )
        assert right < wrong


class TestKernelSearch:
    @pytest.mark.parametrize("kernel", [5, 6])
    def test_more_ure_published_golden_search(self, golden, kernel):
        arrays = golden("more_ure_published")
        mask, phi = arrays["M_a"], arrays["phi"]
        thresholds = arrays["lambda_high"], arrays["lambda_low"]
        assert torch.equal(three_way(arrays["cam"], arrays["labels"], *thresholds, strict=True), mask)
        sums, selected = kernel_search(mask, kernel, phi)
        assert torch.equal(sums, arrays[f"kernel_sum_d{kernel}"])
        assert torch.equal(selected, arrays[f"selected_d{kernel}"])
        at_least = kernel_search(mask, kernel, phi, strict=False)[1]
        assert torch.equal(at_least, arrays[f"selected_ge_d{kernel}"])
        inside = window_sums(torch.ones_like(mask), kernel) == kernel**2
        assert torch.equal(selected & inside, arrays[f"selected_interior_d{kernel}"])
        assert torch.equal(((mask > 0) & (mask < 255)) * mask, arrays["M_c"])
        assert torch.equal((mask == 255).long(), arrays["M_u"])

    def test_equal_sum_is_not_more_and_window_of_even_kernel_begins_before_the_cell(self):
        mask = torch.zeros(1, 4, 4, dtype=torch.long)
        mask[0, 2, 2], mask[0, 1, 1] = 255, 7
        sums, selected = kernel_search(mask, 2, 0.75)  # window of (2, 2): rows and columns 1 and 2
        assert sums[0, 2, 2] == 3
        assert not selected.any()
        assert kernel_search(mask, 2, 0.75, strict=False)[1].nonzero().tolist() == [[0, 2, 2]]
        assert kernel_search(mask, 2, 0.74)[1].nonzero().tolist() == [[0, 2, 2]]


class TestCornerSearch:
    def test_more_ure_released_golden_selection_and_loss(self, golden):
        arrays = golden("more_ure_released")
        mask, labels = arrays["mask"], arrays["labels"]
        height, width = mask.shape[1:]
        row_major = torch.arange(height * width).view(1, height, width).expand(len(mask), -1, -1)
        tokens = corner_search(mask, arrays["kernel"], arrays["threshold"], arrays["max_tokens"], row_major)

        image, place = tokens.chosen.nonzero().T
        index = tokens.index[image, place]
        assert torch.equal((mask == 255) + 2 * ((mask > 0) & (mask < 255)).long(), arrays["roi"])
        assert torch.equal(tokens.accepted.nonzero(), arrays["accepted_position"])
        assert torch.equal(torch.stack([image, index // width, index % width], 1), arrays["selected_position"])
        assert torch.equal(tokens.extra[image, place], arrays["selected_is_extra"])

        classes, features = leaves(arrays["class_tokens"], arrays["feature_map"])
        loss = uncertain_relation_loss_released(classes, as_patches(features), labels, tokens)
        assert_close(loss.item(), arrays["loss"], **EXACT)
        to_classes, to_features = gradients(loss, classes, features)
        assert_close(to_features, arrays["grad_feature_map"], **EXACT)
        assert_close(to_classes, arrays["grad_class_tokens"], **EXACT)

        per_token = []
        for one_image, one_place in zip(image, place):
            single = torch.zeros_like(tokens.chosen)
            single[one_image, one_place] = True
            only = type(tokens)(tokens.index, single, tokens.extra, tokens.accepted)
            per_token.append(uncertain_relation_loss_released(classes, as_patches(features), labels, only).detach())
        assert_close(torch.stack(per_token), arrays["per_token_loss"], **EXACT)

    def test_random_choice_keeps_eight_of_the_accepted_and_changes_with_the_seed(self):
        mask = torch.ones(1, 14, 14, dtype=torch.long)
        mask[:, ::2, ::2] = 255
        draws = set()
        for seed in range(5):
            torch.manual_seed(seed)
            tokens = corner_search(mask, 6, 1.2, 8)
            kept = tokens.index[tokens.chosen]
            assert len(kept) == len(kept.unique()) == 8 < tokens.accepted.sum()
            assert tokens.accepted.flatten()[kept].all()
            draws.add(tuple(sorted(kept.tolist())))
        assert len(draws) > 1

    def test_kernel_that_does_not_fit_is_an_error(self):
        with pytest.raises(ValueError, match="kernel_size = 6 leaves no window on a map of 6x9 patches"):
            corner_search(torch.zeros(1, 6, 9, dtype=torch.long), 6, 1.2, 8)


class TestUncertainRelation:
    @pytest.mark.parametrize("kernel", [5, 6])
    def test_more_ure_published_matches_golden(self, golden, kernel):
        arrays = golden("more_ure_published")
        labels, selected = arrays["labels"], arrays[f"selected_d{kernel}"]
        tokens, features = leaves(arrays["class_tokens"], arrays["feature_map"])
        for reduction in ("image_mean", "batch_pairs"):
            loss = uncertain_relation_loss(tokens, as_patches(features), labels, selected, reduction)
            assert_close(loss.item(), arrays[f"loss_{reduction}_d{kernel}"], **EXACT)
        found = selected.sum((1, 2))
        assert torch.equal(found * labels.sum(1).long(), arrays[f"n_pos_d{kernel}"])
        assert torch.equal(found * (1 - labels).sum(1).long(), arrays[f"n_neg_d{kernel}"])

    def test_more_ure_published_golden_gradients(self, golden):
        arrays = golden("more_ure_published")
        tokens, features = leaves(arrays["class_tokens"], arrays["feature_map"])
        selected = kernel_search(arrays["M_a"], 6, arrays["phi"])[1]
        loss = uncertain_relation_loss(tokens, as_patches(features), arrays["labels"], selected)
        to_tokens, to_features = gradients(loss, tokens, features)
        assert_close(to_tokens, arrays["grad_class_tokens_image_mean_d6"], **DIFFERENCES)
        assert_close(to_features, arrays["grad_feature_map_image_mean_d6"], **DIFFERENCES)

    def test_nothing_selected_counts_zero(self):
        tokens, patches = leaves(torch.randn(2, 3, 8), torch.randn(2, 4, 8))
        value = uncertain_relation_loss(tokens, patches, torch.ones(2, 3), torch.zeros(2, 2, 2, dtype=torch.bool))
        assert value == 0
        assert all(gradient.isfinite().all() for gradient in gradients(value, tokens, patches))

    def test_image_without_labels_only_repels(self):
        patches = torch.eye(4)[None]
        selected = torch.tensor([[[True, False], [False, False]]])
        toward, away = torch.eye(4)[None, :1], torch.eye(4)[None, 1:2]
        none = torch.zeros(1, 1)
        assert uncertain_relation_loss(toward, patches, none, selected) == 1
        assert uncertain_relation_loss(away, patches, none, selected) == 0


class TestMultiClassToken:
    def test_more_mct_released_matches_golden(self, golden):
        arrays = golden("more_mct_released")
        (tokens,) = leaves(arrays["class_tokens"])
        for suffix, labels in (("", None), ("_with_cls", arrays["labels"])):
            loss = multi_class_token_loss(tokens, arrays["temperature"], labels)
            assert_close(loss.item(), arrays[f"loss{suffix}"], **EXACT)
            assert_close(gradients(loss, tokens)[0], arrays[f"grad_class_tokens{suffix}"], **EXACT)

    def test_more_mct_released_golden_equal_tokens_have_no_gradient(self, golden):
        arrays = golden("more_mct_released")
        (tokens,) = leaves(arrays["class_tokens"][:, :1].expand_as(arrays["class_tokens"]))
        loss = multi_class_token_loss(tokens, arrays["temperature"])
        assert_close(loss.item(), arrays["loss_identical_tokens"], **EXACT)
        assert_close(gradients(loss, tokens)[0].abs().max().item(), arrays["max_abs_grad_identical_tokens"], **EXACT)


MORE = SMALL | {
    "cre_start": 0, "ure_start": 0, "mask_switch": 3, "kernel_size": 3, "kernel_proportion": 0.8,
    "weight_mct": 0.1, "weight_cre": 1.0, "weight_ure": 1.0, "cre_temperature": 0.2,
}  # fmt: skip


class MoReTester(MethodTester):
    name = "more"
    label_map: str  # what the decoder is trained on
    terms = {"cls", "aux", "mct", "cre", "ure", "ptc", "seg", "energy"}
    always = {"cls"}

    def test_without_the_graph_q_are_the_class_tokens(self, batch):
        method = self.make(use_gcr=False)
        assert method.gcr is None
        assert torch.equal(method.encode(batch["image"]).classes, method.backbone(batch["image"]).classes)
        assert set(method.losses(batch, 0)) == self.terms

    def test_decoder_is_trained_on_one_of_the_maps(self, method, batch):
        images, labels = batch["image"], batch["label"]
        tokens = method.encode(images)
        assert self.label_map in method.seed_maps
        empty = dict.fromkeys(("cam", "cam_aux", "lam"), torch.zeros(2, CLASSES, SIDE, SIDE))
        full = {name: torch.ones_like(seed) for name, seed in empty.items()}
        reference = method.dense_losses(batch, tokens, empty, 0)["seg"]
        own = {self.label_map: full[self.label_map]}
        assert method.dense_losses(batch, tokens, empty | own, 0)["seg"] != reference
        full.pop(self.label_map)
        assert method.dense_losses(batch, tokens, empty | full, 0)["seg"] == reference

    def test_masks_come_from_the_auxiliary_cam_before_the_switch(self, method, batch):
        """A seed map that is nowhere uncertain or foreground leaves nothing to pull."""
        tokens, labels = method.encode(batch["image"]), batch["label"]
        full = torch.ones(2, CLASSES, 8, 8)
        for step, source in ((2, "cam_aux"), (3, "cam")):
            other = "cam" if source == "cam_aux" else "cam_aux"
            assert method.relation_losses(batch, tokens, {source: full, other: 0 * full}, step)["cre"] > 0
            assert method.relation_losses(batch, tokens, {source: 0 * full, other: full}, step)["cre"] == 0

    def test_each_mask_has_its_own_thresholds(self, batch):
        """At 0.55 a cell is foreground for one loss and uncertain for the other."""
        high, low = [0.5, 0.25], [0.6, 0.25]
        method = self.make(confident_thresholds=high, uncertain_thresholds=low, kernel_proportion=0.4)
        tokens, labels = method.encode(batch["image"]), batch["label"]
        seeds = {"cam": torch.full((2, CLASSES, 8, 8), 0.55), "cam_aux": torch.zeros(2, CLASSES, 8, 8)}
        terms = method.relation_losses(batch, tokens, seeds, 3)
        assert terms["cre"] > 0 and terms["ure"] > 0
        swapped = self.make(confident_thresholds=low, uncertain_thresholds=high, kernel_proportion=0.4)
        assert swapped.relation_losses(batch, tokens, seeds, 3)["cre"] == 0

    def test_temperature_and_form_of_the_token_contrast(self, batch):
        method, named = self.make(), self.make(mct_with_cls=True)
        q = method.encode(batch["image"]).classes
        expected = 0.1 * multi_class_token_loss(q, 0.07), 0.1 * multi_class_token_loss(q, 0.07, batch["label"])
        found = method.losses(batch, 0)["mct"], named.losses(batch, 0)["mct"]
        assert_close(found, expected)

    def test_tokens_are_q_and_p(self, method, batch):
        classes, patches = method.tokens(batch["image"])
        assert classes.shape == (2, CLASSES, 96) and patches.shape == (2, 64, 96)
        assert torch.equal(patches, method.backbone(batch["image"]).patches)

    def test_attention_lam_is_a_share_of_the_attention(self, method, batch):
        lam = method.attention_lam(batch["image"], blocks=(-1, -2))
        assert lam.shape == (2, CLASSES, 8, 8)
        assert 0 < lam.min() and lam.sum((-2, -1)).max() < 2
        one = [method.attention_lam(batch["image"], blocks=(block,)) for block in (-1, -2)]
        assert_close(lam, sum(one))

    def test_more_neighbours_than_patches_is_an_error(self, batch):
        with pytest.raises(ValueError, match="neighbours = 99 gives K = 99"):
            self.make(neighbours=99).losses(batch, 0)


class TestMoRePublished(MoReTester):
    settings = MORE | {"variant": "published"}
    label_map = "lam"

    def test_lam_is_the_cosine(self, method, batch):
        tokens = method.encode(batch["image"])
        expected = torch.cosine_similarity(tokens.classes[:, :, None], tokens.patches[:, None], dim=-1)
        assert_close(method.maps(batch["image"])["lam"].flatten(2), expected)


class TestMoReReleased(MoReTester):
    settings = MORE | {"variant": "released"}
    label_map = "cam"

    def test_lam_is_the_inner_product(self, method, batch):
        tokens = method.encode(batch["image"])
        expected = tokens.classes @ tokens.patches.transpose(1, 2)
        assert_close(method.maps(batch["image"])["lam"].flatten(2), expected)


def test_backbone_needs_one_class_token_per_class():
    backbone = MultiTokenViT(class_tokens=1, image_size=SIDE, pretrained=False)
    with pytest.raises(ValueError, match="1 class tokens and the dataset 3 classes; build it with class_tokens=3"):
        MoRe(MoReConfig(**MORE), CLASSES, backbone)


def test_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="variant 'paper' is unknown; choose one of published, released"):
        MoReConfig(variant="paper")


@pytest.mark.parametrize("variant", ["published", "released"])
@pytest.mark.parametrize("dataset", ["embedded", "voc2012", "voc2012-cpu", "coco2014"])
def test_recipe_is_complete_and_follows_the_variant(variant, dataset):
    experiment = Experiment("more", variant, dataset, seed=0)
    config, recipe = experiment.config(MoReConfig), experiment.recipe()
    assert config.variant == variant
    assert (config.mask_switch == 0) == (variant == "published")
    assert ("cam" in recipe["map_relu"]) == (config.cam_activation == "relu")
    assert config.seg_start < recipe["steps"] and config.cre_start < recipe["steps"]


def test_recipe_of_voc_holds_the_papers_numbers():
    published = Experiment("more", "published", "voc2012", seed=0).recipe()
    numbers = ("weight_cre", "weight_ure", "weight_seg", "kernel_proportion", "lr", "crop")
    assert [published[name] for name in numbers] == [0.2, 0.1, 0.12, 1.2, 6e-5, 448]
    graph = GraphCategoryRepresentation(4, "published", published["neighbour_ratio"])
    assert graph.count_neighbours(20, (448 // 16) ** 2) == 392
    released = Experiment("more", "released", "voc2012", seed=0).config(MoReConfig)
    assert released == MoReConfig(pooling="features"), "the defaults of the configuration are the released numbers"
