"""The command `wsss`."""

import argparse
import sys
from collections.abc import Sequence
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
    _add_plan(commands)
    _add_submit(commands)
    _add_pretrain(commands)
    return parser


def _add_data(commands: argparse._SubParsersAction) -> None:
    from wsss.data.commands import add_arguments

    add_arguments(commands.add_parser("data", help="look after the datasets"))


def _add_reproduce(commands: argparse._SubParsersAction) -> None:
    from wsss import reproduce

    parser = commands.add_parser("reproduce", help="run the notebooks in a batch and write every table")
    reproduce.add_arguments(parser)
    parser.set_defaults(run=reproduce.command)


def _add_submit(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("submit", help="write the archive of a network's predictions for the VOC test server")
    parser.add_argument("folder", type=Path, help="folder of a finished run with its weights")
    parser.add_argument("file", type=Path, help="archive to write: .tar, .tar.gz or .tgz")
    parser.add_argument("--root", metavar="PATH", help="folder that holds VOCdevkit/VOC2012 (default: data/voc2012)")
    parser.add_argument("--crf", action="store_true", help="refine the predictions by the run's CRF")
    parser.set_defaults(run=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    from wsss.submit import command

    return command(arguments)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    from wsss import reproduce

    parser = commands.add_parser("plan", help="say what a reproduction takes: runs, hours and memory, table by table")
    reproduce.add_choice(parser)
    parser.add_argument("--gpu", metavar="NAME", help='for example "A100" (default: this machine, or the papers\' RTX 3090)')
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from wsss import plan

    return plan.command(arguments)


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pretrain", help="pretrain a tiny backbone of the embedded benchmark (half an hour)")
    parser.add_argument("--backbone", default="vit_tiny_scenes", help="or conformer_tiny_scenes, resnet38_tiny_scenes")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: the committed weights, which are replaced")
    parser.set_defaults(run=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> int:
    from wsss.backbones.pretrain import CLASSIFIERS, pretrain

    if arguments.backbone not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        print(f"wsss pretrain: --backbone {arguments.backbone} is not one of {known}", file=sys.stderr)
        return 2
    pretrain(
        arguments.backbone, arguments.epochs, arguments.batch_size, arguments.lr, arguments.seed, arguments.out
    )
    return 0
