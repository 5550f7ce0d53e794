"""Refinement of class maps by the colours of the image: pixel-adaptive refinement (PAR) and the dense CRF."""

import math
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from operator import length_hint
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from wsss.engines import cores
from wsss.maps import UNCERTAIN, check_labels, resize

# Settings of `dense_crf` beside its defaults: for label maps (TransCAM), for class maps (PSA), and for the
# probabilities of a segmentation network (DeepLab in TransCAM).
LABEL_CRF = {"iterations": 10, "gaussian": (3, 3), "bilateral": (10, 50, 5)}
PSA_CRF = {"iterations": 10, "gaussian": (3, 3), "bilateral": (10, 80, 13)}
DEEPLAB_CRF = {"iterations": 1, "gaussian": (3, 3), "bilateral": (10, 32, 13)}
IN_FLIGHT = 2  # images that wait or are worked on, for each worker of `crf_labels`


class PAR(nn.Module):
    """Pixel-adaptive refinement (AFA, used by ToCo, SeCo and MoRe): masks flow along similar colours.

    Every pixel has 8 neighbours at each dilation. With I the image and "std" the unbiased deviation over all
    neighbours, the weight of neighbour n is softmax_n(a) + 0.01 softmax_n(p), where
    a_n = mean over channels of -(|I_n - I| / (std(I) + 1e-8) / 0.3)^2 and p_n = -(d_n / (std(d) + 1e-8) / 0.3)^2 with
    its distance d. Each iteration replaces a mask value by the weighted sum of its neighbours'. The weights sum to
    1.01, so values grow by 1.01 an iteration. Borders are replicated.

    Args:
        dilations: distances of the neighbours in pixels.
        iterations: rounds of propagation.
    """

    SHARPNESS = 0.3
    POSITION_WEIGHT = 0.01

    def __init__(self, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24), iterations: int = 10):
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f"PAR: dilations are {tuple(dilations)}; give at least one, each >= 1 pixel")
        if iterations < 0:
            raise ValueError(f"PAR: iterations is {iterations}; it must not be negative")
        self.dilations = tuple(dilations)
        self.iterations = iterations
        around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
        self.offsets = [(dilation * dy, dilation * dx) for dilation in self.dilations for dy, dx in around]

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, iterations={self.iterations}"

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Refine masks.

        Args:
            images: (B, 3, H, W) colours in any unit (only their ratio to the local deviation counts).
            masks: (B, M, h, w); resized to (H, W) first, with aligned corners, where the sizes differ.

        Returns:
            (B, M, H, W).

        Raises:
            ValueError: shapes that do not fit.
        """
        if images.ndim != 4 or masks.ndim != 4 or images.shape[0] != masks.shape[0]:
            raise ValueError(
                f"PAR: images {tuple(images.shape)} must be (B, 3, H, W) and masks {tuple(masks.shape)} (B, M, h, w)"
            )
        if masks.shape[2:] != images.shape[2:]:
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
        weights = self.affinity(images).unsqueeze(2).unbind(1)
        for _ in range(self.iterations):
            # One neighbour at a time: the 48 shifted copies of all masks never exist together.
            neighbours = self._neighbours(masks)
            masks = neighbours[0] * weights[0]
            for neighbour, weight in zip(neighbours[1:], weights[1:], strict=True):
                masks.addcmul_(neighbour, weight)
        return masks

    def affinity(self, images: Tensor) -> Tensor:
        """Weights of all N neighbours, by dilation, then row by row: images (B, 3, H, W) -> (B, N, H, W), sum 1.01."""
        neighbours = torch.stack(self._neighbours(images), dim=1)
        # Written out: Tensor.std over this dimension is several times slower on a CPU.
        centred = neighbours - neighbours.mean(1, keepdim=True)
        deviation = (centred.square().sum(1, keepdim=True) / (len(self.offsets) - 1)).sqrt() + 1e-8
        difference = (neighbours - images[:, None]) / (deviation * self.SHARPNESS)
        colour_weight = (-difference.square().mean(2)).softmax(1)
        return colour_weight + self.position_weight(images)[:, None, None]

    def position_weight(self, like: Tensor) -> Tensor:
        """Position part of the weights, 0.01 of a softmax, (N,), with dtype and device of `like`."""
        distance = like.new_tensor([math.hypot(*offset) for offset in self.offsets])
        logits = -(distance / (distance.std() + 1e-8) / self.SHARPNESS).square()
        return self.POSITION_WEIGHT * logits.softmax(0)

    def _neighbours(self, values: Tensor) -> list[Tensor]:
        """Views of `values` (B, M, H, W), shifted to each neighbour."""
        margin = max(self.dilations)
        height, width = values.shape[2:]
        padded = F.pad(values, (margin,) * 4, mode="replicate")
        return [
            padded[:, :, margin + dy : margin + dy + height, margin + dx : margin + dx + width]
            for dy, dx in self.offsets
        ]


@torch.no_grad()
def refine_with_background(
    par: PAR, images: Tensor, cams: Tensor, labels: Tensor, high: float, low: float, down_scale: int = 2
) -> Tensor:
    """Pseudo label from class maps refined twice, against a high and a low background score (released MoRe, SeCo).

    Images and maps are reduced by `down_scale`; the softmax over background and the image's classes is refined, resized
    back, and its arg max taken: R_high and R_low. The label is R_high where that is a class, 0 where both are
    background, and 255 elsewhere. One PAR pass serves both background scores and all images: each image's classes are
    moved to the first channels, as many as the richest image needs, and the channels left over are masked out.

    Args:
        par: the refinement.
        images: (B, 3, H, W) RGB, in any unit. The references truncate to whole grey levels first.
        cams: (B, C, H, W) scores in 0..1; classes absent from the image are not looked at.
        labels: (B, C) of 0/1.
        high, low: the two background scores.
        down_scale: divisor of height and width.

    Returns:
        int64 (B, H, W): 0 background, 1..C class, 255 uncertain.

    Raises:
        ValueError: shapes that do not fit, or images smaller than `down_scale`.
    """
    check_labels(cams, labels, "refine_with_background")
    batch, _, height, width = cams.shape
    if images.shape != (batch, 3, height, width):
        raise ValueError(
            f"refine_with_background: images {tuple(images.shape)} must be {(batch, 3, height, width)}, as the cams "
            f"{tuple(cams.shape)}; resize the cams to the image first"
        )
    small = (height // down_scale, width // down_scale)
    if min(small) < 1:
        raise ValueError(f"refine_with_background: images of {height} x {width} cannot be reduced by {down_scale}")

    present = labels > 0.5
    slots = max(1, int(present.sum(1).max()))
    # A stable sort keeps the classes in order, so that ties go to the lower index as with all channels in place.
    channel = present.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
    used = F.pad(present.gather(1, channel), (1, 0), value=True)[:, :, None, None]
    classes = F.pad(channel + 1, (1, 0), value=0)

    kept = resize(cams.gather(1, channel[:, :, None, None].expand(-1, -1, height, width)), small)
    scores = [
        F.pad(kept, (0, 0, 0, 0, 1, 0), value=score).masked_fill(~used, -torch.inf).softmax(1) for score in (high, low)
    ]
    refined = resize(par(resize(images, small), torch.cat(scores, dim=1)), (height, width))
    # `max` gives the same index as `argmax`, several times faster over this dimension on a CPU.
    slot_high, slot_low = (part.masked_fill(~used, -torch.inf).max(1).indices for part in refined.chunk(2, dim=1))
    label = classes.gather(1, slot_high.flatten(1)).view(batch, height, width)
    return label.masked_fill((slot_high == 0) & (slot_low > 0), UNCERTAIN)


def dense_crf(
    image: np.ndarray | Tensor,
    probabilities: np.ndarray | Tensor,
    iterations: int = 10,
    gaussian: tuple[float, float] = (3, 1),
    bilateral: tuple[float, float, float] = (4, 67, 3),
) -> Tensor:
    """Posterior of a fully connected CRF (pydensecrf), with the unary -log of the probabilities clipped to 1e-5..1.

    The defaults are those of the released MoRe on VOC. Classes with the same probabilities everywhere, as those that a
    label map does not have, have the same posterior too, and are computed as one.

    Args:
        image: uint8 (H, W, 3) RGB.
        probabilities: (K, H, W) in 0..1, class 0 = background: a softmax over classes, or class maps with a background
            (`maps.add_background`); they need not sum to 1.
        iterations: mean-field iterations.
        gaussian: (weight, width in pixels) of the smoothness kernel.
        bilateral: (weight, width in pixels, width in grey levels) of the appearance kernel.

    Returns:
        float32 (K, H, W) on the CPU; its arg max is the label.

    Raises:
        ImportError: pydensecrf is not installed.
        ValueError: shapes or the image's type do not fit.
    """
    image = _array(image)
    probabilities = _array(probabilities).astype(np.float32)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"dense_crf: the image is {image.dtype} {image.shape}; expected uint8 (H, W, 3)")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"dense_crf: probabilities have shape {probabilities.shape}; expected (K, H, W) with the image's H and W, "
            f"{image.shape[:2]}"
        )
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "dense_crf needs pydensecrf. Install it with a C++ compiler and an older Cython:\n"
            "  CYTHON_FORCE_REGEN=1 pip install --build-constraint build-constraints.txt pydensecrf==1.0rc3"
        ) from error
    height, width = image.shape[:2]
    planes, count, plane_of = _distinct(probabilities)
    # n classes as one: it has n times the probability, and 1 / n of the compatibility with itself.
    crf = DenseCRF2D(width, height, len(planes))
    crf.setUnaryEnergy((-np.log(planes.clip(1e-5, 1)) - np.log(count)[:, None, None]).reshape(len(planes), -1))
    crf.addPairwiseGaussian(sxy=gaussian[1], compat=-gaussian[0] / count)
    crf.addPairwiseBilateral(sxy=bilateral[1], srgb=bilateral[2], rgbim=image, compat=-bilateral[0] / count)
    posterior = np.array(crf.inference(iterations)) / count[:, None]
    return torch.from_numpy(posterior[plane_of]).view(-1, height, width)


def _distinct(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Planes (K, ...) without repetitions, how often each occurs (float32), and which of them each plane is (K,)."""
    seen = {}
    plane_of = np.array([seen.setdefault(plane.tobytes(), len(seen)) for plane in planes])
    _, first, count = np.unique(plane_of, return_index=True, return_counts=True)
    return planes[first], count.astype(np.float32), plane_of


