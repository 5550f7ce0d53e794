"""From uint8 RGB images to what a network sees: normalisation, augmentation, evaluation size."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

MEAN = (0.485, 0.456, 0.406)  # RGB mean and standard deviation of ImageNet, for values in 0..1
STD = (0.229, 0.224, 0.225)
CROP_MODES = ("resize", "shrink", "long_side", "rescale")
BICUBIC = v2.InterpolationMode.BICUBIC
PADDING = 255  # what a mask holds beside its image


def normalise(image: Tensor) -> Tensor:
    """Subtract the ImageNet mean and divide by the standard deviation.

    Args:
        image: uint8 (..., 3, H, W), RGB 0..255.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: the image is not uint8 (it may have been scaled or normalised already).
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"normalise: image is {image.dtype}; pass uint8 RGB values 0..255, not yet scaled")
    mean, std = _statistics(torch.float32, image.device)
    return (image.float() / 255 - mean) / std


def denormalise(image: Tensor) -> Tensor:
    """Undo `normalise`.

    Args:
        image: float (..., 3, H, W), normalised.

    Returns:
        RGB 0..255 of the same shape and type, neither rounded nor clamped: round before a conversion to uint8.
    """
    mean, std = _statistics(image.dtype, image.device)
    return (image * std + mean) * 255


def _statistics(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([MEAN, STD], dtype=dtype, device=device)[..., None, None]


def resize_for_evaluation(image: Tensor, size: int | None) -> Tensor:
    """Prepare one image for evaluation: normalise, then squash to a square as the released MoRe evaluation does.

    The normalised tensor is resized bilinearly (align_corners False, no antialias), so that a network's scores for it
    equal those of code that resizes inside its validation loop. The aspect ratio is lost.

    Args:
        image: uint8 (3, H, W).
        size: side of the square in pixels, or None to keep (H, W).

    Returns:
        float32 (3, size, size), or (3, H, W) where `size` is None.
    """
    image = normalise(image)
    if size is None:
        return image
    return F.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)[0]


def squash(image: Tensor, size: int) -> Tensor:
    """Squash one image to a square as the released TransCAM inference does, before it is normalised.

    Bicubic and antialiased in whole grey levels, as PIL resizes (to one grey level). The aspect ratio is lost.

    Args:
        image: uint8 (3, H, W).
        size: side of the square in pixels.

    Returns:
        uint8 (3, size, size); `normalise` makes it what the network sees.

    Raises:
        TypeError: the image is not uint8 (3, H, W).
    """
    _check_image(image, "squash")
    return v2.functional.resize(image, [size, size], interpolation=BICUBIC, antialias=True)


