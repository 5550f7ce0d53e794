"""The embedded benchmark: labelled scenes drawn from a seed, so that every notebook runs without a download.

Ten object classes of shape and texture stand in front of seven kinds of background. In training nearly every class
has a home background (boats on water, trains on rails) and two classes have a steady partner (horse and person, chair
and table): the co-occurrence that weakly supervised segmentation suffers from. `val` and `test` follow the law of
training, `val_broken` and `test_broken` break it. Pixel masks are exact by construction.

Every image is a pure function of (split, index). To give the same bytes on every machine the generator uses only
operations that IEEE 754 rounds exactly (+ - * / floor), uniform random numbers of PCG64, fixed-point polygon filling
and a rounded sine table; it never calls a transcendental function on pixels and never sums floating-point numbers.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.data.classes import SCENE_CLASSES

SIZE = 80
BACKGROUNDS = ("water", "rails", "grass", "sky", "road", "room", "sand")
DISTRACTORS = ("tree", "house", "star", "flower", "cup", "fish", "ring", "lamp", "cross", "mushroom")
CLUTTER = ("tree", "house", "lamp")
HOMES = {
    "boat": ("water",),
    "train": ("rails",),
    "horse": ("grass",),
    "person": ("grass", "road", "room"),
    "sheep": ("grass",),
    "bird": ("sky",),
    "chair": ("room",),
    "table": ("room",),
    "bottle": ("room",),
    "car": ("road",),
}
PARTNERS = {"horse": "person", "chair": "table"}


@dataclass(frozen=True)
class Law:
    """How scenes are composed. Probabilities in 0..1, sizes as a share of the image side."""

    images: int
    home_background: float  # the lead object stands in front of its home background
    partner: float  # a lead object that has a steady partner brings it along
    stranger: float = 0.25  # a lead object without a partner brings any other class along
    twin: float = 0.2  # a second object of the lead's class
    clutter: float = 0.5  # mean number of unlabelled objects
    radius: tuple[float, float] = (0.25, 0.5)


SPLITS = {
    "train": Law(2000, home_background=0.95, partner=0.7),
    "val": Law(200, home_background=0.95, partner=0.7),
    "val_broken": Law(200, home_background=0.0, partner=0.05),
    "test": Law(300, home_background=0.95, partner=0.7),
    "test_broken": Law(300, home_background=0.0, partner=0.05),
}

# ------------------------------------------------------------------------------------------------ exact arithmetic
_TABLE = np.array([round(math.sin(2 * math.pi * i / 4096), 9) for i in range(4096)], np.float32)


def _sin(x: np.ndarray) -> np.ndarray:
    """Sine of `x` in turns (1 = a full period), read from a table of 4096 rounded entries."""
    return _TABLE[np.floor(x * np.float32(4096)).astype(np.int64) & 4095]


def _square(x: np.ndarray) -> np.ndarray:
    """Square wave of period 1: +1 in the first half, -1 in the second."""
    return np.where(x - np.floor(x) < 0.5, np.float32(1), np.float32(-1))


def _white(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """White noise (height, width), uniform with unit variance."""
    return (rng.random((height, width), np.float32) - np.float32(0.5)) * np.float32(3.4641)


def _resample(grid: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Smoothly interpolate `grid` to `length` cells along `axis`."""
    position = np.arange(length, dtype=np.float32) * np.float32((grid.shape[axis] - 1) / length)
    low = np.floor(position).astype(np.int64)
    t = position - low
    t = t * t * (np.float32(3) - np.float32(2) * t)
    t = t[:, None] if axis == 0 else t[None]
    return np.take(grid, low, axis) * (1 - t) + np.take(grid, low + 1, axis) * t


def _smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise (height, width) of about unit variance with `cells` bumps along the longer side."""
    longest = max(height, width)
    grid = _white(rng, max(2, cells * height // longest + 2), max(2, cells * width // longest + 2))
    return _resample(_resample(grid, height, 0), width, 1)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV (each 0..1, hue cyclic) to RGB (3,) in 0..1."""
    sector, fraction = divmod(hue % 1 * 6, 1)
    low, falling, rising = (
        value * (1 - saturation),
        value * (1 - saturation * fraction),
        value * (1 - saturation * (1 - fraction)),
    )
    order = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    return np.array(order[int(sector)], np.float32)


