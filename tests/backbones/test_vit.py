"""The multi-token vision transformer: parity with MoRe's released encoder, taps, sizes, and its errors."""

import pytest
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wsss.backbones.vit import TINY, TINY_WEIGHTS, MultiTokenViT, tiny_vit


def encoder_of(arrays: dict) -> MultiTokenViT:
    """The tiny encoder that the arrays' `param_*` belong to."""
    dim = arrays["param_norm_weight"].shape[0]
    prefix = arrays["register_tokens"] + arrays["class_tokens_count"]
    side = round((arrays["param_pos_embed"].shape[1] - prefix) ** 0.5)
    plain = VisionTransformer(
        img_size=side * arrays["patch_size"],
        patch_size=arrays["patch_size"],
        embed_dim=dim,
        depth=arrays["depth"],
        num_heads=arrays["heads"],
        mlp_ratio=arrays["param_blocks_0_mlp_fc1_weight"].shape[0] / dim,
        num_classes=0,
    )
    vit = MultiTokenViT(
        "tiny", arrays["class_tokens_count"], arrays["register_tokens"], pos_resize="offset", vit=plain
    ).double()
    weights = {
        name: arrays["param_" + name.replace(".", "_")] for name in vit.state_dict()
    }
    vit.load_state_dict(weights)
    return vit


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("suffix, image", [("", "image"), ("_native", "image_native")])
def test_golden_more_backbone_released(golden, suffix, image, fused):
    arrays = golden("more_backbone_released")
    set_fused_attn(fused)
    try:
        vit = encoder_of(arrays)
    finally:
        set_fused_attn(True)
    aux = arrays["aux_layer"] if arrays["aux_layer"] < 0 else arrays["aux_layer"] - arrays["depth"]
    tokens = vit(arrays[image], taps=[aux], attention=[-1])
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(tokens.classes, arrays["class_tokens" + suffix], **close)
    torch.testing.assert_close(tokens.patches, arrays["patch_tokens" + suffix], **close)
    torch.testing.assert_close(tokens.taps[aux], arrays["aux_patch_tokens" + suffix], **close)
    if not suffix:
        torch.testing.assert_close(tokens.class_patch_logits[-1], arrays["class_patch_logits"], **close)
        torch.testing.assert_close(vit.position_embedding(tokens.grid), arrays["pos_embed_resized"], **close)


def test_attention_of_a_tapped_block_is_the_softmax_that_timm_computes():
    vit = MultiTokenViT(pretrained=False, class_tokens=3, registers=2)
    images = torch.randn(2, 3, 80, 80)
    kept = {}

    def spy(module, inputs, output):
        kept["qkv"] = output.detach()

    vit.blocks[-1].attn.qkv.register_forward_hook(spy)
    with torch.no_grad():
        attention = vit(images, attention=[-1]).attention[-1]
    query, key, _ = kept["qkv"].unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    full = (query @ key.transpose(-2, -1) * vit.blocks[-1].attn.scale).softmax(-1)
    torch.testing.assert_close(attention.flatten(-2), full[:, :, 2:5, 5:])
    assert (attention.sum((-2, -1)) < 1).all()


def test_hidden_attention_fails_loudly():
    vit = MultiTokenViT(pretrained=False)
    vit.blocks[2].attn = nn.Identity()
    with pytest.raises(TypeError, match="block 2 .* hides its attention: Identity has no `qkv`"):
        vit(torch.randn(1, 3, 80, 80), attention=[2])


def test_any_multiple_of_the_patch_and_nothing_else():
    vit = MultiTokenViT(pretrained=False, class_tokens=2)
    tokens = vit(torch.randn(1, 3, 48, 104))
    assert tokens.grid == (6, 13) and tokens.patches.shape == (1, 78, 96)
    assert tokens.as_map(tokens.patches).shape == (1, 96, 6, 13)
    with pytest.raises(ValueError, match="81x80 is not a multiple of the patch size 8; resize or crop to 80x80"):
        vit(torch.randn(1, 3, 81, 80))


