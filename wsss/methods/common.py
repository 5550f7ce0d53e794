"""What every method needs: checks of its settings, and full precision where half of it would spoil a loss."""

import torch
from torch import Tensor

VARIANTS = ("published", "released")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> str:
    """`value` itself, or ValueError, which names the field and the choices, when it is none of them."""
    if value not in choices:
        raise ValueError(f"{field} {value!r} is unknown; choose one of {', '.join(choices)}")
    return value


def check_variant(variant: str, paper: str) -> str:
    """`variant` itself, or ValueError when it is neither "published" nor "released"."""
    return check_choice(f"{paper}: variant", variant, VARIANTS)


def full_precision(like: Tensor) -> torch.autocast:
    """A context for contrasts and thresholds of cosines, which half precision would spoil; the encoder may use it."""
    return torch.autocast(like.device.type, enabled=False)
