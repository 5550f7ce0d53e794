"""Where a method's name finds its class."""

from torch import nn

from wsss.methods.affinity import AffinityNet
from wsss.methods.apc import APC
from wsss.methods.cam import Cam
from wsss.methods.deeplab import DeepLab
from wsss.methods.more import MoRe
from wsss.methods.seco import SeCo
from wsss.methods.supervised import Supervised
from wsss.methods.toco import ToCo
from wsss.methods.transcam import TransCAM

METHODS = {
    "cam": Cam,
    "more": MoRe,
    "seco": SeCo,
    "apc": APC,
    "toco": ToCo,
    "transcam": TransCAM,
    "affinity": AffinityNet,
    "deeplab": DeepLab,
    "supervised": Supervised,
}


def find(name: str) -> type[nn.Module]:
    """The class of the method `name`; ValueError when there is none."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]