def label_probabilities(labels: np.ndarray | Tensor, num_labels: int, certainty: float = 0.7) -> Tensor:
    """Probabilities of a label map, for `dense_crf`: `certainty` for a pixel's label, the rest shared by all others.

    Args:
        labels: integers (H, W), 0..num_labels-1; 0 is a label as any other.
        num_labels: background included.
        certainty: above 0, below 1.

    Returns:
        float32 (num_labels, H, W), on the labels' device.

    Raises:
        ValueError: labels out of range, or a certainty out of range.
    """
    labels = torch.as_tensor(labels).long()
    if not 0 < certainty < 1:
        raise ValueError(f"label_probabilities: certainty is {certainty}; it must lie between 0 and 1")
    if labels.ndim != 2 or labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"label_probabilities: labels {tuple(labels.shape)} have values {labels.min().item()}.."
            f"{labels.max().item()}; expected (H, W) with 0..{num_labels - 1}"
        )
    rest = (1 - certainty) / (num_labels - 1)
    probabilities = torch.full((num_labels, *labels.shape), rest, device=labels.device)
    return probabilities.scatter_(0, labels[None], certainty)


class CRFJob(NamedTuple):
    """One image for `crf_labels`.

    Attributes:
        name: what an error calls it.
        image: uint8 (H, W, 3) RGB.
        scores: probabilities (K, H, W), or a label map of integers (H, W).
        classes: (K,) the label of each plane of probabilities; 0..K-1 if None.
    """

    name: str
    image: np.ndarray | Tensor
    scores: np.ndarray | Tensor
    classes: np.ndarray | Tensor | None = None


