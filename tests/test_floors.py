"""Floors and ceilings of two images of 4 x 4 pixels, worked out by hand."""

import re

import pytest
import torch

from wsss.data import Sample
from wsss.floors import RADII, centred_discs, class_shares, floors, grid_prediction, sentence

MASKS = torch.tensor(
    [
        [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]],
        [[0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1], [1, 0, 1, 1]],
    ]
)
LABELS = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


class Two(torch.utils.data.Dataset):
    identity, split, classes, masks = "two", "val", ("a", "b"), MASKS

    def __len__(self):
        return 2

    def __getitem__(self, index):
        mask = None if self.masks is None else self.masks[index]
        return Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), LABELS[index], mask, str(index))


def test_two_images_by_hand():
    """Truth: 17 background, 10 a, 4 b, 1 void. Discs of radius 0.2 to 0.35 cover the inner 4 pixels: the best ones."""
    expected = {
        "all background": 17 / 31 / 3,
        "best centred disc": (12 / 28 + 2 / 16 + 0) / 3,
        "token grid, nearest": (15 / 17 + 10 / 12 + 4 / 4) / 3,
        "token grid, bilinear": (16 / 17 + 10 / 11 + 4 / 4) / 3,
    }
    assert floors(Two(), (2, 2)) == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_one_token_for_each_pixel_has_no_ceiling_and_only_the_first_images_count():
    first = floors(Two(), (4, 4), images=1)
    assert first["token grid, nearest"] == first["token grid, bilinear"] == 100
    assert first["all background"] == pytest.approx(100 * (12 / 15 + 0) / 2), "b is not in the first image"


def test_a_second_call_measures_nothing_and_cannot_be_spoilt():
    dataset = Two()
    before = floors(dataset, (2, 2))
    dataset.masks = torch.zeros_like(MASKS)
    floors(dataset, [2, 2]).clear()
    assert floors(dataset, (2, 2)) == before
    assert floors(dataset, (2, 2), images=1)["all background"] == 100


def test_discs_have_the_first_class_and_the_size_of_the_shorter_side():
    discs = centred_discs(torch.tensor([0, 1, 1]), (4, 6), (0.2, 0.4, 2))
    inner, edges = torch.zeros(2, 4, 6, dtype=torch.long)
    inner[1:3, 2:4] = 2
    edges[1:3, 1:5] = edges[:, 2:4] = 2
    assert torch.equal(discs, torch.stack([inner, edges, torch.full((4, 6), 2)]))
    assert not centred_discs(torch.zeros(3), (4, 6)).any()
    assert len(centred_discs(torch.ones(3), (4, 6))) == len(RADII)


def test_class_shares_leave_void_out():
    mask = torch.tensor([[0, 1, 255, 255], [255, 1, 255, 255]])
    expected = torch.tensor([[[1 / 3, 0]], [[2 / 3, 0]], [[0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(class_shares(mask, 3, (1, 2)), expected)


def test_grids_that_do_not_divide_the_image_give_full_size_maps():
    torch.manual_seed(0)
    mask = torch.randint(3, (7, 5))
    assert torch.allclose(class_shares(mask, 3, (3, 2)).sum(0), torch.ones(3, 2).double())
    for mode in ("nearest", "bilinear"):
        assert grid_prediction(mask, 3, (3, 2), mode).shape == (7, 5)
        assert torch.equal(grid_prediction(mask, 3, (7, 5), mode), mask)


def test_sentence_has_every_number():
    values = floors(Two(), (2, 2))
    assert re.findall(r"\d+\.\d", sentence(values)) == ["18.3", "18.5", "90.5", "95.0"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"grid is \(0, 2\)"):
        floors(Two(), (0, 2))
    with pytest.raises(ValueError, match="images is 0"):
        floors(Two(), (2, 2), images=0)
    dataset = Two()
    dataset.masks = None
    with pytest.raises(ValueError, match="two: the split 'val' has no masks"):
        floors(dataset, (2, 2))
