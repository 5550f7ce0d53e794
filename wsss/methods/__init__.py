"""Where a method's name finds its class."""

from torch import nn

from wsss.methods.cam import Cam
from wsss.methods.more import MoRe

METHODS = {"cam": Cam, "more": MoRe}


def find(name: str) -> type[nn.Module]:
    """The class of the method `name`; ValueError when there is none."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]
