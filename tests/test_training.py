"""The training loop: schedule, order of the data, exact resume, refusals."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn

from wsss import training
from wsss.data import Sample
from wsss.data.scenes import Scenes
from wsss.training import TrainConfig, batches, load_checkpoint, parameter_groups, rate_factor, train

CONFIG = TrainConfig(
    crop=80,
    batch_size=4,
    steps=12,
    lr=1e-3,
    head_lr_multiplier=10,
    weight_decay=0.01,
    warmup_steps=3,
    warmup_ratio=1e-6,
    poly_power=0.9,
    clip_norm=1.0,
    precision="fp32",
    crop_mode="resize",
    crop_scale=(0.5, 1.0),
    crop_ratio=(0.75, 1.33),
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_probability=0.5,
    checkpoint_every=4,
)


class Dummy(nn.Module):
    """A method of two layers that also draws random numbers, as L_ure does."""

    batch_fields, views = (), None

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 8, 8)
        self.head = nn.Linear(4, 10)

    def losses(self, batch, step):
        features = self.backbone(batch["image"]).mean((2, 3))
        logits = self.head(features + 0.01 * torch.randn_like(features))
        terms = {"cls": nn.functional.multilabel_soft_margin_loss(logits, batch["label"])}
        if step >= 6:
            terms["late"] = 0.1 * features.square().mean()
        return terms


def fresh():
    torch.manual_seed(0)
    return Dummy()


@pytest.fixture(scope="module")
def scenes():
    return Scenes("train", images=10)


def test_golden_more_lr_released(golden):
    arrays = golden("more_lr_released")
    for which in ("short", "voc"):
        config = dataclasses.replace(
            CONFIG,
            steps=arrays[f"max_{which}"],
            warmup_steps=arrays[f"warmup_{which}"],
            warmup_ratio=arrays["warmup_ratio"],
            poly_power=arrays["power"],
        )
        factors = torch.tensor([rate_factor(s, config) for s in arrays[f"steps_{which}"].tolist()], dtype=torch.float64)
        rates = factors[:, None] * arrays["base_lr"][None]
        torch.testing.assert_close(rates, arrays[f"lr_{which}"], rtol=1e-9, atol=0)


def test_every_image_once_an_epoch_in_an_order_that_follows_from_the_seed():
    config = dataclasses.replace(CONFIG, batch_size=4, steps=5)
    requests = [request for batch in batches(10, config, 3, 0) for request in batch]
    assert sorted(index for index, _ in requests[:10]) == sorted(index for index, _ in requests[10:20]) == list(range(10))
    assert [index for index, _ in requests[:10]] != [index for index, _ in requests[10:20]]
    assert len({seed for _, seed in requests}) == len(requests)
    assert list(batches(10, config, 3, 2)) == list(batches(10, config, 3, 0))[2:]
    assert list(batches(10, config, 4, 0)) != list(batches(10, config, 3, 0))


def test_same_seed_same_bits_and_another_seed_others(scenes):
    first, again = fresh(), fresh()
    history = train(first, scenes, CONFIG, 0, progress=False)
    assert train(again, scenes, CONFIG, 0, progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    other = fresh()
    train(other, scenes, CONFIG, 1, progress=False)
    assert not torch.equal(first.head.weight, other.head.weight)


def _train_and_be_killed(path, step):
    """Train in this process and kill it, as the system would, once `step` steps are in the checkpoint."""
    torch.set_num_threads(1)  # as in the tests: the number of threads changes the bits
    method, losses = fresh(), Dummy.losses

    def lethal(self, batch, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(self, batch, now)

    Dummy.losses = lethal
    train(method, Scenes("train", images=10), CONFIG, 0, path, "run", progress=False)


@pytest.mark.parametrize("killed_at", [2, 7, 10])
def test_a_killed_run_goes_on_with_the_same_bits(scenes, tmp_path, killed_at):
    whole = fresh()
    history = train(whole, scenes, CONFIG, 0, progress=False)
    path = tmp_path / "checkpoint.pt"
    process = multiprocessing.get_context("spawn").Process(target=_train_and_be_killed, args=(path, killed_at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert path.exists() == (killed_at >= CONFIG.checkpoint_every)
    resumed = fresh()
    if path.exists():
        torch.manual_seed(99)  # the random state of the checkpoint must win over this one
    assert train(resumed, scenes, CONFIG, 0, path, "run", progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_backbone_and_heads_have_their_own_rates():
    backbone, heads = parameter_groups(fresh(), CONFIG)
    assert (backbone["base_lr"], heads["base_lr"]) == (1e-3, pytest.approx(1e-2))
    assert len(backbone["params"]) == len(heads["params"]) == 2


def test_terms_enter_the_history_from_the_step_they_are_on(scenes):
    history = train(fresh(), scenes, CONFIG, 0, progress=False)
    assert [point["step"] for point in history] == list(range(1, 13))
    assert all(("late" in point) == (point["step"] > 6) for point in history)
    assert history[-1]["loss"] == pytest.approx(history[-1]["cls"] + history[-1]["late"], rel=1e-5)


def test_mixed_precision_trains(scenes):
    history = train(fresh(), scenes, dataclasses.replace(CONFIG, precision="bf16"), 0, progress=False)
    exact = train(fresh(), scenes, CONFIG, 0, progress=False)
    assert history != exact and history[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)


def test_checkpoint_of_another_run_is_refused(scenes, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(fresh(), scenes, CONFIG, 0, path, "cam.published_s0", progress=False)
    with pytest.raises(ValueError, match="checkpoint is of the run 'cam.published_s0', not of 'more.published_s0'"):
        load_checkpoint(path, "more.published_s0")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint .* remove it to train anew"):
        load_checkpoint(path, "cam.published_s0")


def test_a_loss_that_is_not_finite_stops_the_run(scenes):
    method = fresh()
    with torch.no_grad():
        method.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan before step 1"):
        train(method, scenes, CONFIG, 0, progress=False)


@pytest.mark.parametrize("field, value, message", [("precision", "fp8", "precision = 'fp8'"), ("steps", 0, "steps = 0")])
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


class Slope(nn.Module):
    """Two scalars that start at 0 and whose gradients are always 1, one trained as backbone and one as head."""

    batch_fields, views = (), None

    def __init__(self):
        super().__init__()
        self.backbone = nn.ParameterList([nn.Parameter(torch.zeros(()))])
        self.head = nn.Parameter(torch.zeros(()))

    def losses(self, batch, step):
        return {"slope": self.backbone[0] + self.head}


def test_golden_seco_lr_schedule(golden, monkeypatch):
    """Rates, also two steps past the end, and where AdamW leads the loop with them."""
    arrays = golden("seco_lr_schedule_released")
    base, head = arrays["base_lr"].tolist()
    schedule = dataclasses.replace(
        CONFIG,
        crop=8,
        batch_size=1,
        steps=arrays["max_iter"],
        lr=base,
        head_lr_multiplier=head / base,
        warmup_steps=arrays["warmup_iter"],
        warmup_ratio=arrays["warmup_ratio"],
        poly_power=arrays["power"],
        clip_norm=0.0,
    )
    used = arrays["lr_used_at_step"]
    factors = torch.tensor([rate_factor(step, schedule) for step in range(len(used))], dtype=torch.float64)
    torch.testing.assert_close(factors[:, None] * arrays["base_lr"], used, rtol=1e-9, atol=0)

    monkeypatch.setattr(training, "rate_factor", lambda step, config: rate_factor(step, schedule))
    method = Slope()
    image = Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1), None, "black")
    longer = dataclasses.replace(schedule, steps=len(used))
    train(method, [image], longer, 0, progress=False)
    after = torch.stack([method.backbone[0], method.head]).detach().double()
    torch.testing.assert_close(after, arrays["parameter_after"], rtol=1e-4, atol=0)
