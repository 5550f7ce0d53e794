"""Batches that are cut into parts, over processes and one after the other, train as whole ones do.

Two processes on the CPU, connected by gloo, train what a single one trains; MoRe without the terms that look across
images, so that only rounding may differ. SeCo shows what is shared and what is not.
"""

import json
import multiprocessing
import os
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
from devkit import write_devkit

from wsss import experiments, launch
from wsss.data.scenes import Scenes
from wsss.engines import cores
from wsss.experiments import Experiment, Record, environment, read_state, run
from wsss.training import TrainConfig, batches, check_total_batch, load_checkpoint, shares, train

SMALL = (("steps", 4), ("batch_size", 4), ("warmup_steps", 1), ("checkpoint_every", 2))
MEANS = (("weight_ptc", 0.0), ("seg_start", 4), ("cre_start", 1), ("ure_start", 1))
SGD = (("optimizer", "sgd"), ("lr", 0.2), ("head_lr_multiplier", 1))  # AdamW magnifies gradients that are rounding
MORE = Experiment("more", "published", "embedded", overrides=(*SMALL, *MEANS, *SGD))
CONTRASTS = (("seg_start", 1), ("prototype_start", 1), ("contrast_start", 1), ("patches", 2), ("reservoir", 64))
SECO = Experiment("seco", "published", "embedded", overrides=(*SMALL, *CONTRASTS))
TINY = (("steps", 2), ("batch_size", 2), ("warmup_steps", 1), ("train_images", 2), ("crop", 48), ("eval_size", 48))
VOC = Experiment("more", "published", "voc2012-cpu", overrides=(*TINY, *MEANS, *SGD))

multiprocessing.set_forkserver_preload(["wsss.launch"])


class Stop(Exception):
    pass


def train_small(experiment, checkpoint=None, stop=None, **layout):
    """(network, history) of a training on eight scenes, which stops after `stop` steps."""

    def observe(step, method):
        if step == stop:
            raise Stop

    torch.set_num_threads(1)
    torch.manual_seed(experiment.seed)
    scenes, config = Scenes("train", images=8), experiment.config(TrainConfig)
    method = experiment.build(len(scenes.classes))
    options = {"checkpoint": checkpoint, "identity": experiment.name, "progress": False, "observe": observe}
    return method, train(method, scenes, config, experiment.seed, **options, **layout)


