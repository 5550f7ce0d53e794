"""Backbones whose weights come from a file: what loads, what is refused, and what a run is then called."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from wsss import backbones
from wsss.backbones.conformer import TINY_CONFORMER, tiny_conformer
from wsss.backbones.resnet38 import SIZES, TINY_RESNET, ResNet38
from wsss.backbones.vit import TINY, MultiTokenViT, tiny_vit
from wsss.backbones.weights import fingerprint
from wsss.experiments import BackboneConfig, Experiment

VIT = "small_test_vit"


@register_model
def small_test_vit(pretrained=False, img_size=160, num_classes=1000, **_):
    """What timm has under `VIT`: 10 x 10 patches of 16 pixels, two blocks of 64 channels."""
    return vit_of(img_size, num_classes=num_classes)


def vit_of(image_size, patch=16, channels=64, num_classes=0):
    return VisionTransformer(image_size, patch, embed_dim=channels, depth=2, num_heads=2, num_classes=num_classes)


def file_of(module, path, **more):
    """Save the module's weights, none of them as it was, and return them."""
    torch.manual_seed(1)
    state = {
        name: torch.rand(value.shape) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    torch.save({"model": state | more}, path)
    return state


@pytest.mark.parametrize(
    "name, make, inside",
    [
        (VIT, lambda: vit_of(160, num_classes=7), "blocks.1.attn.qkv.weight"),
        (TINY, lambda: tiny_vit(64), "blocks.5.mlp.fc2.bias"),
        (TINY_CONFORMER, lambda: tiny_conformer(num_classes=5), "conv_trans_3.fusion_block.conv1.weight"),
        (TINY_RESNET, lambda: ResNet38(**SIZES[TINY_RESNET]), "b4.conv_branch2a.weight"),
    ],
)
def test_every_kind_of_backbone_loads_a_file(tmp_path, name, make, inside):
    state = file_of(make(), tmp_path / "weights.pth")
    model = backbones.build(name, weights=tmp_path / "weights.pth")
    assert torch.equal(model.get_parameter(inside), state[inside])
    fresh = backbones.build(name, pretrained=False, weights=tmp_path / "not read.pth")
    assert not torch.equal(fresh.get_parameter(inside), state[inside])


@pytest.mark.parametrize("name, image", [(VIT, 16 * 7), (TINY, 8 * 7)])
def test_the_grid_of_positions_is_that_of_the_file(tmp_path, name, image):
    """timm would resize it with antialiasing; so that `pos_resize` decides, it stays as it is."""
    state = file_of(tiny_vit(image) if name == TINY else vit_of(image), tmp_path / "weights.pth")
    model = backbones.build(name, weights=tmp_path / "weights.pth", class_tokens=2)
    assert tuple(model.native_grid) == (7, 7)
    assert torch.equal(model.pos_embed[:, 2:], state["pos_embed"][:, 1:])
    assert model(torch.randn(1, 3, image, image)).grid == (7, 7)


def test_names_of_other_codes_are_those_that_timm_knows(tmp_path):
    state = file_of(vit_of(160), tmp_path / "plain.pth")
    torch.save({f"visual.trunk.{name}": value for name, value in state.items()}, tmp_path / "clip.pth")  # OpenCLIP
    model = MultiTokenViT(VIT, weights=tmp_path / "clip.pth")
    assert torch.equal(model.norm.weight, state["norm.weight"])
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_a_file_of_another_network_says_what_it_has_and_what_is_needed(tmp_path):
    path = tmp_path / "weights.pth"
    file_of(ResNet38(**SIZES[TINY_RESNET]), path)
    with pytest.raises(ValueError, match="weights.pth: these are not the weights of this VisionTransformer: missing"):
        MultiTokenViT(VIT, weights=path)
    file_of(vit_of(160, channels=96), path)
    with pytest.raises(ValueError, match=r"of another shape: cls_token \(1x1x96, not 1x1x64\)"):
        MultiTokenViT(VIT, weights=path)
    file_of(vit_of(80, patch=8), path)
    with pytest.raises(ValueError, match=r"of another shape: patch_embed.proj.weight \(64x3x8x8, not 64x3x16x16\)"):
        MultiTokenViT(VIT, weights=path)
    for name in (VIT, TINY, TINY_CONFORMER, TINY_RESNET):
        with pytest.raises(FileNotFoundError, match="nowhere.pth"):
            backbones.build(name, weights=tmp_path / "nowhere.pth")


def test_resized_positions_are_those_of_the_papers_or_of_timm():
    """Antialiasing, which no paper's code has, moves them by 8 % on the way from 14 to 28 patches (224 to 448 px)."""
    torch.manual_seed(0)
    plain = vit_of(224)
    resized = {
        way: MultiTokenViT(vit=plain, pos_resize=way).position_embedding((28, 28)) for way in ("bicubic", "antialias")
    }
    for way, embedding in resized.items():
        expected = resample_abs_pos_embed(plain.pos_embed, [28, 28], antialias=way == "antialias")
        torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-6)
    patches = {way: embedding[:, 1:] for way, embedding in resized.items()}
    moved = (patches["antialias"] - patches["bicubic"]).norm() / patches["bicubic"].norm()
    assert 0.07 < moved < 0.1


# ---------------------------------------------------------------------------------------------------------- in a recipe


def test_a_run_is_named_by_the_content_of_its_weights(tmp_path):
    state = {name: value.clone() for name, value in tiny_vit(80).state_dict().items()}
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "other.safetensors")]
    for path in paths:
        save_file(state, path)
        state["norm.bias"] = state["norm.bias"] + (path == paths[1])
    plain = Experiment("cam", "published", "embedded")
    one, copy, other = (replace(plain, overrides=(("weights", str(path)),)) for path in paths)
    assert one.key == copy.key != other.key and len({plain.key, one.key, other.key}) == 3
    assert one.kept_recipe()["weights"] == fingerprint(paths[0]) and str(tmp_path) not in str(one.kept_recipe())
    assert replace(plain, overrides=(("weights", fingerprint(paths[0])),)).key == one.key  # as read from a record
    assert one.config(BackboneConfig).weights == str(paths[0])
    assert replace(plain, overrides=(("weights", ""),)).key == plain.key

    save_file(state, paths[0])  # the file changes, and with it the run
    os.utime(paths[0], ns=(1, 1))
    assert one.key == other.key
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="a.safetensors: there are no weights; fetch or export the file"):
        one.name
    with pytest.raises(ValueError, match="overrides: weights = 3 has the wrong type"):
        replace(plain, overrides=(("weights", 3),)).recipe()


def test_a_recipe_s_weights_are_those_that_train(tmp_path):
    state = file_of(tiny_vit(80), tmp_path / "weights.pth")
    experiment = Experiment("cam", "published", "embedded", overrides=(("weights", str(tmp_path / "weights.pth")),))
    assert torch.equal(experiment.build(3).backbone.norm.weight, state["norm.weight"])
    assert not torch.equal(experiment.build(3, pretrained=False).backbone.norm.weight, state["norm.weight"])
