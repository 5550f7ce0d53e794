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
from wsss.methods.common import Method
from wsss.training import TrainConfig, batches, build_optimizer, load_checkpoint, rate_factor, train

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


class Dummy(Method):
    """A method of two layers that also draws random numbers, as L_ure does."""

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
    first, second = ([index for index, _ in requests[start : start + 10]] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
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
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert path.exists() == (killed_at >= CONFIG.checkpoint_every)
    resumed = fresh()
    if path.exists():
        torch.manual_seed(99)  # the random state of the checkpoint must win over this one
    assert train(resumed, scenes, CONFIG, 0, path, "run", progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_backbone_and_heads_have_their_own_rates():
    backbone, heads = fresh().parameter_groups(CONFIG)
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


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("precision", "fp8", "precision = 'fp8'"),
        ("steps", 0, "steps = 0"),
        ("optimizer", "adam", "optimizer = 'adam' is not one of adamw, sgd"),
        ("momentum", 0.9, "momentum = 0.9 with optimizer = 'adamw'.*only to \"sgd\""),
    ],
)
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match="momentum = 1.5"):
        dataclasses.replace(CONFIG, optimizer="sgd", momentum=1.5)


def test_a_stopped_run_with_momentum_goes_on_with_the_same_bits(scenes, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer="sgd", momentum=0.9, lr=0.1)
    whole, resumed = fresh(), fresh()
    history = train(whole, scenes, config, 0, progress=False)

    class Stop(Exception):
        pass

    def stop(step, method):
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(fresh(), scenes, config, 0, tmp_path / "checkpoint.pt", "run", progress=False, observe=stop)
    assert train(resumed, scenes, config, 0, tmp_path / "checkpoint.pt", "run", progress=False) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    without = fresh()
    train(without, scenes, dataclasses.replace(config, momentum=0.0), 0, progress=False)
    assert not torch.equal(without.head.weight, whole.head.weight)


def test_a_method_gets_the_mask_and_where_it_is_valid():
    sample = Sample(torch.full((3, 30, 30), 255, dtype=torch.uint8), torch.ones(1), torch.full((30, 30), 255), "void")
    seen = {}

    class Both(Dummy):
        batch_fields = ("mask", "valid")

        def losses(self, batch, step):
            seen.update(batch)
            return {"zero": self.head.weight.sum() * 0}

    config = dataclasses.replace(CONFIG, batch_size=1, steps=1, crop=40, crop_mode="shrink", crop_scale=(1.0, 1.0))
    train(Both(), [sample], config, 0, progress=False)
    assert set(seen) == {"image", "label", "mask", "valid"}
    assert (seen["mask"] == 255).all() and seen["valid"].dtype == torch.bool and seen["valid"].sum() == 30 * 30


class Slope(Method):
    """Two scalars that start at 0 and whose gradients are always 1, one trained as backbone and one as head."""

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


class Descent(Method):
    """One vector per multiple of the rate, each with the gradient A w + G[step]."""

    def __init__(self, start, slope, noise, groups):
        super().__init__()
        self.slope, self.noise, self.groups = slope, noise, groups
        self.vectors = nn.ParameterList(nn.Parameter(start.clone()) for _ in groups)

    def parameter_groups(self, config):
        return [
            {"params": [vector], "base_lr": config.lr * multiplier, "weight_decay": decay}
            for vector, (multiplier, decay) in zip(self.vectors, self.groups.items())
        ]

    def losses(self, batch, step):
        return {"all": sum((self.slope * w * w / 2 + self.noise[step] * w).sum() for w in self.vectors)}


def descend(monkeypatch, arrays, config, groups):
    """The vectors, and the rates that they were moved by, after every step of the loop: (steps, groups, ...)."""
    steps = len(arrays["G"])
    monkeypatch.setattr(training, "rate_factor", lambda step, _: rate_factor(step, config))  # also beyond the last step
    rates, vectors = [], []
    build = training.build_optimizer

    def watched(method, config):
        optimizer = build(method, config)
        optimizer.register_step_post_hook(
            lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
        )
        return optimizer

    monkeypatch.setattr(training, "build_optimizer", watched)
    method = Descent(arrays["w0"], arrays["A"], arrays["G"], groups)
    image = Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1), None, "black")
    observe = lambda step, method: vectors.append(torch.stack([w.detach().clone() for w in method.vectors]))
    train(method, [image], dataclasses.replace(config, steps=steps), 0, progress=False, observe=observe)
    return torch.stack(vectors), torch.tensor(rates, dtype=torch.float64)


TRANSCAM = dataclasses.replace(CONFIG, crop=8, batch_size=1, warmup_steps=0, clip_norm=0.0, weight_decay=5e-4)


@pytest.mark.parametrize("momentum, key", [(0.0005, "aff_traj"), (0.9, "aff_traj_m09")])
def test_golden_transcam_optim_of_the_affinity_network(golden, monkeypatch, momentum, key):
    """The weight decay that slipped into the place of the momentum, and what was likely meant."""
    arrays = golden("transcam_optim")
    own = {"lr": arrays["lr"], "steps": arrays["max_step"], "optimizer": "sgd", "momentum": momentum}
    config = dataclasses.replace(TRANSCAM, **own)
    groups = {1: 5e-4, 10: 5e-4, 2: 0.0, 20: 0.0}
    vectors, rates = descend(monkeypatch, arrays, config, groups)
    for index, multiplier in enumerate(groups):
        torch.testing.assert_close(rates[:, index], arrays[f"aff_lr_x{multiplier}"], rtol=1e-9, atol=0)
        torch.testing.assert_close(vectors[:, index], arrays[f"{key}_x{multiplier}"], rtol=1e-9, atol=1e-9)


def test_golden_transcam_optim_of_the_classifier(golden, monkeypatch):
    arrays = golden("transcam_optim")
    config = dataclasses.replace(TRANSCAM, lr=5e-5, steps=len(arrays["G"]), poly_power=0.0)
    vectors, rates = descend(monkeypatch, arrays, config, {1: 5e-4})
    assert (rates == 5e-5).all()
    torch.testing.assert_close(vectors[:, 0], arrays["adamw_traj"], rtol=1e-9, atol=1e-9)


def test_golden_transcam_optim_of_deeplab(golden):
    """The released schedule counts to 20,001, one more than it makes steps."""
    arrays = golden("transcam_optim")
    config = dataclasses.replace(TRANSCAM, lr=0.001, steps=20_001, optimizer="sgd", momentum=0.9)
    rates = [config.lr * rate_factor(step, config) for step in arrays["seg_iter"].tolist()]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), arrays["seg_lr"], rtol=1e-9, atol=0)


def test_a_method_may_group_its_parameters_itself():
    method = Descent(torch.zeros(2), torch.ones(2), torch.zeros(1, 2), {1: 0.1, 3: 0.0})
    optimizer = build_optimizer(method, dataclasses.replace(CONFIG, weight_decay=0.7))
    found = [(group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1e-3, 0.1), (pytest.approx(3e-3), 0)]
    assert isinstance(optimizer, torch.optim.AdamW)
