"""A short real training of every method: the whole path from scenes to scores, better than not looking at the image."""

import pytest

from wsss.data.scenes import Scenes
from wsss.evaluation import EvalConfig, Request, evaluate
from wsss.experiments import Experiment
from wsss.floors import floors
from wsss.training import TrainConfig, train

STEPS = 24
SHORT = (("steps", STEPS), ("warmup_steps", 3))
DECODER = (*SHORT, ("seg_start", 3))
MORE = (*DECODER, ("cre_start", 5), ("ure_start", 5))
SECO = (*DECODER, ("prototype_start", 1), ("contrast_start", 5), ("patches", 2))
CAM, SINGLE_STAGE = Request("maps-given-labels", "cam"), {"cls", "aux", "ptc", "seg", "energy"}


@pytest.mark.parametrize(
    "method, variant, overrides, terms, request_",
    [
        ("cam", "published", DECODER, SINGLE_STAGE, CAM),
        ("more", "published", MORE, SINGLE_STAGE | {"mct", "cre", "ure"}, CAM),
        ("more", "released", (*MORE, ("mask_switch", 12)), SINGLE_STAGE | {"mct", "cre", "ure"}, CAM),
        ("seco", "published", SECO, SINGLE_STAGE | {"lig", "lil"}, CAM),
        ("seco", "released", (*SECO, ("tag_switch", 12)), SINGLE_STAGE | {"lig", "lil"}, CAM),
        ("apc", "published", SHORT, {"mce", "seg", "pcl"}, Request("maps-given-labels", "patch")),
        ("supervised", "published", SHORT, {"seg"}, Request("decoder")),
    ],
)
def test_a_short_training_beats_the_floors(method, variant, overrides, terms, request_):
    experiment = Experiment(method, variant, "embedded", seed=0, overrides=overrides)
    scenes = Scenes("train", images=200)
    network = experiment.build(len(scenes.classes))
    history = train(network, scenes, experiment.config(TrainConfig), seed=0, progress=False)
    assert set(history[-1]) - {"step", "lr", "loss"} == terms
    first = {"apc": "mce", "supervised": "seg"}.get(method, "cls")
    assert history[-1][first] < 0.5 * history[0][first]

    scores = evaluate(network, scenes, [request_], experiment.config(EvalConfig), images=100, progress=False)
    assert 100 * scores[request_.key].miou > floors(scenes, (10, 10), 100)["best centred disc"]