# ---------------------------------------------------------------------------------------------------------- shapes
# A shape is (parts, details, texture): parts are polygons whose union is the object, details are (polygon, factor)
# where factor multiplies the brightness or is the word "skin". Unit frame: x right, y down, extent about -1..1.


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, float)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


@lru_cache(maxsize=None)
def _circle(points: int) -> np.ndarray:
    angles = [2 * math.pi * i / points for i in range(points)]
    return np.array([(round(math.cos(a), 9), round(math.sin(a), 9)) for a in angles])


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, points: int = 20) -> np.ndarray:
    return _circle(points) * (radius_x, radius_y) + (x, y)


def _boat(u, n):
    depth, length, mast, sail = u(0.3, 0.45), u(0.8, 1), u(-0.2, 0.2), u(0.5, 0.8)
    hull = _polygon((-length, 0.2), (length, 0.2), (length * 0.65, 0.2 + depth), (-length * 0.6, 0.2 + depth))
    cloth = _polygon((mast + 0.08, -0.9), (mast + 0.08, 0.1), (mast + sail, 0.1))
    sails = [_box(mast - 0.04, -0.95, mast + 0.04, 0.2), cloth]
    rim = _polygon((-length, 0.2), (length, 0.2), (length * 0.97, 0.28), (-length * 0.97, 0.28))
    return [hull, *sails], [(rim, 1.4)], "planks"


def _train(u, n):
    top, windows = u(0.35, 0.5), n(4, 7)
    body = _polygon((-1, -top), (0.75, -top), (1, -top * 0.1), (1, top * 0.8), (-1, top * 0.8))
    wheels = [_ellipse(x, top * 0.85, 0.14, 0.14) for x in (-0.6, -0.1, 0.5)]
    place = lambda i: -0.85 + 1.5 * i / windows
    panes = [(_box(place(i), -top * 0.6, place(i + 0.6), 0), 0.35) for i in range(windows)]
    return [body, *wheels], [*panes, (_box(-1, top * 0.25, 1, top * 0.4), 1.5)], "plain"


def _horse(u, n):
    leg = u(0.35, 0.5)
    body = [
        _ellipse(0, 0, 0.7, 0.3),
        _polygon((0.35, -0.1), (0.62, 0.1), (0.95, -0.75), (0.7, -0.85)),
        _polygon((0.68, -0.88), (0.92, -0.85), (1.1, -0.5), (0.98, -0.42)),
        _polygon((-0.62, -0.15), (-0.72, -0.1), (-0.95, 0.45), (-0.85, 0.45)),
    ]
    legs = [_box(x - 0.06, 0.1, x + 0.06, 0.55 + leg + u(-0.06, 0.06)) for x in (-0.55, -0.35, 0.3, 0.5)]
    return body + legs, [], "blotches"


def _person(u, n):
    waist, reach = u(0.2, 0.3), u(0.1, 0.45)
    head = _ellipse(0, -0.78, 0.17, 0.2)
    arms = [
        _polygon((s * waist, -0.56), (s * waist, -0.35), (s * (waist + reach), 0.1), (s * (waist + reach + 0.12), 0.05))
        for s in (-1, 1)
    ]
    legs = [_polygon((s * waist, 0.1), (s * 0.02, 0.1), (s * 0.05, 1), (s * (waist + 0.02), 1)) for s in (-1, 1)]
    trousers = _polygon((-waist, 0.12), (waist, 0.12), (waist, 1), (-waist, 1))
    return [head, _box(-waist, -0.56, waist, 0.15), *arms, *legs], [(trousers, 0.55), (head, "skin")], "checks"


def _sheep(u, n):
    curls = _circle(n(8, 12))
    head, legs = _ellipse(0.82, -0.1, 0.2, 0.16), (-0.4, -0.15, 0.2, 0.42)
    wool = [_ellipse(0.55 * x, 0.33 * y, 0.2, 0.17, 10) for x, y in curls]
    parts = [_ellipse(0, 0, 0.6, 0.38), *wool, head, *(_box(x - 0.06, 0.3, x + 0.06, 0.78) for x in legs)]
    return parts, [(head, 0.35), *((_box(x - 0.06, 0.48, x + 0.06, 0.78), 0.35) for x in legs)], "wool"


