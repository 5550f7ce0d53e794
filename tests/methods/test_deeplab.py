"""DeepLab on ResNet38: its head, what trains at which rate, its batch norm, a short training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsss.backbones.resnet38 import TINY_RESNET, ResNet38, build_resnet38
from wsss.data.scenes import Scenes
from wsss.methods.deeplab import DeepLab, DeepLabConfig
from wsss.training import TrainConfig, build_optimizer, train

TRAINING = TrainConfig(
    crop=80,
    batch_size=8,
    steps=15,
    lr=0.01,
    head_lr_multiplier=10,
    weight_decay=5e-4,
    warmup_steps=0,
    warmup_ratio=1.0,
    poly_power=0.9,
    clip_norm=0.0,
    precision="fp32",
    crop_mode="rescale",
    crop_scale=(0.5, 1.5),
    crop_ratio=(1, 1),
    jitter=(0.04, 0.0, 0.04, 0.05),
    jitter_probability=1.0,
    checkpoint_every=15,
    optimizer="sgd",
    momentum=0.9,
)


def make(**settings):
    torch.manual_seed(0)
    backbone = ResNet38((16, 16, 16, 8, 12, 16, 20), (1, 1, 1, 1), (2, 2, 1), (0.0, 0.0))
    return DeepLab(DeepLabConfig(**{"width": 16, "dilation": 3, "dropout": 0.0} | settings), 3, backbone)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.zeros(2, 32, 40, dtype=torch.int64)
    mask[0, 8:24, 8:24], mask[1, 4:28, :20] = 1, 3
    images = 0.1 * torch.randn(2, 3, 32, 40)
    images[:, 0] += mask
    return {"image": images, "mask": mask}


def test_size_of_the_paper():
    with torch.device("meta"):
        method = DeepLab(DeepLabConfig(), 20, ResNet38())
    assert sum(p.numel() for p in method.parameters()) == 124_220_245
    assert method.head[0].dilation == (12, 12) and method.head[6].p == 0.5
    assert all(m.momentum == 0.0003 for m in method.modules() if isinstance(m, nn.BatchNorm2d))
    assert method.segments == "retrained" and method.map_names == ()


def test_logits_have_the_size_of_the_image_with_aligned_corners(batch):
    method = make().eval()
    with torch.no_grad():
        logits = method.segment(batch["image"])
        cells = method.head(method.backbone(batch["image"])["conv6"])
    assert logits.shape == (2, 4, 32, 40) and cells.shape == (2, 4, 8, 10)
    torch.testing.assert_close(logits[..., :: 31, :: 39], cells[..., :: 7, :: 9])  # corners on corners


def test_void_pixels_do_not_count_and_a_batch_of_them_gives_zero(batch):
    method = make().eval()
    void = batch["mask"].masked_fill(batch["mask"] == 3, 255)
    expected = F.cross_entropy(method.segment(batch["image"]), void, ignore_index=255)
    torch.testing.assert_close(method.losses(batch | {"mask": void}, 0)["seg"], expected)
    nothing = method.losses(batch | {"mask": torch.full_like(void, 255)}, 0)["seg"]
    nothing.backward()
    assert nothing == 0 and all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_everything_but_norms_trains_and_the_head_faster(batch):
    method = make()
    backbone, head, bias = build_optimizer(method, TRAINING).param_groups
    assert [group["base_lr"] for group in (backbone, head, bias)] == pytest.approx([0.01, 0.1, 0.2])
    assert [group["weight_decay"] for group in (backbone, head, bias)] == [5e-4, 5e-4, 0]
    assert bias["params"] == [method.head[-1].bias]
    assert {id(p) for p in head["params"]} == {id(m.weight) for m in method.head if isinstance(m, nn.Conv2d)}
    convolutions = [m.weight for m in method.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in backbone["params"]} == {id(p) for p in convolutions}
    method.train().losses(batch, 0)["seg"].backward()
    for name, parameter in method.named_parameters():
        norm = "bn" in name or name.startswith(("head.1.", "head.4."))
        assert (parameter.grad is None) == norm and (norm or parameter.grad.any()), name


def test_norms_use_the_batch_in_training_and_their_momentum(batch):
    method = make(norm_momentum=0.25).train()
    entered = {}
    method.head[0].register_forward_hook(lambda _, __, output: entered.update(output=output.detach()))
    trained = method.segment(batch["image"])
    expected = 0.25 * entered["output"].mean((0, 2, 3))  # it started at 0
    torch.testing.assert_close(method.head[1].running_mean, expected)
    assert not torch.allclose(trained, method.eval().segment(batch["image"]), atol=1e-3)


def test_a_short_training_on_scenes_learns_and_leaves_scale_and_shift():
    torch.manual_seed(0)
    method = DeepLab(DeepLabConfig(32, 4, 0.0, 0.1), 10, build_resnet38(TINY_RESNET, pretrained=False))
    weight = method.backbone.conv1a.weight.clone()
    history = train(method, Scenes("train", images=16), TRAINING, 0, progress=False)
    losses = [point["seg"] for point in history]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert not torch.equal(method.backbone.conv1a.weight, weight)
    norms = [m for m in method.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() and m.running_mean.any() for m in norms)
