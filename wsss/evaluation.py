"""The evaluation protocols, by name.

- `decoder`: arg max of the decoder's logits, fused over scales and mirror images. No labels are used.
- `maps-given-labels`: a class map, thresholded, filtered by the image-level ground truth. For seeds and pseudo masks of
  training images; on any other split it must be asked for explicitly, since labels are not known there.
- `maps-predicted-labels`: the same, filtered by the classes that the model itself predicts. No labels are used.

Maps that a method names in `probability_maps` have a background channel and are not thresholded: labels are merged into
the probabilities (`maps.merge_labels`), and the arg max over background and classes decides.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from wsss.data import Sample
from wsss.data.transforms import resize_for_evaluation
from wsss.maps import (
    add_background,
    merge_labels,
    minmax,
    multi_scale,
    multi_scale_logits,
    multi_scale_probabilities,
    predict,
    resize,
)
from wsss.metrics import ConfusionMatrix, Scores
from wsss.refine import dense_crf

PROTOCOLS = ("decoder", "maps-given-labels", "maps-predicted-labels")
BATCH = 32


@dataclass(frozen=True)
class EvalConfig:
    """How images are fed and scores are made; the fields are part of every recipe.

    Attributes:
        eval_size: side that images are squashed to before the network; 0 keeps their own size.
        map_scales: scales of the class maps.
        decoder_scales: scales of the decoder's logits.
        eval_flip: whether mirror images are used.
        map_relu: names of maps whose negative values are cut off before scales are summed.
        threshold_cam, threshold_lam, threshold_fused: background score of each map; `cam_aux` uses the one of `cam`.
        crf_gaussian: (weight, width in pixels) of the CRF's smoothness kernel.
        crf_bilateral: (weight, width in pixels, width in grey levels) of its appearance kernel.
        train_images: how many training images seeds and pseudo masks are scored on; 0 takes all.
        decoder_crf: whether the decoder is also scored after a CRF.
    """

    eval_size: int
    map_scales: tuple[float, ...]
    decoder_scales: tuple[float, ...]
    eval_flip: bool
    map_relu: tuple[str, ...]
    threshold_cam: float
    threshold_lam: float
    threshold_fused: float
    crf_gaussian: tuple[float, float]
    crf_bilateral: tuple[float, float, float]
    train_images: int
    decoder_crf: bool

    def threshold(self, name: str) -> float:
        """Background score of the map `name`."""
        return getattr(self, f"threshold_{name.removesuffix('_aux')}")


@dataclass(frozen=True)
class Request:
    """One score: a protocol, the map it reads ("decoder" for the decoder), with a CRF or without.

    `threshold` replaces the recipe's background score, for sweeps; the decoder, a CRF and probabilities have none.
    """

    protocol: str
    map: str = "decoder"
    crf: bool = False
    threshold: float | None = None

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if (self.protocol == "decoder") != (self.map == "decoder"):
            raise ValueError(f"protocol {self.protocol!r} cannot score the map {self.map!r}")
        if self.threshold is not None and (self.crf or self.map == "decoder"):
            raise ValueError(f"{self.key}: only a map without a CRF has a threshold; leave `threshold` out")

    @property
    def key(self) -> str:
        """Name of the score within a split: protocol/map[+crf][@threshold]."""
        swept = "" if self.threshold is None else f"@{self.threshold:g}"
        return f"{self.protocol}/{self.map}{'+crf' if self.crf else ''}{swept}"


@torch.no_grad()
def evaluate(
    method: nn.Module,
    dataset: Dataset[Sample],
    requests: Iterable[Request],
    config: EvalConfig,
    device: str | torch.device = "cpu",
    images: int | None = None,
    labels_on_held_out: bool = False,
    progress: bool = True,
) -> dict[str, Scores]:
    """Score `method` on (the first `images` images of) a split under several protocols, sharing the forward passes.

    Args:
        labels_on_held_out: allow `maps-given-labels` on a split that is not a training split.

    Returns:
        `Request.key` -> `Scores`. Pixels marked 255 in the truth are left out.

    Raises:
        ValueError: a split without masks, labels given on a held-out split, a decoder that the method does not have, or
            a threshold for a map that needs none.
    """
    requests = list(requests)
    _check(dataset, requests, labels_on_held_out)
    _check_thresholds(method, requests)
    method.to(device).eval()
    matrices = {request.key: ConfusionMatrix(len(dataset.classes) + 1) for request in requests}
    total = len(dataset) if images is None else min(images, len(dataset))
    bar = tqdm(total=total, desc=f"evaluating {dataset.split}", unit="image", disable=not progress, leave=False)
    for samples in _batches(dataset, total):
        inputs = torch.stack([resize_for_evaluation(s.image, config.eval_size or None) for s in samples]).to(device)
        scores = _scores(method, inputs, tuple(samples[0].mask.shape), requests, config)
        for request in requests:
            predictions = _predictions(request, scores, samples, config)
            for prediction, sample in zip(predictions, samples):
                matrices[request.key].update(prediction, sample.mask)
        bar.update(len(samples))
    bar.close()
    return {key: matrix.scores() for key, matrix in matrices.items()}


def _check(dataset: Dataset, requests: list[Request], labels_on_held_out: bool) -> None:
    if not requests:
        raise ValueError("evaluate: no requests")
    if dataset[0].mask is None:
        raise ValueError(f"{dataset.identity}: the split {dataset.split!r} has no masks and cannot be scored here")
    given = any(request.protocol == "maps-given-labels" for request in requests)
    if given and not dataset.split.startswith("train") and not labels_on_held_out:
        raise ValueError(
            f"maps-given-labels on the split {dataset.split!r} would use its image-level ground truth at test time; "
            "use maps-predicted-labels, or pass labels_on_held_out=True and say so beside the number"
        )


def _probability_maps(method: nn.Module) -> tuple[str, ...]:
    return getattr(method, "probability_maps", ())


def _check_thresholds(method: nn.Module, requests: list[Request]) -> None:
    for request in requests:
        if request.threshold is not None and request.map in _probability_maps(method):
            raise ValueError(
                f"{request.key}: the map {request.map!r} has a background channel, whose score no threshold replaces; "
                "leave `threshold` out"
            )


def _batches(dataset: Dataset[Sample], total: int) -> Iterator[list[Sample]]:
    """Runs of consecutive images that fit into one batch: of one size, at most `BATCH` of them."""
    samples = (dataset[index] for index in range(total))
    for _, run in groupby(samples, key=lambda s: s.image.shape):
        while batch := list(islice(run, BATCH)):
            yield batch


def _scores(
    method: nn.Module, inputs: Tensor, size: tuple[int, int], requests: list[Request], config: EvalConfig
) -> dict[str, Tensor]:
    """Everything the requests need: decoder logits at the `size` of the truth, where the released code fuses scales;
    normalised maps at input size, or probabilities at patch size; predicted image labels (B, C).
    """
    names = {request.map for request in requests}
    scores = {}
    if "decoder" in names:

        def segment(images: Tensor) -> Tensor:
            logits = method.segment(images)
            if logits is None:
                raise ValueError(f"{type(method).__name__} has no decoder: the protocol `decoder` does not apply")
            return logits

        scores["decoder"] = multi_scale_logits(segment, inputs, config.decoder_scales, size, config.eval_flip)
    wanted = (names - {"decoder", "fused"}) | ({"cam", "lam"} if "fused" in names else set())
    if wanted:
        present = {}

        def forward(images: Tensor) -> dict[str, Tensor]:
            maps = method.maps(images)
            if images.shape[-2:] == inputs.shape[-2:]:
                present["labels"] = (maps["class_logits"][: len(inputs), :, 0, 0] > 0).float()
            return maps

        probabilities = sorted(wanted & set(_probability_maps(method)))
        relu = {name: name in config.map_relu for name in sorted(wanted - set(probabilities))}
        if relu:
            scores |= multi_scale(forward, inputs, config.map_scales, relu, config.eval_flip)
        if probabilities:
            scores |= multi_scale_probabilities(forward, inputs, config.map_scales, probabilities, config.eval_flip)
        if not present:
            forward(inputs)
        scores["labels"] = present["labels"]
    if "fused" in names:
        scores["fused"] = minmax(scores["cam"] * scores["lam"])
    return scores


def _predictions(request: Request, scores: dict[str, Tensor], samples: list[Sample], config: EvalConfig) -> list[Tensor]:
    """Label maps (H, W) of a batch at the size of the truth."""
    maps = scores[request.map].float()
    if request.protocol == "maps-given-labels":
        labels = torch.stack([sample.label for sample in samples]).to(maps.device)
    else:
        labels = scores.get("labels")
    probable = request.map != "decoder" and maps.shape[1] == labels.shape[1] + 1  # with a background channel
    if probable:
        maps = merge_labels(maps, labels)
    threshold = request.threshold
    if threshold is None and request.map != "decoder" and not probable:
        threshold = config.threshold(request.map)
    predictions = []
    for index, sample in enumerate(samples):
        own = resize(maps[index : index + 1], tuple(sample.mask.shape))
        if request.map == "decoder":
            classes = torch.arange(own.shape[1])
            probabilities, plain = own[0].softmax(0), own[0].argmax(0)
        else:
            # The CRF sees only the classes that may appear: it is faster, and absent ones are no rivals.
            kept = labels[index].nonzero()[:, 0]
            classes = torch.cat([kept.new_zeros(1), kept + 1])
            if probable:
                probabilities, plain = own[0, classes], own[0].argmax(0)
            else:
                probabilities = add_background(own[0, kept]) if len(kept) else own.new_ones(1, *own.shape[-2:])
                plain = predict(own, labels[index : index + 1], threshold)[0]
        if request.crf:
            image = sample.image.permute(1, 2, 0)
            refined = dense_crf(image, probabilities, gaussian=config.crf_gaussian, bilateral=config.crf_bilateral)
            plain = classes.cpu()[refined.argmax(0)]
        predictions.append(plain.cpu())
    return predictions
