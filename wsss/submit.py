"""`wsss submit`: the archive of a trained network's predictions for the test server of PASCAL VOC 2012."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from wsss.data.submission import check_submission, write_submission
from wsss.data.voc import DEFAULT_ROOT, VOC2012
from wsss.evaluation import Request, batches_of_one_size, label_maps
from wsss.experiments import Record, load_trained


def submit(run: Path, file: Path, root: Path, crf: bool = False, progress: bool = True) -> Path:
    """Predict the split test of VOC 2012 with the decoder of a finished run, and write the archive.

    Args:
        run: folder of the run, with its weights.
        file: the archive to write.
        root: folder that holds the devkit with the test images.
        crf: refine the predictions by the run's CRF.

    Raises:
        FileNotFoundError: the run is not done, or its weights are missing.
        ValueError: the network has no decoder, or was not trained on VOC.
        DataError: test images are missing, or the disk is full.
    """
    record = Record.read(run)
    trained = load_trained(record.experiment(run.parent), run.parent)
    if not trained.method.segments:
        raise ValueError(
            f"{run}: {record.method} has no decoder; submit the network that was trained on its pseudo masks"
        )
    dataset = VOC2012(root, "test")
    if tuple(record.classes) != tuple(dataset.classes):
        raise ValueError(
            f"{run}: this network knows the classes of {record.identity}; the server takes those of VOC 2012"
        )
    batches = batches_of_one_size(dataset, range(len(dataset)))
    request = Request(trained.method.segments, crf=crf)
    masks = label_maps(trained.method, batches, request, trained.config, trained.device, crf_workers=None)
    bar = tqdm(masks, "predicting", len(dataset), unit="image", disable=not progress)
    return write_submission(file, dataset, ((sample.name, mask) for sample, mask in bar))


def command(arguments: argparse.Namespace) -> int:
    """Run `wsss submit`; 1 when the archive cannot be written or is not what the server takes."""
    root = arguments.root or DEFAULT_ROOT
    try:
        report = check_submission(submit(arguments.folder, arguments.file, root, arguments.crf), root)
    except (ValueError, OSError) as error:
        print(f"wsss submit: {error}", file=sys.stderr)
        return 1
    print(report)
    return 1 if report.problems else 0
