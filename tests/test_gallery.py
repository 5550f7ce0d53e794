"""Pictures of the same images: what networks with known answers show, and whether it comes back from a file."""

import numpy as np
import pytest
import torch
from test_stages import CONFIG
from torch import nn

from wsss import gallery
from wsss.data import Sample
from wsss.experiments import Experiment
from wsss.gallery import as_seen_by, pictures, save
from wsss.methods.common import Method
from wsss.stages import Trained

MAPS = torch.tensor([[[[0.0, 0.0], [0.0, 4.0]], [[0.0, 2.0], [1.0, 0.0]]]])  # (1, 2 classes, 2, 2)
SAMPLE = Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([1.0, 0.0]), torch.zeros(8, 8).long(), "one")
COW = Experiment("cam", "published", "embedded", arm="cow")
RETRAINED = Experiment("deeplab", "released", "embedded", arm="cow", source=COW)


class Known(Method):
    """Says MAPS of every image, and that its upper half is class 2."""

    map_names, mask_map, num_classes = ("cam",), "cam", 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def maps(self, images):
        return {"cam": MAPS, "class_logits": torch.ones(1, 2, 1, 1)}

    def segment(self, images):
        logits = torch.zeros(1, 3, *images.shape[2:])
        logits[:, 2, : images.shape[2] // 2] = 1
        return logits


class Probable(Known):
    """The same as probabilities, with a background of 1/8."""

    probability_maps = ("cam",)

    def maps(self, images):
        return super().maps(images) | {"cam": torch.cat([torch.full((1, 1, 2, 2), 0.125), MAPS / 8], 1)}


class Second(Known):
    """A network retrained on masks: it has no maps."""

    map_names, mask_map, segments = (), "", "retrained"


class NoDecoder(Known):
    segments = ""


def test_the_map_of_a_class_is_kept_in_bytes():
    corners = lambda picture: picture[::7, ::7].tolist()
    seen = as_seen_by(Trained(Known().eval(), CONFIG), SAMPLE, 1)
    assert seen["map"].dtype == np.uint8 and seen["map"].shape == (8, 8)
    assert corners(seen["map"]) == [[0, 255], [127, 0]], "a half of 255, less the epsilon of the normalisation"
    assert corners(as_seen_by(Trained(Known().eval(), CONFIG), SAMPLE, 0)["map"]) == [[0, 0], [0, 255]]


def test_a_background_channel_does_not_shift_the_classes():
    seen = as_seen_by(Trained(Probable().eval(), CONFIG), SAMPLE, 1)
    assert seen["map"].tolist() == [[0, 64], [32, 0]], "of 255: 2/8 and 1/8"


def test_predictions_are_named_by_their_protocol():
    upper = np.repeat([[2], [0]], 4, axis=0).repeat(8, axis=1)
    seen = as_seen_by(Trained(Known().eval(), CONFIG), SAMPLE, 0)
    np.testing.assert_array_equal(seen["decoder"], upper)
    seen = as_seen_by(Trained(Second().eval(), CONFIG), SAMPLE, 0)
    assert list(seen) == ["retrained"]
    np.testing.assert_array_equal(seen["retrained"], upper)
    assert list(as_seen_by(Trained(NoDecoder().eval(), CONFIG), SAMPLE, 0)) == ["map"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with the weights of both runs."""
    for run in (COW, RETRAINED):
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "checkpoint.pt").touch()
    networks = {"cam": Known, "deeplab": Second}
    monkeypatch.setattr(gallery, "load_trained", lambda run, folder: Trained(networks[run.method]().eval(), CONFIG))
    return tmp_path


def test_pictures_come_from_the_weights_or_from_the_file(runs):
    kept = runs / "kept.npz"
    seen = pictures([COW, RETRAINED], runs, [SAMPLE], [1], kept)
    assert sorted(seen) == ["cow/one/decoder", "cow/one/map", "cow/one/retrained"]
    first = save(seen, kept).read_bytes()
    assert save(seen, kept).read_bytes() == first

    (runs / RETRAINED.name / "checkpoint.pt").unlink()
    again = pictures([COW, RETRAINED], runs, [SAMPLE], [1], kept)
    assert sorted(again) == sorted(seen)
    for name, picture in seen.items():
        np.testing.assert_array_equal(again[name], picture)


def test_without_weights_and_file_it_is_said_how_to_make_them(runs):
    (runs / COW.name / "checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="kept.npz: no such file, and .* not the weights of all runs; train"):
        pictures([COW, RETRAINED], runs, [SAMPLE], [1], runs / "kept.npz")


def test_a_file_of_other_arms_is_refused(runs):
    save({"horse/one/map": np.zeros((2, 2), np.uint8)}, runs / "kept.npz")
    (runs / COW.name / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="kept.npz: no pictures of cow/one; train the runs anew"):
        pictures([COW], runs, [SAMPLE], [1], runs / "kept.npz")
