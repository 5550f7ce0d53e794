"""What arms cost: whose turn it is, what is made of the turns, and what is refused of a kept table."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from wsss import efficiency, plan
from wsss.efficiency import NUMBERS, PLACE, parameters, read, take_turns
from wsss.experiments import Experiment
from wsss.plan import Cost

ARM = Experiment("supervised", "published", "embedded", arm="a")
ARMS = [ARM, replace(ARM, arm="b")]
CPU = torch.device("cpu")


def test_parameters_are_counted_by_what_becomes_of_them(monkeypatch):
    def build(experiment, classes, pretrained):
        assert classes == 10 and not pretrained
        method = nn.ModuleDict({"backbone": nn.Linear(3, 2), "head": nn.Linear(2, 1), "teacher": nn.Linear(3, 2)})
        method.backbone = method["backbone"]
        method["teacher"].requires_grad_(False)
        return method

    monkeypatch.setattr(Experiment, "build", build)
    assert parameters(ARM) == {"backbone": 8, "trained": 11, "parameters": 19}


def test_the_network_that_trains_is_the_one_that_is_counted():
    method = ARM.build(10, pretrained=False)
    assert parameters(ARM)["parameters"] == sum(p.numel() for p in method.parameters())


@pytest.fixture
def turns(monkeypatch):
    """Arms in the order of their turns; every turn has its own cost."""
    taken = []

    def measure(arm, device):
        assert device == CPU
        taken.append(arm.arm)
        turn = len(taken)
        return Cost([0.4, 4.0, 0.1, 1.0, 0.2, 2.0][turn - 1], image=0.001 * turn, gigabytes=0.1 * turn)

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(efficiency.os, "getloadavg", lambda: (0.04, 9.0, 9.0))
    return taken


def test_arms_take_turns_and_cost_their_median(turns):
    table = take_turns(ARMS, CPU, rounds=3).set_index("arm")
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert table.loc["a", ["step_s", "step_s_low", "step_s_high"]].tolist() == [0.2, 0.1, 0.4]
    assert table.loc["b", ["step_s", "step_s_low", "step_s_high"]].tolist() == [2.0, 1.0, 4.0]
    assert table.loc["a", ["image_ms", "memory_gb"]].tolist() == pytest.approx([3.0, 0.5]), "turns 1, 3 and 5"
    assert table.loc["a", "load"] == 0.0 and table.loc["a", "threads"] == torch.get_num_threads()
    assert list(table.columns) == [*NUMBERS, *PLACE]


@pytest.mark.parametrize("arms, rounds", [(ARMS, 0), ([ARM, ARM], 1)])
def test_turns_need_rounds_and_labels(arms, rounds, turns):
    with pytest.raises(ValueError, match="rounds = .* must differ"):
        take_turns(arms, CPU, rounds)
    assert turns == []


@pytest.fixture
def path(tmp_path, turns):
    take_turns(ARMS, CPU, 1).to_csv(tmp_path / "timing.csv", index=False)
    return tmp_path / "timing.csv"


def test_a_kept_table_is_the_one_that_was_measured(path, turns):
    turns.clear()
    pd.testing.assert_frame_equal(read(path, ARMS), take_turns(ARMS, CPU, 1))


@pytest.mark.parametrize("arms, wrong", [(ARMS[:1], "b"), ([*ARMS, replace(ARM, arm="c")], "c")])
def test_a_kept_table_of_other_arms_is_refused(path, arms, wrong):
    with pytest.raises(ValueError, match=f"timing.csv: other arms: {wrong}; delete the file"):
        read(path, arms)


def test_a_kept_table_without_a_column_is_refused(path):
    pd.read_csv(path).drop(columns="load").to_csv(path, index=False)
    with pytest.raises(ValueError, match="timing.csv: no column load; delete the file"):
        read(path, ARMS)
