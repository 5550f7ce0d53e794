"""What is in the files of a dataset and what is wrong with them, as data and as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from wsss.data import DataError


@dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Attributes:
        images: number of its images.
        label_source: where their image-level labels come from.
        class_counts: number of images with each of the C classes; zeros where labels are unknown.
    """

    images: int
    label_source: str
    class_counts: tuple[int, ...]

    @classmethod
    def of(cls, labels: Tensor, label_source: str) -> "SplitReport":
        """From labels (N, C), NaN where unknown."""
        return cls(len(labels), label_source, tuple(labels.nansum(0).long().tolist()))


@dataclass(frozen=True)
class Report:
    """What is in a dataset's files and what is wrong with them; as text, a report for people.

    Attributes:
        path: the folder.
        identity: how results name this dataset.
        classes: names of the C classes.
        folders: number of files in each folder, None where the folder is absent.
        splits: the splits that are there.
        problems: what is wrong, in the order found.
        official: number of images of each split of the whole dataset; empty where there is no such thing.
        notes: explanations.
    """

    path: Path
    identity: str
    classes: tuple[str, ...]
    folders: dict[str, int | None]
    splits: dict[str, SplitReport]
    problems: tuple[DataError, ...]
    official: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text(10)

    def text(self, most: int | None = None) -> str:
        """The report, with at most `most` problems of each kind, or all of them."""
        lines = [f"{self.path}", f"results will name it {self.identity}", "", "files"]
        for folder, count in self.folders.items():
            lines.append(f"  {folder:<22}{'absent' if count is None else f'{count:,}':>8}")
        lines += ["", "images and where their image-level labels come from"]
        for split in self.official or self.splits:
            if split in self.splits:
                images, source = self.splits[split].images, self.splits[split].label_source
                lines.append(f"  {split:<12}{images:>8,}  {self._note(split):<29}  labels: {source}")
            else:
                lines.append(f"  {split:<12}{'absent':>8}  officially {self.official[split]:,}")
        lines += [f"  {note}" for note in self.notes]
        width = max(12, *(len(name) + 1 for name in self.classes))
        lines += ["", "images with each class", f"  {'':<{width}}" + "".join(f"{split:>11}" for split in self.splits)]
        for index, name in enumerate(self.classes):
            counts = "".join(f"{report.class_counts[index]:>11,}" for report in self.splits.values())
            lines.append(f"  {name:<{width}}{counts}")
        lines += ["", f"wrong: {len(self.problems):,}" if self.problems else "nothing is wrong"]
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            messages = [str(problem) for problem in self.problems if problem.kind == kind]
            lines += [f"  {kind}: {len(messages):,}", *(f"    {message}" for message in messages[:most])]
            if len(messages[:most]) < len(messages):
                lines.append(f"    ... and {len(messages) - len(messages[:most]):,} more")
        return "\n".join(lines)

    def _note(self, split: str) -> str:
        images, official = self.splits[split].images, self.official.get(split)
        if official is None:
            return ""
        if images == official:
            return "the official number"
        return f"a subset: {images:,} of {official:,}" if images < official else f"not the official {official:,}"
