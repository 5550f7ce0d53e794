import numpy as np
import pytest

from wsss.data.classes import SCENE_CLASSES, VOC_CLASSES, palette


def test_class_names():
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    assert VOC_CLASSES == tuple(sorted(VOC_CLASSES)), "mask values follow the alphabet"
    assert len(SCENE_CLASSES) == len(set(SCENE_CLASSES)) == 10


def test_palette_has_the_colours_of_the_devkit():
    colours = palette(20)
    assert colours.shape == (21, 3) and colours.dtype == np.uint8
    known = {
        "aeroplane": (128, 0, 0),
        "bicycle": (0, 128, 0),
        "bottle": (128, 0, 128),
        "cat": (64, 0, 0),
        "chair": (192, 0, 0),
        "person": (192, 128, 128),
        "pottedplant": (0, 64, 0),
        "tvmonitor": (0, 64, 128),
    }
    assert tuple(colours[0]) == (0, 0, 0)
    for name, colour in known.items():
        assert tuple(colours[VOC_CLASSES.index(name) + 1]) == colour, name
    assert tuple(palette(255)[255]) == (224, 224, 192)


def test_palette_prefix_and_distinct():
    everything = palette(255)
    assert len(np.unique(everything, axis=0)) == 256
    np.testing.assert_array_equal(palette(0), [[0, 0, 0]])
    np.testing.assert_array_equal(palette(80), everything[:81])
    with pytest.raises(ValueError, match="256"):
        palette(256)
