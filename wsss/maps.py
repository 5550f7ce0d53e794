"""From raw class maps to labels: similarity maps, multi-scale fusion, normalisation, thresholds.

Maps have the shape (B, C, h, w) with one channel per foreground class; labels (B, C) hold 0/1. Label maps are int64
(B, h, w): 0 background, 1..C class (channel index + 1), 255 uncertain.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UNCERTAIN = 255


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of maps (B, C, h, w) to `size` (H, W), without aligned corners."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def minmax(maps: Tensor) -> Tensor:
    """Scale every map to 0..1: (x - min) / (max - min + 1e-5) over the pixels of each image and class.

    Args:
        maps: (B, C, h, w), any real values.

    Returns:
        (B, C, h, w) in [0, 1); a constant map becomes 0.
    """
    _check_maps(maps, "minmax")
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (maps.amax((-2, -1), keepdim=True) + 1e-5)


def minmax_transcam(maps: Tensor) -> Tensor:
    """Scale every map to 0..1 as TransCAM's code does: (x - min - 1e-5) / (max - min + 1e-5), 0 for values next to min.

    So the largest value stays just below 1. Where a map is 0 at its least, the least becomes -1e-5 / max; where it is
    positive everywhere, the pixels next to its minimum fall to about -min / (max - min), far below 0.

    Args:
        maps: (B, C, h, w), without negative values.

    Returns:
        (B, C, h, w), below 1. A constant map becomes negative.
    """
    _check_maps(maps, "minmax_transcam")
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps.masked_fill(maps < low + 1e-5, 0) - low - 1e-5) / (high - low + 1e-5)


def token_similarity(features: Tensor, tokens: Tensor, kind: str) -> Tensor:
    """Similarity of every patch to every class token (the localised attention map, LAM, of MoRe).

    Args:
        features: (B, D, h, w) patch tokens as a map.
        tokens: (B, C, D) class tokens.
        kind: "cosine" (as MoRe's text has it) or "dot" (the inner product, as its released code has it).

    Returns:
        (B, C, h, w), not normalised: see `minmax`.

    Raises:
        ValueError: shapes that do not fit, or an unknown kind.
    """
    if features.ndim != 4 or tokens.ndim != 3 or (features.shape[0], features.shape[1]) != tokens.shape[::2]:
        raise ValueError(
            f"token_similarity: features {tuple(features.shape)} must be (B, D, h, w), tokens {tuple(tokens.shape)} "
            "(B, C, D) with the same B and D"
        )
    if kind == "cosine":
        features, tokens = F.normalize(features, dim=1), F.normalize(tokens, dim=2)
    elif kind != "dot":
        raise ValueError(f'token_similarity: kind is "{kind}"; choose "cosine" or "dot"')
    return torch.einsum("bdhw,bcd->bchw", features, tokens)


@torch.no_grad()
def multi_scale(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,
    scales: Sequence[float],
    relu: Mapping[str, bool],
    flip: bool = True,
) -> dict[str, Tensor]:
    """Maps fused over image scales and mirror images, without gradient.

    Each scale takes one forward pass, of the images together with their mirror images. The maps are resized to the
    images' size, an image and its un-mirrored mirror image are merged by the elementwise maximum, negative values are
    cut off where asked, and the sum over scales is normalised by `minmax`.

    Args:
        forward: (2B, 3, h, w) images -> maps by name, each (2B, C, h', w'); h = int(scale * H), w = int(scale * W).
        images: (B, 3, H, W) normalised images.
        scales: factors of the image size, in any order.
        relu: the maps wanted, by name, and whether their negative values are cut off: {"cam": True, "lam": False}.
            Everything else that `forward` returns is left out.
        flip: whether mirror images are used.

    Returns:
        {name: (B, C, H, W) in [0, 1)}.

    Raises:
        ValueError: images of another shape, no scales, or a map that `forward` does not return.
    """
    size = _check_images(images, "multi_scale")
    total: dict[str, Tensor] = {}
    for inputs in _scaled_inputs(images, scales, flip):
        for name, own in _wanted(forward(inputs), relu, "multi_scale"):
            pair = resize(own, size)
            merged = torch.maximum(*_unmirrored(pair)) if flip else pair
            merged = merged.relu() if relu[name] else merged
            total[name] = total[name] + merged if name in total else merged
    return {name: minmax(maps) for name, maps in total.items()}


@torch.no_grad()
def multi_scale_sum(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    size: tuple[int, int],
    flip: bool = True,
) -> dict[str, Tensor]:
    """Maps summed over image scales and mirror images, without gradient (TransCAM).

    Unlike in `multi_scale`, negative values cancel positive ones of another scale; they are cut off after the sum,
    which is then normalised by `minmax_transcam`.

    Args:
        forward: (2B, 3, h, w) images -> maps by name, each (2B, C, h', w'); one call for each of `inputs`.
        inputs: the normalised images (B, 3, h, w) at every scale.
        names: the maps wanted.
        size: (H, W) of the result, usually that of the original image.
        flip: whether mirror images are used.

    Returns:
        {name: (B, C, H, W)}, below 1.

    Raises:
        ValueError: images of another shape, no scales, or a map that `forward` does not return.
    """
    total: dict[str, Tensor] = {}
    for images in inputs:
        _check_images(images, "multi_scale_sum")
        maps = forward(torch.cat([images, images.flip(-1)]) if flip else images)
        for name, own in _wanted(maps, names, "multi_scale_sum"):
            own = resize(own, size)
            own = torch.add(*_unmirrored(own)) if flip else own
            total[name] = total[name] + own if name in total else own
    if not total:
        raise ValueError("multi_scale_sum: no inputs; give the images at one scale or more")
    return {name: minmax_transcam(maps.relu()) for name, maps in total.items()}


@torch.no_grad()
def multi_scale_logits(
    segment: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float],
    size: tuple[int, int],
    flip: bool = True,
) -> Tensor:
    """Decoder logits fused over image scales and mirror images, without gradient (released MoRe and SeCo).

    At every scale the logits of an image and the un-mirrored ones of its mirror image are resized to `size` and added;
    of the scales, the elementwise maximum is taken.

    Args:
        segment: (2B, 3, h, w) images -> logits (2B, C + 1, h', w'); one call per scale.
        images: (B, 3, H, W) normalised images.
        scales: factors of the image size, in any order.
        size: (H', W') of the result, usually that of the truth.
        flip: whether mirror images are used.

    Returns:
        (B, C + 1, H', W') logits.

    Raises:
        ValueError: images of another shape, or no scales.
    """
    _check_images(images, "multi_scale_logits")
    fused = None
    for inputs in _scaled_inputs(images, scales, flip):
        logits = resize(segment(inputs), size)
        logits = torch.add(*_unmirrored(logits)) if flip else logits
        fused = logits if fused is None else torch.maximum(fused, logits)
    return fused


@torch.no_grad()
def multi_scale_mean(
    segment: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float],
    size: tuple[int, int],
    flip: bool = True,
) -> Tensor:
    """Segmentation logits, averaged over image scales and mirror images, without gradient (DeepLab in TransCAM).

    Images are rescaled with bicubic interpolation; logits are resized bilinearly with aligned corners.

    Args:
        segment: (2B, 3, h, w) images -> logits (2B, C + 1, h', w'); one call per scale.
        images: (B, 3, H, W) normalised images.
        scales: factors of the image size.
        size: (H', W') of the result, usually that of the truth.
        flip: whether mirror images are used.

    Returns:
        (B, C + 1, H', W') logits.

    Raises:
        ValueError: images of another shape, or no scales.
    """
    _check_images(images, "multi_scale_mean")
    total = 0
    for inputs in _scaled_inputs(images, scales, flip, mode="bicubic"):
        logits = F.interpolate(segment(inputs), size=tuple(size), mode="bilinear", align_corners=True)
        total = total + (torch.add(*_unmirrored(logits)) / 2 if flip else logits)
    return total / len(scales)


@torch.no_grad()
def multi_scale_probabilities(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,
    scales: Sequence[float],
    names: Sequence[str],
    flip: bool = True,
) -> dict[str, Tensor]:
    """Class probabilities of patches, averaged over image scales and mirror images, without gradient.

    Nothing is normalised: the channels of a pixel still sum to 1 where those of `forward` do.

    Args:
        forward: (2B, 3, h, w) images -> maps by name, each (2B, C + 1, h', w'); one call per scale.
        images: (B, 3, H, W) normalised images.
        scales: factors of the image size; the others are resized to the patch grid of the first.
        names: the maps wanted.
        flip: whether mirror images are used.

    Returns:
        {name: (B, C + 1, h', w')}, on the patch grid of the first scale.

    Raises:
        ValueError: images of another shape, no scales, or a map that `forward` does not return.
    """
    _check_images(images, "multi_scale_probabilities")
    total: dict[str, Tensor] = {}
    for inputs in _scaled_inputs(images, scales, flip):
        for name, own in _wanted(forward(inputs), names, "multi_scale_probabilities"):
            own = torch.add(*_unmirrored(own)) / 2 if flip else own
            total[name] = total[name] + resize(own, total[name].shape[-2:]) if name in total else own
    return {name: maps / len(scales) for name, maps in total.items()}


def three_way(cam: Tensor, labels: Tensor, high: float, low: float, strict: bool = False) -> Tensor:
    """Label map with background, classes and an uncertain band between them.

    With v the largest score among an image's classes and k its class: k above the band, 0 below it, 255 inside. The
    two variants differ only in where a score exactly at a threshold belongs.

    Args:
        cam: (B, C, h, w) scores in 0..1.
        labels: (B, C) of 0/1.
        high, low: thresholds.
        strict: True: k if v > high, 0 if v < low (MoRe eq. 6). False: k if v > high, 0 if v <= low (released MoRe,
            SeCo and ToCo).

    Returns:
        int64 (B, h, w).

    Raises:
        ValueError: shapes that do not fit, or low > high.
    """
    if low > high:
        raise ValueError(f"three_way: low = {low} must not be above high = {high}")
    score, index = strongest_class(cam, labels, "three_way")
    background = score < low if strict else score <= low
    return index.masked_fill(score <= high, UNCERTAIN).masked_fill(background, 0)


def predict(maps: Tensor, labels: Tensor, threshold: float, strict: bool = True) -> Tensor:
    """Label map without an uncertain band: the strongest class where its score is above `threshold`, else background.

    Args:
        maps: (B, C, H, W) scores in 0..1.
        labels: (B, C) of 0/1, the image-level labels (given or predicted) that the map may use.
        threshold: the background's score.
        strict: whether a score exactly at the threshold is background (released codes) or a class (BNR's text).

    Returns:
        int64 (B, H, W) in 0..C.

    Raises:
        ValueError: shapes that do not fit.
    """
    score, index = strongest_class(maps, labels, "predict")
    return index.masked_fill(score <= threshold if strict else score < threshold, 0)


def merge_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Merge image-level labels into class probabilities (ViT-PCM's inference, APC's pseudo masks).

    Absent classes are set to 0, each class is divided by its largest value in the image, and the classes of a pixel are
    scaled to the sum 1 again (0 / 0 is 0). The background is always present.

    Args:
        probabilities: (B, C + 1, h, w), channel 0 = background.
        labels: (B, C) of 0/1.

    Returns:
        (B, C + 1, h, w) in 0..1.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_labels(probabilities[:, 1:], labels, "merge_labels")
    present = F.pad(labels, (1, 0), value=1.0)[:, :, None, None]
    merged = _ratio(probabilities * present, probabilities.amax((-2, -1), keepdim=True))
    return _ratio(merged, merged.sum(1, keepdim=True))


def add_background(maps: Tensor) -> Tensor:
    """Prepend a background channel 1 - max over the classes: (..., C, H, W) in 0..1 -> (..., C + 1, H, W)."""
    return torch.cat([1 - maps.amax(-3, keepdim=True), maps], dim=-3)


def strongest_class(maps: Tensor, labels: Tensor, caller: str) -> tuple[Tensor, Tensor]:
    """The largest score of the labelled classes and that class (channel + 1), each (B, h, w).

    Without a labelled class the score is -inf and the class 1. `caller` is named in errors.
    """
    check_labels(maps, labels, caller)
    score, channel = maps.masked_fill(labels[:, :, None, None] == 0, -torch.inf).max(dim=1)
    return score, channel + 1


def check_labels(maps: Tensor, labels: Tensor, caller: str) -> None:
    """Raise a ValueError unless maps are (B, C, h, w) and labels (B, C)."""
    _check_maps(maps, caller)
    if labels.shape != maps.shape[:2]:
        raise ValueError(
            f"{caller}: labels have shape {tuple(labels.shape)}, but the maps {tuple(maps.shape)} need "
            f"{tuple(maps.shape[:2])}, one 0/1 per image and class"
        )


def _wanted(maps: Mapping[str, Tensor], names: Iterable[str], caller: str) -> Iterator[tuple[str, Tensor]]:
    """The maps of these names, by name; ValueError, which names those that there are, where one is none of them."""
    for name in names:
        if name not in maps:
            raise ValueError(f'{caller}: no map "{name}"; this method returns {", ".join(sorted(maps))}')
        yield name, maps[name]


def _ratio(values: Tensor, by: Tensor) -> Tensor:
    """values / by, and 0 where `by` is 0."""
    return torch.where(by > 0, values / torch.where(by > 0, by, 1), 0)


def _scaled_inputs(images: Tensor, scales: Sequence[float], flip: bool, mode: str = "bilinear") -> Iterator[Tensor]:
    """The images at every scale, followed in the batch by their mirror images."""
    if not scales:
        raise ValueError("scales is empty: give at least one factor of the image size, e.g. (1.0,)")
    height, width = images.shape[-2:]
    for scale in scales:
        size = (int(scale * height), int(scale * width))
        scaled = F.interpolate(images, size=size, mode=mode, align_corners=False)
        yield torch.cat([scaled, scaled.flip(-1)]) if flip else scaled


def _unmirrored(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Split (2B, ...) into the images' half and the mirror images' half, mirrored back."""
    image, mirror = pair.chunk(2)
    return image, mirror.flip(-1)


def _check_maps(maps: Tensor, caller: str) -> None:
    if maps.ndim != 4:
        raise ValueError(f"{caller}: maps have shape {tuple(maps.shape)}; expected (B, C, h, w)")


def _check_images(images: Tensor, caller: str) -> tuple[int, int]:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{caller}: images have shape {tuple(images.shape)}; expected (B, 3, H, W)")
    return images.shape[-2], images.shape[-1]
