"""The command `wsss`."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run `wsss` with the arguments `argv` (those of the process unless given) and return its exit code."""
    arguments = build_parser().parse_args(argv)
    return arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; each names the function that runs it, which imports what it needs when it is called."""
    parser = argparse.ArgumentParser(prog="wsss", description="Replications in weakly supervised segmentation.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_data(commands)
    _add_reproduce(commands)
    _add_pretrain(commands)
    return parser


def _add_data(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("data", help="look after the datasets")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say what is there and what is wrong; exit code 1 when something is")
    check.add_argument("dataset", choices=["voc2012"])
    check.add_argument("--root", metavar="PATH", help="folder that holds VOCdevkit/VOC2012 (default: data/voc2012)")
    check.set_defaults(run=_data_check)


def _data_check(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from wsss.data import DataError
    from wsss.data.voc import DEFAULT_ROOT, check

    try:
        report = check(arguments.root or DEFAULT_ROOT, progress=partial(tqdm, desc="reading", unit=" images"))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    print(report)
    return 1 if report.problems else 0


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    from wsss import reproduce

    parser = commands.add_parser("reproduce", help="run the notebooks in a batch and write every table")
    reproduce.add_arguments(parser)
    parser.set_defaults(run=reproduce.command)


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pretrain", help="pretrain the tiny backbone of the embedded benchmark (half an hour)")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: the committed weights, which are replaced")
    parser.set_defaults(run=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> int:
    from wsss.backbones.pretrain import pretrain
    from wsss.backbones.vit import TINY_WEIGHTS

    pretrain(arguments.epochs, arguments.batch_size, arguments.lr, arguments.seed, arguments.out or TINY_WEIGHTS)
    return 0
