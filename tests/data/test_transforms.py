import pickle

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from wsss.data.transforms import (
    MEAN,
    PADDING,
    STD,
    StrongView,
    TrainTransform,
    denormalise,
    normalise,
    resize_for_evaluation,
    squash,
)

JITTER = (0.4, 0.4, 0.2, 0.1)
VOC = TrainTransform(crop=48, scale=(0.32, 1), ratio=(3 / 4, 4 / 3), jitter=JITTER, jitter_probability=0.5)
COCO = TrainTransform(48, (0.32, 1), (3 / 4, 4 / 3), JITTER, 0.8, crop_mode="shrink")
TRANSCAM = TrainTransform(48, (30, 60), (1, 1), JITTER, 1, crop_mode="long_side")
DEEPLAB = TrainTransform(48, (0.5, 1.5), (1, 1), JITTER, 1, crop_mode="rescale")


def plain(crop, scale=(1, 1), ratio=(1, 1), crop_mode="resize"):
    return TrainTransform(crop, scale, ratio, JITTER, 0, crop_mode)


def coordinates(height, width):
    """An image whose red is the row, green the column and blue 255: it shows which pixels a crop has taken."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 255)]).to(torch.uint8)


def noise(height=60, width=80):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalise_and_back():
    image = noise()
    result = normalise(image)
    assert result.dtype == torch.float32
    assert_close(result[1], (image[1] / 255 - MEAN[1]) / STD[1])
    assert_close(normalise(image.expand(2, 5, -1, -1, -1))[1, 4], result)
    assert torch.equal(denormalise(result).round().to(torch.uint8), image)
    assert denormalise(result.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="float32.*uint8"):
        normalise(result)


def test_resize_for_evaluation_squashes_after_normalising():
    image = noise()
    assert torch.equal(resize_for_evaluation(image, None), normalise(image))
    squashed = resize_for_evaluation(image, 30)
    assert squashed.shape == (3, 30, 30)
    # Half of 60 rows: each result lies between two rows. 30 of 80 columns: centre at 8/3 (i + 1/2) - 1/2.
    rows = normalise(image).unflatten(1, (30, 2)).mean(2)
    assert_close(squashed[..., 1], rows[..., 3] * 0.5 + rows[..., 4] * 0.5)
    assert_close(squashed[..., 0], rows[..., 0] * (1 / 6) + rows[..., 1] * (5 / 6))


def test_golden_transcam_squash(golden):
    """Within one grey level of the reference, whose library may round another way."""
    arrays = golden("transcam_msfuse")
    image = arrays["img"].permute(2, 0, 1)
    grey_level = 1 / 255 / torch.tensor(STD)[:, None, None]
    for index, size in enumerate(arrays["sq_sizes"].tolist()):
        result = squash(image, size)
        expected = arrays[f"resized_{index}"].permute(2, 0, 1)
        assert result.dtype == torch.uint8 and result.shape == expected.shape
        assert (result.int() - expected.int()).abs().max() <= 1
        assert ((normalise(result) - arrays[f"normed_{index}"]).abs() <= grey_level + 1e-6).all()


def test_squash_is_refused_after_normalising():
    with pytest.raises(TypeError, match="squash: image is torch.float32.*uint8"):
        squash(normalise(noise()), 32)


@pytest.mark.parametrize("transform", [VOC, COCO, TRANSCAM, DEEPLAB])
@pytest.mark.parametrize("size", [(30, 40), (60, 80), (200, 49)])
def test_train_transform_shape_and_seed(transform, size):
    image = noise(*size)
    untouched = image.clone()
    torch.manual_seed(3)
    first = transform(image)
    assert first.shape == (3, 48, 48) and first.dtype == torch.float32
    assert torch.equal(image, untouched)
    other = transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    assert torch.equal(transform(image), other) and not torch.equal(other, first)
    torch.manual_seed(3)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), first)


def test_flip_has_probability_one_half():
    image = noise(40, 40)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(400):
        result = plain(40)(image)
        mirrored = torch.equal(result, normalise(image.flip(-1)))
        assert mirrored or torch.equal(result, normalise(image))
        flipped += mirrored
    assert 160 < flipped < 240  # four standard deviations


@pytest.mark.parametrize(("crop_mode", "scale"), [("resize", 1), ("shrink", 1), ("long_side", 20), ("rescale", 1)])
@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_jitter_has_its_probability(crop_mode, scale, probability):
    image = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    image[0] = 160
    torch.manual_seed(0)
    transform = TrainTransform(20, (scale, scale), (1, 1), JITTER, probability, crop_mode)
    changed = sum(not torch.equal(transform(image), normalise(image)) for _ in range(60))
    assert abs(changed / 60 - probability) <= 4 * (probability * (1 - probability) / 60) ** 0.5


def test_resized_crop_has_the_given_ratio():
    result = denormalise(plain(32, scale=(0.4, 0.4), ratio=(2, 2))(coordinates(100, 100)))
    height, width = (result[c].max() - result[c].min() for c in (0, 1))
    assert 1.9 < width / height < 2.1


def test_resized_crop_takes_a_share_of_the_area_in_the_ratio():
    torch.manual_seed(0)
    transform = plain(32, scale=(0.32, 1), ratio=(3 / 4, 4 / 3))
    shares = []
    for _ in range(100):
        result = denormalise(transform(coordinates(100, 100)))
        # Along 32 samples a crop of n pixels spans n * 31 / 32.
        height, width = ((result[c].max() - result[c].min()).item() * 32 / 31 for c in (0, 1))
        assert 0.7 < width / height < 1.42
        shares.append(height * width / 100**2)
    assert 0.29 < min(shares) < 0.4 and 0.9 < max(shares) < 1.03


def test_shrink_places_the_image_on_a_black_canvas():
    image = torch.full((3, 10, 12), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    corners = set()
    for _ in range(100):
        result = denormalise(plain(16, crop_mode="shrink")(image)).round()
        inside = (result == 255).all(0)
        assert inside.sum() == 120 and (result[:, ~inside] == 0).all()
        rows, columns = inside.nonzero().unbind(1)
        assert rows.max() - rows.min() == 9 and columns.max() - columns.min() == 11
        corners.add((rows.min().item(), columns.min().item()))
    assert {row for row, _ in corners} == set(range(7)) and {column for _, column in corners} == set(range(5))


@pytest.mark.parametrize(("crop_mode", "scale"), [("long_side", (12, 12)), ("rescale", (1, 1))])
def test_other_modes_place_the_image_on_the_mean_colour(crop_mode, scale):
    image = torch.full((3, 10, 12), 255, dtype=torch.uint8)
    white = normalise(image)[:, :1, :1]
    torch.manual_seed(0)
    corners = set()
    for _ in range(100):
        result = plain(16, scale, crop_mode=crop_mode)(image)
        inside = (result == white).all(0)
        assert inside.sum() == 120 and (result[:, ~inside] == 0).all()
        rows, columns = inside.nonzero().unbind(1)
        corners.add((rows.min().item(), columns.min().item()))
    assert {row for row, _ in corners} == set(range(7)) and {column for _, column in corners} == set(range(5))


def test_psa_crops_or_pads_raw_pixels():
    """AffinityNet's loader is "shrink" without shrinking: no pixel is resampled, and what is outside is black."""
    image = noise(40, 70)
    torch.manual_seed(0)
    result = denormalise(plain(56, crop_mode="shrink")(image)).round().to(torch.uint8)
    columns = image.unfold(2, 56, 1).unbind(2)  # every column range that a crop may take
    candidates = torch.stack([c for column in columns for c in (column, column.flip(-1))])
    inside = (result > 0).any(0).any(1)
    assert inside.sum() == 40
    assert (candidates == result[:, inside]).flatten(1).all(1).any()
    assert (result[:, ~inside] == 0).all()


