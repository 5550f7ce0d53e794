"""Fixtures that many tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("WSSS_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture
def golden():
    """`golden("more_par_released")` -> the reference arrays of that file as tensors (numbers as Python scalars, names as lists)."""

    def load(name: str) -> dict:
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            pytest.fail(f"{path} is missing: WSSS_GOLDEN must name a folder with all reference arrays")
        with np.load(path) as arrays:
            return {key: plain(value) for key, value in arrays.items()}

    def plain(value: np.ndarray):
        if not value.ndim:
            return value.item()
        return value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value)

    return load


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
