"""Between the networks of a multi-stage method: label maps that one network leaves and the next one learns from.

classifier -> seeds -> affinity network -> random walk -> pseudo masks -> second segmentation network. The second
network can also learn from the maps of any single-stage method. Label maps lie as one small PNG an image in the folder
of the run that learns from them; nothing else is written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from wsss.affinity import merge_crf_labels, pad_to_stride, pair_affinity, pool_for_walk, random_walk
from wsss.data import DataError, Sample
from wsss.data.transforms import normalise
from wsss.evaluation import (
    EvalConfig,
    Request,
    all_scores,
    batches_of_one_size,
    label_maps,
    stream_crf,
)
from wsss.files import write_atomic
from wsss.maps import predict, resize
from wsss.methods.affinity import AffinityNet
from wsss.methods.common import Method
from wsss.metrics import ConfusionMatrix, Scores
from wsss.refine import CRFJob


@dataclass
class Trained:
    """A trained network and how its scores are made."""

    method: Method
    config: EvalConfig

    @property
    def device(self) -> torch.device:
        return next(self.method.parameters()).device


# ---------------------------------------------------------------------------------------------------------- label maps

Labelled = Iterator[tuple[Sample, Tensor]]  # images with a label map, int64 (H, W), in their order


def affinity_labels(
    seeds: Trained, stage: Trained, batches: Iterable[list[Sample]], workers: int | None = 1
) -> Labelled:
    """What an affinity network learns from: the seeds of a classifier, labelled by a high and by a low background
    score, both smoothed by the CRF of `stage`, merged where they agree (TransCAM's code). 255 is uncertain.

    Args:
        seeds: the classifier.
        stage: the affinity network, which need not be trained.
        batches: images of one size each.
        workers: processes of the CRF; None takes all cores.
    """

    def seeded() -> Labelled:
        scores = stage.method.config.threshold_high, stage.method.config.threshold_low
        for samples in batches:
            maps, labels = given_maps(seeds, samples)
            for sample, *pair in zip(samples, *(predict(maps, labels, score) for score in scores)):
                yield from ((sample, mask) for mask in pair)

    for (sample, confident), (_, generous) in _in_pairs(_smoothed(stage, seeded(), workers)):
        yield sample, merge_crf_labels(confident, generous)


@torch.no_grad()
def walked_maps(affinity: Trained, seeds: Trained, samples: Sequence[Sample]) -> Tensor:
    """Seeds after the random walk along the affinities, with the background as channel 0: (B, C + 1, H, W)."""
    own, stride = affinity.method.config, affinity.method.backbone.stride
    maps, labels = given_maps(seeds, samples)
    images = torch.stack([normalise(sample.image) for sample in samples]).to(affinity.device)
    embedding = affinity.method.eval().embed(pad_to_stride(images, stride))
    planes = pool_for_walk((maps * labels[:, :, None, None]).to(images.device), own.background, stride)
    walked = random_walk(planes, pair_affinity(embedding, own.radius), own.radius, own.beta, own.doublings)
    height, width = images.shape[2:]
    return resize(walked, tuple(stride * n for n in walked.shape[2:]))[..., :height, :width].cpu()


def pseudo_masks(
    chain: Sequence[Trained], batches: Iterable[list[Sample]], crf: bool, workers: int | None = 1
) -> Labelled:
    """The label maps that a chain of networks ends in, with the image labels given.

    Args:
        chain: the last network first: an affinity network and the classifier whose seeds it spreads, or a method alone,
            whose `mask_map` is taken with its background score.
        batches: images of one size each.
        crf: refine them by the CRF of the first of the chain.
        workers: processes of the CRF on labels; None takes all cores.
    """
    last = chain[0]
    if isinstance(last.method, AffinityNet):
        walked = (pair for s in batches for pair in zip(s, walked_maps(last, chain[1], s).argmax(1)))
        yield from _smoothed(last, walked, workers) if crf else walked
        return
    request = Request("maps-given-labels", last.method.mask_map, crf)
    yield from label_maps(last.method, batches, request, last.config, last.device, workers)


def given_maps(seeds: Trained, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The `mask_map` of a classifier (B, C, H, W) at image size, on the CPU, and the image labels (B, C)."""
    name = seeds.method.mask_map
    if not name or name in seeds.method.probability_maps:
        raise ValueError(
            f"{type(seeds.method).__name__} has no class maps with a background score of our choice; affinity networks "
            "are trained from those of cam, more, seco and transcam"
        )
    maps = all_scores(seeds.method.eval(), samples, {name}, seeds.config, seeds.device)[name]
    return resize(maps, tuple(samples[0].image.shape[1:])).cpu(), torch.stack([sample.label for sample in samples])


def _smoothed(stage: Trained, labelled: Labelled, workers: int | None) -> Labelled:
    """Label maps after the CRF on labels, streamed."""
    jobs = ((sample, CRFJob(sample.name, sample.image.permute(1, 2, 0), mask)) for sample, mask in labelled)
    return stream_crf(jobs, stage.config.crf, stage.method.num_classes + 1, workers)


def _in_pairs(values: Iterator) -> Iterator[tuple]:
    return zip(values, values)


# -------------------------------------------------------------------------------------------------- files and scores


class Relabelled(Dataset[Sample]):
    """The first images of a dataset with label maps from a folder in place of their masks; see `load_dataset`."""

    def __init__(self, dataset: Dataset[Sample], folder: Path, images: int):
        self.dataset, self.folder = dataset, folder
        self.identity, self.split, self.classes = dataset.identity, dataset.split, dataset.classes
        self.labels, self.names = dataset.labels[:images], dataset.names[:images]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / f"{self.names[index]}.png"

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError where the label map is missing or is not as large as the image."""
        sample, path = self.dataset[index], self.path(index)
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if mask is None or mask.shape != tuple(sample.image.shape[1:]):
            size = tuple(sample.image.shape[1:])
            found = "is missing or unreadable" if mask is None else f"is {mask.shape}, the image {size}"
            raise DataError(f"{path}: this label map {found}; remove {self.folder} and start the run again", "size")
        return replace(sample, mask=torch.from_numpy(mask).long())


def relabel(
    dataset: Dataset[Sample],
    folder: Path,
    make: Callable[[Iterable[list[Sample]]], Labelled],
    images: int = 0,
    progress: bool = True,
) -> Relabelled:
    """Write the label maps that are not there yet, and return the dataset that has them.

    Args:
        make: images of one size each -> the same images with label maps.
        images: how many of the first images of `dataset`; 0 takes all.
    """
    total = min(images or len(dataset), len(dataset))
    relabelled = Relabelled(dataset, folder, total)
    missing = [index for index in range(total) if not relabelled.path(index).exists()]
    labelled = make(batches_of_one_size(dataset, missing))
    bar = tqdm(labelled, "label maps", len(missing), unit="image", disable=not progress, leave=False)
    for sample, mask in bar:
        _, png = cv2.imencode(".png", mask.numpy().astype(np.uint8))
        write_atomic(folder / f"{sample.name}.png", png.tobytes())
    return relabelled


def score_masks(
    chain: Sequence[Trained], dataset: Dataset[Sample], images: int | None = None, workers: int | None = 1
) -> dict[str, Scores]:
    """Scores of the pseudo masks after a random walk, with and without the CRF, on first images of a training split."""
    total = len(dataset) if images is None else min(images, len(dataset))
    matrices = {name: ConfusionMatrix(len(dataset.classes) + 1) for name in ("walk", "walk+crf")}

    def walked() -> Labelled:
        for sample, mask in pseudo_masks(chain, batches_of_one_size(dataset, range(total)), crf=False):
            matrices["walk"].update(mask, sample.mask)
            yield sample, mask

    for sample, mask in _smoothed(chain[0], walked(), workers):
        matrices["walk+crf"].update(mask, sample.mask)
    return {f"maps-given-labels/{name}": matrix.scores() for name, matrix in matrices.items()}
