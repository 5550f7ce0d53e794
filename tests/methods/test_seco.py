"""SeCo: parity of its parts with the reference arrays, plain loops, edge cases, and the whole method twice."""

import copy
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from base import CLASSES, SIDE, MethodTester
from test_cam import SMALL
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data import Sample
from wsss.experiments import Experiment
from wsss.methods import find
from wsss.methods.seco import (
    ProjectionHead,
    Reservoir,
    SeCo,
    SeCoConfig,
    cut,
    draw_corners,
    ema_update,
    global_contrast_loss,
    local_contrast_loss,
    local_contrast_loss_released,
    patch_tags,
    patch_tags_released,
    prototype_weights,
    pseudo_mask,
    rectify_tags,
    update_prototypes,
    update_prototypes_released,
)
from wsss.training import TrainConfig, train

PUBLISHED = dict(rtol=1e-9, atol=1e-10)  # own float64 implementation of the equations
RELEASED = dict(rtol=1e-4, atol=1e-5)  # public code in float32
RELEASED_GRADIENT = dict(rtol=1e-4, atol=1e-6)


def gradients(value, *inputs):
    """d value / d input for each input, zeros where an input does not take part."""
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def cases(arrays):
    """The arrays of a file with several cases, one namespace a case."""
    names = sorted({key.split("_")[0] for key in arrays if key.startswith("case")})
    return [
        SimpleNamespace(**{key.split("_", 1)[1]: value for key, value in arrays.items() if key.startswith(f"{name}_")})
        for name in names
    ]


def as_tags(column):
    """Tags (..., 1) float, as the public code keeps them -> (...) int64"""
    return column.squeeze(-1).long()


def single_labels(index, num_classes):
    """Labels (B, C) with one class where `index` (B, 1) has one, and with all of them where it is -1."""
    labels = F.one_hot(index[:, 0].clamp(min=1) - 1, num_classes).float()
    labels[index[:, 0] < 1] = 1
    return labels


# ------------------------------------------------------------------------------------------------- patches and tags