def _bird(u, n):
    wing = u(0.4, 0.9)
    return [
        _ellipse(0, 0.1, 0.42, 0.16),
        _ellipse(0.45, 0, 0.15, 0.13),
        _polygon((0.57, -0.03), (0.57, 0.07), (0.75, 0.04)),
        _polygon((-0.35, 0.05), (-0.35, 0.17), (-0.85, 0.25), (-0.8, -0.02)),
        _polygon((-0.15, 0.05), (0.2, 0.05), (-0.1 - 0.2 * wing, -wing), (-0.45 - 0.2 * wing, -wing * 0.95)),
        _polygon((-0.05, 0.1), (0.2, 0.15), (0.25, 0.1 + wing * 0.7), (0.02, 0.1 + wing * 0.6)),
    ], [], "diagonals"


def _chair(u, n):
    back, w = u(0.8, 1), u(0.4, 0.55)
    rungs = [
        _polygon((-w, -back + y), (-w + 0.5, -back + y + 0.12), (-w + 0.5, -back + y + h), (-w, -back + y + h - 0.12))
        for y, h in ((0, 0.34), (0.45, 0.3))
    ]
    frame = [_box(-w, -back, -w + 0.15, 1), _box(w - 0.14, 0.1, w, 1), _box(-w, 0.02, w, 0.2)]
    return [*frame, *rungs, _box(-w + 0.4, -back + 0.1, -w + 0.5, 0.1)], [], "upright grain"


def _table(u, n):
    w, leg = u(0.8, 1), u(0.08, 0.14)
    legs = [_box(-w + 0.05, 0.05, -w + 0.05 + leg, 0.75), _box(w - 0.05 - leg, 0.05, w - 0.05, 0.75)]
    rear = [_box(-w * 0.6, 0.05, -w * 0.6 + leg * 0.8, 0.5), _box(w * 0.6 - leg * 0.8, 0.05, w * 0.6, 0.5)]
    top = _polygon((-w * 0.8, -0.4), (w * 0.8, -0.4), (w, -0.1), (-w, -0.1))
    edge = _box(-w, -0.1, w, 0.05)
    return [top, edge, *legs, *rear], [(edge, 0.7)], "level grain"


def _bottle(u, n):
    w, neck = u(0.24, 0.36), u(0.08, 0.12)
    shoulder = _polygon((-neck, -0.6), (neck, -0.6), (w, -0.2), (-w, -0.2))
    return (
        [_box(-neck, -1, neck, -0.5), shoulder, _box(-w, -0.25, w, 1)],
        [(_box(-neck * 1.05, -1, neck * 1.05, -0.85), 0.4), (_box(-w, 0.15, w, 0.6), 1.7)],
        "glass",
    )


def _car(u, n):
    roof = u(0.32, 0.45)
    body = _polygon((-1, 0), (-0.95, -0.12), (0.9, -0.12), (1, 0.1), (1, 0.38), (-1, 0.38))
    cabin = _polygon((-0.62, -0.1), (-0.4, -roof - 0.12), (0.3, -roof - 0.12), (0.6, -0.1))
    panes = [
        _polygon((-0.5, -0.12), (-0.35, -roof), (-0.08, -roof), (-0.08, -0.12)),
        _polygon((0.02, -0.12), (0.02, -roof), (0.26, -roof), (0.47, -0.12)),
    ]
    wheels = [_ellipse(x, 0.4, 0.2, 0.2) for x in (-0.55, 0.55)]
    hubs = [_ellipse(x, 0.4, 0.09, 0.09) for x in (-0.55, 0.55)]
    details = [(p, 0.3) for p in panes] + [(w, 0.2) for w in wheels] + [(h, 1.6) for h in hubs]
    return [body, cabin, *wheels], details, "gloss"


def _star(u, n):
    radii = np.where(np.arange(10) % 2, 0.4, 1.0)[:, None]
    return [_circle(10) * radii], [], "plain"


def _flower(u, n):
    petals = [_ellipse(0.5 * x, 0.5 * y, 0.3, 0.3, 12) for x, y in _circle(6)]
    return [*petals, _ellipse(0, 0, 0.35, 0.35)], [(_ellipse(0, 0, 0.28, 0.28), 1.8)], "blotches"


