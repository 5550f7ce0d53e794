"""The protocols, against loops over pixels in numpy and a method whose maps are known functions of the pixels."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from wsss.data import Sample
from wsss.data.transforms import MEAN, STD
from wsss.evaluation import EvalConfig, Request, evaluate
from wsss.refine import dense_crf

CONFIG = EvalConfig(
    eval_size=0,
    map_scales=(1.0,),
    decoder_scales=(1.0,),
    eval_flip=False,
    map_relu=(),
    threshold_cam=0.6,
    threshold_lam=0.3,
    threshold_fused=0.2,
    crf_gaussian=(3, 1),
    crf_bilateral=(4, 5, 20),
    train_images=0,
    decoder_crf=False,
)
SQUASHED = replace(CONFIG, eval_size=16, map_scales=(0.5, 1.0), decoder_scales=(1.0, 0.5), eval_flip=True, map_relu=("cam",))
GIVEN = [Request("maps-given-labels", name) for name in ("cam", "cam_aux", "lam", "fused")]
PREDICTED = [Request("maps-predicted-labels", name) for name in ("cam", "lam")]
DECODER = Request("decoder")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# What the method gives, on tensors and on arrays alike: the images' channels as three classes, on a grid half as fine.


def pooled(images):
    height, width = images.shape[-2:]
    return images.reshape(*images.shape[:-2], height // 2, 2, width // 2, 2).mean((-3, -1))


def leaning(values):
    """A gradient from left to right, so that a mirror image does not give the mirrored map."""
    return values + torch.linspace(0, 0.5, values.shape[-1], dtype=torch.float64).numpy().tolist()[-1] * 0 + slope(values)


def slope(values):
    ramp = np.linspace(0, 1, values.shape[-1])
    return torch.from_numpy(ramp).to(values) if isinstance(values, torch.Tensor) else ramp


MAPS = {
    "cam": lambda x: pooled(x) + slope(pooled(x)) - 0.5,
    "cam_aux": lambda x: -pooled(x),
    "lam": lambda x: pooled(x)[..., [1, 2, 0], :, :] ** 2,
}
