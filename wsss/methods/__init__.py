"""Where a method's name finds its class."""

from collections.abc import Mapping
from dataclasses import fields

from torch import nn

from wsss.methods.cam import Cam
from wsss.methods.more import MoRe

METHODS = {"cam": Cam, "more": MoRe}


def build(name: str, settings: Mapping[str, object], num_classes: int, backbone: nn.Module) -> nn.Module:
    """Make the method `name` with the hyper-parameters among `settings`.

    Args:
        name: one of `METHODS`.
        settings: a recipe; names that are no hyper-parameter of the method are left out.
        num_classes: C, foreground classes.
        backbone: with as many class tokens as the method's `class_tokens(C)` says.

    Raises:
        ValueError: the name is unknown, or the method refuses a value.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    names = {field.name for field in fields(method.Config)}
    config = method.Config(**{key: value for key, value in settings.items() if key in names})
    return method(config, num_classes, backbone)