def _house(u, n):
    openings = [_box(-0.15, 0.4, 0.15, 0.9), _box(-0.5, 0.1, -0.25, 0.35), _box(0.25, 0.1, 0.5, 0.35)]
    roof = _polygon((-0.9, -0.05), (0.9, -0.05), (0, -0.9))
    return [_box(-0.7, -0.1, 0.7, 0.9), roof], [(o, 0.4) for o in openings], "bricks"


def _tree(u, n):
    crown = [_polygon((0, -1), (0.55, 0), (-0.55, 0)), _polygon((0, -0.5), (0.7, 0.4), (-0.7, 0.4))]
    return [_box(-0.1, 0.2, 0.1, 1), *crown], [], "wool"


def _cup(u, n):
    body = _polygon((-0.6, -0.6), (0.5, -0.6), (0.35, 0.7), (-0.45, 0.7))
    return [body, _ellipse(0.55, -0.05, 0.3, 0.35)], [(_ellipse(0.58, -0.05, 0.15, 0.2), 0.5)], "glass"


def _fish(u, n):
    tail = _polygon((-0.45, 0), (-0.95, -0.4), (-0.95, 0.4))
    return [_ellipse(0.1, 0, 0.65, 0.35), tail], [(_ellipse(0.5, -0.08, 0.07, 0.07), 0.1)], "diagonals"


def _lamp(u, n):
    shade = _polygon((-0.3, -0.9), (0.3, -0.9), (0.6, -0.2), (-0.6, -0.2))
    return [shade, _box(-0.06, -0.2, 0.06, 0.8), _box(-0.35, 0.8, 0.35, 0.95)], [], "upright grain"


def _mushroom(u, n):
    cap = np.concatenate([_ellipse(0, -0.1, 0.85, 0.7, 24)[12:], _polygon((0.85, -0.05), (-0.85, -0.05))])
    spots = [(_ellipse(-0.3, -0.45, 0.12, 0.12), 1.7), (_ellipse(0.3, -0.5, 0.14, 0.12), 1.7)]
    return [cap, _box(-0.2, -0.25, 0.2, 0.8)], spots, "plain"


SHAPES = {
    "boat": _boat,
    "train": _train,
    "horse": _horse,
    "person": _person,
    "sheep": _sheep,
    "bird": _bird,
    "chair": _chair,
    "table": _table,
    "bottle": _bottle,
    "car": _car,
    "tree": _tree,
    "house": _house,
    "star": _star,
    "flower": _flower,
    "cup": _cup,
    "fish": _fish,
    "ring": lambda u, n: ([_ellipse(0, 0, 0.9, 0.9, 28)], [(_ellipse(0, 0, 0.45, 0.45, 24), 0.25)], "level grain"),
    "lamp": _lamp,
    "cross": lambda u, n: ([_box(-0.25, -0.9, 0.25, 0.9), _box(-0.9, -0.25, 0.9, 0.25)], [], "checks"),
    "mushroom": _mushroom,
}


def _bricks(x, y, rng, shift):
    rows = _square(y * 2.9 + shift)
    return 1 + 0.25 * rows * _square(x * 1.9 + 0.25 * rows)


# Brightness of the surface at (x, y) in the object's own frame, so that a texture turns and scales with its object.
TEXTURES = {
    "plain": lambda x, y, rng, shift: 1 + 0.05 * y,
    "planks": lambda x, y, rng, shift: 1 + 0.28 * _square(y * 3.6 + shift),
    "blotches": lambda x, y, rng, shift: 1 + 0.3 * np.clip(2 * _smooth(rng, *x.shape, 6), -1, 1),
    "checks": lambda x, y, rng, shift: 1 + 0.3 * _square(x * 2.6 + shift) * _square(y * 2.6 + shift),
    "wool": lambda x, y, rng, shift: 1 + 0.35 * _white(rng, *x.shape),
    "diagonals": lambda x, y, rng, shift: 1 + 0.3 * _sin((x + y) * 3.2 + shift),
    "upright grain": lambda x, y, rng, shift: 1 + 0.25 * _sin(x * 4.2 + shift + 0.16 * _smooth(rng, *x.shape, 4)),
    "level grain": lambda x, y, rng, shift: 1 + 0.25 * _sin(y * 4.2 + shift + 0.16 * _smooth(rng, *x.shape, 4)),
    "glass": lambda x, y, rng, shift: 0.75 + 0.6 / (1 + (x + 0.1) * (x + 0.1) * 120),
    "gloss": lambda x, y, rng, shift: 1 - 0.35 * y,
    "bricks": _bricks,
}