@dataclass(frozen=True)
class TrainTransform:
    """Random augmentation of one training image; draws from the global generator of torch, in the calling process.

    `crop_mode` "resize" (MoRe on VOC): random resized crop (bicubic, antialiased), flip, colour jitter, normalise.
    `crop_mode` "shrink" (MoRe on COCO): colour jitter, rescale (bilinear, antialiased), flip, random place on a black
    canvas of at least the crop size, random crop, normalise. Black is added before normalisation: the padding counts
    as image. With a scale of (1, 1) nothing is rescaled: PSA's training of AffinityNet.
    `crop_mode` "long_side" (TransCAM's classifier): resize to a random length of the longer side (bicubic,
    antialiased), flip, colour jitter, normalise, random place on a canvas of at least the crop size, random crop. The
    canvas is 0 after normalisation, the mean colour.
    `crop_mode` "rescale" (TransCAM's DeepLab): colour jitter, rescale (bicubic, not antialiased, as OpenCV does it),
    flip, normalise, then as "long_side".

    Attributes:
        crop: side of the square result in pixels.
        scale: "resize": range of the cropped share of the image area; "shrink" and "rescale": range of the factor on
            both sides; "long_side": range of the longer side in whole pixels, both ends included.
        ratio: "resize": range of the aspect ratio (width / height) of the cropped region; not used by the others.
        jitter: largest relative change of brightness, contrast and saturation, and shift of the hue (share of the
            colour circle, at most 0.5).
        jitter_probability: how often the colour jitter is applied. The flip has probability 0.5.
        crop_mode: one of `CROP_MODES`.

    Raises:
        ValueError: an unknown `crop_mode`, or a range that is empty or not positive.
    """

    crop: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    jitter: tuple[float, float, float, float]
    jitter_probability: float
    crop_mode: str = "resize"

    def __post_init__(self):
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode {self.crop_mode!r} is unknown; choose one of {', '.join(CROP_MODES)}")
        if self.crop < 1:
            raise ValueError(f"crop is {self.crop}; give a side of at least 1 pixel")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is ({low}, {high}); give the smaller value first, both above 0")
        if self.crop_mode == "long_side" and any(side != int(side) for side in self.scale):
            raise ValueError(f"scale is {self.scale}; crop_mode 'long_side' needs whole pixels, such as (320, 640)")

    def __call__(self, image: Tensor) -> Tensor:
        """Augment `image`, uint8 (3, H, W), to normalised float32 (3, crop, crop)."""
        _check_image(image, "TrainTransform")
        return self._augment(image)

    def with_mask(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Augment `image` and, in the same geometry, its label map `mask`, int64 (H, W), or several, (N, H, W).

        Returns:
            The image as from a call, bit for bit, and int64 (crop, crop) or (N, crop, crop): nearest label, 255 where
            the image was padded.
        """
        _check_image(image, "TrainTransform")
        image, mask = self._augment(tv_tensors.Image(image), tv_tensors.Mask(mask[None]))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)[0]

    @cached_property
    def _augment(self) -> v2.Compose:
        jitter = v2.RandomApply([v2.ColorJitter(*self.jitter)], p=self.jitter_probability)
        flip = v2.RandomHorizontalFlip(0.5)
        cut = [_Place(self.crop), v2.RandomCrop(self.crop)]
        if self.crop_mode == "shrink":
            return v2.Compose([jitter, _Rescale(self.scale), flip, *cut, _Normalise()])
        if self.crop_mode == "long_side":
            return v2.Compose([_ResizeLongSide(self.scale), flip, jitter, _Normalise(), *cut])
        if self.crop_mode == "rescale":
            return v2.Compose([jitter, _RescaleAsOpenCV(self.scale), flip, _Normalise(), *cut])
        crop = v2.RandomResizedCrop(self.crop, self.scale, self.ratio, interpolation=BICUBIC, antialias=True)
        return v2.Compose([crop, flip, jitter, _Normalise()])


@dataclass(frozen=True)
class StrongView:
    """The strongly augmented views that SeCo contrasts a training image with (SeCo, Sec. 3.3; values: released code).

    Attributes:
        blur_sigma: range of the blur's width in pixels.
        released: whether the strong view is mirrored once more, so that half of its patches show another place, and a
            second view of the whole image is made; both as in the released code.
    """

    blur_sigma: tuple[float, float]
    released: bool = False

    def __call__(self, original: Tensor, crop: Tensor) -> dict[str, Tensor]:
        """Views of one training image.

        Args:
            original: uint8 (3, H, W), the whole image.
            crop: float (3, h, w), its normalised training crop.

        Returns:
            "strong" (3, h, w), the crop in other colours, and as released "second" (3, h, w), another crop of
            `original`.
        """
        views = {"strong": normalise(self._strong(denormalise(crop).round().clamp(0, 255).to(torch.uint8)))}
        if self.released:
            views["second"] = normalise(self._second(crop.shape[-2:])(original))
        return views

    @cached_property
    def _strong(self) -> v2.Compose:
        flip = [v2.RandomHorizontalFlip(0.5)] if self.released else []
        return v2.Compose([*flip, *_COLOURS, self._blur(0.5)])

    def _second(self, size: torch.Size) -> v2.Compose:
        crop = v2.RandomResizedCrop(tuple(size), (0.4, 1.0), interpolation=BICUBIC, antialias=True)
        flip, solarize = v2.RandomHorizontalFlip(0.5), v2.RandomSolarize(128, 0.2)
        return v2.Compose([crop, flip, *_COLOURS, self._blur(0.1), solarize])

    def _blur(self, probability: float) -> v2.RandomApply:
        side = 2 * max(1, round(3 * self.blur_sigma[1])) + 1  # three standard deviations to each side
        return v2.RandomApply([v2.GaussianBlur(side, self.blur_sigma)], p=probability)


_COLOURS = (v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2))


def _check_image(image: Tensor, caller: str) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3:
        shape = tuple(image.shape)
        raise TypeError(f"{caller}: image is {image.dtype} {shape}; pass one uint8 image (3, H, W)")


class _Normalise(v2.Transform):
    """`normalise` of the image; masks stay as they are."""

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        return tv_tensors.wrap(normalise(inpt.as_subclass(Tensor)), like=inpt)


class _Rescale(v2.Transform):
    """Resize both sides by one random factor; a mask to its nearest labels."""

    interpolation = v2.InterpolationMode.BILINEAR

    def __init__(self, scale: tuple[float, float]):
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list) -> dict:
        factor = torch.empty(()).uniform_(*self.scale).item()
        return {"size": [max(1, int(factor * side)) for side in flat_inputs[0].shape[-2:]]}

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        settings = {"interpolation": self.interpolation, "antialias": True}
        return self._call_kernel(v2.functional.resize, inpt, params["size"], **settings)


class _RescaleAsOpenCV(_Rescale):
    """Bicubic without antialiasing. In floating point: the kernel for whole grey levels takes another cubic."""

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        if isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        exact = v2.functional.resize(inpt.float(), params["size"], interpolation=BICUBIC, antialias=False)
        return tv_tensors.wrap(exact.round().clamp(0, 255).to(torch.uint8), like=inpt)


class _ResizeLongSide(_Rescale):
    """Resize to a random length of the longer side, in whole pixels; the aspect ratio stays."""

    interpolation = BICUBIC

    def make_params(self, flat_inputs: list) -> dict:
        low, high = map(int, self.scale)
        length = int(torch.randint(low, high + 1, ()))
        sides = flat_inputs[0].shape[-2:]
        return {"size": [max(1, round(side * length / max(sides))) for side in sides]}


class _Place(v2.Transform):
    """Lay an image at a random place on a canvas of zeros of at least `side`; a mask is padded with `PADDING`."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list) -> dict:
        height, width = flat_inputs[0].shape[-2:]
        free = max(height, self.side) - height, max(width, self.side) - width
        top, left = (int(torch.randint(room + 1, ())) for room in free)
        return {"padding": [left, top, free[1] - left, free[0] - top]}

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        fill = PADDING if isinstance(inpt, tv_tensors.Mask) else 0
        return self._call_kernel(v2.functional.pad, inpt, params["padding"], fill=fill)