class TestPseudoMask:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_seco_pseudo_mask_released_matches_golden(self, golden, dtype):
        arrays = golden("seco_pseudo_mask_released")
        valid = torch.zeros(arrays["roi_mask"].shape, dtype=torch.bool)
        for inside, (top, bottom, left, right) in zip(valid, arrays["img_box"].tolist(), strict=True):
            inside[top:bottom, left:right] = True
        found = pseudo_mask(*self.inputs(arrays, dtype), valid)
        assert torch.equal(found, arrays["roi_mask"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_seco_pseudo_mask_published_matches_golden(self, golden, dtype):
        arrays = golden("seco_pseudo_mask_published")
        assert torch.equal(pseudo_mask(*self.inputs(arrays, dtype)), arrays["pseudo_mask"])

    def inputs(self, arrays, dtype):
        # Some scores equal a threshold as float32 has it.
        high, low = (torch.tensor(arrays[f"{name}_threshold"]).to(dtype).item() for name in ("high", "low"))
        return arrays["cam"].to(dtype), arrays["image_labels"].to(dtype), high, low

    def test_seco_pseudo_mask_published_golden_auxiliary_cam_is_eq_1(self, golden):
        arrays = golden("seco_pseudo_mask_published")
        weight, features = arrays["head_weight"], arrays["features"]
        classes, dim = weight.shape
        config = SeCoConfig(**SECO)
        method = build(config)
        method.aux_classifier = method.classifier = nn.Linear(dim, classes, bias=False, dtype=weight.dtype)
        with torch.no_grad():
            method.aux_classifier.weight.copy_(weight)
        patches = features.flatten(1).T[None]
        tokens = Tokens(None, patches, tuple(features.shape[1:]), {config.aux_tap: patches}, {}, {})
        assert_close(method.token_maps(tokens)["cam_aux"][0].relu(), arrays["cam_aux"], **PUBLISHED)

    def test_classes_that_the_image_does_not_have_do_not_appear(self):
        cam = torch.tensor([0.9, 0.5])[None, :, None, None].expand(1, 2, 2, 2)
        assert pseudo_mask(cam, torch.tensor([[0.0, 1]]), 0.7, 0.25).eq(-1).all()
        assert pseudo_mask(cam, torch.tensor([[0.0, 0]]), 0.7, 0.25).eq(0).all()


class TestPatches:
    def test_seco_tags_released_golden_corners_and_crops(self, golden):
        arrays = golden("seco_tags_released")
        mask, size, count = arrays["roi_mask"], arrays["crop_size"], arrays["crop_num"]
        margin = size // 2
        priority = torch.full(mask.shape, 1e6)
        inner = mask[:, margin : mask.shape[1] - margin, margin : mask.shape[2] - margin]
        uncertain = (inner == -1).sum((1, 2))
        assert torch.equal(uncertain < count, arrays["used_fallback"])
        assert torch.equal(uncertain.where(uncertain >= count, inner[0].numel()), arrays["candidate_count"])
        for image, fallback in enumerate(arrays["used_fallback"].tolist()):
            order = arrays[f"permutation_{image}"]
            candidates = (torch.ones_like(inner[image]) if fallback else inner[image] == -1).nonzero()
            rows, columns = (margin + candidates[order]).T
            priority[image, rows, columns] = torch.arange(len(order), dtype=priority.dtype)
        corners = draw_corners(mask, size, count, priority)
        assert torch.equal(corners, arrays["crop_top_left"])
        assert torch.equal(cut(arrays["images"], corners, size), arrays["crops"])
        assert torch.equal(cut(arrays["strong_images"], corners, size), arrays["strong_crops"])

    def test_cut_by_plain_loops(self):
        images, masks = torch.rand(2, 3, 20, 24), torch.randint(9, (2, 20, 24))
        corners = torch.stack([torch.randint(20 - 7, (2, 5)), torch.randint(24 - 7, (2, 5))], -1)
        patches, tags = cut(images, corners, 7), cut(masks, corners, 7)
        assert patches.shape == (2, 5, 3, 7, 7) and tags.shape == (2, 5, 7, 7)
        for b in range(2):
            for n, (y, x) in enumerate(corners[b].tolist()):
                assert torch.equal(patches[b, n], images[b, :, y : y + 7, x : x + 7])
                assert torch.equal(tags[b, n], masks[b, y : y + 7, x : x + 7])

    @pytest.mark.parametrize("size", [8, 9])
    def test_drawn_centres_are_uncertain_pixels_inside(self, size):
        torch.manual_seed(0)
        mask = torch.where(torch.rand(3, 30, 40) < 0.1, -1, torch.randint(4, (3, 30, 40)))
        corners = draw_corners(mask, size, 12)
        assert corners.dtype == torch.int64 and corners.shape == (3, 12, 2)
        assert corners.min() >= 0
        assert (corners + size <= torch.tensor([30, 40])).all()
        centres = corners + size // 2
        assert (mask[torch.arange(3)[:, None], centres[..., 0], centres[..., 1]] == -1).all()
        assert all(len(set(map(tuple, rows))) == 12 for rows in centres.tolist()), "without replacement"
        assert not torch.equal(corners, draw_corners(mask, size, 12)), "drawn anew"
        torch.manual_seed(1)
        again = draw_corners(mask, size, 12)
        torch.manual_seed(1)
        assert torch.equal(again, draw_corners(mask, size, 12))

    def test_all_pixels_may_be_drawn_where_too_few_are_uncertain(self):
        mask = torch.zeros(2, 16, 16, dtype=torch.long)
        mask[0, 8, 6:10] = -1
        mask[:, 0] = -1  # too close to the border
        corners = draw_corners(mask, 8, 4)
        assert set(map(tuple, (corners[0] + 4).tolist())) == {(8, x) for x in range(6, 10)}
        everywhere = {tuple(corner) for _ in range(40) for corner in draw_corners(mask, 8, 5)[0].tolist()}
        assert len(everywhere) > 40, "a fifth patch: uncertain pixels are not preferred any more"

    @pytest.mark.parametrize("size, count, fits", [(16, 1, False), (40, 1, False), (14, 5, False), (14, 4, True)])
    def test_patches_that_do_not_fit_are_an_error(self, size, count, fits):
        mask = torch.zeros(1, 16, 16, dtype=torch.long)
        if fits:
            assert draw_corners(mask, size, count).shape == (1, count, 2)
        else:
            with pytest.raises(ValueError, match="patch_size"):
                draw_corners(mask, size, count)


def tag_by_loops(patch, threshold, reading):
    """Published tag of one patch (p, p)."""
    pixels = [0 if tag == 255 else tag for tag in patch.flatten().tolist()]
    share = {tag: pixels.count(tag) / len(pixels) for tag in set(pixels)}
    little = 1 - share.get(0, 0) <= threshold + 1e-12
    if reading == "a":
        found = [tag for tag in share if tag > 0]
        return 0 if little else found[0] if len(found) == 1 else -1
    found = [tag for tag in share if tag > 0 and share[tag] > threshold]
    return found[0] if len(found) == 1 else -1 if found or not little else 0


def released_tags_by_loops(mask, corners, size, threshold):
    """Released tags of one image: mask (H, W), corners (N, 2)."""
    confident = {tag for tag in mask.flatten().tolist() if 0 < tag < 255}
    view = 1 if not confident else confident.copy().pop() if len(confident) == 1 else -1
    tags = [view, view]
    for y, x in corners.tolist():
        pixels = mask[y : y + size, x : x + size].flatten().tolist()
        total = sum(1 if tag == -1 else 0 if tag == 255 else tag for tag in pixels)
        present = {tag for tag in pixels if 0 < tag < 255}
        if len(confident) == 1 and -1 in pixels:
            present |= confident
        tags.append(0 if total / size**2 <= threshold else present.pop() if len(present) == 1 else -1)
    return tags


def random_masks(images, side, num_classes):
    """Tag masks of blocks, one with a single class and one without any."""
    blocks = torch.randint(-1, num_classes + 1, (images, side // 8, side // 8))
    blocks[torch.rand(blocks.shape) < 0.4] = 0
    blocks[torch.rand(blocks.shape) < 0.1] = 255
    confident = (blocks > 0) & (blocks < 255)
    blocks[0][confident[0]] = num_classes
    blocks[1][confident[1]] = -1
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


class TestTags:
    def test_seco_tags_released_matches_golden(self, golden):
        arrays = golden("seco_tags_released")
        mask, corners = arrays["roi_mask"], arrays["crop_top_left"]
        classes = int(mask.where(mask != 255, 0).max())
        tags = patch_tags_released(mask, corners, arrays["crop_size"], classes, arrays["threshold"])
        assert tags.dtype == torch.int64
        assert torch.equal(tags, arrays["tags"].long())

    @pytest.mark.parametrize("reading", ["a", "b"])
    def test_seco_tags_published_matches_golden(self, golden, reading):
        arrays = golden("seco_tags_published")
        mask, size = arrays["roi_mask"], arrays["crop_size"]
        drawn, hand = cut(mask, arrays["crop_top_left"], size), arrays["hand_patches"][None]
        for patches, name in ((drawn, f"tags_reading_{reading}"), (hand, f"hand_tags_reading_{reading}")):
            classes = int(patches.where(patches != 255, 0).max())
            tags = patch_tags(patches, classes, arrays["threshold"], reading)
            assert tags.dtype == torch.int64
            assert torch.equal(tags, arrays[name].view_as(tags))

    def test_seco_tags_published_golden_share_that_a_threshold_must_exceed(self, golden):
        """A patch is background from the recorded share of its pixels on, and not before."""
        arrays = golden("seco_tags_published")
        drawn = cut(arrays["roi_mask"], arrays["crop_top_left"], arrays["crop_size"])
        for patches, shares in (
            (drawn.flatten(0, 1), arrays["non_background_fraction"].flatten()),
            (arrays["hand_patches"], arrays["hand_fraction"]),
        ):
            for patch, share in zip(patches[:, None, None], shares.tolist(), strict=True):
                assert patch_tags(patch, 99, share) == 0
                assert share == 0 or patch_tags(patch, 99, share - 0.5 / patch.numel()) != 0

    @pytest.mark.parametrize("seed", range(4))
    def test_tags_by_plain_loops(self, seed):
        torch.manual_seed(seed)
        mask = random_masks(4, 48, 3)
        corners = torch.randint(48 - 13, (4, 9, 2))
        patches = cut(mask, corners, 13)
        for threshold in (0.0, 0.2, 0.5):
            for reading in ("a", "b"):
                tags = patch_tags(patches, 3, threshold, reading).flatten().tolist()
                assert tags == [tag_by_loops(patch, threshold, reading) for patch in patches.flatten(0, 1)]
            tags = patch_tags_released(mask, corners, 13, 3, threshold).tolist()
            assert tags == [released_tags_by_loops(m, c, 13, threshold) for m, c in zip(mask, corners)]

    @pytest.mark.parametrize("images", [1, 3])
    def test_released_tags_of_a_batch_are_those_of_its_images(self, images):
        torch.manual_seed(0)
        for mask in (random_masks(4, 32, 5)[:images], random_masks(4, 32, 5)[[0] * images]):
            corners = torch.randint(32 - 8, (images, 6, 2))
            tags = patch_tags_released(mask, corners, 8, 5, 0.2)
            for image in range(images):
                one = slice(image, image + 1)
                assert torch.equal(tags[one], patch_tags_released(mask[one], corners[one], 8, 5, 0.2))

    def test_unknown_class_and_unknown_reading_are_errors(self):
        patches = torch.full((1, 2, 4, 4), 4)
        corners = torch.zeros(1, 2, 2, dtype=torch.long)
        with pytest.raises(ValueError, match=r"4; expected -1 .*, 0 .* and 1\.\.3"):
            patch_tags(patches, 3, 0.2)
        with pytest.raises(ValueError, match=r"4; expected -1 .*, 0 .* and 1\.\.3"):
            patch_tags_released(patches[:, 0], corners, 2, 3, 0.2)
        with pytest.raises(ValueError, match="-2.*; expected -1"):
            patch_tags(patches * 0 - 2, 3, 0.2)
        with pytest.raises(ValueError, match="reading 'c' is unknown; choose one of a, b"):
            patch_tags(patches, 4, 0.2, "c")


# ---------------------------------------------------------------------------------------- contrast with prototypes


def released_prototypes_by_loops(prototypes, tokens, labels, momentum):
    prototypes = prototypes.clone()
    for token, label in zip(tokens, labels):
        present = label.nonzero().flatten().tolist()
        if len(present) == 1:
            prototypes[present[0]] = momentum * prototypes[present[0]] + (1 - momentum) * token
    return F.normalize(prototypes, dim=1)


def prototypes_by_loops(prototypes, tokens, labels, eta, rule):
    prototypes = prototypes.clone()
    for token, label in zip(tokens, labels):
        present = label.nonzero().flatten().tolist()
        if not present or rule == "single" and len(present) > 1:
            continue
        cosines = torch.stack([F.cosine_similarity(prototypes[c], token, dim=0) for c in present])
        weights = cosines.softmax(0) if rule == "weighted" else torch.ones_like(cosines)
        for c, weight in zip(present, weights):
            moved = eta * prototypes[c] + weight * (1 - eta) * token
            prototypes[c] = moved / moved.norm()
    return prototypes


class TestPrototypes:
    def test_seco_prototypes_released_matches_golden(self, golden):
        arrays = golden("seco_prototypes_released")
        prototypes = arrays["prototypes_initial"]
        steps = zip(arrays["class_tokens"], arrays["single_class_index"], arrays["prototypes_after"], strict=True)
        for tokens, index, after in steps:
            labels = single_labels(index, len(prototypes))
            nothing = labels * (labels.sum(1, keepdim=True) == 1)  # an image without labels does not count either
            updated = update_prototypes_released(prototypes, tokens, nothing, arrays["momentum"])
            prototypes = update_prototypes_released(prototypes, tokens, labels, arrays["momentum"])
            assert_close(prototypes, after, rtol=0, atol=1e-5)
            assert torch.equal(updated, prototypes)

    @pytest.mark.parametrize("kind", ["raw_token", "unit_token"])
    def test_seco_prototypes_published_matches_golden(self, golden, kind):
        arrays = golden("seco_prototypes_published")
        options = dict(rule="weighted", unit_tokens=kind == "unit_token")
        prototypes = arrays["prototypes_initial"]
        steps = zip(
            arrays["class_tokens"],
            arrays["image_labels"].double(),
            arrays[f"prototypes_after_{kind}"],
            arrays[f"weights_{kind}"],
            strict=True,
        )
        for tokens, labels, after, weights in steps:
            batch = update_prototypes(prototypes, tokens, labels, arrays["eta"], **options)
            for token, label, weight in zip(tokens, labels, weights, strict=True):
                assert_close(prototype_weights(prototypes, token, label), weight, **PUBLISHED)
                prototypes = update_prototypes(prototypes, token[None], label[None], arrays["eta"], **options)
            assert_close(prototypes, after, **PUBLISHED)
            assert_close(batch, after, **PUBLISHED)

    def test_seco_prototypes_published_golden_single_only(self, golden):
        arrays = golden("seco_prototypes_published")
        prototypes = arrays["prototypes_initial"]
        steps = zip(arrays["class_tokens"], arrays["image_labels"], arrays["prototypes_after_single_only"], strict=True)
        for tokens, labels, after in steps:
            prototypes = update_prototypes(prototypes, tokens, labels, arrays["eta"], rule="single")
            assert_close(prototypes, after, **PUBLISHED)

    @pytest.mark.parametrize("rule", ["weighted", "single", "equal"])
    def test_prototypes_by_plain_loops(self, rule):
        torch.manual_seed(0)
        prototypes = F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1)
        tokens, labels = 3 * torch.randn(9, 6, dtype=torch.float64), (torch.rand(9, 4) < 0.4).double()
        labels[:, 3] = 0
        labels[0] = 0
        found = update_prototypes(prototypes, tokens, labels, 0.8, rule)
        assert_close(found, prototypes_by_loops(prototypes, tokens, labels, 0.8, rule), **PUBLISHED)
        assert torch.equal(found[3], prototypes[3]), "no image of the class"
        unit = update_prototypes(prototypes, tokens, labels, 0.8, rule, unit_tokens=True)
        assert_close(unit, update_prototypes(prototypes, F.normalize(tokens, dim=1), labels, 0.8, rule), **PUBLISHED)

    def test_released_prototypes_by_plain_loops(self):
        torch.manual_seed(0)
        prototypes, tokens = torch.randn(4, 6, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
        labels = F.one_hot(torch.randint(3, (12,)), 4).double()
        labels[2] = 1
        labels[5] = 0
        found = update_prototypes_released(prototypes, tokens, labels, 0.9)
        assert_close(found, released_prototypes_by_loops(prototypes, tokens, labels, 0.9), **PUBLISHED)

    def test_weights_sum_to_one_over_the_classes_of_the_image(self):
        torch.manual_seed(0)
        prototypes, token = torch.randn(4, 6), torch.randn(6)
        weights = prototype_weights(prototypes, token, torch.tensor([1.0, 0, 1, 1]))
        assert weights[1] == 0 and weights.sum() == pytest.approx(1)
        assert prototype_weights(prototypes, token, torch.tensor([0.0, 1, 0, 0])).tolist() == [0, 1, 0, 0]
        assert prototype_weights(prototypes, token, torch.zeros(4)).tolist() == [0, 0, 0, 0]

    def test_no_gradient_reaches_prototypes(self):
        tokens = leaf(torch.randn(2, 6))
        for update in (update_prototypes, update_prototypes_released):
            assert not update(torch.randn(3, 6), tokens, torch.eye(3)[:2], 0.9).requires_grad

    def test_unknown_rule_is_an_error(self):
        with pytest.raises(ValueError, match="rule 'mean' is unknown; choose one of weighted, single, equal"):
            update_prototypes(torch.randn(3, 6), torch.randn(2, 6), torch.ones(2, 3), 0.9, "mean")


def global_contrast_by_loops(queries, prototypes, tags, temperature):
    classes = sorted({tag for tag in tags.tolist() if tag >= 1})
    terms = []
    for q, tag in zip(queries, tags.tolist()):
        if tag >= 1:
            scores = torch.stack([(q @ prototypes[c - 1] / temperature).exp() for c in classes])
            terms.append(-(scores[classes.index(tag)] / scores.sum()).log())
    return torch.stack(terms).mean() if terms else (queries * 0).sum()


class TestGlobalContrast:
    @pytest.mark.parametrize(
        "variant, close, gradient_close",
        [("published", PUBLISHED, PUBLISHED), ("released", RELEASED, RELEASED_GRADIENT)],
    )
    def test_seco_lig_matches_golden(self, golden, variant, close, gradient_close):
        arrays = golden(f"seco_lig_{variant}")
        for case in cases(arrays):
            queries, tags = leaf(case.q), case.tags if variant == "published" else as_tags(case.tags)
            loss = global_contrast_loss(queries, case.prototypes, tags, arrays["temperature"])
            expected = torch.as_tensor(case.loss, dtype=queries.dtype).reshape(())
            zero = dict(rtol=0, atol=1e-6) if expected == 0 else {}
            assert_close(loss, expected, **(zero or close))
            assert_close(gradients(loss, queries)[0], case.grad_q, **(zero or gradient_close))

    def test_seco_lig_published_golden_counts_patches_and_classes_of_the_batch(self, golden):
        arrays = golden("seco_lig_published")
        for case in cases(arrays):
            kept = case.tags >= 1
            assert kept.sum() == case.num_positive
            assert torch.equal(case.tags[kept].unique(), case.classes)
            loss = global_contrast_loss(case.q, case.prototypes, case.tags, arrays["temperature"])
            only = global_contrast_loss(case.q[kept], case.prototypes, case.tags[kept], arrays["temperature"])
            assert_close(only, loss, **PUBLISHED)
            other = torch.randn_like(case.prototypes)
            other[case.classes - 1] = case.prototypes[case.classes - 1]
            assert_close(global_contrast_loss(case.q, other, case.tags, arrays["temperature"]), loss, **PUBLISHED)

    @pytest.mark.parametrize("seed", range(3))
    def test_by_plain_loops(self, seed):
        torch.manual_seed(seed)
        queries = leaf(F.normalize(torch.randn(15, 6, dtype=torch.float64), dim=1))
        prototypes, tags = torch.randn(5, 6, dtype=torch.float64), torch.randint(-1, 5, (15,))
        loss = global_contrast_loss(queries, prototypes, tags, 0.2)
        expected = global_contrast_by_loops(queries, prototypes, tags, 0.2)
        assert_close(loss, expected, **PUBLISHED)
        assert_close(gradients(loss, queries), gradients(expected, queries), **PUBLISHED)

    @pytest.mark.parametrize("tag", [-1, 0])
    def test_no_class_is_exactly_zero_and_back_propagates(self, tag):
        queries = leaf(torch.randn(6, 8))
        loss = global_contrast_loss(queries, torch.randn(3, 8), torch.full((6,), tag), 0.1)
        loss.backward()
        assert loss == 0 and not queries.grad.any()

    def test_a_single_class_is_exactly_zero_and_back_propagates(self):
        queries = leaf(torch.randn(6, 8))
        loss = global_contrast_loss(queries, torch.randn(1, 8), torch.tensor([1, 0, 1, -1, 1, 1]), 0.1)
        loss.backward()
        assert loss == 0 and not queries.grad.any()

    def test_large_products_stay_finite(self):
        queries = leaf(torch.tensor([[1000.0, 0], [0, 1000]]))
        loss = global_contrast_loss(queries, torch.eye(2).flip(0), torch.tensor([1, 2]), 0.01)
        loss.backward()
        assert loss.isfinite() and queries.grad.isfinite().all()

    @pytest.mark.parametrize("tag", [4, -2])
    def test_tag_of_an_unknown_class_is_an_error(self, tag):
        with pytest.raises(ValueError, match=rf"{tag}.*; expected -1 .*, 0 .* and 1\.\.3"):
            global_contrast_loss(torch.randn(2, 8), torch.randn(3, 8), torch.tensor([1, tag]), 0.1)


# -------------------------------------------------------------------------------------------- contrast among patches


def rectify_by_loops(queries, tags, keys, key_tags, sigma):
    """(tags, means, positives, below) of eqs. 6 and 7."""
    out = []
    for q, tag in zip(queries, tags.tolist()):
        products = [(q @ k).item() for k, other in zip(keys, key_tags.tolist()) if tag != -1 and other == tag]
        mean = sum(products) / len(products) if products else float("nan")
        below = sum(product < mean for product in products)
        noisy = bool(products) and below / len(products) > sigma
        out.append((-1 if noisy else tag, mean, len(products), below))
    return zip(*out)


def local_contrast_by_loops(queries, tags, keys, key_tags, temperature, reduction="pairs", with_queries=False):
    """Eq. 8 word by word."""
    rows = []
    for i, (q, tag) in enumerate(zip(queries, tags.tolist())):
        candidates = [(k, other) for k, other in zip(keys, key_tags.tolist()) if other != -1]
        if with_queries:
            others = zip(range(len(queries)), queries, tags.tolist())
            candidates += [(k, other) for j, k, other in others if j != i and other != -1]
        if tag == -1 or not candidates:
            continue
        scores = [(q @ k / temperature).exp() for k, _ in candidates]
        total = sum(scores)
        row = [(score / total).log() for score, (_, other) in zip(scores, candidates) if other == tag]
        rows.append(torch.stack(row)) if row else None
    if not rows:
        return (queries * 0).sum()
    return -torch.cat(rows).mean() if reduction == "pairs" else -torch.stack([row.mean() for row in rows]).mean()


def released_contrast_by_loops(queries, tags, keys, key_tags, temperature):
    """(loss, tags, N+) word by word, facts of the public code."""
    total, after, pairs, rows = 0, [], 0, []
    for q, tag in zip(queries, tags.tolist()):
        scores = [q @ k / temperature for k in keys]
        highest = max(score.item() for score in scores)
        scores = [score - highest for score in scores]
        pull = [s if tag != -1 and u == tag else 0 * s for s, u in zip(scores, key_tags.tolist())]
        mean = sum(p.item() for p in pull) / len(pull)
        below = sum(p.item() < mean for p in pull)
        noisy = below > 10 * (len(pull) - below + 1e-6)
        pull = [0 * p for p in pull] if noisy else pull
        kept = [s.exp() for s, u in zip(scores, key_tags.tolist()) if tag != -1 and u != -1 and s != 0]
        after.append(0 if noisy else tag)
        pairs += sum(p.item() != 0 for p in pull)
        if kept:
            rows.append(sum(pull) - len(pull) * (sum(kept) + 1e-12).log())
    if pairs:
        total = -sum(row for row in rows if row < 0) / pairs / len(queries)
    return total + (queries * 0).sum(), torch.tensor(after), pairs


def contrast_example(seed, queries=9, keys=30, classes=3, dtype=torch.float64):
    """Unit vectors around one centre a tag, tags -1..C, some slots empty."""
    torch.manual_seed(seed)
    centres = torch.randn(classes + 2, 8, dtype=dtype)
    tags, key_tags = (torch.randint(-1, classes + 1, (n,)) for n in (queries, keys))
    vectors = [F.normalize(centres[t + 1] + 0.7 * torch.randn(len(t), 8, dtype=dtype), dim=1) for t in (tags, key_tags)]
    return vectors[0], tags, vectors[1], key_tags


class TestRectification:
    def test_seco_lil_published_golden_rectification(self, golden):
        arrays = golden("seco_lil_published")
        for case in cases(arrays):
            for sigma, after in zip(arrays["sigma_values"].tolist(), case.tags_after, strict=True):
                found = rectify_tags(case.q, case.tags, case.bank, case.bank_tags, sigma)
                assert_close(found.mean_similarity, case.mean_similarity, **PUBLISHED, equal_nan=True)
                assert torch.equal(found.positives, case.num_positive)
                assert torch.equal(found.below, case.num_below_mean)
                assert torch.equal(found.tags, after)

    @pytest.mark.parametrize("sigma", [0.3, 0.5, 0.6, 0.9])
    def test_by_plain_loops(self, sigma):
        queries, tags, keys, key_tags = contrast_example(0, 30, 60)
        found = rectify_tags(queries, tags, keys, key_tags, sigma)
        after, means, positives, below = rectify_by_loops(queries, tags, keys, key_tags, sigma)
        assert found.tags.tolist() == list(after)
        assert found.positives.tolist() == list(positives) and found.below.tolist() == list(below)
        assert_close(found.mean_similarity, torch.tensor(means, dtype=torch.float64), **PUBLISHED, equal_nan=True)

    def test_a_tag_is_given_up_only_above_sigma(self):
        """Four of five keys lie below the mean: more than 0.79 of them, not more than 0.8."""
        queries, keys = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0], *[[0.1, 0]] * 4, [0, 1]])
        tags, key_tags = torch.tensor([2]), torch.tensor([2] * 5 + [1])
        for sigma, after in ((0.79, -1), (0.8, 2), (0.81, 2)):
            found = rectify_tags(queries, tags, keys, key_tags, sigma)
            assert (found.below.item(), found.positives.item(), found.tags.item()) == (4, 5, after)

    def test_more_tags_survive_a_larger_sigma_and_all_survive_one(self):
        queries, tags, keys, key_tags = contrast_example(1, 40, 80)
        kept = []
        for sigma in (0.0, 0.4, 0.5, 0.6, 1.0):
            found = rectify_tags(queries, tags, keys, key_tags, sigma)
            changed = found.tags != tags
            assert torch.equal(changed, (found.below > sigma * found.positives) & (tags != -1))
            assert (found.tags[changed] == -1).all()
            kept.append((found.tags != -1).sum().item())
        assert kept == sorted(kept) and kept[0] < kept[2] < kept[-1] == (tags != -1).sum()

    def test_empty_reservoir_and_input_tags_stay_as_they_are(self):
        queries, tags, keys, key_tags = contrast_example(2)
        before = tags.clone()
        found = rectify_tags(queries, tags, torch.zeros_like(keys), torch.full_like(key_tags, -1), 0.5)
        assert torch.equal(found.tags, before) and found.mean_similarity.isnan().all()
        rectify_tags(queries, tags, keys, key_tags, 0.0)
        assert torch.equal(tags, before)


class TestLocalContrast:
    def test_seco_lil_published_matches_golden(self, golden):
        arrays = golden("seco_lil_published")
        for case in cases(arrays):
            inputs = case.tags, case.bank, case.bank_tags, arrays["temperature"]
            queries = leaf(case.q)
            loss = local_contrast_loss(queries, *inputs)
            assert_close(loss.item(), case.loss, **PUBLISHED)
            assert_close(gradients(loss, queries)[0], case.grad_q, **PUBLISHED)
            per_anchor = local_contrast_loss(queries, *inputs, reduction="anchors")
            assert_close(per_anchor.item(), case.loss_per_anchor, **PUBLISHED)
            assert_close(gradients(per_anchor, queries)[0], case.grad_q_per_anchor, **PUBLISHED)
            literal = local_contrast_loss(queries, *inputs, with_queries=True)
            assert_close(literal.item(), case.loss_literal_reservoir, **PUBLISHED)

    def test_seco_lil_published_golden_pairs_are_those_of_equal_tags(self, golden):
        """The loss of all pairs is the mean of the losses of the single anchors, weighted by their pairs."""
        arrays = golden("seco_lil_published")
        for case in cases(arrays):
            positives = rectify_tags(case.q, case.tags, case.bank, case.bank_tags, 1).positives
            assert positives.sum() == case.num_positive_pairs
            single = [
                local_contrast_loss(q[None], tag[None], case.bank, case.bank_tags, arrays["temperature"])
                for q, tag in zip(case.q, case.tags)
            ]
            mean = (torch.stack(single) * positives).sum() / case.num_positive_pairs
            assert_close(mean.item(), case.loss, **PUBLISHED)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_seco_lil_released_matches_golden(self, golden, dtype):
        arrays = golden("seco_lil_released")
        for case in cases(arrays):
            queries, tags = leaf(case.q.to(dtype)), as_tags(case.tags)
            keys = torch.cat([case.keys, case.queue]).to(dtype)
            key_tags = torch.cat([tags, as_tags(case.queue_tags)])
            loss, after = local_contrast_loss_released(queries, tags, keys, key_tags, arrays["temperature"])
            assert loss.shape == ()
            assert_close(loss, case.loss[0].to(dtype), rtol=1e-5, atol=1e-5)
            assert_close(gradients(loss, queries)[0], case.grad_q.to(dtype), **RELEASED_GRADIENT)
            assert torch.equal(after, as_tags(case.tags_after))
            assert torch.equal(tags, as_tags(case.tags)), "the input is not touched"

    def test_seco_lil_released_golden_pairs_by_plain_loops(self, golden):
        arrays = golden("seco_lil_released")
        for case in cases(arrays):
            tags = as_tags(case.tags)
            keys, key_tags = torch.cat([case.keys, case.queue]), torch.cat([tags, as_tags(case.queue_tags)])
            inputs = case.q.double(), tags, keys.double(), key_tags, arrays["temperature"]
            loss, after, pairs = released_contrast_by_loops(*inputs)
            assert pairs == case.num_nonzero_positive
            found, rectified = local_contrast_loss_released(*inputs)
            assert_close(found, loss, **PUBLISHED)
            assert torch.equal(rectified, after)

    @pytest.mark.parametrize("with_queries", [False, True])
    @pytest.mark.parametrize("reduction", ["pairs", "anchors"])
    def test_by_plain_loops(self, reduction, with_queries):
        queries, tags, keys, key_tags = contrast_example(3)
        queries = leaf(queries)
        inputs = queries, tags, keys, key_tags, 0.3, reduction, with_queries
        loss, expected = local_contrast_loss(*inputs), local_contrast_by_loops(*inputs)
        assert_close(loss, expected, **PUBLISHED)
        assert_close(gradients(loss, queries), gradients(expected, queries), **PUBLISHED)

    @pytest.mark.parametrize("seed", range(4))
    def test_released_by_plain_loops(self, seed):
        """Numbers whose products are exact, since equality with 0 decides."""
        torch.manual_seed(seed)
        queries, keys = leaf(torch.randint(-4, 5, (8, 6)).double() / 8), torch.randint(-4, 5, (24, 6)).double() / 8
        tags, key_tags = torch.randint(-1, 3, (8,)), torch.randint(-1, 3, (24,))
        if seed % 2:
            tags[1:], key_tags[2:] = 2, 2
        inputs = queries, tags, keys, key_tags, 0.25
        loss, after = local_contrast_loss_released(*inputs)
        expected, expected_after, _ = released_contrast_by_loops(*inputs)
        assert_close(loss, expected, **PUBLISHED)
        assert_close(gradients(loss, queries), gradients(expected, queries), **PUBLISHED)
        assert torch.equal(after, expected_after)

    @pytest.mark.parametrize("reduction", ["pairs", "anchors"])
    @pytest.mark.parametrize("tag, key_tag", [(-1, -1), (-1, 2), (0, -1), (0, 2), (2, -1)])
    def test_without_pairs_exactly_zero_and_back_propagates(self, tag, key_tag, reduction):
        queries = leaf(torch.randn(5, 8))
        tags, key_tags = torch.full((5,), tag), torch.full((11,), key_tag)
        loss = local_contrast_loss(queries, tags, torch.randn(11, 8), key_tags, 0.08, reduction)
        loss.backward()
        assert loss == 0 and not queries.grad.any()

    @pytest.mark.parametrize("tag, key_tag", [(-1, -1), (-1, 2), (0, -1), (0, 2)])
    def test_released_without_pairs_exactly_zero_and_back_propagates(self, tag, key_tag):
        queries = leaf(torch.randn(5, 8))
        tags, key_tags = torch.full((5,), tag), torch.full((11,), key_tag)
        loss, after = local_contrast_loss_released(queries, tags, torch.randn(11, 8), key_tags, 0.08)
        loss.backward()
        assert loss == 0 and not queries.grad.any() and torch.equal(after, tags)

    def test_sharp_temperature_stays_finite(self):
        queries, tags, keys, key_tags = contrast_example(4, dtype=torch.float32)
        for loss in (
            local_contrast_loss(leaf(queries), tags, keys, key_tags, 1e-4),
            local_contrast_loss_released(leaf(queries), tags, keys, key_tags, 1e-4)[0],
        ):
            assert loss.isfinite()

    def test_empty_slots_do_not_count(self):
        queries, tags, keys, key_tags = contrast_example(5)
        filled = key_tags != -1
        loss = local_contrast_loss(queries, tags, keys, key_tags, 0.1)
        assert_close(local_contrast_loss(queries, tags, keys[filled], key_tags[filled], 0.1), loss, **PUBLISHED)

    def test_unknown_reduction_is_an_error(self):
        with pytest.raises(ValueError, match="reduction 'sum' is unknown; choose one of pairs, anchors"):
            local_contrast_loss(*contrast_example(0), 0.1, reduction="sum")


class TestReservoir:
    def test_seco_memory_released_matches_golden(self, golden):
        arrays = golden("seco_memory_released")
        memory = Reservoir(*arrays["queue_initial"].shape, "released")
        pointer = torch.tensor(arrays["pointer_initial"])
        tags = as_tags(arrays["queue_tags_initial"])
        memory.load_state_dict({"keys": arrays["queue_initial"], "tags": tags, "pointer": pointer})
        for step, (keys, tags) in enumerate(zip(arrays["keys"], as_tags(arrays["tags"]), strict=True)):
            memory.enqueue(keys, tags)
            assert torch.equal(memory.keys, arrays["queue_after"][step])
            assert torch.equal(memory.tags, as_tags(arrays["queue_tags_after"][step]))
            assert memory.pointer == arrays["pointer_after"][step]

    def test_seco_pipeline_published_matches_golden(self, golden):
        """Rectify, store, contrast, step after step, with the functions and with `SeCo.contrast`."""
        arrays = golden("seco_pipeline_published")
        _, capacity, dim = arrays["step_bank"].shape
        memory = Reservoir(capacity, dim).double()
        alpha, beta = arrays["alpha"], arrays["beta"]
        temperatures = arrays["temperature_lig"], arrays["temperature_lil"]
        config = SeCoConfig(
            **SECO | {"variant": "published", "reservoir": capacity, "sigma": arrays["sigma"], "weight_lig": alpha},
        )
        config = replace(config, temperature_lig=temperatures[0], temperature_lil=temperatures[1], weight_lil=beta)
        method = build(config)
        method.reservoir = Reservoir(capacity, dim).double()
        method.prototypes = arrays["prototypes"]
        assert not memory.keys.any() and (memory.tags == -1).all() and memory.pointer == 0
        for step, (queries, keys, given) in enumerate(zip(arrays["step_q"], arrays["step_k"], arrays["step_tags"])):
            tags = rectify_tags(queries, given, memory.keys, memory.tags, arrays["sigma"]).tags
            assert torch.equal(tags, arrays["step_tags_after"][step])
            memory.enqueue(keys, tags)
            lil = local_contrast_loss(queries, tags, memory.keys, memory.tags, temperatures[1])
            lig = global_contrast_loss(queries, arrays["prototypes"], tags, temperatures[0])
            assert_close(lil, arrays["step_lil"][step], **PUBLISHED)
            assert_close(lig, arrays["step_lig"][step], **PUBLISHED)
            terms = method.contrast(queries, keys, given)
            assert_close(terms["lil"] + terms["lig"], arrays["step_weighted"][step], **PUBLISHED)
            for reservoir in (memory, method.reservoir):
                assert torch.equal(reservoir.keys, arrays["step_bank"][step])
                assert torch.equal(reservoir.tags, arrays["step_bank_tags"][step])
                assert reservoir.pointer == arrays["step_pointer"][step]

    def test_is_a_ring_and_survives_saving(self):
        memory = Reservoir(7, 2)
        for first in (0, 3, 6):
            numbers = torch.arange(first, first + 3)
            memory.enqueue(numbers[:, None].expand(3, 2).float(), numbers)
        assert memory.tags.tolist() == [7, 8, 2, 3, 4, 5, 6] and memory.pointer == 2
        assert torch.equal(memory.keys[:, 0], memory.tags.float())
        copied = Reservoir(7, 2)
        copied.load_state_dict(copy.deepcopy(memory.state_dict()))
        for reservoir in (memory, copied):
            reservoir.enqueue(torch.full((6, 2), 9.0), torch.arange(10, 16))
            assert reservoir.tags.tolist() == [15, 8, 10, 11, 12, 13, 14]
            assert reservoir.pointer == 1 and reservoir.pointer.dtype == torch.int64

    def test_takes_as_many_as_it_has_slots_and_no_more(self):
        memory = Reservoir(4, 2)
        memory.enqueue(torch.rand(4, 2), torch.arange(4))
        assert memory.tags.tolist() == [0, 1, 2, 3] and memory.pointer == 0
        with pytest.raises(ValueError, match="reservoir = 4 .* 5 patches"):
            memory.enqueue(torch.rand(5, 2), torch.arange(5))

    def test_keeps_no_graph(self):
        memory = Reservoir(4, 2)
        memory.enqueue(leaf(torch.rand(2, 2)), torch.ones(2, dtype=torch.long))
        assert not memory.keys.requires_grad and not list(memory.parameters())

    def test_starts_empty_or_as_released_with_random_background(self):
        published, released = Reservoir(64, 16), Reservoir(64, 16, "released")
        assert not published.keys.any() and (published.tags == -1).all()
        assert (released.tags == 0).all()
        assert_close(released.keys.norm(dim=0), torch.ones(16))
        with pytest.raises(ValueError, match="variant 'paper' is unknown"):
            Reservoir(4, 2, "paper")


# -------------------------------------------------------------------------------------------------------- networks


class TestTeacher:
    def test_seco_ema_released_matches_golden(self, golden):
        arrays = golden("seco_ema_released")
        names = [key.removeprefix("teacher_initial_") for key in arrays if key.startswith("teacher_initial_")]
        teacher = [arrays[f"teacher_initial_{name}"] for name in names]
        steps = len({key.split("_")[1] for key in arrays if key.startswith("student_")})
        for step in range(steps):
            ema_update(teacher, [arrays[f"student_step{step}_{name}"] for name in names], arrays["momentum"])
            for name, values in zip(names, teacher):
                assert_close(values, arrays[f"teacher_step{step}_{name}"], rtol=1e-4, atol=1e-6)

    def test_seco_ema_published_matches_golden(self, golden):
        arrays = golden("seco_ema_published")
        teacher = arrays["teacher_initial"]
        for student, after in zip(arrays["student_steps"], arrays["teacher_steps"], strict=True):
            ema_update([teacher], [student], arrays["momentum"])
            assert_close(teacher, after, **PUBLISHED)


class TestProjectionHead:
    def test_seco_projection_head_released_matches_golden(self, golden):
        arrays = golden("seco_projection_head_released")
        (width, dim), out = arrays["fc1_weight"].shape, len(arrays["fc3_bias"])
        head = ProjectionHead(dim, width, out)
        linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for number, layer in enumerate(linear, 1):
                layer.weight.copy_(arrays[f"fc{number}_weight"])
                layer.bias.copy_(arrays[f"fc{number}_bias"])
        tokens = leaf(arrays["input"])
        output = head(tokens)
        assert_close(output, arrays["output"], **RELEASED)
        scalar = (output * arrays["upstream_grad"]).sum()
        found = gradients(scalar, tokens, *(layer.weight for layer in linear))
        for name, gradient in zip(("input", "fc1_weight", "fc2_weight", "fc3_weight"), found, strict=True):
            assert_close(gradient, arrays[f"grad_{name}"], **RELEASED_GRADIENT, msg=lambda text, n=name: f"{n}: {text}")

    def test_unit_length_at_any_rank(self):
        out = ProjectionHead(6, 12)(torch.randn(2, 3, 6))
        assert out.shape == (2, 3, 6)
        assert_close(out.norm(dim=-1), torch.ones(2, 3))


class TestNetwork:
    """The whole network, with weights and views of `seco_network_released`."""

    CLOSE = dict(rtol=1e-4, atol=2e-5)
    HEADS = {"student_projection.mlp": "student_head.layers", "teacher_projection.mlp": "teacher_head.layers"}
    BUFFERS = {"queue": "reservoir.keys", "queue_label_flag": "reservoir.tags", "queue_ptr": "reservoir.pointer"}

    @pytest.fixture
    def arrays(self, golden):
        return golden("seco_network_released")

    @pytest.fixture
    def method(self, arrays):
        def encoder():
            return VisionTransformer(
                img_size=arrays["base_image_size"],
                patch_size=arrays["patch_size"],
                embed_dim=arrays["embed_dim"],
                depth=arrays["depth"],
                num_heads=arrays["num_heads"],
                mlp_ratio=arrays["mlp_ratio"],
                num_classes=0,
                norm_layer=partial(nn.LayerNorm, eps=arrays["layer_norm_eps"]),
            )

        first = arrays["decoder_dilations"][0].item()
        assert arrays["decoder_dilations"].tolist() == [first * factor for factor in (1, 2, 3, 4)]
        config = SeCoConfig(
            variant="released",
            pooling="features",
            aux_tap=arrays["aux_layer"],
            cam_scales=(1.0,),
            cam_flip=False,
            decoder_width=0,
            decoder_dilation=first,
            patch_size=arrays["local_student"].shape[-1],
            patches=arrays["local_student"].shape[1],
            reservoir=arrays["queue_size"],
            ema_momentum=arrays["ema_momentum"],
            prototype_start=arrays["update_prototype_from"],
            prototype_momentum=arrays["prototype_momentum"],
            projection_width=len(arrays["w.student_projection.mlp.0.bias"]),
        )
        assert arrays["ncrops"] == 2 + config.patches
        backbone = MultiTokenViT(vit=encoder(), pos_resize="bicubic")
        method = SeCo(config, arrays["num_classes_foreground"], backbone)
        weights = {self.ours(key[2:]): value for key, value in arrays.items() if key.startswith("w.")}
        own = method.state_dict()
        method.load_state_dict({name: value.reshape(own[name].shape) for name, value in weights.items()})
        return method.train()

    def ours(self, name):
        """Name of a reference weight here."""
        for theirs, ours in {"student_encoder": "backbone", "local_teacher_encoder": "teacher"}.items():
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        for theirs, ours in self.HEADS.items():
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        if name.startswith("decoder.c"):
            return name.replace("decoder.c", "decoder.branches.", 1)
        return self.BUFFERS.get(name, name)

    def step(self, method, arrays, step):
        """One step of the public code with the recorded views and tags; returns queries, keys and tags."""
        tokens = method.encode(arrays["x"][step])
        patches, strong = (arrays[f"local_{role}"][step].transpose(0, 1) for role in ("student", "teacher"))
        whole = tokens.classes[:, 0]
        queries, keys = method.represent(whole, patches, strong, arrays["global_views"][step])
        if step >= method.config.prototype_start:
            labels = single_labels(arrays["single_class_index"][step], method.num_classes)
            momentum = method.config.prototype_momentum
            method.prototypes.copy_(update_prototypes_released(method.prototypes, whole, labels, momentum))
        tags = as_tags(arrays["tags"][step])
        queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)
        assert method.contrast(queries, keys, tags, on=False) == {}
        return queries, keys, tags

    def class_losses(self, method, images, labels):
        """The classification losses of a training step."""
        batch = {"image": images, "label": labels, "strong": images, "second": images}
        terms = method.losses(batch, 0)
        return terms["cls"], terms["aux"]

    def class_scores(self, method, images):
        """What the two classifiers score, (B, C) each, from their losses: a label y_c = 1 lowers one by score_c / C."""
        classes = method.num_classes
        scores = []
        for image in images[:, None]:
            nothing, *single = (
                torch.stack(self.class_losses(method, image, label[None]))
                for label in torch.cat([torch.zeros(1, classes), torch.eye(classes)])
            )
            scores.append(classes * (nothing - torch.stack(single)))
        return torch.stack(scores).unbind(-1)

    def test_seco_network_released_golden_plain_pass(self, method, arrays):
        images = arrays["x"][0]
        with torch.no_grad():
            tokens, maps, logits = method.encode(images), method.maps(images), method.segment(images)
        assert_close(tokens.classes[:, 0], arrays["plain_class_token"], **self.CLOSE)
        assert_close(tokens.as_map(tokens.patches), arrays["plain_features"], **self.CLOSE)
        assert_close(maps["cam"], arrays["cam_only"], **self.CLOSE)
        assert_close(maps["cam_aux"], arrays["cam_only_aux"], **self.CLOSE)
        assert_close(maps["class_logits"].flatten(1), arrays["plain_cls"], **self.CLOSE)
        assert_close(logits, arrays["plain_seg"], **self.CLOSE)
        with torch.no_grad():
            main, auxiliary = self.class_scores(method, images)
        assert_close(main, arrays["plain_cls"], **self.CLOSE)
        assert_close(auxiliary, arrays["plain_cls_aux"], **self.CLOSE)

    def test_seco_network_released_golden_steps_and_gradients(self, method, arrays):
        steps = len(arrays["x"])
        for step in range(steps):
            queries, keys, tags = self.step(method, arrays, step)
            assert_close(queries, arrays["step_q"][step], **self.CLOSE)
            assert_close(method.prototypes, arrays["step_prototypes"][step], **self.CLOSE)
            assert_close(method.reservoir.keys, arrays["step_queue"][step], **self.CLOSE)
            assert torch.equal(method.reservoir.tags, as_tags(arrays["step_queue_tags"][step]))
            assert method.reservoir.pointer == arrays["step_pointer"][step]
            if step == 0:
                candidates = torch.cat([queries, keys, method.reservoir.keys])
                assert_close(candidates, arrays["candidate_features_step0"], **self.CLOSE)
                candidate_tags = torch.cat([tags, tags, method.reservoir.tags])
                assert torch.equal(candidate_tags, as_tags(arrays["candidate_tags_step0"]))

        parameters = dict(method.named_parameters())
        for name in [key for key in arrays if key.startswith("after.")]:
            assert_close(parameters[self.ours(name.removeprefix("after."))].detach(), arrays[name], **self.CLOSE)

        lig = global_contrast_loss(queries, method.prototypes, tags, method.config.temperature_lig)
        assert_close(lig, arrays["last_lig"][0], **self.CLOSE)
        (method.config.weight_lig * lig).backward()
        cls, aux = self.class_losses(method, arrays["x"][-1], arrays["image_labels_last"])
        assert_close(cls.item(), arrays["last_cls_loss"], **self.CLOSE)
        assert_close(aux.item(), arrays["last_cls_loss_aux"], **self.CLOSE)
        (cls + aux).backward()
        for name in [key for key in arrays if key.startswith("grad.")]:
            found = parameters[self.ours(name.removeprefix("grad."))].grad
            expected = arrays[name].reshape(found.shape)
            assert_close(found, expected, **self.CLOSE, msg=lambda text, n=name: f"{n}: {text}")


