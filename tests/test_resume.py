"""A run that is killed at random steps, and started again each time, ends with the bits of one that never was.

Everything in its last checkpoint is compared: network, teacher, prototypes, reservoir, optimiser, scaler, random
generators, history. The kills are drawn anew at every execution; WSSS_TEST_SEED repeats those that a failure prints.
"""

import errno
import multiprocessing
import os
import random
import secrets
import signal

import pytest
import torch
from test_training import CONFIG, fresh

from wsss import experiments, training
from wsss.data.scenes import Scenes
from wsss.experiments import Experiment, train_experiment
from wsss.training import load_checkpoint, train

SEED = int(os.environ.get("WSSS_TEST_SEED") or secrets.randbelow(10**6))
STEPS, KILLS = 6, 2
SMALL = (("steps", STEPS), ("batch_size", 4), ("warmup_steps", 2))
DECODER = (*SMALL, ("seg_start", 2))
CONTRASTS = (("prototype_start", 1), ("contrast_start", 3), ("tag_switch", 4), ("patches", 2), ("reservoir", 32))
RELATIONS = (("cre_start", 1), ("ure_start", 2))
EXPERIMENTS = [
    Experiment("cam", "published", "embedded", overrides=(*DECODER, ("checkpoint_every", 2))),
    Experiment("seco", "released", "embedded", overrides=(*DECODER, *CONTRASTS, ("checkpoint_every", 1))),
    Experiment("apc", "published", "embedded", overrides=(*SMALL, ("frozen_steps", 3), ("checkpoint_every", 3))),
    Experiment("more", "released", "embedded", overrides=(*DECODER, *RELATIONS, ("checkpoint_every", 2))),
    Experiment("transcam", "published", "embedded", overrides=(*SMALL, ("checkpoint_every", 1))),
]

multiprocessing.set_forkserver_preload(["wsss.experiments"])


def train_here(patch, experiment, checkpoint):
    """Train on a few scenes, on the CPU."""
    patch.setattr(experiments, "cached_dataset", lambda *_: Scenes("train", images=10))
    patch.setattr(experiments, "_device", lambda: torch.device("cpu"))
    return train_experiment(experiment, checkpoint=checkpoint, progress=False)


def train_until_killed(experiment, checkpoint, step, while_saving):
    """Train in this process, which is killed at the beginning of `step`, or while the next checkpoint is written."""
    now = 0

    def rate_factor(current, config, plain=training.rate_factor):
        nonlocal now
        now = current
        if current == step and not while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(current, config)

    def replace(*paths, plain=os.replace):
        if now >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*paths)

    patch = pytest.MonkeyPatch()
    patch.setattr(training, "rate_factor", rate_factor)
    if while_saving:
        patch.setattr(os, "replace", replace)
    train_here(patch, experiment, checkpoint)


def differing(one, other, where=""):
    """Places at which two checkpoints are not the same to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differing(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [place for i, pair in enumerate(zip(one, other)) for place in differing(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.method)
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(experiment, tmp_path, monkeypatch):
    draw = random.Random(f"{SEED} {experiment.method}")
    kills = sorted((draw.randrange(1, STEPS), draw.random() < 0.5) for _ in range(KILLS))
    print(f"WSSS_TEST_SEED={SEED}: killed at (step, while saving) {kills}")
    _, _, history = train_here(monkeypatch, experiment, tmp_path / "whole.pt")
    for step, while_saving in kills:
        process = multiprocessing.get_context("forkserver").Process(
            target=train_until_killed, args=(experiment, tmp_path / "killed.pt", step, while_saving)
        )
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    method, _, resumed = train_here(monkeypatch, experiment, tmp_path / "killed.pt")
    whole, killed = (load_checkpoint(tmp_path / f"{name}.pt", experiment.name) for name in ("whole", "killed"))
    assert resumed == history and [point["step"] for point in history] == list(range(1, STEPS + 1))
    assert killed["step"] == STEPS and differing(whole, killed) == []
    assert differing(dict(method.state_dict()), dict(whole["method"])) == []


def test_what_differs_between_checkpoints_is_found():
    one = {"method": {"weight": torch.zeros(2)}, "recent": [{"loss": torch.ones(())}], "step": 3}
    other = {"method": {"weight": torch.tensor([0.0, 1e-45])}, "recent": [{"loss": torch.ones(1)}], "step": 4}
    assert differing(one, one) == [] and differing(one, other) == ["/method/weight", "/recent/0/loss", "/step"]


def test_a_full_disk_loses_nothing_and_the_run_goes_on(tmp_path, monkeypatch):
    scenes, whole, stopped = Scenes("train", images=10), fresh(), fresh()
    history = train(whole, scenes, CONFIG, 0, progress=False)
    path, renamed = tmp_path / "checkpoint.pt", []

    def replace(*paths, plain=os.replace):
        if renamed:
            raise OSError(errno.ENOSPC, "No space left on device")
        renamed.append(paths)
        plain(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"checkpoint.pt: cannot be written \(No space left on device\).*free space"):
        train(stopped, scenes, CONFIG, 0, path, "run", progress=False)
    monkeypatch.undo()
    assert load_checkpoint(path, "run")["step"] == CONFIG.checkpoint_every and os.listdir(tmp_path) == [path.name]
    resumed = fresh()
    assert train(resumed, scenes, CONFIG, 0, path, "run", progress=False) == history
    assert differing(dict(resumed.state_dict()), dict(whole.state_dict())) == []


@pytest.fixture(autouse=True)
def free_choice_of_algorithms():
    yield
    torch.use_deterministic_algorithms(False)  # a run switches them on for its process
