"""Pretraining of the tiny backbones: its pieces against loops, and the weights that the repository carries."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wsss import backbones
from wsss.backbones import pretrain
from wsss.backbones.conformer import TINY_CONFORMER
from wsss.backbones.pretrain import (
    CLASSIFIERS,
    ConformerClassifier,
    ResNetClassifier,
    ViTClassifier,
    accuracy,
    augment,
    draw_images,
    pool_region,
    rectangles,
)
from wsss.backbones.resnet38 import TINY_RESNET
from wsss.backbones.vit import TINY
from wsss.data.scenes import PRETRAINING_CLASSES, pretraining_image
from wsss.data.transforms import STD

CLASSES = len(PRETRAINING_CLASSES)
README = Path(__file__).parents[2] / "data" / "README.md"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_pretraining_set():
    images, labels = draw_images(3, 2)
    assert images.shape == (2, 3, 80, 80) and images.dtype == torch.uint8
    for image, label, index in zip(images, labels, (3, 4)):
        drawn, kind = pretraining_image(index)
        np.testing.assert_array_equal(image.permute(1, 2, 0), drawn)
        assert label == kind


def test_augmentation_follows_its_generator():
    images = torch.randint(0, 256, (3, 3, 80, 80), dtype=torch.uint8, generator=seeded())
    state = torch.get_rng_state()
    first, again, other = (augment(images, seeded(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 64, 64) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_augmentation_is_a_crop_perhaps_mirrored_with_another_contrast_and_tint():
    y, x = torch.meshgrid(torch.arange(80), torch.arange(80), indexing="ij")
    images = torch.stack([2 * y, 3 * x, y + x]).to(torch.uint8).repeat(40, 1, 1, 1)
    step = 3 / 255 / STD[1]  # one pixel to the right in the green channel
    mirrored, contrasts = [], []
    for image in augment(images, seeded()):
        slope = image[1].diff(dim=1)
        assert slope.std() < 1e-4, "the columns follow each other"
        assert (image[0].diff(dim=0) > 0).all() and image[0].diff(dim=1).abs().max() < 1e-4, "rows are not mirrored"
        contrasts.append((slope.mean() / step).abs().item())
        mirrored.append(bool(slope.mean() < 0))
    assert 0.8 <= min(contrasts) < 0.9 and 1.1 < max(contrasts) <= 1.2
    assert 10 < sum(mirrored) < 30


def test_rectangles_are_whole_inside_and_missing_for_one_in_five():
    side, masks = 8, rectangles(2000, 8, seeded())
    lengths = set()
    for mask in masks[masks.any((1, 2))].numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "no gap"
        assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        lengths |= {len(rows), len(columns)}
    assert lengths == set(range(3, side - 1))
    assert 0.17 < (~masks.any((1, 2))).float().mean() < 0.23
    assert masks.any(0).all(), "every token is sometimes pasted"
    assert torch.equal(masks, rectangles(2000, 8, seeded()))


def test_pool_region_against_a_loop():
    logits = torch.randn(4, 20, 3, generator=seeded())
    region = torch.rand(4, 20, generator=seeded(1)) < torch.tensor([0.2, 0.6, 1.0, 0.0])[:, None]
    expected = np.zeros((4, 3))
    for b, k in np.ndindex(4, 3):
        inside = sorted((logits[b, j, k].item() for j in range(20) if region[b, j]), reverse=True)
        kept = inside[: max(1, round(0.2 * len(inside)))]
        expected[b, k] = sum(kept) / max(1, len(kept))
    np.testing.assert_allclose(pool_region(logits, region), expected, rtol=1e-5)
    assert not region[3].any() and (pool_region(logits, region)[3] == 0).all()


def test_pixels_are_pasted_in_whole_patches(monkeypatch):
    seen = {}
    model = ViTClassifier()

    def spy(images, kept):
        seen.update(images=images, kept=kept)
        return torch.zeros(len(images), CLASSES), torch.zeros(len(images), kept.shape[1], CLASSES)

    monkeypatch.setattr(model, "forward", spy)
    region = torch.zeros(2, 8, 8, dtype=torch.bool)
    region[0, 2:5, 1:4] = True
    monkeypatch.setattr(pretrain, "rectangles", lambda *_: region)
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    model.loss(images, torch.tensor([3, 5]), seeded())
    expected = torch.zeros(3, 64, 64)
    expected[:, 16:40, 8:32] = 1
    assert torch.equal(seen["images"][0], expected) and torch.equal(seen["images"][1], images[1])
    assert seen["kept"].shape == (2, 48), "a quarter of the patches is dropped"
    assert all(len(set(row.tolist())) == 48 for row in seen["kept"])


def test_each_region_is_classified_with_the_label_of_its_image(monkeypatch):
    model, labels = ViTClassifier(), torch.tensor([3, 5])
    region = torch.zeros(2, 8, 8, dtype=torch.bool)
    region[0, :4] = True  # half of image 0 comes from image 1

    def oracle(images, kept):
        """Logits that name every region rightly."""
        pasted = region.flatten(1).gather(1, kept)[..., None]
        own = 9 * torch.nn.functional.one_hot(labels, CLASSES).float()
        return torch.stack([own.mean(0), own[1]]), torch.where(pasted, own.flip(0)[:, None], own[:, None])

    monkeypatch.setattr(pretrain, "rectangles", lambda *_: region)
    monkeypatch.setattr(model, "forward", oracle)
    images = torch.zeros(2, 3, 64, 64)
    nll = lambda logits, label: torch.nn.functional.cross_entropy(logits, labels[label], label_smoothing=0.05)
    classes, patches = oracle(images, torch.arange(64).repeat(2, 1))
    first = (nll(classes[0], 0) + nll(patches[0, -1], 0) + nll(classes[0], 1) + nll(patches[0, 0], 1)) / 2
    second = nll(classes[1], 1) + nll(patches[1, 0], 1)
    torch.testing.assert_close(model.loss(images, labels, seeded()), (first + second) / 2)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_loss_is_finite_and_reaches_every_weight(name):
    torch.manual_seed(0)
    model = CLASSIFIERS[name][0]()
    images, labels = torch.randn(6, 3, 64, 64, generator=seeded()), torch.arange(6)

    def loss(seed=0):
        torch.manual_seed(0)  # of drop path
        return model.loss(images, labels, seeded(seed))

    first = loss()
    first.backward()
    assert first.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(first, loss()), "a function of the generators"
    assert all(loss(seed).isfinite() for seed in range(10)), "whatever the regions"


@pytest.mark.parametrize("classifier, kinds", [(ViTClassifier, 1), (ConformerClassifier, 2), (ResNetClassifier, 1)])
def test_logits_of_images_and_of_kept_patches(classifier, kinds):
    torch.manual_seed(0)
    model, images, kept = classifier().eval(), torch.randn(2, 3, 64, 64), torch.tensor([[5, 0, 63], [1, 62, 9]])
    with torch.no_grad():
        whole, part = model(images), model(images, kept)
    assert [logits.shape for logits in whole] == [(2, CLASSES), *[(2, 64, CLASSES)] * kinds]
    assert [logits.shape for logits in part] == [(2, CLASSES), *[(2, 3, CLASSES)] * kinds]
    if classifier.DROP:
        assert not torch.equal(part[0], whole[0]), "patches that are dropped are not seen"
        return
    assert torch.equal(part[0], whole[0])
    for of_all, of_kept in zip(whole[1:], part[1:]):
        for image, row in enumerate(kept):
            assert torch.equal(of_kept[image], of_all[image, row])


@pytest.mark.parametrize("classifier", [ConformerClassifier, ResNetClassifier])
def test_patches_of_a_map_stand_row_by_row(classifier):
    """A bright patch changes the logits most at most one patch from its place."""
    torch.manual_seed(0)
    model, image = classifier().eval(), torch.zeros(1, 3, 64, 64)
    bright = image.clone()
    bright[..., 8:16, 48:56] = 4  # row 1, column 6
    with torch.no_grad():
        changes = [(b - a).square().sum(2)[0] for a, b in zip(model(image)[1:], model(bright)[1:])]
    row, column = divmod(changes[0].argmax().item(), 8)
    assert abs(row - 1) <= 1 and abs(column - 6) <= 1


def test_accuracy_counts_the_centre_crop():
    class Fake:
        def __call__(self, images):
            assert images.shape[1:] == (3, 64, 64)
            bright = (images[:, 0, 0, 0] > 0).long()
            return torch.eye(2)[bright], torch.eye(2)[1 - bright][:, None].expand(-1, 4, -1)

    images = torch.zeros(4, 3, 80, 80, dtype=torch.uint8)
    images[:3, :, 8, 8] = 255  # the first pixel of the crop
    assert accuracy(Fake(), images, torch.tensor([1, 1, 0, 0])) == (0.75, 0.25)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_tiny_pretraining_gives_weights_that_load(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "TRAIN_IMAGES", 64)
    monkeypatch.setattr(pretrain, "VAL_IMAGES", 16)
    out = tmp_path / "new" / f"{name}.safetensors"
    pretrain.pretrain(name, epochs=1, batch_size=16, lr=1e-3, seed=1, out=out)
    assert {path.name for path in out.parent.iterdir()} == {f"{name}.safetensors", f"{name}.log.csv"}
    command, header, row = out.with_suffix(".log.csv").read_text().splitlines()
    named = "" if name == TINY else f"--backbone {name} "
    assert command.startswith(f"wsss pretrain {named}--epochs 1 --batch-size 16 --lr 0.001 --seed 1  (torch ")
    assert header == "epoch,loss,accuracy_class_token,accuracy_patches,seconds"
    assert re.fullmatch(r"1,\d+\.\d{4},[01]\.\d{4},[01]\.\d{4},\d+", row) and row in capsys.readouterr().out
    assert out.stat().st_mode & 0o777 == 0o644
    weights = load_file(out)
    assert {value.dtype for value in weights.values()} == {torch.float16} | (set() if name == TINY else {torch.int64})
    assert not any("head" in key for key in weights)
    monkeypatch.setattr("wsss.backbones.vit.TINY_WEIGHTS", out)
    monkeypatch.setattr("wsss.backbones.conformer.TINY_CONFORMER_WEIGHTS", out)
    monkeypatch.setitem(backbones.resnet38.WEIGHTS, TINY_RESNET, out)
    built = backbones.build(name).state_dict()
    same = set(weights) - {"cls_token", "pos_embed"} if name == TINY else set(weights)
    assert same and all(torch.equal(built[key], weights[key].to(built[key].dtype)) for key in same)


def test_class_token_and_positions_of_the_vision_transformer_are_repeated():
    weights, vit = load_file(CLASSIFIERS[TINY][1]), backbones.build(TINY, class_tokens=2)
    assert torch.equal(vit.cls_token, weights["cls_token"].float().expand_as(vit.cls_token))
    assert torch.equal(vit.pos_embed[:, 2:], weights["pos_embed"][:, 1:].float())


@pytest.mark.parametrize("name", [TINY, TINY_CONFORMER, TINY_RESNET])
def test_the_committed_weights_are_those_that_the_readme_states(name):
    file = backbones.TINY_FILES[name]
    assert file == CLASSIFIERS[name][1] and file.name == f"{name}.safetensors"
    [stated] = re.findall(rf"{name}\.safetensors +sha256 ([0-9a-f]{{64}})", README.read_text())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == stated
    command, _, *epochs = file.with_suffix(".log.csv").read_text().splitlines()
    assert command.split("  (")[0] in README.read_text() and f"--epochs {len(epochs)} " in command
    assert min(float(accuracy) for accuracy in epochs[-1].split(",")[2:4]) > 0.95
    assert file.stat().st_size < 2_500_000