# ------------------------------------------------------------------------------------------------------- the method


SECO = SMALL | {
    "patch_size": 16, "patches": 4, "tag_thresholds": [0.7, 0.25], "tag_threshold": 0.2, "tag_switch": 3,
    "tagging": "class", "label_switch": 0, "prototype_start": 0, "prototype_momentum": 0.9, "contrast_start": 0,
    "weight_lig": 0.5, "weight_lil": 0.5, "temperature_lig": 0.1, "temperature_lil": 0.08, "reservoir": 40,
    "ema_momentum": 0.9, "projection_width": 32,
}  # fmt: skip


def build(config, classes=CLASSES):
    """A small network without pretrained weights."""
    torch.manual_seed(0)
    return SeCo(config, classes, MultiTokenViT(image_size=SIDE, pretrained=False))


class Marked(torch.utils.data.Dataset):
    """Images with stripes of their classes as masks."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        stripes = torch.cat([torch.zeros(1, dtype=torch.long), self.labels[index].nonzero()[:, 0] + 1])
        mask = stripes[torch.arange(SIDE) * len(stripes) // SIDE].expand(SIDE, SIDE)
        return Sample(image, self.labels[index], mask, str(index))


class SeCoTester(MethodTester):
    name = "seco"
    rows: int  # of the contrasts, for two images with four patches each
    passes: list[tuple]  # shapes that the student encodes besides the images
    terms = {"cls", "aux", "lig", "lil", "ptc", "seg", "energy"}
    always = {"cls"}
    frozen = {"pos_embed", "teacher", "teacher_head"}

    @pytest.fixture
    def batch(self):
        """The two images of the other methods, a noisy strong view of them, and a mirrored second view."""
        torch.manual_seed(1)
        images = 0.3 * torch.randn(2, 3, SIDE, SIDE)
        images[0, 0, 8:40, 8:40] += 2
        images[1, 1, 24:56, :32] += 2
        images[1, 2, 24:56, 32:] += 2
        strong = images + 0.2 * torch.randn_like(images)
        batch = {"image": images, "label": torch.tensor([[1.0, 0, 0], [0, 1, 1]]), "strong": strong}
        return batch | ({"second": images.flip(-1)} if self.settings["variant"] == "released" else {})

    def trained(self, method):
        return {name: p for name, p in method.named_parameters() if p.requires_grad}

    def test_every_parameter_gets_a_gradient(self, method, batch):
        """Every one that trains: the teacher follows the student instead, and the position embedding is frozen."""
        sum(method.losses(batch, 0).values()).backward()
        trained = self.trained(method)
        assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
        rest = {name: p for name, p in method.named_parameters() if name not in trained}
        assert {next(part for part in name.split(".") if part in self.frozen) for name in rest} == self.frozen
        assert all(p.grad is None for p in rest.values())

    def test_image_without_labels_is_no_error(self, method, batch):
        """As for the other methods, for the parameters that train."""
        for labels in (torch.zeros(2, CLASSES), torch.tensor([[0.0, 0, 0], [1, 0, 0]])):
            terms = method.losses(batch | {"label": labels}, 0)
            sum(terms.values()).backward()
            assert all(value.isfinite() for value in terms.values())
            assert all(p.grad.isfinite().all() for p in self.trained(method).values())

    def test_loss_falls_on_two_images(self, method, batch):
        """Without L_LiL, whose candidates change while the reservoir fills."""
        optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3)
        history = []
        for _ in range(12):
            torch.manual_seed(2)
            terms = method.losses(batch, 0)
            optimiser.zero_grad()
            sum(terms.values()).backward()
            optimiser.step()
            terms.pop("lil")
            history.append(sum(terms.values()).item())
        assert min(history[-3:]) < 0.9 * history[0]

    def test_supervision_has_no_gradient_and_one_scale_needs_one_pass(self, method, batch):
        """The maps that supervise are those of the training pass; patches (and a second view) are encoded besides."""
        sizes = []
        method.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
        seeds = method.seeds(batch["image"], method.token_maps(method.encode(batch["image"])))
        assert sizes == [(2, 3, SIDE, SIDE)]
        for seed in seeds.values():
            assert not seed.requires_grad
            assert seed.shape == (2, CLASSES, 8, 8)
            assert 0 <= seed.min() and seed.max() < 1
        method.losses(batch, 0)
        assert sizes[1] == (2, 3, SIDE, SIDE) and sorted(sizes[2:]) == sorted(self.passes)

    def test_two_scales_with_mirror_images_take_two_passes_more(self, batch):
        method = self.make(cam_scales=[1.0, 0.5], cam_flip=True)
        sizes = []
        method.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
        method.losses(batch, 0)
        assert sizes[:3] == [(2, 3, SIDE, SIDE), (4, 3, SIDE, SIDE), (4, 3, SIDE // 2, SIDE // 2)]
        assert sorted(sizes[3:]) == sorted(self.passes)

    def test_teacher_moves_by_the_ema_alone(self, method, batch):
        pairs = (method.teacher, method.backbone), (method.teacher_head, method.student_head)
        for teacher, student in pairs:
            assert all(torch.equal(t, s) for t, s in zip(teacher.parameters(), student.parameters()))
        optimiser = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            expected = [
                0.9 * t.detach() + 0.1 * s.detach()
                for teacher, student in pairs
                for t, s in zip(teacher.parameters(), student.parameters())
            ]
            optimiser.zero_grad()
            sum(method.losses(batch, 0).values()).backward()
            optimiser.step()
            found = [p for teacher, _ in pairs for p in teacher.parameters()]
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs)
        assert any(not torch.equal(t, s) for t, s in zip(method.teacher.parameters(), method.backbone.parameters()))
        before = [p.clone() for p in method.teacher.parameters()]
        method.maps(batch["image"]), method.segment(batch["image"])
        assert all(torch.equal(a, b) for a, b in zip(before, method.teacher.parameters()))

    def test_teacher_and_reservoir_run_before_the_contrast_starts(self, batch):
        method = self.make(contrast_start=5, prototype_start=4)
        prototypes, teacher = method.prototypes.clone(), [p.clone() for p in method.teacher.parameters()]
        with torch.no_grad():
            method.backbone.cls_token += 1  # after a step of the optimiser
        assert not {"lig", "lil"} & set(method.losses(batch, 3))
        assert method.reservoir.pointer == self.rows
        assert any(not torch.equal(a, b) for a, b in zip(teacher, method.teacher.parameters()))
        assert torch.equal(method.prototypes, prototypes)
        assert not {"lig", "lil"} & set(method.losses(batch, 4))
        assert method.reservoir.pointer == 2 * self.rows
        assert not torch.equal(method.prototypes, prototypes)
        assert {"lig", "lil"} <= set(method.losses(batch, 5))

    def test_no_gradient_reaches_keys_or_prototypes(self, method, batch):
        images, tokens = batch["image"], method.encode(batch["image"])
        patches, strong = (cut(views, torch.tensor([[[0, 0], [8, 24]]] * 2), 16) for views in (images, batch["strong"]))
        whole = tokens.classes[:, 0]
        queries, keys = method.represent(whole, patches, leaf(strong), batch.get("second"))
        assert queries.shape == keys.shape == (2, 2 + len(self.passes) * 2 - 2, 96)
        assert queries.requires_grad and not keys.requires_grad
        assert_close(queries.norm(dim=-1), torch.ones(queries.shape[:2]))
        assert_close(keys.norm(dim=-1), torch.ones(queries.shape[:2]))
        method.losses(batch, 0)
        assert not any(buffer.requires_grad for buffer in method.buffers())

    def test_state_holds_teacher_prototypes_and_reservoir(self, method, batch):
        for _ in range(3):
            method.losses(batch, 0)
        copied = self.make()
        copied.load_state_dict(copy.deepcopy(method.state_dict()))
        for step in range(3):
            found = []
            for one in (method, copied):
                torch.manual_seed(step)
                found.append(one.losses(batch, 0))
            assert found[0].keys() == found[1].keys()
            assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        for ours, theirs in zip(method.state_dict().values(), copied.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("stop", [2, 4])
    def test_a_stopped_run_goes_on_with_the_same_bits(self, tmp_path, stop):
        torch.manual_seed(3)
        samples = []
        for index in range(5):
            image = torch.randint(256, (3, 60, 90), dtype=torch.uint8)
            samples.append(Sample(image, F.one_hot(torch.tensor(index % CLASSES), CLASSES).float(), None, str(index)))
        path = tmp_path / "checkpoint.pt"
        settings = {"blur_sigma": [0.1, 0.5], "reservoir": self.rows * 2 + 3}

        def interrupt(done, _):
            if done == stop + 1:
                raise KeyboardInterrupt

        whole = self.make(**settings)
        history = train(whole, samples, TRAINING, 0, progress=False)
        with pytest.raises(KeyboardInterrupt):
            train(self.make(**settings), samples, TRAINING, 0, path, "run", progress=False, observe=interrupt)
        resumed = self.make(**settings)
        assert train(resumed, samples, TRAINING, 0, path, "run", progress=False) == history
        assert {"lig", "lil"} <= set(history[-1])
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_rows_and_tags_of_a_batch(self, method, batch):
        images = batch["image"]
        seed = method.seeds(images, method.token_maps(method.encode(images)))["cam_aux"]
        mask = method.tag_mask(images, seed, batch["label"])
        assert mask.shape == (2, SIDE, SIDE)
        assert set(mask[0].unique().tolist()) <= {-1, 0, 1} and set(mask[1].unique().tolist()) <= {-1, 0, 2, 3}
        tags = method.tags(mask, draw_corners(mask, 16, 4))
        assert tags.shape == (2, self.rows // 2) and tags.dtype == torch.int64

    def test_tags_come_from_the_auxiliary_cam_before_the_switch(self, batch):
        full, none = torch.ones(2, CLASSES, 8, 8), torch.zeros(2, CLASSES, 8, 8)
        for step, source in ((2, "cam_aux"), (3, "cam")):
            for seed, tag in ((full, 1), (none, 0)):
                method = self.make()
                other = none if seed is full else full
                seeds = {"cam": other, "cam_aux": other} | {source: seed}
                method.relation_losses(batch, method.encode(batch["image"]), seeds, step)
                patches_of_first_image = method.reservoir.tags[: self.rows // 2][-4:]
                assert patches_of_first_image.tolist() == [tag] * 4

    def test_pixels_outside_the_image_have_no_tag(self, method, batch):
        valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        valid[:, :, 40:] = False
        mask = method.tag_mask(batch["image"], torch.ones(2, CLASSES, 8, 8), batch["label"], valid)
        assert (mask[:, :, 40:] == 255).all() and (mask[:, :, :40] < 255).all()
        corners = torch.tensor([[0, 0], [0, 48], [8, 44], [4, 30]]).expand(2, 4, 2)
        tags = method.tags(mask, corners)[:, -4:]
        assert tags.tolist() == [[1, 0, 0, 1], [2, 0, 0, 2]]
        assert "valid" in method.batch_fields
        terms = method.losses(batch | {"valid": valid}, 0)
        assert set(terms) == self.terms and all(value.isfinite() for value in terms.values())

    def test_foreground_tagging_knows_one_class(self, batch):
        labels, seed = torch.tensor([[0.0, 1, 0], [0, 0, 1]]), torch.ones(2, CLASSES, 8, 8)
        method, by_class = self.make(tagging="foreground"), self.make()
        mask = method.tag_mask(batch["image"], seed, labels)
        corners = draw_corners(mask, 16, 4)
        assert (method.tags(mask, corners) == 1).all()
        tags = by_class.tags(mask, corners)
        assert (tags[0] == 2).all() and (tags[1] == 3).all()

    def test_decoder_labels_come_from_the_auxiliary_cam_before_the_switch(self):
        method = self.make(label_switch=7)
        assert [method.label_source(step) for step in (0, 6, 7)] == ["cam_aux", "cam_aux", "cam"]
        assert self.make().label_source(0) == "cam"

    def test_without_contrast_it_is_the_baseline(self, batch):
        method = self.make(weight_lig=0.0, weight_lil=0.0)
        assert method.views is None and not hasattr(method, "teacher") and not hasattr(method, "reservoir")
        baseline = find("cam")
        cam = baseline(baseline.Config(**SMALL), CLASSES, copy.deepcopy(method.backbone))
        cam.load_state_dict(method.state_dict())
        plain = {"image": batch["image"], "label": batch["label"]}
        expected, found = cam.losses(plain, 0), method.losses(plain, 0)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_classifiers_may_see_the_largest_value_of_every_channel(self, batch):
        """As released: the features are pooled, not the scores."""
        method, images, labels = self.make(pooling="features"), batch["image"], batch["label"]
        tokens, terms = method.encode(images), method.losses(batch, 0)
        main = method.classifier(tokens.patches.amax(1))
        auxiliary = method.aux_classifier(tokens.taps[method.config.aux_tap].amax(1))
        assert_close(terms["cls"], F.multilabel_soft_margin_loss(main, labels))
        assert_close(terms["aux"], F.multilabel_soft_margin_loss(auxiliary, labels))
        assert_close(method.maps(images)["class_logits"].flatten(1), main)

    @pytest.mark.parametrize("off", ["lig", "lil"])
    def test_one_contrast_alone(self, batch, off):
        assert set(self.make(**{f"weight_{off}": 0.0}).losses(batch, 0)) == self.terms - {off}

    @pytest.mark.parametrize("size", [SIDE, 2 * SIDE])
    def test_patch_larger_than_the_image_is_an_error(self, batch, size):
        with pytest.raises(ValueError, match=f"{size}x{size}.*image of {SIDE}x{SIDE}.*patch_size"):
            self.make(patch_size=size).losses(batch, 0)

    def test_patch_of_half_tokens_is_an_error(self):
        with pytest.raises(ValueError, match="patch_size = 20 is not a multiple of .* 8 pixels"):
            self.make(patch_size=20)

    def test_reservoir_smaller_than_the_batch_is_an_error(self, batch):
        with pytest.raises(ValueError, match=f"reservoir = 7 .* {self.rows} patches"):
            self.make(reservoir=7).losses(batch, 0)

    def test_data_of_a_single_class(self, batch):
        torch.manual_seed(0)
        method = build(SeCoConfig(**self.settings), classes=1)
        for labels in ([[1.0], [1.0]], [[1.0], [0.0]]):
            terms = method.losses(batch | {"label": torch.tensor(labels)}, 3)
            sum(terms.values()).backward()
            assert set(terms) == self.terms
            assert terms["lig"] == 0, "no other class to be pushed off"
            assert all(value.isfinite() for value in terms.values())
            assert all(p.grad.isfinite().all() for p in self.trained(method).values())

    @pytest.mark.parametrize(
        "labels",
        [
            torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]]),
            torch.tensor([[1.0, 0], [0, 1]]),
            torch.tensor([[255.0, 0, 0], [0, 1, 1]]),
            torch.tensor([[-1.0, 0, 0], [0, 1, 1]]),
            torch.tensor([[1.0, 0, 0]]),
        ],
        ids=["one too many", "one too few", "255", "-1", "one image"],
    )
    def test_labels_of_an_unknown_class_are_an_error(self, method, batch, labels):
        with pytest.raises(ValueError, match="label"):
            method.losses(batch | {"label": labels}, 0)

    def test_without_a_tag_the_contrasts_are_exactly_zero(self, method):
        queries = leaf(F.normalize(torch.randn(self.rows, 96), dim=1))
        terms = method.contrast(queries, queries.detach().roll(1, 0), torch.full((self.rows,), -1))
        assert set(terms) == {"lig", "lil"}
        sum(terms.values()).backward()
        assert terms["lig"] == terms["lil"] == 0 and not queries.grad.any()


    @pytest.mark.parametrize("steps", [0, 2])
    def test_description_holds_plain_numbers_and_changes_nothing(self, method, batch, steps):
        """Also of a network whose reservoir holds no tag yet."""
        for _ in range(steps):
            method.losses(batch, 0)
        before = copy.deepcopy(method.state_dict())
        first, second = (method.describe(Marked(batch["label"]), 2) for _ in range(2))
        json.dumps(first)
        assert str(first) == str(second)
        similarity = torch.tensor(first.pop("prototype_similarity"))
        assert similarity.shape == (CLASSES, CLASSES)
        assert_close(similarity.diagonal(), torch.ones(CLASSES), rtol=0, atol=1e-3)
        assert all(value is None or math.isfinite(value) for value in first.values())
        shares = [first[name] for name in ("tag_accuracy", "tag_accuracy_final")]
        assert all(share is None or 0 <= share <= 1 for share in shares)
        for name, value in method.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_no_description_without_contrasts_or_class_tags(self, batch):
        assert self.make(tagging="foreground").describe(Marked(batch["label"]), 2) == {}
        assert self.make(weight_lig=0.0, weight_lil=0.0).describe(Marked(batch["label"]), 2) == {}


class TestSeCoPublished(SeCoTester):
    settings = SECO | {"variant": "published", "sigma": 0.5, "prototype_rule": "weighted"}
    rows = 8
    passes = [(8, 3, 16, 16)]

    def test_pool_keeps_the_rectified_tags(self, method):
        """Rows 0..3 fill the reservoir; then a query of the same tag far from most of them comes."""
        axis = torch.eye(96)
        method.contrast(axis[:5], axis[[0, 1, 1, 1, 1]], torch.full((5,), 2))
        before = method.reservoir.tags.clone()
        assert before[:5].tolist() == [2] * 5
        method.contrast(axis[:1], axis[:1], torch.tensor([2]))
        assert method.reservoir.tags[5] == -1, "4 of 5 keys are less similar than the mean"
        kept = self.make(rectify=False)
        kept.contrast(axis[:5], axis[[0, 1, 1, 1, 1]], torch.full((5,), 2))
        kept.contrast(axis[:1], axis[:1], torch.tensor([2]))
        assert kept.reservoir.tags[5] == 2

    def test_current_keys_are_candidates_and_rectification_does_not_see_them(self, method):
        vectors = F.normalize(torch.randn(4, 96), dim=1)
        tags = torch.tensor([1, 1, 2, 0])
        terms = method.contrast(vectors, vectors.flip(0), tags)
        assert torch.equal(method.reservoir.tags[:4], tags), "the reservoir was empty"
        expected = 0.5 * local_contrast_loss(vectors, tags, vectors.flip(0), tags, 0.08)
        assert_close(terms["lil"], expected)

    def test_prototypes_start_at_unit_length_and_follow_eq_3(self, method, batch):
        assert_close(method.prototypes.norm(dim=1), torch.ones(CLASSES))
        before = method.prototypes.clone()
        tokens = method.encode(batch["image"]).classes[:, 0].detach()
        method.losses(batch, 0)
        assert_close(method.prototypes, update_prototypes(before, tokens, batch["label"], 0.9, "weighted"))


class TestSeCoReleased(SeCoTester):
    settings = SECO | {"variant": "released"}
    rows = 12
    passes = [(8, 3, 16, 16), (2, 3, SIDE, SIDE)]

    def test_views_of_the_whole_image_come_first_and_pass_the_students_encoder(self, method, batch):
        images, second = batch["image"], batch["second"]
        corners = torch.tensor([[[0, 0]], [[8, 8]]])
        whole = method.encode(images).classes[:, 0]
        with torch.no_grad():
            method.teacher.cls_token += 1
            queries, keys = method.represent(whole, cut(images, corners, 16), cut(images, corners, 16), second)
            views = torch.stack([whole, method.backbone(second).classes[:, 0]], 1)
            assert_close(queries[:, :2], method.student_head(views))
            assert_close(keys[:, :2], method.teacher_head(views))
            patches = method.teacher(cut(images, corners, 16).flatten(0, 1)).classes
            assert_close(keys[:, 2:], method.teacher_head(patches))

    def test_pool_keeps_the_tags_as_given_and_holds_the_keys_before_they_are_used(self, method):
        """One tag dominates all columns, so that the released rule gives it up, but only in the loss."""
        method.reservoir = Reservoir(24, 96, "released")
        method.reservoir.tags.fill_(2)
        torch.manual_seed(0)
        queries, keys = (F.normalize(torch.randn(4, 96), dim=1) for _ in range(2))
        tags = torch.full((4,), 2)
        terms = method.contrast(queries, keys, tags)
        assert (method.reservoir.tags == 2).all()
        assert torch.equal(method.reservoir.keys[:4], keys)
        columns = torch.cat([keys, method.reservoir.keys]), torch.cat([tags, method.reservoir.tags])
        loss, after = local_contrast_loss_released(queries, tags, *columns, 0.08)
        assert_close(terms["lil"], 0.5 * loss)
        assert_close(terms["lig"], 0.5 * global_contrast_loss(queries, method.prototypes, after, 0.1))

    def test_without_rectification_no_pull_is_given_up(self):
        queries, keys, tags, key_tags = self.dominated()
        kept, given_up = (self.make(rectify=rectify, reservoir=len(keys)) for rectify in (False, True))
        for method in (kept, given_up):
            method.reservoir.keys.copy_(keys)
            method.reservoir.tags.copy_(key_tags)
            method.reservoir.pointer.fill_(len(keys) - len(queries))
        assert kept.contrast(queries, keys[-len(queries) :], tags)["lil"] != given_up.contrast(
            queries, keys[-len(queries) :], tags
        )["lil"]
        assert given_up.contrast(queries, keys[-len(queries) :], tags)["lig"] == 0
        assert kept.contrast(queries, keys[-len(queries) :], tags)["lig"] == 0, "a single class"

    def dominated(self):
        """Queries of which 10 / 11 of all columns have the tag and a score below the mean."""
        queries = torch.zeros(4, 96)
        queries[:, 0] = 1
        keys = torch.zeros(40, 96)
        keys[:, 1] = 1
        keys[0] = queries[0]
        return queries, keys, torch.full((4,), 2), torch.where(torch.arange(40) == 0, 1, 2)

    def test_prototypes_move_by_images_of_one_class(self, method, batch):
        before = method.prototypes.clone()
        tokens = method.encode(batch["image"]).classes[:, 0].detach()
        method.losses(batch, 0)
        moved = 0.9 * before[0] + 0.1 * tokens[0]
        assert_close(method.prototypes[0], F.normalize(moved, dim=0))
        assert_close(method.prototypes[1:], F.normalize(before[1:], dim=1))

    def test_memory_starts_as_random_background(self, method):
        assert (method.reservoir.tags == 0).all() and method.reservoir.keys.any()


TRAINING = TrainConfig(
    crop=SIDE,
    batch_size=2,
    steps=6,
    lr=1e-3,
    head_lr_multiplier=10,
    weight_decay=0.01,
    warmup_steps=1,
    warmup_ratio=1e-6,
    poly_power=0.9,
    clip_norm=1.0,
    precision="fp32",
    crop_mode="shrink",
    crop_scale=(0.5, 1.0),
    crop_ratio=(0.75, 1.33),
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_probability=0.5,
    checkpoint_every=2,
)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("variant", "paper", "variant 'paper' is unknown; choose one of published, released"),
        ("tagging", "pixel", "tagging 'pixel' is unknown; choose one of class, foreground"),
        ("prototype_rule", "mean", "prototype_rule 'mean' is unknown; choose one of weighted, single, equal"),
        ("patch_size", 0, "patch_size = 0"),
        ("patches", 0, "patches = 0"),
        ("reservoir", 0, "reservoir = 0"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        SeCoConfig(**{field: value})


RECIPES = [(v, d) for v in ("published", "released") for d in ("embedded", "voc2012", "voc2012-cpu", "coco2014")]


@pytest.mark.parametrize("variant, dataset", RECIPES)
def test_recipe_is_complete_and_possible(variant, dataset):
    experiment = Experiment("seco", variant, dataset, seed=0)
    config, recipe = experiment.config(SeCoConfig), experiment.recipe()
    assert config.variant == variant
    assert config.prototype_start <= config.contrast_start < recipe["steps"]
    assert config.seg_start < recipe["steps"]
    # Eq. 1 knows only the auxiliary CAM; the released code changes over to the other one.
    assert (config.tag_switch >= recipe["steps"]) == (variant == "published")
    rows = recipe["batch_size"] * (config.patches + (2 if variant == "released" else 0))
    assert rows <= config.reservoir
    mask = torch.zeros(1, recipe["crop"], recipe["crop"], dtype=torch.long)
    corners = draw_corners(mask, config.patch_size, config.patches)
    assert corners.shape == (1, config.patches, 2)
    assert ("cam" in recipe["map_relu"]) == (config.cam_activation == "relu")


@pytest.mark.parametrize("variant", ["published", "released"])
@pytest.mark.parametrize(
    "dataset, numbers",
    [
        (
            "voc2012",
            {
                "batch_size": 4, "steps": 20000, "tag_thresholds": [0.7, 0.25], "label_thresholds": [0.7, 0.25],
                "threshold_cam": 0.5, "weight_ptc": 0.3, "ptc_start": 0, "weight_lil": 0.5, "prototype_momentum": 0.9,
                "prototype_start": 600, "contrast_start": 1001, "seg_start": 2001,
                "cam_scales": [1.0, 0.5, 0.75, 1.5],
            },
        ),
        (
            "coco2014",
            {
                "batch_size": 8, "steps": 80000, "tag_thresholds": [0.65, 0.25], "label_thresholds": [0.65, 0.25],
                "threshold_cam": 0.45, "weight_ptc": 0.2, "ptc_start": 8001, "prototype_momentum": 0.99,
                "prototype_start": 6000, "contrast_start": 12001, "seg_start": 16001,
                "cam_scales": [1.0, 0.5, 0.75, 1.25, 1.5],
            },
        ),
    ],
)  # fmt: skip
def test_recipes_hold_the_numbers_of_the_paper_and_its_logs(variant, dataset, numbers):
    recipe = Experiment("seco", variant, dataset, seed=0).recipe()
    common = {
        "crop": 448, "patch_size": 64, "reservoir": 4608, "tag_threshold": 0.2, "temperature_lig": 0.1,
        "temperature_lil": 0.08, "ema_momentum": 0.999, "weight_lig": 0.5, "weight_seg": 0.12, "weight_energy": 0.05,
        "lr": 6e-5, "head_lr_multiplier": 10, "weight_decay": 0.01, "warmup_steps": 1500, "warmup_ratio": 1e-6,
        "poly_power": 0.9, "precision": "fp32", "decoder_width": 0, "projection_width": 2048,
        "pooling": "features",
        "patches": 12 if variant == "published" else 10,
    }  # fmt: skip
    expected = common | numbers
    assert {name: recipe[name] for name in expected} == expected


@pytest.mark.parametrize(
    "dataset, weight, tag_switch, label_switch", [("voc2012", 0.5, 10001, 0), ("coco2014", 0.3, 50001, 12001)]
)
def test_released_recipes_weigh_the_local_contrast_and_change_their_maps(dataset, weight, tag_switch, label_switch):
    released, published = (Experiment("seco", v, dataset, seed=0).recipe() for v in ("released", "published"))
    assert published["weight_lil"] == 0.5
    assert released["weight_lil"] == weight
    assert (released["tag_switch"], released["label_switch"]) == (tag_switch, label_switch)


def test_defaults_are_the_released_numbers_on_voc():
    assert Experiment("seco", "released", "voc2012", seed=0).config(SeCoConfig) == SeCoConfig(pooling="features")
