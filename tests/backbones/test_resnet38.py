"""ResNet38: its size, its taps, what can be frozen, its weights."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wsss.backbones import resnet38
from wsss.backbones.resnet38 import RESNET, TINY_RESNET, ResNet38, build_resnet38


def small(**settings):
    torch.manual_seed(0)
    return ResNet38((16, 16, 16, 8, 12, 16, 20), (1, 2, 2, 2), **settings)


def randomise_norms(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values, std=0.2)
    return network


@pytest.fixture(scope="module")
def paper_size():
    with torch.device("meta"):
        return ResNet38()


def test_size_of_the_paper(paper_size):
    assert sum(p.numel() for p in paper_size.parameters()) == 105_070_912
    assert paper_size.stride == 8 and paper_size.out_channels == {"conv4": 512, "conv5": 1024, "conv6": 4096}
    taps = paper_size.eval()(torch.empty(1, 3, 56, 60, device="meta"))
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {
        "conv4": (1, 512, 7, 8),
        "conv5": (1, 1024, 7, 8),
        "conv6": (1, 4096, 7, 8),
    }


def test_parameters_have_the_names_of_the_public_port(paper_size):
    shapes = {name: tuple(value.shape) for name, value in paper_size.state_dict().items()}
    convolutions = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    assert len(convolutions) == 1 + 15 * 2 + 4 + 2 * 4  # the first, plain blocks, their shortcuts, bottlenecks
    assert convolutions["conv1a.weight"] == (64, 3, 3, 3)
    assert convolutions["b2.conv_branch1.weight"] == (128, 64, 1, 1)
    assert convolutions["b4_5.conv_branch2b1.weight"] == (512, 512, 3, 3)
    assert convolutions["b5.conv_branch2a.weight"] == (512, 512, 3, 3)
    assert convolutions["b5_2.conv_branch2b1.weight"] == (1024, 512, 3, 3)
    assert convolutions["b6.conv_branch2b1.weight"] == (1024, 512, 3, 3)
    assert convolutions["b7.conv_branch2b2.weight"] == (4096, 2048, 1, 1)
    assert shapes["b6.bn_branch2b2.running_mean"] == (1024,) and shapes["bn7.bias"] == (4096,)
    blocks = {re.match(r"b\d(_\d)?", name)[0] for name in shapes if name.startswith("b") and "bn7" not in name}
    assert blocks == {"b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", "b5", "b5_1", "b5_2", "b6", "b7"} | {
        f"b4_{i}" for i in range(1, 6)
    }


def test_last_strides_are_dilations(paper_size):
    dilations = {
        name: module.dilation[0]
        for name, module in paper_size.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation[0] > 1
    }
    assert dilations == {
        "b5.conv_branch2b1": 2,
        **{f"b5_{i}.conv_branch2{part}": 2 for i in (1, 2) for part in ("a", "b1")},
        "b6.conv_branch2b1": 4,
        "b7.conv_branch2b1": 4,
    }


def test_tiny_size():
    network = build_resnet38(TINY_RESNET, pretrained=False).eval()
    assert sum(p.numel() for p in network.parameters()) == 469_760
    with FlopCounterMode(display=False) as counter:
        taps = network(torch.zeros(1, 3, 80, 80))
    assert counter.get_total_flops() / 2 == pytest.approx(200e6, rel=0.01)  # multiply-adds
    assert network.stride == 4
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {
        name: (1, channels, 20, 20) for name, channels in network.out_channels.items()
    }


def test_forward_equals_the_written_out_network():
    """Activation in front of the convolutions; a shortcut of another shape starts at the activated input."""
    network = randomise_norms(small()).double().eval()
    weights = network.state_dict()
    images = torch.randn(2, 3, 37, 50, dtype=torch.float64)

    def norm(x, name):
        statistics = (weights[f"{name}.{field}"] for field in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-5).relu()

    def convolve(x, name, **settings):
        weight = weights[f"{name}.weight"]
        padding = settings.get("dilation", 1) if weight.shape[-1] == 3 else 0
        return F.conv2d(x, weight, padding=padding, **settings)

    def plain(x, name, stride=1, first=1, second=1):
        active = norm(x, f"{name}.bn_branch2a")
        inner = norm(convolve(active, f"{name}.conv_branch2a", stride=stride, dilation=first), f"{name}.bn_branch2b1")
        changed = f"{name}.conv_branch1.weight" in weights
        shortcut = convolve(active, f"{name}.conv_branch1", stride=stride) if changed else x
        return shortcut + convolve(inner, f"{name}.conv_branch2b1", dilation=second), active

    def bottleneck(x, name):
        active = norm(x, f"{name}.bn_branch2a")
        inner = norm(convolve(active, f"{name}.conv_branch2a"), f"{name}.bn_branch2b1")
        inner = norm(convolve(inner, f"{name}.conv_branch2b1", dilation=4), f"{name}.bn_branch2b2")
        return convolve(active, f"{name}.conv_branch1") + convolve(inner, f"{name}.conv_branch2b2"), active

    x = convolve(images, "conv1a")
    for name, stride in (("b2", 2), ("b3", 2), ("b3_1", 1), ("b4", 2), ("b4_1", 1)):
        x, _ = plain(x, name, stride)
    x, conv4 = plain(x, "b5", second=2)
    x, _ = plain(x, "b5_1", first=2, second=2)
    x, conv5 = bottleneck(x, "b6")
    x, _ = bottleneck(x, "b7")
    expected = {"conv4": conv4, "conv5": conv5, "conv6": norm(x, "bn7")}
    taps = network(images)
    assert list(taps) == list(expected) and taps["conv6"].shape == (2, 20, 5, 7)
    for name, tap in taps.items():
        torch.testing.assert_close(tap, expected[name], rtol=1e-10, atol=1e-10)


def test_dropout_is_on_in_training_only():
    network = small(dropout=(0.5, 0.5))
    images = torch.randn(2, 3, 32, 32)
    network.freeze(norm=True)  # so that nothing but dropout changes
    network.train()
    assert not torch.equal(network(images)["conv6"], network(images)["conv6"])
    assert torch.equal(network(images)["conv5"], network(images)["conv5"])
    network.eval()
    assert torch.equal(network(images)["conv6"], network(images)["conv6"])


def test_frozen_stages_and_norms_do_not_train():
    network = small(dropout=(0.0, 0.0))
    network.freeze(("conv1a", "b2", "b3"), norm=True)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sum(tap.square().mean() for tap in network(torch.randn(2, 3, 32, 32)).values()).backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {f"{name}.weight" for name in convolutions(network) if name[:2] not in ("co", "b2", "b3")}
    assert {"b4.conv_branch1.weight", "b4_1.conv_branch2a.weight", "b7.conv_branch1.weight"} < trained
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def convolutions(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def test_free_norms_use_and_follow_the_batch():
    network = small(dropout=(0.0, 0.0)).train()
    network.freeze(("conv1a",))
    images = 3 + torch.randn(2, 3, 32, 32)
    out = network(images)["conv6"]
    assert network.b2.bn_branch2a.running_mean.abs().max() > 0
    assert not torch.equal(out, network.eval()(images)["conv6"])
    assert not network.conv1a.weight.requires_grad and network.bn7.weight.requires_grad


def test_weights_come_from_a_local_file(tmp_path, monkeypatch):
    first = randomise_norms(build_resnet38(TINY_RESNET, pretrained=False))
    save_file({name: value.half() for name, value in first.state_dict().items()}, tmp_path / "tiny.safetensors")
    monkeypatch.setitem(resnet38.WEIGHTS, TINY_RESNET, tmp_path / "tiny.safetensors")
    loaded = build_resnet38(TINY_RESNET)
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(first.state_dict().values(), loaded.state_dict().values()))
    public = {name: value for name, value in small().state_dict().items() if "num_batches" not in name}
    torch.save(public | {"fc8.weight": torch.zeros(20, 20, 1, 1)}, tmp_path / "port.pth")
    again = ResNet38((16, 16, 16, 8, 12, 16, 20), (1, 2, 2, 2), pretrained=tmp_path / "port.pth")
    assert torch.equal(again.b7.conv_branch1.weight, public["b7.conv_branch1.weight"])
    with pytest.raises(ValueError, match="port.pth: these are not the weights of this ResNet38: missing: b2_1.*left over: b3_1"):
        ResNet38((16, 16, 16, 8, 12, 16, 20), (2, 1, 2, 2), pretrained=tmp_path / "port.pth")


def test_bad_names_and_sizes_are_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'resnet50' is unknown; choose one of resnet38, resnet38_tiny_scenes"):
        build_resnet38("resnet50")
    monkeypatch.setitem(resnet38.WEIGHTS, RESNET, tmp_path / "resnet38.pth")
    with pytest.raises(FileNotFoundError, match="resnet38.pth is missing: put there the ImageNet weights"):
        build_resnet38(RESNET)
    with pytest.raises(ValueError, match=r"needs 7 widths, .* not \(4, 8\)"):
        ResNet38((4, 8))
    with pytest.raises(ValueError, match="a block with a stride gets 8 channels; give it 16 or more"):
        ResNet38((16, 8, 16, 8, 12, 16, 20))
    with pytest.raises(ValueError, match="no stage 'layer1' to freeze; choose among conv1a, b2, b3, b4, b5, b6, b7"):
        small().freeze(("layer1",))