def _fill(polygons: list[np.ndarray], size: int) -> np.ndarray:
    """Antialiased coverage 0..255 of the union of `polygons` (pixel coordinates), filled in fixed point."""
    coverage = np.zeros((size, size), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(coverage, [np.floor(polygon * 16 + 0.5).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    return coverage


def _draw(image, mask, name, index, centre, scale, rng, light=1.0, turn=0.25):
    """Paint one object into `image` (S, S, 3, float 0..1) and, when `index` is not None, into `mask` (S, S)."""
    size = len(mask)
    parts, details, texture = SHAPES[name](
        lambda low, high: rng.uniform(low, high), lambda low, high: int(rng.integers(low, high))
    )
    angle, flip, aspect = rng.uniform(-turn, turn), 1 - 2 * int(rng.integers(2)), rng.uniform(0.85, 1.18)
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)

    def place(polygon):
        x, y = polygon[:, 0] * (flip * aspect), polygon[:, 1] / aspect
        return np.stack([(cos * x - sin * y) * scale + centre[0], (sin * x + cos * y) * scale + centre[1]], 1)

    coverage = _fill([place(part) for part in parts], size)
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    if not len(rows):
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = (a.astype(np.float32) for a in np.mgrid[window])
    x, y = (x - centre[0]) / scale, (y - centre[1]) / scale
    own_x, own_y = (cos * x + sin * y) / (flip * aspect), (cos * y - sin * x) * aspect
    frequency = rng.uniform(0.85, 1.2)
    base = _colour(rng.random(), rng.uniform(0.1, 0.85), rng.uniform(0.35, 0.85))
    surface = TEXTURES[texture](own_x * frequency, own_y * frequency, rng, rng.random())[..., None] * base
    for polygon, factor in details:
        alpha = (_fill([place(polygon)], size)[window] / np.float32(255))[..., None]
        paint = _colour(0.07, 0.45, rng.uniform(0.5, 0.9)) if factor == "skin" else surface * factor
        surface = surface * (1 - alpha) + paint * alpha
    alpha = (coverage[window] / np.float32(255))[..., None]
    image[window] = image[window] * (1 - alpha) + np.clip(surface * light, 0, 1) * alpha
    if index is not None:
        mask[window][coverage[window] > 127] = index


# ----------------------------------------------------------------------------------------------------- backgrounds


def _ground(kind: str, depth: np.ndarray, x: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Colour (3,) and brightness (S, S) of the ground; `depth` grows from 0 at the horizon to 1 at the lower edge."""
    size = len(x)
    near = np.sqrt(depth)
    centre = rng.uniform(0.3, 0.7)
    if kind == "water":
        waves = _sin(9.5 * near + 0.4 * _smooth(rng, size, size, 7)) * (0.4 + 0.6 * depth)
        return _colour(rng.uniform(0.45, 0.65), rng.uniform(0.35, 0.8), rng.uniform(0.4, 0.8)), 1 + 0.25 * waves
    if kind == "rails":
        gravel = 1 + 0.3 * _white(rng, size, size)
        across = np.abs((x - centre) / (0.12 + depth * 0.75))
        sleepers = (_square(6.6 * near) > 0) & (across < 0.6)
        light = np.where(sleepers, 0.4 + 0.05 * gravel, gravel)
        light = np.where(np.abs(across - 0.38) < 0.045, np.float32(1.9), light)
        return _colour(rng.uniform(0.02, 0.12), rng.uniform(0.05, 0.3), rng.uniform(0.35, 0.6)), light
    if kind == "grass":
        blades = _resample(_white(rng, size // 6 + 1, size), size, 0)
        light = 1 + 0.25 * blades + 0.12 * _smooth(rng, size, size, 5)
        return _colour(rng.uniform(0.2, 0.4), rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.7)), light
    if kind == "road":
        across = np.abs((x - centre) / (0.05 + depth))
        light = 1 + 0.08 * _white(rng, size, size)
        light = np.where((across < 0.05) & (_square(2.5 * near) > 0), np.float32(2.4), light)
        light = np.where(across > 0.75, np.float32(1.4), light)
        return _colour(rng.random(), rng.uniform(0, 0.08), rng.uniform(0.25, 0.5)), light
    if kind == "room":
        boards = _square((x - 0.5) / (0.5 + depth * 0.6) * 6)
        light = 1 + 0.12 * boards + 0.05 * _smooth(rng, size, size, 20)
        return _colour(rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.75)), light
    ripples = _sin(2.2 * depth + 0.48 * _smooth(rng, size, size, 4))
    light = 1 + 0.1 * ripples + 0.05 * _white(rng, size, size)
    return _colour(rng.uniform(0.08, 0.14), rng.uniform(0.2, 0.5), rng.uniform(0.65, 0.95)), light


def _background(kind: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """One background (S, S, 3, float 0..1) and the height of its horizon (share of the side, at most 1)."""
    y, x = (a.astype(np.float32) / np.float32(size) for a in np.mgrid[:size, :size])
    if kind == "room":
        wall = _colour(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.55, 0.95))
        image = np.ones((size, size, 3), np.float32) * wall
        pattern, stripes = int(rng.integers(3)), rng.uniform(6, 13)
        if pattern:
            checks = _square(x * stripes) * (_square(y * stripes) if pattern == 2 else 1)
            image = image * (1 + 0.1 * checks)[..., None]
        horizon = rng.uniform(0.5, 0.7)
    else:
        horizon = 1.1 if kind == "sky" else rng.uniform(0.3, 0.55)
        top = _colour(rng.uniform(0.5, 0.65), rng.uniform(0.1, 0.5), rng.uniform(0.7, 1))
        low = _colour(rng.uniform(0.05, 0.6), rng.uniform(0, 0.25), rng.uniform(0.75, 1))
        t = np.clip(y / horizon, 0, 1)[..., None]
        image = top * (1 - t) + low * t
        if kind == "sky" or rng.random() < 0.4:
            image = image + 0.22 * np.clip(_smooth(rng, size, size, 5), 0, 2)[..., None]
        if kind in ("grass", "road", "rails") and rng.random() < 0.6:
            houses = int(rng.integers(3, 9))
            heights = np.array([rng.uniform(0.05, 0.25) for _ in range(houses)], np.float32)
            skyline = horizon - heights[np.minimum((x[0] * houses).astype(int), houses - 1)]
            image[(y > skyline) & (y < horizon)] = _colour(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.25, 0.6))
    if kind != "sky":
        depth = np.clip((y - horizon) / (1 - horizon), 0.001, 1)
        colour, light = _ground(kind, depth, x, rng)
        image = np.where((y >= horizon)[..., None], colour * light[..., None], image)
    return np.clip(image, 0, 1).astype(np.float32), min(horizon, 1.0)


def _finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add sensor noise and quantise to uint8."""
    noise = (rng.random(image.shape, np.float32) - np.float32(0.5)) * np.float32(0.07)
    return np.floor(np.clip(image + noise, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- scenes


def _stream(purpose: str, index: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(purpose.encode()), index])


def scene(split: str, index: int, law: Law | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Scene `index` of `split`; `law` replaces the split's own law and keeps its random numbers.

    Returns:
        image (80, 80, 3) uint8 RGB; mask (80, 80) uint8 with 0 background, 1..10 class, 255 specks too small to
        label; label (10,) uint8; the background's name.
    """
    law, rng = law or SPLITS[split], _stream(f"scenes/{split}", index)
    lead = SCENE_CLASSES[int(rng.integers(len(SCENE_CLASSES)))]
    objects = [lead]
    if lead in PARTNERS:
        if rng.random() < law.partner:
            objects.append(PARTNERS[lead])
    elif rng.random() < law.stranger:
        objects.append(SCENE_CLASSES[int(rng.integers(len(SCENE_CLASSES)))])
    if rng.random() < law.twin:
        objects.append(lead)
    choices = HOMES[lead] if rng.random() < law.home_background else BACKGROUNDS
    kind = choices[int(rng.integers(len(choices)))]
    image, horizon = _background(kind, SIZE, rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    light = rng.uniform(0.75, 1.2)
    floor = min(horizon, 0.8)
    clutter = sum(rng.random() < law.clutter / 4 for _ in range(4))
    for _ in range(clutter):
        centre = rng.random() * SIZE, rng.uniform(floor * 0.7, floor * 1.2) * SIZE
        name = CLUTTER[int(rng.integers(len(CLUTTER)))]
        _draw(image, mask, name, None, centre, rng.uniform(0.08, 0.2) * SIZE, rng, light, turn=0.1)
    for name, centre, radius in sorted(_arrange(objects, horizon, law, rng), key=lambda placed: placed[1][1]):
        centre = centre[0] * SIZE, centre[1] * SIZE
        _draw(image, mask, name, SCENE_CLASSES.index(name) + 1, centre, radius * SIZE, rng, light)
    pixels = np.bincount(mask.ravel(), minlength=len(SCENE_CLASSES) + 1)[1:]
    label = (pixels >= 0.004 * SIZE * SIZE).astype(np.uint8)
    mask[np.isin(mask, 1 + np.flatnonzero((pixels > 0) & (label == 0)))] = 255
    return _finish(image, rng), mask, label, kind


def _arrange(objects, horizon, law, rng) -> list[tuple[str, tuple[float, float], float]]:
    """Choose a centre and a radius for each object, keeping objects apart where a few tries allow it."""
    low, high = law.radius
    first, placed = rng.uniform(low, high), []
    for rank, name in enumerate(objects):
        radius = first if rank == 0 else min(max(first * rng.uniform(0.7, 1.3), low), high)
        radius *= 0.8 if len(objects) > 2 else 1.0
        for _ in range(8):
            x = rng.uniform(0.2, 0.8)
            y = rng.uniform(0.2, 0.6) if name == "bird" else rng.uniform(min(max(horizon - 0.05, 0.3), 0.7), 0.85)
            gaps = [((x - a) * (x - a) + (y - b) * (y - b), 0.6 * (radius + r)) for _, (a, b), r in placed]
            if all(gap > need * need for gap, need in gaps):
                break
        placed.append((name, (x, y), radius))
    return placed


class Scenes(Dataset):
    """One split of the embedded benchmark, drawn once and kept in memory (about 2 ms and 26 kB an image).

    Args:
        split: one of `SPLITS`.
        images: how many scenes; the split's own number unless given.
        law: replaces the split's law, for studies of co-occurrence.
    """

    identity = "embedded"
    classes = SCENE_CLASSES

    def __init__(self, split: str, images: int | None = None, law: Law | None = None):
        if split not in SPLITS:
            raise ValueError(f"embedded benchmark: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        self.split = split
        images = SPLITS[split].images if images is None else images
        drawn = [scene(split, index, law) for index in range(images)]
        self.images = torch.from_numpy(np.stack([d[0] for d in drawn]).transpose(0, 3, 1, 2).copy())
        self.masks = torch.from_numpy(np.stack([d[1] for d in drawn]))
        self.labels = torch.from_numpy(np.stack([d[2] for d in drawn])).float()
        self.backgrounds = [d[3] for d in drawn]
        self.names = [f"{split}_{index:05d}" for index in range(images)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.labels[index], self.masks[index].long(), self.names[index])


# ----------------------------------------------------------------------------------------------------- pretraining
PRETRAINING_CLASSES = SCENE_CLASSES + DISTRACTORS + BACKGROUNDS


def pretraining_image(index: int) -> tuple[np.ndarray, int]:
    """Image `index` of the pretraining set: one object, or (every fifth) an empty background.

    Half of the objects of the ten target classes stand in front of their home background. Image labels only.

    Returns:
        image (80, 80, 3) uint8 RGB and its class as an index into `PRETRAINING_CLASSES`.
    """
    rng = _stream("pretraining", index)
    if index % 5 == 4:
        kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        return _finish(_background(kind, SIZE, rng)[0], rng), PRETRAINING_CLASSES.index(kind)
    name = PRETRAINING_CLASSES[int(rng.integers(len(SCENE_CLASSES + DISTRACTORS)))]
    choices = HOMES[name] if name in HOMES and rng.random() < 0.5 else BACKGROUNDS
    image, _ = _background(choices[int(rng.integers(len(choices)))], SIZE, rng)
    centre = rng.uniform(0.3, 0.7) * SIZE, rng.uniform(0.35, 0.7) * SIZE
    scale, light = rng.uniform(0.25, 0.48) * SIZE, rng.uniform(0.75, 1.2)
    _draw(image, np.zeros((SIZE, SIZE), np.uint8), name, None, centre, scale, rng, light, turn=0.35)
    return _finish(image, rng), PRETRAINING_CLASSES.index(name)
