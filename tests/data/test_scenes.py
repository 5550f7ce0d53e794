"""The embedded benchmark: the same bytes everywhere, the law it claims, masks that fit."""

import hashlib

import numpy as np
import pytest
import torch

from wsss.data.classes import SCENE_CLASSES
from wsss.data.scenes import BACKGROUNDS, HOMES, SPLITS, Law, Scenes, pretraining_image, scene

CHECKSUMS = {
    "train": "46d23a9439c5f978",
    "val": "0231b2508cc01ae9",
    "val_broken": "0b83367038212fb5",
    "test": "813f86c2046e49f3",
    "test_broken": "a2f9142532f58d9f",
}


def digest(arrays) -> str:
    checksum = hashlib.sha256()
    for array in arrays:
        checksum.update(np.ascontiguousarray(array).tobytes())
    return checksum.hexdigest()[:16]


@pytest.mark.parametrize("split", SPLITS)
def test_same_bytes_on_every_machine(split):
    assert digest(part for index in range(50) for part in scene(split, index)[:3]) == CHECKSUMS[split]


def test_pretraining_images_have_the_same_bytes_on_every_machine():
    assert digest(pretraining_image(index)[0] for index in range(50)) == "8dbeeda29f5d51be"


def test_a_scene_depends_only_on_its_split_and_index():
    first, again = scene("val", 7), scene("val", 7)
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert not np.array_equal(first[0], scene("test", 7)[0])


def test_labels_follow_the_mask_and_specks_are_void():
    for index in range(200):
        _, mask, label, _ = scene("train", index)
        present = np.bincount(mask.ravel(), minlength=256)
        assert set(np.flatnonzero(present)) <= {0, 255, *(1 + np.flatnonzero(label))}
        assert (present[1 : 1 + len(label)][label == 1] >= 0.004 * mask.size).all()


def test_training_co_occurs_and_the_broken_split_does_not():
    """P(home background | class) and P(partner | class), counted over labels and backgrounds."""

    def at_home(split):
        scenes = Scenes(split)
        pairs = [
            (SCENE_CLASSES[c], background)
            for label, background in zip(scenes.labels, scenes.backgrounds)
            for c in label.nonzero()[:, 0].tolist()
        ]
        return np.mean([background in HOMES[name] for name, background in pairs]), scenes.labels

    home, labels = at_home("train")
    home_broken, labels_broken = at_home("val_broken")
    horse, person = SCENE_CLASSES.index("horse"), SCENE_CLASSES.index("person")
    partner = lambda y: (y[:, horse] * y[:, person]).sum() / y[:, horse].sum()
    assert home > 0.75 and home_broken < 0.35
    assert partner(labels) > 0.5 and partner(labels_broken) < 0.2


def test_items_are_samples_and_a_law_can_be_replaced():
    scenes = Scenes("train", images=5, law=Law(5, home_background=0, partner=0))
    sample = scenes[3]
    assert sample.image.shape == (3, 80, 80) and sample.image.dtype == torch.uint8
    assert sample.mask.dtype == torch.int64 and sample.name == "train_00003"
    assert len(scenes) == 5 and torch.equal(sample.label, scenes.labels[3])
    assert set(scenes.backgrounds) <= set(BACKGROUNDS)


def test_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="'tain'; choose one of train, val"):
        Scenes("tain")
