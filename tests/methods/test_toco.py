"""ToCo's patch token contrast, and the guide that has it as its example."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from base import MethodTester
from test_cam import SMALL

from wsss.data.scenes import Scenes
from wsss.evaluation import EvalConfig, Request, evaluate
from wsss.experiments import RECIPE_DATASETS, Experiment
from wsss.floors import floors
from wsss.losses import ptc_loss
from wsss.methods.cam import Cam, CamConfig
from wsss.methods.toco import ToCo, ToCoConfig, mean_similarity, patch_token_contrast
from wsss.training import TrainConfig, train

ROOT = Path(__file__).parents[2]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
FORMS = {"published": patch_token_contrast, "released": ptc_loss}
LABELS = {
    "all kinds": [[[0, 1, 1], [255, 2, 0]], [[3, 3, 255], [0, 0, 3]]],
    "no positive pair": [[[0, 1, 2], [3, 255, 255]], [[255, 2, 255], [1, 255, 255]]],
    "no negative pair": [[[1, 1, 1], [255, 1, 1]], [[0, 0, 0], [0, 0, 255]]],
    "all uncertain": [[[255] * 3] * 2] * 2,
}


class TestToCo(MethodTester):
    name = "toco"
    settings = SMALL
    terms = {"cls", "aux", "ptc", "seg", "energy"}
    always = {"cls"}

    def test_similarity_of_the_blocks_is_that_of_their_patches(self, method, batch):
        tokens = method.eval().backbone(batch["image"], taps=(0, 3))
        found = method.block_similarity(batch["image"])
        assert found.shape == (2, method.backbone.depth)
        for block, patches in ((0, tokens.taps[0]), (3, tokens.taps[3]), (-1, tokens.patches)):
            torch.testing.assert_close(found[:, block], mean_similarity(patches))


class TestToCoAsReleased(TestToCo):
    settings = SMALL | {"variant": "released"}

    def test_it_is_the_baseline_bit_for_bit(self, method, batch):
        baseline = Cam(CamConfig(**SMALL), method.num_classes, method.backbone)
        baseline.load_state_dict(method.state_dict())
        ours, theirs = method.losses(batch, 0), baseline.losses(batch, 0)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def contrast_by_loops(features, label, variant):
    """The sum over ordered pairs as it is written."""
    equal, different = [], []
    for tokens, own in zip(features.flatten(2).mT, label.flatten(1).tolist()):
        for i, first in enumerate(own):
            for j, second in enumerate(own):
                if i == j or 255 in (first, second):
                    continue
                cosine = tokens[i] @ tokens[j] / (tokens[i].norm() * tokens[j].norm())
                (equal if first == second else different).append(cosine)
    if variant == "released":
        attraction = sum(abs(s) for s in equal) / (len(equal) + 1)
        repulsion = sum(abs(s) for s in different) / (len(different) + 1)
        return 0.5 * (1 - attraction) + 0.5 * repulsion
    return sum(1 - s for s in equal) / max(len(equal), 1) + sum(different) / max(len(different), 1)


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("variant", FORMS)
def test_contrast_and_its_gradient_are_those_of_plain_loops(features, variant, kind):
    label = torch.tensor(LABELS[kind])
    loss, expected = FORMS[variant](features, label), contrast_by_loops(features, label, variant)
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float64), **EXACT)
    (gradient,) = torch.autograd.grad(loss, features)
    if kind == "all uncertain":
        assert loss == {"published": 0, "released": 0.5}[variant] and not gradient.any()
    else:
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0], **EXACT)
        assert gradient.any()


@pytest.mark.parametrize("degrees, published, released", [(60, 1, 1), (120, 1, -1)])
def test_only_the_published_form_drives_patches_beyond_a_right_angle(degrees, published, released):
    """Which way a descent turns the second of two patches of different labels: +1 further off the first one."""
    for form, expected in ((patch_token_contrast, published), (ptc_loss, released)):
        angle = torch.tensor(math.radians(degrees), requires_grad=True)
        pair = torch.stack([torch.stack([torch.ones(()), angle.cos()]), torch.stack([torch.zeros(()), angle.sin()])])
        loss = form(pair[None, :, None], torch.tensor([[[0, 1]]]))
        assert -torch.autograd.grad(loss, angle)[0].sign() == expected


def test_at_acute_angles_the_released_form_is_half_of_the_published_one_but_for_the_counts():
    torch.manual_seed(1)
    features = torch.rand(1, 5, 3, 3)
    unit = F.normalize(features.flatten(2), dim=1)
    assert (unit.mT @ unit > 0).all()
    alone = {count: torch.tensor([0] * count + [255] * (9 - count)).view(1, 3, 3) for count in (4, 9)}
    for count, label in alone.items():
        pairs, attraction = count * (count - 1), patch_token_contrast(features, label)
        torch.testing.assert_close(ptc_loss(features, label), 0.5 * (1 - (1 - attraction) * pairs / (pairs + 1)))
    unlike = torch.arange(9).view(1, 3, 3)
    repulsion = patch_token_contrast(features, unlike)
    torch.testing.assert_close(ptc_loss(features, unlike), 0.5 + 0.5 * repulsion * 72 / 73)


def test_shapes_that_do_not_fit_are_an_error(features):
    with pytest.raises(ValueError, match=r"features \(2, 4, 2, 3\) .* label \(1, 2, 3\) .* resize one of them"):
        patch_token_contrast(features, torch.zeros(1, 2, 3, dtype=torch.int64))


def test_mean_similarity_by_loops(features):
    patches = features.detach().flatten(2).mT
    for tokens, found in zip(patches, mean_similarity(patches)):
        pairs = [F.cosine_similarity(tokens[i], tokens[j], dim=0) for i in range(6) for j in range(6) if i != j]
        torch.testing.assert_close(found, sum(pairs) / len(pairs), **EXACT)
    alike = torch.ones(1, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(mean_similarity(alike), torch.ones(1, dtype=torch.float64), **EXACT)


def test_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="ToCo: variant 'paper' is unknown; choose one of published, released"):
        ToCoConfig(variant="paper")
    with pytest.raises(ValueError, match="variant 'paper' of toco is not one of published, released"):
        Experiment("toco", "paper", "embedded").recipe()


@pytest.mark.parametrize("dataset", RECIPE_DATASETS)
def test_the_variants_differ_in_the_form_of_the_loss_alone(dataset):
    published, released = (Experiment("toco", variant, dataset) for variant in ToCo.variants)
    assert published.recipe() == released.recipe() and published.name != released.name
    assert published.recipe()["weight_ptc"] == 0.2 and published.recipe()["weight_seg"] == 0.1
    assert [e.config(ToCoConfig).variant for e in (published, released)] == ["published", "released"]


@pytest.mark.parametrize("dataset", ["embedded", "voc2012-cpu"])
def test_small_recipes_are_those_of_the_baseline_but_for_two_weights(dataset):
    own, baseline = (Experiment(method, "published", dataset).recipe() for method in ("toco", "cam"))
    assert {name for name in own if own[name] != baseline[name]} == {"weight_ptc", "weight_seg"}


def test_a_short_training_beats_the_floors():
    overrides = (("steps", 24), ("warmup_steps", 3), ("seg_start", 3))
    experiment = Experiment("toco", "published", "embedded", overrides=overrides)
    scenes = Scenes("train", images=200)
    torch.manual_seed(0)
    network = experiment.build(len(scenes.classes))
    history = train(network, scenes, experiment.config(TrainConfig), seed=0, progress=False)
    assert set(history[-1]) - {"step", "lr", "loss"} == TestToCo.terms
    assert history[-1]["cls"] < 0.5 * history[0]["cls"]

    request = Request("maps-given-labels", "cam")
    scores = evaluate(network, scenes, [request], experiment.config(EvalConfig), images=100, progress=False)
    assert 100 * scores[request.key].miou > floors(scenes, (10, 10), 100)["best centred disc"]
    similarity = network.describe(scenes, 60)["block_similarity"]
    assert len(similarity) == network.backbone.depth and all(-1 <= value <= 1 for value in similarity)


# ------------------------------------------------------------------------------------------------------------ the guide


GUIDE = ROOT / "docs/adding-a-paper.md"
EXAMPLE = {
    name: (ROOT / name).read_text() if not name.endswith(".ipynb") else nbformat.read(ROOT / name, as_version=4)
    for name in re.findall(r"^\| \[`([^`]+)`\]\(", GUIDE.read_text(), re.MULTILINE)
}
REGISTRY = (ROOT / "wsss/methods/__init__.py").read_text().splitlines()


def sources(content):
    """The lines of a text, or those of the code of a notebook."""
    text = content if isinstance(content, str) else "\n".join(c.source for c in content.cells if c.cell_type == "code")
    return text.splitlines()


def test_the_guide_counts_the_files_of_its_example():
    rows = re.findall(r"^\| \[`([^`]+)`\]\(\.\./([^)]+)\) \|[^|]*\| ([^|]+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert [name for name, _, _ in rows] == list(EXAMPLE) and len(rows) == 4
    for name, link, said in rows:
        content, lines = EXAMPLE[name], len(sources(EXAMPLE[name]))
        counted = f"{lines}" if isinstance(content, str) else f"{len(content.cells)} cells, {lines} lines of code"
        assert (link, said) == (name, counted)
    [said] = re.findall(r"(\d+) lines of `wsss/methods/__init__.py`", GUIDE.read_text())
    assert int(said) == sum("ToCo" in line for line in REGISTRY)


def test_what_the_guide_shows_stands_in_the_files():
    there = {line for content in EXAMPLE.values() for line in sources(content)} | set(REGISTRY)
    blocks = re.findall(r"^```(?:python|toml)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines() if line]
    assert len(blocks) == 5 and [line for line in shown if line not in there] == []