def train_in_each(fabric, folder):
    """What each of the two processes does."""
    found = {"seed": {}}
    for name, accumulate in (("two", 1), ("two by two", 2)):
        method, history = train_small(MORE, fabric=fabric, accumulate=accumulate)
        found[name] = method.state_dict(), history
    method, history = train_small(SECO, folder / "whole.pt", fabric=fabric)
    found["seco"], found["seed"] = (method.state_dict(), history), torch.initial_seed()
    try:
        train_small(SECO, folder / "stopped.pt", 3, fabric=fabric)
    except Stop:
        torch.manual_seed(99)
    method, history = train_small(SECO, folder / "stopped.pt", fabric=fabric)
    found["resumed"] = method.state_dict(), history
    torch.save(found, folder / f"{fabric.global_rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder with what the first and the second of two processes found, in 0.pt and 1.pt, and their checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    with mock.patch.dict(os.environ):  # Fabric writes into it
        launch.processes(2, "cpu", start_method="forkserver").launch(train_in_each, folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    """(weights, history) of one process."""
    method, history = train_small(MORE)
    start = MORE.build(10).state_dict()
    assert max((start[name] - value).abs().max() for name, value in method.named_parameters()) > 0.01  # it has learned
    return method.state_dict(), history


def assert_close(found, expected):
    """Weights and history, within the rounding of float32."""
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", ["two", "two by two"])
def test_two_processes_train_as_one(two, alone, name):
    for rank in range(2):
        assert_close(torch.load(two / f"{rank}.pt")[name], alone)


def test_accumulated_parts_train_as_a_whole_batch(alone):
    method, history = train_small(MORE, accumulate=4)
    assert_close((method.state_dict(), history), alone)
    assert {"cls", "aux", "mct", "cre", "ure"} <= set(history[-1])


def test_networks_teachers_and_memories_are_the_same_in_all_processes(two):
    one, other = (torch.load(two / f"{rank}.pt") for rank in range(2))
    assert one["seed"] != other["seed"]  # or images of different processes would get the same random numbers
    for name in ("two", "two by two", "seco"):
        assert all(torch.equal(value, other[name][0][key]) for key, value in one[name][0].items()), name
        assert one[name][1] == other[name][1]


def test_memories_take_in_the_images_of_all_processes(two):
    state, _ = torch.load(two / "0.pt")["seco"]
    assert state["reservoir.pointer"] == 4 * 4 * 2  # steps x total batch x patches
    assert (state["reservoir.keys"].norm(dim=1) > 0.99).sum() == 32
    start = SECO.build(10).state_dict()
    assert not torch.equal(start["teacher.norm.weight"], state["teacher.norm.weight"])


def test_two_processes_that_were_stopped_go_on_with_the_same_bits(two):
    for rank in range(2):
        found = torch.load(two / f"{rank}.pt")
        assert all(torch.equal(value, found["seco"][0][key]) for key, value in found["resumed"][0].items())
        assert found["resumed"][1] == found["seco"][1]
    state = load_checkpoint(two / "whole.pt", SECO.name)
    assert (state["processes"], state["accumulate"], len(state["rng"])) == (2, 1, 2)
    assert not torch.equal(*state["rng"])


def test_a_run_does_not_go_on_in_another_number_of_parts(two):
    found, wanted = "processes = 2 x accumulate = 1", "processes = 1 x accumulate = 2"
    message = f"whole.pt: this run was started with {found}; with {wanted} its bits would be others. Go on as it was"
    with pytest.raises(ValueError, match=message):
        train_small(SECO, two / "whole.pt", accumulate=2)


def test_the_parts_of_all_processes_are_the_batch_in_its_order():
    config = replace(SECO.config(TrainConfig), batch_size=12)
    whole = list(batches(10, config, 0, 1))
    assert list(shares(whole, 1, 0, 1)) == whole
    parts = [list(shares(whole, 2, rank, 3)) for rank in range(2)]
    assert all(len(part) == 2 for rank in parts for part in rank)
    joined = [request for side_by_side in zip(*parts) for part in side_by_side for request in part]
    assert joined == [request for batch in whole for request in batch]


# ---------------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.skipif(cores() < 2 or torch.cuda.is_available(), reason="needs two CPU cores and no GPU")
def test_a_run_in_two_processes_leaves_what_a_run_leaves(tmp_path):
    root = write_devkit(tmp_path / "tiny")
    record = run(VOC, tmp_path / "two", str(root), devices=2)
    single = run(VOC, tmp_path / "one", str(root), progress=False)
    folder = tmp_path / "two" / VOC.name
    assert {path.name for path in folder.iterdir()} == {"record.json", "state.json", "checkpoint.pt", ".lock"}
    assert read_state(folder)["state"] == "done" and asdict(Record.read(folder)) == asdict(record)
    assert record.environment["processes"] == 2 and "accumulate" not in record.environment
    assert set(single.environment) == set(environment(torch.device("cpu")))  # records of one process keep their form
    for one, other in zip(record.history, single.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert record.metrics.keys() == single.metrics.keys()
    assert run(VOC, tmp_path / "two", str(root), devices=2) == record  # and is not trained again


def test_accumulation_is_told_in_the_record(tmp_path):
    root = write_devkit(tmp_path / "tiny")
    record = run(VOC, tmp_path / "runs", str(root), progress=False, accumulate=2)
    assert record.environment["accumulate"] == 2 and "processes" not in record.environment


class Failing:
    """Stands for torchrun when a process fails: "1" first, and the other one because of it."""

    def __init__(self, command, env, pass_fds):
        self.file = experiments.Path(next(word for word in command if word.endswith(".json")))
        assert launch.read_experiment(self.file) == VOC and "--nproc-per-node=2" in command and len(pass_fds) == 1

    def wait(self):
        for place, (rank, error) in enumerate([(1, "FloatingPointError: the loss is nan"), (0, "RuntimeError: lost")]):
            path = self.file.with_name(f"{rank}.error")
            path.write_text(error)
            os.utime(path, ns=(place, place))
        return 1


def test_the_error_of_the_process_that_failed_first_is_the_run_s(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.subprocess, "Popen", Failing)
    monkeypatch.setattr(experiments, "_check_devices", lambda devices: None)
    with pytest.raises(RuntimeError, match="one of 2 processes failed: FloatingPointError: the loss is nan"):
        run(VOC, tmp_path, devices=2)
    state = read_state(tmp_path / VOC.name)
    assert state["state"] == "failed" and state["error"].endswith("the loss is nan")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("processes, accumulate", [(3, 1), (1, 3), (2, 4), (1, 0), (8, 1)])
def test_a_total_batch_that_cannot_be_met_is_refused(processes, accumulate):
    message = f"batch_size = 4 is the total, and processes = {processes} x accumulate = {accumulate} equal parts"
    with pytest.raises(ValueError, match=f"{message} do not make it up; choose numbers whose product divides 4"):
        check_total_batch(MORE.config(TrainConfig), processes, accumulate)


def test_a_run_that_cannot_be_shared_like_that_leaves_nothing(tmp_path, capsys):
    with pytest.raises(ValueError, match="batch_size = 4 is the total, and processes = 1 x accumulate = 3"):
        run(MORE, tmp_path, accumulate=3)
    with pytest.raises(ValueError, match=r"devices = 999: this machine has \d+ .*; ask for 1 to \d+"):
        run(MORE, tmp_path, devices=999)
    (tmp_path / "experiment.json").write_text(json.dumps(asdict(MORE)))
    assert launch.main([str(tmp_path / "experiment.json"), f"--runs={tmp_path}", "--devices=0"]) == 1
    assert "wsss.launch: devices = 0: this machine has" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


def test_an_experiment_survives_the_way_to_other_processes(tmp_path):
    chain = Experiment("affinity", "released", "embedded", 2, "PSA", (("beta", 8.0), ("frozen_stages", ["b2"])), SECO)
    (tmp_path / "experiment.json").write_text(json.dumps(asdict(chain)))
    read = launch.read_experiment(tmp_path / "experiment.json")
    assert read == chain and read.name == chain.name


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"method": "cam",', "experiment.json: this is not valid JSON"),
        ('["cam"]', "experiment.json: an experiment is an object with method, variant and dataset, not"),
        ('{"method": "cam", "variant": "published", "dataset": "embedded", "sede": 1}', "did you mean `seed`?"),
        ('{"method": "cam", "variant": "published", "dataset": "voc"}', "cam.toml has no recipe for 'voc'"),
    ],
)
def test_a_wrong_experiment_file_is_named(tmp_path, capsys, content, message):
    (tmp_path / "experiment.json").write_text(content)
    assert launch.main([str(tmp_path / "experiment.json"), f"--runs={tmp_path / 'runs'}"]) == 1
    assert message in capsys.readouterr().err
    assert launch.main([str(tmp_path / "nowhere.json"), f"--runs={tmp_path / 'runs'}"]) == 1
    assert "nowhere.json" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def free_choice_of_algorithms():
    yield
    torch.use_deterministic_algorithms(False)  # a run switches them on for its process
