"""Class names in the order of their mask values (value = index + 1), and the colours in which masks are shown."""

import numpy as np

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# COCO numbers its 80 categories from 1 to 90 with gaps; here they follow each other in the same order.
COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
SCENE_CLASSES = ("boat", "train", "horse", "person", "sheep", "bird", "chair", "table", "bottle", "car")


def palette(n: int) -> np.ndarray:
    """Colour map of the VOC devkit for background and `n` classes.

    The bits of a mask value go to red, green, blue, red, ... in turn, and fill each channel from its highest bit down.

    Args:
        n: number of foreground classes, 0..255.

    Returns:
        uint8 (n + 1, 3) RGB; row 0 (background) is black, row 255, where there is one, is the cream of void.
    """
    if not 0 <= n <= 255:
        raise ValueError(f"palette: n is {n}; a mask of 8 bits has 0 to 255 foreground classes")
    bits = np.unpackbits(np.arange(n + 1, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    bits = np.pad(bits, ((0, 0), (0, 16)))  # eight bits a channel: 24, of which a value fills the first eight
    return np.packbits(bits.reshape(n + 1, 8, 3), axis=1)[:, 0]