@pytest.mark.parametrize("resizing", ["antialias", "bicubic", "offset"])
def test_position_embedding_keeps_the_native_grid_and_the_prefix(resizing):
    vit = MultiTokenViT(pretrained=False, class_tokens=3, registers=1, pos_resize=resizing)
    assert vit.position_embedding((10, 10)) is vit.pos_embed
    resized = vit.position_embedding((14, 7))
    assert resized.shape == (1, 4 + 98, 96)
    torch.testing.assert_close(resized[:, :4], vit.pos_embed[:, :4])


def test_ways_of_resizing_positions_differ_where_the_papers_say_so():
    vits = {way: MultiTokenViT(pos_resize=way, image_size=80) for way in ("antialias", "bicubic", "offset")}
    small = {way: vit.position_embedding((5, 5))[:, 1:] for way, vit in vits.items()}
    assert (small["antialias"] - small["bicubic"]).norm() / small["bicubic"].norm() > 0.01
    assert (small["offset"] - small["bicubic"]).abs().max() > 0


def test_prefix_tokens_start_as_copies_or_with_noise():
    copies = MultiTokenViT(pretrained=False, class_tokens=4)
    noisy = MultiTokenViT(pretrained=False, class_tokens=4, token_init="noise")
    assert (copies.cls_token == copies.cls_token[:, :1]).all()
    assert noisy.cls_token.std(1).mean() > 0.01


def test_blocks_and_choices_are_checked():
    vit = MultiTokenViT(pretrained=False)
    with pytest.raises(ValueError, match="block 6 does not exist: .* has 6 blocks"):
        vit(torch.randn(1, 3, 80, 80), taps=[6])
    with pytest.raises(ValueError, match="pos_resize = 'nearest' is not one of"):
        MultiTokenViT(pretrained=False, pos_resize="nearest")
    with pytest.raises(ValueError, match="token_init = 'zero' is not one of"):
        MultiTokenViT(pretrained=False, token_init="zero")


def test_tiny_weights_load_and_a_missing_file_says_what_to_do(monkeypatch, tmp_path):
    pretrained, random = MultiTokenViT(TINY), MultiTokenViT(TINY, pretrained=False)
    assert not torch.equal(pretrained.blocks[0].attn.qkv.weight, random.blocks[0].attn.qkv.weight)
    assert TINY_WEIGHTS.stat().st_size < 4e6
    monkeypatch.setattr("wsss.backbones.vit.TINY_WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors is missing: restore it with git"):
        MultiTokenViT(TINY)


def test_a_timm_backbone_by_name():
    vit = MultiTokenViT("vit_tiny_patch16_224", class_tokens=20, registers=4, pretrained=False, pos_resize="offset")
    tokens = vit(torch.randn(1, 3, 64, 96), taps=[-3])
    assert tokens.classes.shape == (1, 20, 192) and tokens.taps[-3].shape == (1, 24, 192)


def test_gradients_reach_every_parameter():
    vit = MultiTokenViT(pretrained=False, class_tokens=2, registers=1)
    tokens = vit(torch.randn(2, 3, 80, 80))
    (tokens.classes.square().sum() + tokens.patches.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vit.parameters())


def test_tiny_vit_is_the_pretrained_architecture():
    assert set(tiny_vit(64).state_dict()) >= {"pos_embed", "cls_token", "norm.weight"}


def test_a_checkpoint_brings_the_grid_of_positions_that_its_run_started_from():
    trained = MultiTokenViT(class_tokens=2, registers=1, image_size=80).eval()  # 8 x 8 positions, those of the weights
    empty = MultiTokenViT(class_tokens=2, registers=1, image_size=80, pretrained=False).eval()
    assert empty.native_grid != trained.native_grid
    empty.load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        assert torch.equal(empty(images).patches, trained(images).patches)
