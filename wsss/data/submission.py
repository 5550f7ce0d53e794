"""The archive that the test server of PASCAL VOC 2012 takes: one palette PNG of class indices for each test image.

results/VOC2012/Segmentation/comp6_test_cls/<image id>.png in a .tar, .tar.gz or .tgz; `comp6` is the competition in
which other training data than VOC's own is allowed, which ImageNet weights and SBD are. Predictions know no void.
"""

import contextlib
import io
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from torch import Tensor

from wsss.data import DataError
from wsss.data.classes import VOC_CLASSES
from wsss.data.reading import encode_mask, naming_full_disk
from wsss.data.voc import OFFICIAL, VOC2012

FOLDER = PurePosixPath("results", "VOC2012", "Segmentation", "comp6_test_cls")
MODES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz"}


def write_submission(file: str | Path, dataset: VOC2012, predictions: Iterable[tuple[str, Tensor]]) -> Path:
    """Write the archive of a model's predictions, one image at a time; it appears only when it is complete.

    Args:
        file: ends in .tar, .tar.gz or .tgz.
        dataset: the split test of VOC 2012.
        predictions: image id and label map (H, W) of integers 0..20, of the image's own size; each image once.

    Raises:
        ValueError: another suffix; a prediction of the wrong size, with another value, twice, or of an unknown image.
        DataError: the disk is full.
    """
    file = Path(file)
    if file.suffix not in MODES:
        raise ValueError(f"{file}: the server takes {', '.join(MODES)}; choose one of these suffixes")
    open_images = {name: index for index, name in enumerate(dataset.names)}
    mode = MODES[file.suffix]
    with naming_full_disk(file.parent), _appearing(file) as temporary, tarfile.open(temporary, mode) as tar:
        for name, prediction in predictions:
            if name not in open_images:
                raise ValueError(f"{file}: {name} is not in split {dataset.split}, or was predicted twice")
            size, values = dataset.size(open_images.pop(name)), prediction.cpu().numpy()
            if values.shape != size or values.min() < 0 or values.max() > len(VOC_CLASSES):
                raise ValueError(
                    f"{file}: the prediction of {name} is {values.shape} with values {values.min()}..{values.max()}; "
                    f"expected {size} (height, width) with 0..{len(VOC_CLASSES)}"
                )
            content = encode_mask(values.astype(np.uint8))
            member = tarfile.TarInfo(str(FOLDER / f"{name}.png"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if open_images:
            raise ValueError(f"{file}: {len(open_images):,} images have no prediction, e.g. {min(open_images)}")
    return file


@contextlib.contextmanager
def _appearing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` that replaces it if all goes well, and is removed otherwise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclass(frozen=True)
class SubmissionReport:
    """What is wrong with an archive for the test server; as text, a report for people.

    Attributes:
        file: the archive.
        images: number of predictions.
        compared: whether names and sizes could be compared with the images of a devkit.
        problems: what is wrong, in the order of the archive.
    """

    file: Path
    images: int
    compared: bool
    problems: tuple[DataError, ...]

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.images:,} predictions; the test split has {OFFICIAL['test']:,} images"]
        if not self.compared:
            lines.append("names and sizes are not compared: the devkit's test.txt and its images are not there")
        lines.append(f"wrong: {len(self.problems):,}" if self.problems else "nothing is wrong")
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def check_submission(
    file: str | Path, root: str | Path | None = None, progress: Callable[[Iterable], Iterable] = iter
) -> SubmissionReport:
    """Check the format of an archive for the test server, one image at a time.

    Args:
        root: a devkit with the split test, to compare names and sizes with; see `VOC2012`.
        progress: wraps the members of the archive, e.g. `tqdm`.

    Raises:
        DataError: the file is missing or no tar archive, or the devkit has no complete split test.
    """
    file = Path(file)
    dataset = VOC2012(root, "test") if root else None
    indices = {name: index for index, name in enumerate(dataset.names)} if dataset else {}
    problems: list[DataError] = []
    seen: Counter[str] = Counter()
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in progress(tar):
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                where = f"{file}, {member.name}"
                if not member.isfile() or path.parent != FOLDER or path.suffix != ".png":
                    problems.append(DataError(f"{where}: only {FOLDER}/<image id>.png belong here.", "surplus"))
                    continue
                seen[path.stem] += 1
                size = None
                if dataset and path.stem in indices:
                    size = dataset.size(indices[path.stem])
                elif dataset:
                    problems.append(DataError(f"{where}: is no image of split test. Remove it.", "surplus"))
                problems += _prediction_problems(tar.extractfile(member).read(), size, where)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as a tar archive ({error}). Write it again.") from error
    problems += [DataError(f"{file}: {name} is there {n} times.", "list") for name, n in seen.items() if n > 1]
    missing = sorted(indices.keys() - seen.keys())
    if missing:
        problems.append(DataError(f"{file}: {len(missing):,} images are missing, e.g. {missing[0]}.", "missing"))
    elif not dataset and len(seen) != OFFICIAL["test"]:
        problems.append(DataError(f"{file}: {len(seen):,} images, expected {OFFICIAL['test']:,}.", "count"))
    return SubmissionReport(file, seen.total(), dataset is not None, tuple(problems))


def _prediction_problems(content: bytes, size: tuple[int, int] | None, where: str) -> list[DataError]:
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        return [DataError(f"{where}: cannot be decoded as a PNG ({error}).")]
    if image.mode != "P":
        return [DataError(f"{where}: has mode {image.mode}, not P: a palette PNG of class indices.", "values")]
    problems = []
    if size and values.shape != size:
        (height, width), (h, w) = size, values.shape
        problems.append(DataError(f"{where}: is {w}x{h} pixels, its image {width}x{height}.", "size"))
    if values.max() > len(VOC_CLASSES):
        problems.append(
            DataError(f"{where}: holds the value {values.max()}, but only 0..{len(VOC_CLASSES)}, no void.", "values")
        )
    return problems
