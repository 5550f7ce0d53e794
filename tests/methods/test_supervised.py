"""The fully supervised counterpart: it learns from masks, ignores void pixels, and has no maps."""

import pytest
import torch
from torch import nn

from wsss.backbones.vit import MultiTokenViT
from wsss.data import Sample
from wsss.methods.supervised import Supervised, SupervisedConfig
from wsss.training import TrainConfig, train


@pytest.fixture
def method():
    torch.manual_seed(0)
    return Supervised(SupervisedConfig(0, 2), 3, MultiTokenViT(image_size=64, pretrained=False))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.zeros(2, 64, 64, dtype=torch.int64)
    mask[0, 8:40, 8:40], mask[1, 24:56, :32] = 1, 3
    images = 0.1 * torch.randn(2, 3, 64, 64)
    images[:, 0] += mask
    return {"image": images, "mask": mask, "label": torch.tensor([[1.0, 0, 0], [0, 0, 1]])}


def test_loss_falls_and_the_decoder_learns_the_masks(method, batch):
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    history = []
    for step in range(60):
        loss = method.losses(batch, step)["seg"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert history[-1] < 0.3 * history[0]
    prediction = method.eval().segment(batch["image"]).argmax(1)
    assert (prediction == batch["mask"][:, 4::8, 4::8]).float().mean() > 0.9


def test_void_pixels_do_not_count(method, batch):
    void = batch["mask"].masked_fill(batch["mask"] == 3, 255)
    logits = nn.functional.interpolate(method.segment(batch["image"]), size=64 * 64 // 64, mode="bilinear")
    expected = nn.functional.cross_entropy(logits, void, ignore_index=255)
    torch.testing.assert_close(method.losses(batch | {"mask": void}, 0)["seg"], expected)


def test_a_batch_of_void_gives_zero_and_no_nan(method, batch):
    loss = method.losses(batch | {"mask": torch.full_like(batch["mask"], 255)}, 0)["seg"]
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_it_has_no_maps(method, batch):
    assert method.maps(batch["image"]) == {} and method.map_names == ()


def test_training_images_without_masks_are_named():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    samples = [Sample(image, torch.ones(3), None, "scene 7")]
    method = Supervised(SupervisedConfig(0, 2), 3, MultiTokenViT(image_size=64, pretrained=False))
    plain = "fp32", "resize", (1.0, 1.0), (1.0, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0, 1
    config = TrainConfig(64, 1, 1, 1e-3, 1.0, 0.0, 0, 1.0, 0.9, 0.0, *plain)
    with pytest.raises(ValueError, match="scene 7: this image has no mask"):
        train(method, samples, config, 0, progress=False)
