"""The same images as all arms of a comparison see them: from trained weights, which are not committed, or from a small
file, which is.

A picture is a uint8 array named "<arm>/<image>/<what>". <what> is "map", the `mask_map` of the arm's method for one
class, (h, w) as `evaluation.all_scores` gives it, 0..1 as 0..255; or "decoder" or "retrained", the label map (H, W)
that is predicted under this protocol.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wsss.data import Sample
from wsss.evaluation import DECODER, Request, all_scores, predict_masks
from wsss.experiments import Experiment, load_trained
from wsss.files import write_atomic
from wsss.stages import Trained

Pictures = Mapping[str, np.ndarray]


def pictures(
    arms: Sequence[Experiment], runs: Path, samples: Sequence[Sample], classes: Sequence[int], kept: Path
) -> Pictures:
    """The pictures of all arms, from their weights where those of all runs are in `runs`, else from the file `kept`.

    Args:
        arms: runs; several may have one label, such as a method and the network retrained on its masks.
        samples: the images.
        classes: the class (0 is the first after the background) that the map of each image is of.

    Raises:
        FileNotFoundError: neither weights nor file are there.
        ValueError: the file has not the pictures of these arms and images.
    """
    if all((Path(runs) / arm.name / "checkpoint.pt").exists() for arm in arms):
        seen = {}
        for arm in arms:
            trained = load_trained(arm, runs)
            for sample, index in zip(samples, classes, strict=True):
                own = as_seen_by(trained, sample, index)
                seen |= {f"{arm.arm}/{sample.name}/{what}": picture for what, picture in own.items()}
        return seen
    if not Path(kept).exists():
        raise FileNotFoundError(
            f"{kept}: no such file, and {runs} has not the weights of all runs; train them (`retrain = True` in the "
            "notebook)"
        )
    with np.load(kept) as file:
        seen = dict(file)
    wanted = {f"{arm.arm}/{sample.name}" for arm in arms for sample in samples}
    missing = sorted(wanted - {name.rpartition("/")[0] for name in seen})
    if missing:
        raise ValueError(f"{kept}: no pictures of {', '.join(missing)}; train the runs anew (`retrain = True`)")
    return seen


def as_seen_by(trained: Trained, sample: Sample, index: int) -> dict[str, np.ndarray]:
    """The map of one class, and the prediction, of a network for an image; what it does not have is left out."""
    method, seen = trained.method, {}
    names = {method.mask_map} - {""} | ({DECODER} if method.segments else set())
    scores = all_scores(method, [sample], names, trained.config, trained.device)
    if method.mask_map:
        own = scores[method.mask_map][0, index - method.num_classes]  # from the end: the first may be the background
        seen["map"] = (255 * own.float().cpu()).round().byte().numpy()
    if method.segments:
        [mask] = predict_masks(Request(method.segments), scores, [sample], trained.config)
        seen[method.segments] = mask.byte().numpy()
    return seen


def save(seen: Pictures, path: Path) -> Path:
    """Write pictures as a compressed file that `pictures` reads; the same pictures give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(sorted(seen.items())))
    return write_atomic(path, buffer.getvalue())
