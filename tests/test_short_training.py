"""A short real training of every method: the whole path from scenes to scores, better than not looking at the image."""

import pytest

from wsss.data.scenes import Scenes
from wsss.evaluation import EvalConfig, Request, evaluate
from wsss.experiments import Experiment
from wsss.floors import floors
from wsss.training import TrainConfig, train

STEPS = 24
SHORT = (("steps", STEPS), ("warmup_steps", 3), ("seg_start", 3))
LATER = (("cre_start", 5), ("ure_start", 5))


@pytest.mark.parametrize(
    "method, variant, overrides",
    [
        ("cam", "published", SHORT),
        ("more", "published", SHORT + LATER),
        ("more", "released", SHORT + LATER + (("mask_switch", 12),)),
    ],
)
def test_a_short_training_beats_the_floors(method, variant, overrides):
    experiment = Experiment(method, variant, "embedded", seed=0, overrides=overrides)
    scenes = Scenes("train", images=200)
    network = experiment.build(len(scenes.classes))
    history = train(network, scenes, experiment.config(TrainConfig), seed=0, progress=False)
    assert history[-1]["cls"] < 0.5 * history[0]["cls"]
    assert all(term in history[-1] for term in ("aux", "ptc", "seg", "energy"))
    assert ("cre" in history[-1]) == ("ure" in history[-1]) == (method == "more")

    config = experiment.config(EvalConfig)
    request = Request("maps-given-labels", "cam")
    scores = evaluate(network, scenes, [request], config, images=100, progress=False)[request.key]
    assert 100 * scores.miou > floors(scenes, (10, 10), 100)["best centred disc"]