def crf_labels(
    jobs: Iterable[CRFJob],
    settings: Mapping[str, object],
    num_labels: int | None = None,
    workers: int | None = None,
    progress: bool = True,
    total: int | None = None,
) -> Iterator[Tensor]:
    """Label maps by `dense_crf` of many images, in their order, on all cores.

    Workers are processes: pydensecrf never lets go of Python's lock, so threads would take turns. Images stream: `jobs`
    is read in the calling thread, `IN_FLIGHT` images ahead for each worker.

    Args:
        jobs: the images; a generator will do.
        settings: arguments of `dense_crf`, such as `LABEL_CRF`.
        num_labels: the scores are label maps of that many labels, see `label_probabilities`; None: probabilities.
        workers: processes; None takes one for each core, 1 none but the calling one.
        progress: whether a progress bar is shown.
        total: number of images, for the bar, where `jobs` has no length.

    Yields:
        int64 (H, W) on the CPU.

    Raises:
        RuntimeError: an image failed; the message names it.
        ValueError: workers < 1.
    """
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"crf_labels: workers is {workers}; give at least 1")
    work = partial(_crf_label, settings=dict(settings), num_labels=num_labels)
    total = total or length_hint(jobs) or None
    results = map(work, jobs) if workers == 1 else _in_processes(work, jobs, workers)
    for label in tqdm(results, desc="CRF", unit="image", total=total, disable=not progress, leave=False):
        yield torch.from_numpy(label).long()


def _crf_label(job: CRFJob, settings: dict, num_labels: int | None) -> np.ndarray:
    try:
        scores = job.scores if num_labels is None else label_probabilities(job.scores, num_labels)
        label = dense_crf(job.image, scores, **settings).argmax(0).numpy()
        return label if job.classes is None else _array(job.classes)[label]
    except Exception as error:
        raise RuntimeError(f"crf_labels: {job.name}: {error}") from error


def _in_processes(work, jobs: Iterable[CRFJob], workers: int) -> Iterator[np.ndarray]:
    """Results of `work` in the order of the jobs."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit locks of torch's threads
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    pending = deque()
    try:
        for job in jobs:
            # Arrays are pickled as they are; tensors would pass through shared memory, one open file each.
            arrays = [None if value is None else _array(value) for value in job[1:]]
            pending.append((job.name, pool.submit(work, CRFJob(job.name, *arrays))))
            if len(pending) >= IN_FLIGHT * workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(name: str, future) -> np.ndarray:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"crf_labels: a worker died while {name} was waited for, perhaps for lack of memory; use fewer workers"
        ) from error


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    """Contiguous numpy array of a tensor on any device, or of an array."""
    return np.ascontiguousarray(values.detach().cpu() if isinstance(values, Tensor) else values)
