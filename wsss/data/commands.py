"""The command `wsss data`: fetch, prepare, label and check datasets."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from wsss.data import DataError, coco, fetch, folder, sbd, submission, voc

MODULES = {"voc2012": voc, "sbd": voc, "coco2014": coco, "folder": folder}
ROOT = "folder of the files (default: data/voc2012 or data/coco2014)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions of `wsss data`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser("fetch", help="fetch a dataset from its own host; goes on where it was stopped")
    action.add_argument("dataset", choices=list(fetch.SOURCES))
    action.add_argument("--root", metavar="PATH", type=Path, help=ROOT)
    action.add_argument("--source", metavar="URL|PATH", help="folder, here or elsewhere, that has the same archives")
    action.add_argument("--yes", action="store_true", help="do not ask whether the terms and the size are right")
    action.set_defaults(run=partial(_run, _fetch))

    action = actions.add_parser("prepare", help="make the masks: of VOC from SBD, of COCO from its annotations")
    action.add_argument("dataset", choices=["voc2012", "coco2014"])
    action.add_argument("--root", metavar="PATH", type=Path, help=ROOT)
    action.add_argument("--sbd", metavar="PATH", type=Path, help="where SBD is (default: benchmark_RELEASE in root)")
    action.add_argument("--workers", metavar="N", type=int, help="processes (default: one a core)")
    action.set_defaults(run=partial(_run, _prepare))

    action = actions.add_parser("labels", help="write what is missing of the labels of your own images, and check them")
    action.add_argument("root", type=Path, help="folder with your images in a folder `images`")
    action.set_defaults(run=partial(_run, _labels), skip_unreadable=False, all=False)

    action = actions.add_parser("check", help="say what is there and what is wrong; exit code 1 when something is")
    action.add_argument("dataset", choices=["voc2012", "coco2014", "folder"])
    action.add_argument("--root", metavar="PATH", type=Path, help=ROOT)
    action.add_argument("--all", action="store_true", help="list everything that is wrong, not ten of each kind")
    action.add_argument("--skip-unreadable", action="store_true", help="name damaged files, but let them pass")
    action.set_defaults(run=partial(_run, _check))

    action = actions.add_parser("check-submission", help="check an archive for the test server of VOC 2012")
    action.add_argument("file", type=Path)
    action.add_argument("--root", metavar="PATH", type=Path, help="devkit with the test split, to compare with")
    action.set_defaults(run=partial(_run, _check_submission))


def _run(function, arguments: argparse.Namespace) -> int:
    """Print errors that name a file and its remedy without a traceback."""
    try:
        return function(arguments)
    except (DataError, PermissionError) as error:
        print(error, file=sys.stderr)
        return 1


def _root(arguments: argparse.Namespace) -> Path:
    module = MODULES[arguments.dataset]
    if arguments.root is None and module is folder:
        raise DataError("wsss data check folder: say which with --root.", "missing")
    return arguments.root or module.DEFAULT_ROOT


def _fetch(arguments: argparse.Namespace) -> int:
    root = _root(arguments)
    print(fetch.announce(arguments.dataset, root, arguments.source))
    if not arguments.yes and not _agreed():
        print("nothing was fetched; --yes agrees beforehand", file=sys.stderr)
        return 1
    for line in fetch.fetch(arguments.dataset, root, arguments.source):
        print(line)
    return 0


def _agreed() -> bool:
    return sys.stdin.isatty() and input("fetch it? [y/N] ").strip().lower() in ("y", "yes")


def _prepare(arguments: argparse.Namespace) -> int:
    options = {"workers": arguments.workers, "progress": partial(tqdm, desc="masks", unit=" images")}
    if arguments.dataset == "voc2012":
        lines = sbd.prepare(_root(arguments), arguments.sbd, **options)
    else:
        lines = coco.prepare(_root(arguments), **options)
    print("\n".join(lines))
    return 0


def _labels(arguments: argparse.Namespace) -> int:
    for line in folder.build(arguments.root):
        print(line)
    return _report(folder, arguments.root, arguments)


def _check(arguments: argparse.Namespace) -> int:
    return _report(MODULES[arguments.dataset], _root(arguments), arguments)


def _report(module, root: Path, arguments: argparse.Namespace) -> int:
    report = module.check(root, progress=partial(tqdm, desc="reading", unit=" images"))
    print(report.text() if arguments.all else report)
    unreadable = sum(problem.kind == "unreadable" for problem in report.problems)
    if arguments.skip_unreadable and unreadable:
        print(f"{unreadable:,} unreadable files pass; skip_unreadable=True leaves their images out")
    return 1 if len(report.problems) > unreadable * arguments.skip_unreadable else 0


def _check_submission(arguments: argparse.Namespace) -> int:
    bar = partial(tqdm, desc="reading", unit=" images", total=voc.OFFICIAL["test"])
    report = submission.check_submission(arguments.file, arguments.root, progress=bar)
    print(report)
    return 1 if report.problems else 0
