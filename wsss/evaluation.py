"""The evaluation protocols, by name.

- `decoder`: arg max of the decoder's logits, fused over scales and mirror images. No labels are used.
- `maps-given-labels`: a class map, thresholded, filtered by the image-level ground truth. For seeds and pseudo masks of
  training images; on any other split it must be asked for explicitly, since labels are not known there.
- `maps-predicted-labels`: the same, filtered by the classes that the model itself predicts. No labels are used.
- `retrained`: as `decoder`, of a second network that was trained on the pseudo masks of a first one.

Maps that a method names in `probability_maps` have a background channel and are not thresholded: labels are merged into
the probabilities (`maps.merge_labels`), and the arg max over background and classes decides.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from wsss.data import Sample
from wsss.data.transforms import normalise, resize_for_evaluation, squash
from wsss.maps import (
    add_background,
    merge_labels,
    minmax,
    multi_scale,
    multi_scale_logits,
    multi_scale_mean,
    multi_scale_probabilities,
    multi_scale_sum,
    predict,
    resize,
)
from wsss.methods.common import Method, check_choice
from wsss.metrics import ConfusionMatrix, Scores, ThresholdSweep
from wsss.refine import CRFJob, crf_labels

PROTOCOLS = ("decoder", "maps-given-labels", "maps-predicted-labels", "retrained")
DECODER = "decoder"  # what a request names instead of a map
BATCH = 32
WAITING = 4 * BATCH


@dataclass(frozen=True)
class EvalConfig:
    """How images are fed and scores are made; the fields are part of every recipe.

    Attributes:
        eval_size: side that images are squashed to before the network; 0 keeps their own size.
        map_scales: scales of the class maps.
        decoder_scales: scales of the decoder's logits.
        eval_flip: whether mirror images are used.
        map_relu: names of maps whose negative values are cut off before scales are summed.
        threshold_cam, threshold_lam, threshold_fused, threshold_transcam: background score of each map; `cam_aux` uses
            the one of `cam`.
        crf_gaussian: (weight, width in pixels) of the CRF's smoothness kernel.
        crf_bilateral: (weight, width in pixels, width in grey levels) of its appearance kernel.
        train_images: how many training images seeds and pseudo masks are scored on; 0 takes all.
        decoder_crf: whether the decoder is also scored after a CRF.
        threshold_split: split on whose truth the background score of every map is chosen, with its image labels given;
            "" takes the recipe's scores. It must not be a training split, on which seeds are scored.
        map_fusion: "max" (see `multi_scale`) or "sum" (see `multi_scale_sum`).
        decoder_fusion: "max" (see `multi_scale_logits`) or "mean" (see `multi_scale_mean`).
        crf_iterations: mean-field iterations of the CRF.
        extra_scores: scores beside those that every run has, named as records name them: "<split>/<protocol>/<map>",
            for example "test/maps-given-labels/cam+crf". To name it is to ask for it: labels may be given on any split.

    Recipes may leave out the last five and `threshold_transcam`.
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
    threshold_transcam: float = field(default=0.5, metadata={"optional": True})
    threshold_split: str = field(default="", metadata={"optional": True})
    map_fusion: str = field(default="max", metadata={"optional": True})
    decoder_fusion: str = field(default="max", metadata={"optional": True})
    crf_iterations: int = field(default=10, metadata={"optional": True})
    extra_scores: tuple[str, ...] = field(default=(), metadata={"optional": True})

    def __post_init__(self):
        check_choice("recipe field map_fusion", self.map_fusion, ("max", "sum"))
        check_choice("recipe field decoder_fusion", self.decoder_fusion, ("max", "mean"))
        if self.threshold_split.startswith("train"):
            raise ValueError(
                f"recipe field threshold_split = {self.threshold_split!r}: seeds are scored there, so their background "
                'score must come from elsewhere; give "val", or "" for the scores of the recipe'
            )
        if self.map_fusion == "sum" and not self.eval_size:
            raise ValueError(
                'recipe field eval_size = 0: with map_fusion = "sum" images are squashed, so it needs a side'
            )

    @property
    def crf(self) -> dict[str, object]:
        """Arguments of `refine.dense_crf`."""
        return {"iterations": self.crf_iterations, "gaussian": self.crf_gaussian, "bilateral": self.crf_bilateral}

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
        if (self.protocol in ("decoder", "retrained")) != (self.map == DECODER):
            raise ValueError(f"protocol {self.protocol!r} cannot score the map {self.map!r}")
        if self.threshold is not None and (self.crf or self.map == DECODER):
            raise ValueError(f"{self.key}: only a map without a CRF has a threshold; leave `threshold` out")

    @property
    def key(self) -> str:
        """Name of the score within a split: protocol/map[+crf][@threshold]."""
        swept = "" if self.threshold is None else f"@{self.threshold:g}"
        return f"{self.protocol}/{self.map}{'+crf' if self.crf else ''}{swept}"

    @classmethod
    def read(cls, name: str) -> tuple[str, "Request"]:
        """Split and request of a score's full name "<split>/<protocol>/<map>[+crf]".

        Raises:
            ValueError: it is not of this form, or there is no such protocol.
        """
        parts = name.split("/")
        if len(parts) != 3:
            form = "<split>/<protocol>/<map>, with +crf or without"
            raise ValueError(f"recipe field extra_scores: {name!r} is not {form}")
        split, protocol, map_name = parts
        return split, cls(protocol, map_name.removesuffix("+crf"), map_name.endswith("+crf"))


