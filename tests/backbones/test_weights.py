"""Weights from files: every common form loads, and what does not fit is named."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsss.backbones.weights import load_weights, read_weights


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        name: torch.rand(value.shape) if value.is_floating_point() else value
        for name, value in network().state_dict().items()
    }


def assert_loaded(module, state):
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_pth_files_load_alone_or_wrapped(state, tmp_path, wrap):
    torch.save(wrap(state), tmp_path / "weights.pth")
    module = network()
    load_weights(module, read_weights(tmp_path / "weights.pth"), "weights.pth")
    assert_loaded(module, state)


def test_safetensors_in_half_precision_load(state, tmp_path):
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(half, tmp_path / "weights.safetensors")
    module = network()
    load_weights(module, read_weights(tmp_path / "weights.safetensors"), "weights.safetensors")
    assert module[0].weight.dtype == torch.float32
    assert_loaded(module, {name: value.float() for name, value in half.items()})


def test_the_counter_of_batch_norm_may_be_absent(state):
    del state["1.num_batches_tracked"]
    module = network()
    load_weights(module, state, "port.pth")
    assert torch.equal(module[1].running_var, state["1.running_var"])


def test_ignored_names_may_be_on_either_side(state):
    head = {"fc8.weight": torch.zeros(5)}
    del state["2.weight"], state["2.bias"]
    module = network()
    before = module[2].weight.clone()
    load_weights(module, state | head, "classifier.pth", ignore=("fc8", "2."))
    assert torch.equal(module[0].weight, state["0.weight"]) and torch.equal(module[2].weight, before)


def test_missing_left_over_and_misshapen_names_are_listed_and_nothing_is_loaded(state):
    del state["0.weight"]
    state["2.weight"] = torch.zeros(7, 4, 1, 1)
    state |= {f"layer{i}.weight": torch.zeros(1) for i in range(8)}
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(module, state, "other.pth")
    message = str(error.value)
    assert message.startswith("other.pth: ") and "missing: 0.weight;" in message
    assert "left over: layer0.weight, layer1.weight, layer2.weight, layer3.weight, layer4.weight and 3 more;" in message
    assert "of another shape: 2.weight (7x4x1x1, not 2x4x1x1)." in message and "layer5" not in message
    assert_loaded(module, before)


def test_files_that_hold_no_weights_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="weights.pth: there are no weights; fetch or export"):
        read_weights(path)
    path.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(ValueError, match="weights.pth: not readable as weights .*fetch or export the file again"):
        read_weights(path)
    path.with_suffix(".safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="weights.safetensors: not readable as weights"):
        read_weights(path.with_suffix(".safetensors"))
    torch.save({"weights": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="weights.pth: holds no dict of tensors.*'model' or 'state_dict'"):
        read_weights(path)
    torch.save({"model": network()}, path)  # a whole module would run code when it is unpickled
    with pytest.raises(ValueError, match="weights.pth: not readable as weights"):
        read_weights(path)
