"""Fixtures that many tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("WSSS_GOLDEN") or Path(__file__).parent / "golden")


@pytest.fixture
def golden():
    """`golden("more_par_released")` -> the reference arrays of that file as tensors (numbers as Python scalars)."""

    def load(name: str) -> dict:
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            pytest.fail(f"{path} is missing: WSSS_GOLDEN must name a folder with all reference arrays")
        with np.load(path) as arrays:
            return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in arrays.items()}

    return load


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