@torch.no_grad()
def evaluate(
    method: Method,
    dataset: Dataset[Sample],
    requests: Iterable[Request],
    config: EvalConfig,
    device: str | torch.device = "cpu",
    images: int | None = None,
    labels_on_held_out: bool = False,
    progress: bool = True,
    sweeps: Mapping[str, ThresholdSweep] | None = None,
    crf_workers: int | None = 1,
) -> dict[str, Scores]:
    """Score `method` on (the first `images` images of) a split under several protocols, sharing the forward passes.

    Args:
        labels_on_held_out: allow `maps-given-labels` on a split that is not a training split.
        sweeps: name of a map -> what gathers its mIoU over all thresholds, with the image labels given.
        crf_workers: processes of the CRF, which run beside the network; None takes all cores.

    Returns:
        `Request.key` -> `Scores`. Pixels marked 255 in the truth are left out.

    Raises:
        ValueError: a split without masks, labels given on a held-out split, a decoder that the method does not have, or
            a threshold for a map that needs none.
    """
    requests, sweeps = list(requests), sweeps or {}
    _check(dataset, requests, sweeps, labels_on_held_out)
    _check_thresholds(method, requests)
    method.to(device).eval()
    matrices = {request.key: ConfusionMatrix(len(dataset.classes) + 1) for request in requests}
    names = {request.map for request in requests} | set(sweeps)
    total = len(dataset) if images is None else min(images, len(dataset))
    bar = tqdm(total=total, desc=f"evaluating {dataset.split}", unit="image", disable=not progress, leave=False)

    def crf_jobs() -> Iterator[tuple[tuple[str, Sample], CRFJob]]:
        """Do all that needs no CRF, and hand on what needs one."""
        for samples in batches_of_one_size(dataset, range(total)):
            scores = all_scores(method, samples, names, config, device)
            for request in requests:
                if request.crf:
                    jobs = crf_inputs(request, scores, samples)
                    yield from (((request.key, sample), job) for sample, job in zip(samples, jobs))
                    continue
                for prediction, sample in zip(predict_masks(request, scores, samples, config), samples):
                    matrices[request.key].update(prediction, sample.mask)
            for name, sweep in sweeps.items():
                labels, truth = torch.stack([s.label for s in samples]), torch.stack([s.mask for s in samples])
                sweep.update(resize(scores[name].float().cpu(), tuple(truth.shape[1:])), labels, truth)
            bar.update(len(samples))

    for (key, sample), prediction in stream_crf(crf_jobs(), config.crf, workers=crf_workers):
        matrices[key].update(prediction, sample.mask)
    bar.close()
    return {key: matrix.scores() for key, matrix in matrices.items()}


