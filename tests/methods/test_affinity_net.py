"""AffinityNet: its embedding, which pairs it learns from, what stays frozen, a short training."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from wsss.backbones.resnet38 import TINY_RESNET, ResNet38, build_resnet38
from wsss.data.scenes import Scenes
from wsss.methods.affinity import AffinityConfig, AffinityNet
from wsss.training import TrainConfig, train

SMALL = {"tap_widths": (4, 6, 8), "embedding_width": 10, "radius": 3}
TRAINING = TrainConfig(
    crop=80,
    batch_size=8,
    steps=12,
    lr=0.01,
    head_lr_multiplier=10,
    weight_decay=5e-4,
    warmup_steps=0,
    warmup_ratio=1.0,
    poly_power=0.9,
    clip_norm=0.0,
    precision="fp32",
    crop_mode="shrink",
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    jitter=(0.3, 0.3, 0.3, 0.1),
    jitter_probability=1.0,
    checkpoint_every=12,
    optimizer="sgd",
    momentum=0.0005,
)


def make(**settings):
    torch.manual_seed(0)
    backbone = ResNet38((16, 16, 16, 8, 12, 16, 20), (1, 1, 1, 1), (2, 2, 1), (0.0, 0.0))
    return AffinityNet(AffinityConfig(**SMALL | settings), 3, backbone)


@pytest.fixture
def batch():
    """Two images of two halves; the second has void pixels and is padded at the left."""
    torch.manual_seed(1)
    mask = torch.zeros(2, 48, 60, dtype=torch.int64)
    mask[0, :, 30:], mask[1, 20:, 20:], mask[1, :10, 40:] = 1, 3, 255
    valid = torch.ones(2, 48, 60, dtype=torch.bool)
    valid[1, :, :14] = False
    images = 0.1 * torch.randn(2, 3, 48, 60)
    images[:, 0] += mask % 255
    return {"image": images, "mask": mask.masked_fill(~valid, 255), "valid": valid}


class Taps(nn.Module):
    """A stand-in for the backbone, whose taps are given."""

    stride = 8

    def __init__(self, taps):
        super().__init__()
        self.taps, self.out_channels = taps, {name: tap.shape[1] for name, tap in taps.items()}

    def freeze(self, *_):
        pass

    def forward(self, images):
        return self.taps


def test_golden_transcam_embedding(golden):
    arrays = golden("transcam_psa")
    taps = {name: arrays[name][None] for name in ("conv4", "conv5", "conv6")}
    weights = [arrays[f"w_f8_{i}"] for i in (3, 4, 5)]
    config = AffinityConfig(tap_widths=tuple(len(w) for w in weights), embedding_width=len(arrays["w_f9"]))
    method = AffinityNet(config, 20, Taps(taps)).double()
    with torch.no_grad():
        for layer, weight in zip([*method.reduce.values(), method.fuse], [*weights, arrays["w_f9"]], strict=True):
            layer.weight.copy_(weight[..., None, None])
        embedding = method.embed(torch.zeros(1, 3, 96, 104))
    torch.testing.assert_close(embedding[0], arrays["embedding"], rtol=1e-9, atol=1e-9)


def test_golden_transcam_labels_of_cells(golden):
    arrays = golden("transcam_psa")
    method = AffinityNet(AffinityConfig(), 20, Taps({name: torch.zeros(1, 2, 1, 1) for name in ("a", "b", "c")}))
    assert torch.equal(method.cell_labels(arrays["rescale_in"][None]), arrays["rescale_out"][None])


def test_size_of_the_paper():
    with torch.device("meta"):
        method = AffinityNet(AffinityConfig(), 20, ResNet38())
    assert sum(p.numel() for p in method.parameters()) == 106_484_032
    frozen = sum(p.numel() for p in method.backbone.parameters() if not p.requires_grad)
    norms = sum(p.numel() for m in method.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    first = 64 * 3 * 9 + 64 * 128 * 9 + 64 * 128 + 5 * 128 * 128 * 9
    assert frozen == norms + first
    assert method.segment(torch.zeros(1)) is None and method.map_names == () and method.segments == ""


def written_out_loss(method, batch, labels):
    """The loss of all pairs, one after the other."""
    embedding = method.embed(batch["image"])
    cells = labels[:, ::4, ::4]
    radius, (height, width) = method.config.radius, cells.shape[1:]
    parts = {"background": [], "foreground": [], "different": []}
    rows, columns = range(height - radius + 1), range(radius - 1, width - radius + 1)
    for image, row, column in itertools.product(range(2), rows, columns):
        for dy, dx in itertools.product(range(radius), range(1 - radius, radius)):
            if dy**2 + dx**2 >= radius**2 or dy == 0 and dx <= 0:
                continue
            own, other = cells[image, row, column], cells[image, row + dy, column + dx]
            if 255 in (own, other):
                continue
            distance = (embedding[image, :, row, column] - embedding[image, :, row + dy, column + dx]).abs().mean()
            affinity = math.exp(-distance)
            kind = "different" if own != other else "background" if own == 0 else "foreground"
            parts[kind].append(-math.log(1 + 1e-5 - affinity if own != other else affinity + 1e-5))
    mean = {kind: sum(values) / (len(values) + 1e-5) for kind, values in parts.items()}
    return mean["background"] / 4 + mean["foreground"] / 4 + mean["different"] / 2


def test_padding_is_background_as_released_and_nothing_in_the_paper(batch):
    released, published = (make(variant=variant) for variant in ("released", "published"))
    padded = batch["mask"].masked_fill(~batch["valid"], 0)
    with torch.no_grad():
        losses = [method.losses(batch, 0)["affinity"].item() for method in (released, published)]
        assert losses[0] == pytest.approx(written_out_loss(released, batch, padded), rel=1e-4)
        assert losses[1] == pytest.approx(written_out_loss(published, batch, batch["mask"]), rel=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_only_free_parts_train_and_norms_keep_their_statistics(batch):
    method = make().train()
    statistics = [m.running_mean.clone() for m in method.modules() if isinstance(m, nn.BatchNorm2d)]
    method.losses(batch, 0)["affinity"].backward()
    for name, parameter in method.named_parameters():
        frozen = "bn" in name or name.startswith(("backbone.conv1a", "backbone.b2"))
        assert (parameter.grad is None) == frozen and (frozen or parameter.grad.any()), name
    after = [m.running_mean for m in method.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(statistics, after))


def test_free_norms_and_stages_all_train(batch):
    method = make(frozen_stages=(), frozen_norm=False).train()
    method.losses(batch, 0)["affinity"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in method.parameters())


def test_no_known_pair_gives_zero_and_no_nan(batch):
    method = make(variant="published")
    loss = method.losses(batch | {"mask": torch.full_like(batch["mask"], 255)}, 0)["affinity"]
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_rates_are_those_of_psa():
    method = make()
    backbone, new = method.parameter_groups(TRAINING)
    assert (backbone["base_lr"], new["base_lr"]) == (0.01, pytest.approx(0.1))
    fresh = {id(p) for layer in (method.reduce, method.fuse) for p in layer.parameters()}
    assert {id(p) for p in new["params"]} == fresh
    assert all(p.ndim == 4 for group in (backbone, new) for p in group["params"])  # no biases, no norms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "psa"}, "AffinityNet: variant 'psa' is unknown; choose one of published, released"),
        ({"radius": 1}, "radius = 1 leaves no pairs"),
        ({"tap_widths": (4, 6)}, r"tap_widths = \(4, 6\) needs one width for each tap of .*: conv4, conv5, conv6"),
        ({"frozen_stages": ("stem",)}, "no stage 'stem' to freeze"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_a_short_training_on_scenes_pulls_regions_apart():
    torch.manual_seed(0)
    config = AffinityConfig("released", (16, 16, 16), 48, 3, (), False)
    method = AffinityNet(config, 10, build_resnet38(TINY_RESNET, pretrained=False))
    fixed = method.backbone.conv1a.weight.clone()
    faster = dataclasses.replace(TRAINING, momentum=0.9)
    history = train(method, Scenes("train", images=16), faster, 0, progress=False)
    losses = [point["affinity"] for point in history]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert not torch.equal(method.backbone.conv1a.weight, fixed)
    assert method.eval().embed(torch.zeros(2, 3, 80, 60)).shape == (2, 48, 20, 15)