@pytest.mark.parametrize("size", [(50, 100), (100, 50), (99, 100)])
def test_long_side_is_a_random_whole_number_and_the_aspect_stays(size):
    torch.manual_seed(0)
    lengths = set()
    image = torch.full((3, *size), 255, dtype=torch.uint8)
    for _ in range(60):
        inside = plain(40, (32, 36), crop_mode="long_side")(image)[0] > 0
        sides = inside.any(1).sum().item(), inside.any(0).sum().item()
        lengths.add(max(sides))
        assert sides == tuple(round(side * max(sides) / max(size)) for side in size)
    assert lengths == {32, 33, 34, 35, 36}


def test_long_side_resizes_as_pil_does():
    image = noise(60, 80)
    torch.manual_seed(0)
    result = denormalise(plain(40, (40, 40), crop_mode="long_side")(image))
    inside = (result != denormalise(torch.zeros(3, 1, 1))).any(0).any(1)
    pil = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 30), Image.BICUBIC)))
    assert_one_of_both_mirrors(result[:, inside], pil.permute(2, 0, 1))


@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_rescale_resizes_as_opencv_does(factor):
    image = noise(64, 64)
    side = int(64 * factor)
    torch.manual_seed(0)
    result = denormalise(plain(side, (factor, factor), crop_mode="rescale")(image))
    opencv = cv2.resize(image.permute(1, 2, 0).numpy(), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    assert_one_of_both_mirrors(result, torch.from_numpy(opencv).permute(2, 0, 1))


def assert_one_of_both_mirrors(result, expected):
    """Equal to one grey level."""
    assert result.shape == expected.shape
    assert min((result - mirrored).abs().max() for mirrored in (expected, expected.flip(-1))) < 1.01


def test_rescale_takes_its_factor_from_the_range():
    image = torch.full((3, 40, 60), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    widths, heights = [], []
    for _ in range(100):
        inside = plain(90, (0.5, 1.5), crop_mode="rescale")(image)[0] > 0
        heights.append(inside.any(1).sum().item())
        widths.append(inside.any(0).sum().item())
    assert 30 <= min(widths) < 34 and 86 < max(widths) <= 90
    assert all(abs(height * 1.5 - width) <= 1.5 for height, width in zip(heights, widths, strict=True))


def test_shrink_crops_a_block_of_a_larger_image():
    torch.manual_seed(0)
    corners = set()
    for _ in range(200):
        result = denormalise(plain(16, crop_mode="shrink")(coordinates(18, 20))).round()
        rows, columns = result[0, :, 0], result[1, 0].sort().values  # sorted: the crop may be mirrored
        assert torch.equal(rows, rows[0] + torch.arange(16.0)) and torch.equal(columns, columns[0] + torch.arange(16.0))
        corners.add((int(rows[0]), int(columns[0])))
    assert corners == {(row, column) for row in range(3) for column in range(5)}


def test_shrink_never_enlarges():
    image = torch.full((3, 100, 50), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    heights, widths = [], []
    for _ in range(100):
        inside = denormalise(plain(100, scale=(0.32, 1), crop_mode="shrink")(image))[0] > 127
        heights.append(inside.any(1).sum().item())
        widths.append(inside.any(0).sum().item())
    assert 32 <= min(heights) < 40 and 92 < max(heights) <= 100
    assert all(abs(height / 2 - width) <= 1 for height, width in zip(heights, widths, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "pad"}, "'pad'.*resize, shrink, long_side, rescale"),
        ({"crop_mode": "long_side"}, r"scale is \(0.3, 1\); crop_mode 'long_side' needs whole pixels"),
        ({"crop": 0}, "crop is 0"),
        ({"scale": (1, 0.3)}, r"scale is \(1, 0.3\)"),
        ({"ratio": (0, 1)}, r"ratio is \(0, 1\)"),
    ],
)
def test_bad_settings(change, message):
    settings = {"crop": 48, "scale": (0.3, 1), "ratio": (1, 1), "jitter": JITTER, "jitter_probability": 0.5}
    with pytest.raises(ValueError, match=message):
        TrainTransform(**(settings | change))


def test_bad_images():
    with pytest.raises(TypeError, match="float32"):
        VOC(torch.zeros(3, 60, 60))
    with pytest.raises(TypeError, match=r"\(2, 3, 60, 60\)"):
        VOC(torch.zeros(2, 3, 60, 60, dtype=torch.uint8))


@pytest.mark.parametrize(
    "transform",
    [
        VOC,
        COCO,
        TrainTransform(90, (0.5, 2), (1, 1), JITTER, 0.5, "shrink"),
        TrainTransform(90, (60, 120), (1, 1), JITTER, 0.5, "long_side"),
        TrainTransform(90, (0.5, 1.5), (1, 1), JITTER, 0.5, "rescale"),
    ],
)
def test_a_mask_takes_the_way_of_its_image(transform):
    """Where the image is its own mask, every pixel must agree; the image itself is the one of a call without a mask."""
    image = (coordinates(60, 80) // 16 * 16)[[0, 0, 0]]
    for seed in range(5):
        torch.manual_seed(seed)
        alone = transform(image)
        torch.manual_seed(seed)
        crop, mask = transform.with_mask(image, image[0].long())
        assert torch.equal(crop, alone)
        assert mask.dtype == torch.int64 and mask.shape == crop.shape[1:]
    plain_colours = TrainTransform(transform.crop, transform.scale, transform.ratio, JITTER, 0, transform.crop_mode)
    crop, mask = plain_colours.with_mask(image, image[0].long())
    grey, inside = denormalise(crop)[0], mask != PADDING
    padding = 0 if transform.crop_mode in ("resize", "shrink") else 255 * MEAN[0]
    assert inside.any() and ((grey[~inside] - padding).abs() < 1e-3).all()
    assert ((grey - mask)[inside].abs() <= 16).float().mean() > 0.95  # at edges colours lie between two steps


def test_padding_is_marked_in_the_mask():
    transform = TrainTransform(90, (0.5, 0.5), (1, 1), JITTER, 0, "shrink")
    _, mask = transform.with_mask(noise(60, 80), torch.zeros(60, 80).long())
    assert (mask == 0).sum() == 30 * 40 and (mask == PADDING).sum() == 90 * 90 - 30 * 40


def test_several_masks_take_the_same_way():
    labels = torch.stack([torch.arange(60 * 80).view(60, 80) % 7, torch.zeros(60, 80).long()])
    torch.manual_seed(3)
    image, one = DEEPLAB.with_mask(noise(), labels[0])
    torch.manual_seed(3)
    same, both = DEEPLAB.with_mask(noise(), labels)
    assert torch.equal(image, same) and both.shape == (2, 48, 48)
    assert torch.equal(both[0], one) and torch.equal(both[1] == PADDING, one == PADDING)


def test_the_strong_view_keeps_the_place_and_changes_the_colours():
    crop = normalise((6 * coordinates(40, 40))[[0, 0, 0]])  # grey, so that a shift of the hue cannot turn it round
    different = 0
    for seed in range(20):
        torch.manual_seed(seed)
        views = StrongView((0.1, 2.0))(noise(), crop)
        assert set(views) == {"strong"} and views["strong"].shape == crop.shape
        different += not torch.allclose(views["strong"], crop, atol=0.02)
        rows = denormalise(views["strong"]).mean((0, 2))
        assert rows[-5] > rows[5]  # still brighter downwards
    assert different > 12  # jitter alone has a probability of 0.8


def test_released_views_mirror_the_key_half_of_the_time_and_add_a_second_crop():
    crop, mirrored = normalise((6 * coordinates(40, 40))[[1, 1, 1]]), 0
    for seed in range(40):
        torch.manual_seed(seed)
        views = StrongView((0.1, 2.0), released=True)(noise(90, 70), crop)
        assert views["second"].shape == crop.shape
        columns = denormalise(views["strong"]).mean((0, 1))
        mirrored += bool(columns[5] > columns[-5])
    assert 8 < mirrored < 32


def test_views_follow_the_seed():
    crop, view = normalise(noise(40, 40)), StrongView((0.1, 2.0), released=True)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(view(noise(), crop))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["second"], results[2]["second"])