def _check(dataset: Dataset, requests: list[Request], sweeps: Mapping, labels_on_held_out: bool) -> None:
    if not requests and not sweeps:
        raise ValueError("evaluate: no requests")
    if dataset[0].mask is None:
        raise ValueError(f"{dataset.identity}: the split {dataset.split!r} has no masks and cannot be scored here")
    given = bool(sweeps) or any(request.protocol == "maps-given-labels" for request in requests)
    if given and not dataset.split.startswith("train") and not labels_on_held_out:
        raise ValueError(
            f"maps-given-labels on the split {dataset.split!r} would use its image-level ground truth at test time; "
            "use maps-predicted-labels, or pass labels_on_held_out=True and say so beside the number"
        )


def _check_thresholds(method: Method, requests: list[Request]) -> None:
    for request in requests:
        if request.threshold is not None and request.map in method.probability_maps:
            raise ValueError(
                f"{request.key}: the map {request.map!r} has a background channel, whose score no threshold replaces; "
                "leave `threshold` out"
            )


def batches_of_one_size(dataset: Dataset[Sample], indices: Iterable[int]) -> Iterator[list[Sample]]:
    """The images `indices`, each once, in batches of one size: as many as `BATCH`, or fewer of a size that is rare.

    At most `WAITING` images wait for others of their size, so the order is only roughly kept where sizes differ.
    """
    waiting: dict[tuple[int, ...], list[Sample]] = {}
    for index in indices:
        sample = dataset[index]
        batch = waiting.setdefault(tuple(sample.image.shape), [])
        batch.append(sample)
        if len(batch) == BATCH:
            yield waiting.pop(tuple(sample.image.shape))
        elif sum(map(len, waiting.values())) == WAITING:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def all_scores(
    method: Method,
    samples: Sequence[Sample],
    names: Iterable[str],
    config: EvalConfig,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Scores of images of one size, from as few forward passes as will do.

    Args:
        names: maps of the method, and "decoder" for the logits of its decoder.

    Returns:
        "decoder" (B, C + 1, H, W), at the size of the images, where the released codes fuse scales; maps (B, C, h, w)
        normalised to 0..1 and, of `probability_maps`, (B, C + 1, h, w); with any map also "labels" (B, C) of 0/1, the
        classes that the network predicts.

    Raises:
        ValueError: a decoder that the method does not have.
    """
    names, scores = set(names), {}
    size = tuple(samples[0].image.shape[1:])
    inputs = torch.stack([resize_for_evaluation(s.image, config.eval_size or None) for s in samples]).to(device)
    if DECODER in names:

        def segment(images: Tensor) -> Tensor:
            logits = method.segment(whole_patches(images, method.patch_size))
            if logits is None:
                raise ValueError(f"{type(method).__name__} has no decoder: the protocol `decoder` does not apply")
            return logits

        fuse = multi_scale_logits if config.decoder_fusion == "max" else multi_scale_mean
        scores[DECODER] = fuse(segment, inputs, config.decoder_scales, size, config.eval_flip)
    wanted = (names - {DECODER, "fused"}) | ({"cam", "lam"} if "fused" in names else set())
    if wanted:
        present = {}

        def forward(images: Tensor) -> dict[str, Tensor]:
            maps = method.maps(whole_patches(images, method.patch_size))
            if images.shape[-2:] == inputs.shape[-2:]:
                present["labels"] = (maps["class_logits"][: len(inputs), :, 0, 0] > 0).float()
            return maps

        probabilities = sorted(wanted & set(method.probability_maps))
        plain = sorted(wanted - set(probabilities))
        if plain and config.map_fusion == "sum":
            sides = [round(config.eval_size * scale) for scale in config.map_scales]
            squashed = [torch.stack([normalise(squash(s.image, side)) for s in samples]).to(device) for side in sides]
            scores |= multi_scale_sum(forward, squashed, plain, size, config.eval_flip)
        elif plain:
            relu = {name: name in config.map_relu for name in plain}
            scores |= multi_scale(forward, inputs, config.map_scales, relu, config.eval_flip)
        if probabilities:
            scores |= multi_scale_probabilities(forward, inputs, config.map_scales, probabilities, config.eval_flip)
        if not present:
            forward(inputs)
        scores["labels"] = present["labels"]
    if "fused" in names:
        scores["fused"] = minmax(scores["cam"] * scores["lam"])
    return scores


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) resized to the nearest whole number of patches, at least one each way.

    Images at their own size, and their scaled copies, need not be cut into patches without a rest, which vision
    transformers ask for. Scores are resized in the end, so nothing is lost; a side changes by half a patch at most.
    """
    size = tuple(max(1, round(side / patch)) * patch for side in images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def predict_masks(
    request: Request, scores: Mapping[str, Tensor], samples: Sequence[Sample], config: EvalConfig
) -> list[Tensor]:
    """Label maps int64 (H, W) of images at their own size, without a CRF, from what `all_scores` gave for them."""
    maps, labels, probable = _maps_and_labels(request, scores, samples)
    threshold = request.threshold
    if threshold is None and request.map != DECODER and not probable:
        threshold = config.threshold(request.map)
    predictions = []
    for index, sample in enumerate(samples):
        own = resize(maps[index : index + 1], tuple(sample.image.shape[1:]))
        arg_max = request.map == DECODER or probable
        label_map = own[0].argmax(0) if arg_max else predict(own, labels[index : index + 1], threshold)[0]
        predictions.append(label_map.cpu())
    return predictions


@torch.no_grad()
def label_maps(
    method: Method,
    batches: Iterable[list[Sample]],
    request: Request,
    config: EvalConfig,
    device: str | torch.device = "cpu",
    crf_workers: int | None = 1,
) -> Iterator[tuple[Sample, Tensor]]:
    """The images of `batches`, each of one size, with the label maps int64 (H, W) that a request asks for, streamed."""
    method.eval()
    scored = ((samples, all_scores(method, samples, {request.map}, config, device)) for samples in batches)
    if request.crf:
        jobs = (pair for samples, scores in scored for pair in zip(samples, crf_inputs(request, scores, samples)))
        yield from stream_crf(jobs, config.crf, workers=crf_workers)
    else:
        for samples, scores in scored:
            yield from zip(samples, predict_masks(request, scores, samples, config))


def crf_inputs(request: Request, scores: Mapping[str, Tensor], samples: Sequence[Sample]) -> list[CRFJob]:
    """What the CRF of a request is given.

    It sees only the classes that may appear: it is faster, and absent ones are no rivals.
    """
    maps, labels, probable = _maps_and_labels(request, scores, samples)
    jobs = []
    for index, sample in enumerate(samples):
        own = resize(maps[index : index + 1], tuple(sample.image.shape[1:]))
        if request.map == DECODER:
            classes, probabilities = torch.arange(own.shape[1]), own[0].softmax(0)
        else:
            kept = labels[index].nonzero()[:, 0]
            classes = torch.cat([kept.new_zeros(1), kept + 1])
            if probable:
                probabilities = own[0, classes]
            else:
                probabilities = add_background(own[0, kept]) if len(kept) else own.new_ones(1, *own.shape[-2:])
        jobs.append(CRFJob(sample.name, sample.image.permute(1, 2, 0), probabilities.cpu(), classes.cpu()))
    return jobs


def _maps_and_labels(
    request: Request, scores: Mapping[str, Tensor], samples: Sequence[Sample]
) -> tuple[Tensor, Tensor | None, bool]:
    """The scores that a request reads, the image labels that it may use, and whether its map has a background."""
    maps = scores[request.map].float()
    if request.protocol == "maps-given-labels":
        labels = torch.stack([sample.label for sample in samples]).to(maps.device)
    else:
        labels = scores.get("labels")
    probable = request.map != DECODER and maps.shape[1] == labels.shape[1] + 1
    return merge_labels(maps, labels) if probable else maps, labels, probable


def stream_crf(
    jobs: Iterable[tuple[object, CRFJob]], settings: Mapping, num_labels: int | None = None, workers: int | None = 1
) -> Iterator[tuple[object, Tensor]]:
    """`crf_labels` of jobs that carry a tag: (tag, label map) in their order, while `jobs` is being read."""
    tags = deque()

    def untagged() -> Iterator[CRFJob]:
        for tag, job in jobs:
            tags.append(tag)
            yield job

    for label in crf_labels(untagged(), settings, num_labels, workers, progress=False):
        yield tags.popleft(), label
