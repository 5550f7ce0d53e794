"""Conformer: parity with the reference, the names of the public checkpoints, sizes of images."""

import math
from pathlib import Path

import pytest
import timm
import torch
from conformers import golden_conformer, small_conformer
from torch import nn
from torch.testing import assert_close

from wsss import backbones
from wsss.backbones.conformer import TINY_CONFORMER, Attention, Expand, Squeeze, build_conformer, tiny_conformer

SMALL_NAME = "conformer_small_patch16_224"
PARAMETERS = Path(__file__).parents[1] / "golden" / "transcam_conformer_s_params.txt"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def relative_error(found, expected):
    """The reference's tolerance: largest difference over the largest value, or over 1 where that is smaller."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_transcam_conformer(golden, dtype, tolerance):
    data = golden("transcam_conformer")
    model = golden_conformer(data).to(dtype).eval()
    with torch.no_grad():
        features = model.forward_features(data["x"].to(dtype), heads=True)
    assert relative_error(features.map, data["feature"]) < tolerance
    assert relative_error(features.tokens, data["tokens"]) < tolerance
    assert relative_error(torch.stack(features.attention), data["attn"]) < tolerance
    assert features.grid == tuple(data["feature"].shape[2:])


def test_golden_transcam_conformer_mean_attention(golden):
    data = golden("transcam_conformer")
    model = golden_conformer(data).eval()
    with torch.no_grad():
        attention = torch.stack(model.forward_features(data["x"].double()).attention)
    assert relative_error(attention, data["attn_headmean"]) < 1e-9


def test_golden_transcam_conformer_taps(golden):
    """What every block leaves, so that a failure names the first block that differs."""
    data = golden("transcam_conformer")
    model = golden_conformer(data).eval()
    blocks = range(1, model.depth + 1)
    with torch.no_grad():
        taps = model.forward_features(data["x"].double(), taps=blocks).taps
    assert list(taps) == list(blocks)
    for (x, tokens), stats, shape in zip(taps.values(), data["block_stats"], data["block_shapes"], strict=True):
        assert [*x.shape[1:], *tokens.shape[1:]] == shape.tolist()
        found = torch.stack([value(t) for t in (x, tokens) for value in (torch.mean, lambda t: t.std(correction=0))])
        assert relative_error(found, stats) < 1e-9


# -------------------------------------------------------------------------------------------------- names and weights


def listed(heads: bool = True):
    """(name, shape) of all tensors of the list, with the buffers of its batch norms."""
    for line in PARAMETERS.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, shape, *norm = line.split(" | ")
        if "cls_head" in name and not heads:
            continue
        shape = tuple(map(int, shape.split("x")))
        yield name, shape
        if norm == ["BN"] and name.endswith(".weight"):
            yield from ((name.replace("weight", kind), shape if "num" not in kind else ()) for kind in STATISTICS)


def create(name=SMALL_NAME, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_names_and_shapes_are_those_of_the_public_checkpoint():
    model = create(num_classes=0, last_stride=1)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == dict(listed(heads=False))
    assert len(dict(listed())) == 718, "the list is whole"


@pytest.mark.parametrize(
    "name, parameters",
    [("conformer_tiny_patch16_224", 23_524_704), (SMALL_NAME, 37_673_424), ("conformer_base_patch16_224", 83_289_136)],
)
def test_sizes_of_the_classifiers(name, parameters):
    model = create(name)
    assert count(model) == parameters
    assert isinstance(model.conv_cls_head, nn.Linear) and model.conv_cls_head.out_features == 1000
    assert model.conv_trans_12.fusion_block.conv2.stride == (2, 2)


def test_size_of_transcam():
    backbone = create(num_classes=0, last_stride=1)
    heads = sum(math.prod(shape) for name, shape in listed() if "cls_head" in name)
    assert count(backbone) + heads == 36_465_066
    assert backbone.conv_trans_12.fusion_block.conv2.stride == (1, 1)


def test_the_classifier_adds_the_logits_of_both_heads():
    torch.manual_seed(0)
    model = small_conformer(num_classes=5, last_stride=2).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.map.shape == (2, 64, 2, 2), "the last stride halves the map"
    expected = model.conv_cls_head(features.map.mean((2, 3))) + model.trans_cls_head(features.tokens[:, 0])
    assert_close(model(images), expected)
    assert expected.shape == (2, 5)


@pytest.fixture
def registered(monkeypatch):
    """`SMALL_NAME` stands for a network that is small indeed; returns the state of such an ImageNet classifier."""
    shape = dict(base_channels=8, channel_ratio=1, embed_dim=12, depth=3, num_heads=2, mlp_ratio=2)
    real = backbones.conformer.Conformer
    monkeypatch.setattr(backbones.conformer, "Conformer", lambda **options: real(8, **(options | shape)))
    torch.manual_seed(0)
    return real(8, num_classes=7, **shape).state_dict()


@pytest.mark.parametrize("wrap", [lambda state: {"model": state, "epoch": 300}, dict], ids=["wrapped", "plain"])
def test_a_checkpoint_loads_by_its_own_names_without_its_heads(registered, tmp_path, wrap):
    assert sum("cls_head" in name for name in registered) == 4
    torch.save(wrap(registered), tmp_path / "Conformer_small_patch16.pth")
    model = build_conformer(SMALL_NAME, weights=tmp_path / "Conformer_small_patch16.pth")
    found = model.state_dict()
    assert set(found) == {name for name in registered if "cls_head" not in name}
    assert all(torch.equal(value, registered[name]) for name, value in found.items())


def test_missing_and_extra_names_are_said(registered, tmp_path):
    path = tmp_path / "spoilt.pth"
    registered["pos_embed"] = registered.pop("conv_trans_2.expand_block.bn.weight")
    torch.save(registered, path)
    message = r"spoilt.pth: .*Conformer: missing: conv_trans_2.expand_block.bn.weight; left over: pos_embed\."
    with pytest.raises(ValueError, match=message):
        build_conformer(SMALL_NAME, weights=path)


def test_weights_that_cannot_be_fetched_say_where_they_are():
    with pytest.raises(FileNotFoundError, match="no copy of the ImageNet weights.*pass its path"):
        backbones.build(SMALL_NAME)
    with pytest.raises(FileNotFoundError, match="nowhere.pth: there are no weights"):
        build_conformer(TINY_CONFORMER, weights="nowhere.pth")


def test_backbones_are_found_by_name():
    torch.manual_seed(0)
    model = backbones.build(TINY_CONFORMER, pretrained=False, class_tokens=1, image_size=80)
    assert (model.num_classes, model.embed_dim, model.depth, model.patch_size) == (0, 96, 6, 8)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).map.shape == (1, model.num_features, 8, 8)
    with pytest.raises(RuntimeError, match="conformer_huge"):
        backbones.build("conformer_huge")
    strides = {TINY_CONFORMER: 8, "vit_tiny_scenes": 8, "resnet38_tiny_scenes": 4, "resnet38": 8, SMALL_NAME: 16}
    assert {name: backbones.stride(name) for name in strides} == strides


def test_the_committed_weights_load():
    model, fresh = backbones.build(TINY_CONFORMER), tiny_conformer(num_classes=0, last_stride=1)
    assert set(model.state_dict()) == set(fresh.state_dict())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert model.bn1.running_mean.any(), "batch norm has seen images"


# ------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("height, width", [(32, 64), (64, 24), (8, 8)])
def test_images_of_any_shape_keep_the_patch_grid(height, width):
    torch.manual_seed(0)
    features = small_conformer().eval().forward_features(torch.randn(2, 3, height, width))
    grid = (height // 8, width // 8)
    tokens = 1 + grid[0] * grid[1]
    assert features.grid == grid and features.map.shape == (2, 64, *grid)
    assert features.tokens.shape == (2, tokens, 24)
    assert [weights.shape for weights in features.attention] == [(2, tokens, tokens)] * 3
    assert_close(torch.stack(features.attention).sum(-1), torch.ones(3, 2, tokens))


def test_map_and_tokens_keep_the_place_of_a_patch():
    """A bright patch of a wide image moves both most next to where it is; convolutions smear it over a cell."""
    torch.manual_seed(0)
    model, image = small_conformer().eval(), torch.zeros(1, 3, 32, 64)
    bright = image.clone()
    bright[..., :8, 48:56] = 5  # row 0, column 6 of 4 x 8
    with torch.no_grad():
        before, after = (model.forward_features(x, taps=[1]).taps[1] for x in (image, bright))
    of_map, of_tokens = (b - a for a, b in zip(before, after))
    cells = nn.functional.avg_pool2d(of_map.square().sum(1), 2).flatten()
    for moved in (cells, of_tokens[0, 1:].square().sum(1)):
        row, column = divmod(moved.argmax().item(), 8)
        assert row <= 1 and 5 <= column <= 7


@pytest.mark.parametrize("height, width, fixed", [(60, 64, "64x64"), (64, 3, "64x8")])
def test_a_wrong_size_is_refused(height, width, fixed):
    message = f"image size {height}x{width} is not a multiple of the patch size 8; .*{fixed}"
    with pytest.raises(ValueError, match=message):
        small_conformer().forward_features(torch.zeros(1, 3, height, width))


def test_a_block_that_does_not_exist_is_refused():
    for block in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"block {block} does not exist: this Conformer has the blocks 1\.\.3"):
            small_conformer().forward_features(torch.zeros(1, 3, 8, 8), taps=[block])


@pytest.mark.parametrize("options", [{"patch_size": 6}, {"depth": 4}])
def test_a_network_that_cannot_be_built_is_refused(options):
    with pytest.raises(ValueError, match="must be a multiple of 4 and depth"):
        backbones.conformer.Conformer(**options)


def test_attention_weights_are_those_that_were_used():
    torch.manual_seed(0)
    layer, tokens = Attention(12, 3), torch.randn(2, 5, 12)
    out, weights = layer(tokens)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {f"out_proj.{kind}": f"proj.{kind}" for kind in ("weight", "bias")}
    reference.load_state_dict({theirs: layer.state_dict()[ours] for theirs, ours in names.items()})
    expected = reference(tokens, tokens, tokens, average_attn_weights=False)
    assert_close(out, expected[0])
    assert_close(weights, expected[1])


def test_couplings_keep_the_place_of_a_patch():
    torch.manual_seed(0)
    down, up = Squeeze(4, 6, stride=2), Expand(6, 4).eval()
    x = torch.randn(1, 4, 4, 8)
    patches = down(x)
    assert patches.shape == (1, 8, 6)
    corner = down(x[..., 2:, 4:6])  # row 1, column 2 of 2 x 4
    assert_close(patches[:, 4 + 2], corner[:, 0])
    grown = up(patches, (2, 4), (4, 8))
    assert grown.shape == (1, 4, 4, 8)
    cells = grown.unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.equal(cells, cells[..., :1, :1].expand_as(cells)), "every patch is repeated over its pixels"
    assert_close(up(patches[:, 6:7], (1, 1), (1, 1))[..., 0, 0], grown[..., 2, 4])


def test_drop_path_rises_to_its_rate_and_only_acts_in_training():
    model = small_conformer(depth=6, drop_path_rate=0.5)
    blocks = [model.trans_1, *(getattr(model, f"conv_trans_{index}").trans_block for index in range(2, 7))]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first, again = (model.eval().forward_features(images).tokens for _ in range(2))
        assert torch.equal(first, again)
        first, again = (model.train().forward_features(images).tokens for _ in range(2))
        assert not torch.equal(first, again)
