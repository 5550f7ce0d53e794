"""Weights from files: what is missing or left over is said by name, never skipped in silence."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("model", "state_dict")  # what public checkpoints call the weights among other things
FINGERPRINT = "sha256:"
SHOWN = 5  # names that an error lists before it only counts


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file by parameter name, on the CPU, as stored there.

    Args:
        path: a `.safetensors` file, or one of `torch.save` that holds a dict of tensors, alone or under "model" or
            "state_dict". Nothing but tensors and plain containers is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no dict of tensors.
    """
    path = _existing(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not readable as weights ({reason}); fetch or export the file again") from error
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: holds no dict of tensors, neither alone nor under {' or '.join(map(repr, WRAPPERS))}; "
            "save `network.state_dict()` with torch.save or safetensors"
        )
    return dict(state)


def fingerprint(path: str | Path) -> str:
    """`FINGERPRINT` and the hexadecimal digest of a file of weights: what it holds, wherever it lies.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = _existing(path)
    return f"{FINGERPRINT}{_digest(path, path.stat().st_size, path.stat().st_mtime_ns)}"


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read again when its size or date are others."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there are no weights; fetch or export the file, or name another one")
    return path


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, ignore: Sequence[str] = ()
) -> None:
    """Load `state` into `module`, all of it and nothing else.

    Args:
        state: parameter or buffer name -> tensor, of any floating type. The step counters of batch norm, which ports
            from other frameworks lack, may be absent.
        source: where it comes from, for the error.
        ignore: beginnings of names that may be in `state` alone (a head that the module does not have) or in `module`
            alone (one that is trained anew).

    Raises:
        ValueError: names that are missing or left over, or shapes that differ; the module is left as it was.
    """
    wanted, ignore = module.state_dict(), tuple(ignore)
    counter = lambda name: name.endswith("num_batches_tracked")
    missing = [name for name in wanted if name not in state and not name.startswith(ignore) and not counter(name)]
    extra = [name for name in state if name not in wanted and not name.startswith(ignore)]
    common = {name: value for name, value in state.items() if name in wanted}
    shape = lambda tensor: "x".join(map(str, tensor.shape)) or "scalar"
    other = [
        f"{name} ({shape(value)}, not {shape(wanted[name])})"
        for name, value in common.items()
        if value.shape != wanted[name].shape
    ]
    found = {"missing": missing, "left over": extra, "of another shape": other}
    if any(found.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in found.items() if names)
        raise ValueError(
            f"{source}: these are not the weights of this {type(module).__name__}: {listed}. "
            "Take the file of the same network, or rename its parameters to the names above"
        )
    module.load_state_dict(common, strict=False)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
