"""Every figure of the notebooks. Functions draw and return nothing; a notebook cell ends with `plt.show()`."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.utils.data import Dataset

from wsss.affinity import pair_indices
from wsss.data import Sample, co_occurrence
from wsss.data.classes import palette
from wsss.maps import resize

UNCERTAIN_COLOUR = (0.85, 0.85, 0.85)


def rgb(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) -> (H, W, 3) for matplotlib."""
    return image.permute(1, 2, 0).numpy()


def colours(count: int) -> np.ndarray:
    """RGB 0..1 of background and `count` classes, (count + 1, 3)."""
    return palette(count) / 255


def row(pictures: int, title: str = "", width: float = 2.3, height: float = 2.5) -> list[Axes]:
    """One row of `pictures` axes without ticks."""
    figure, axes = plt.subplots(1, pictures, figsize=(width * pictures, height), squeeze=False, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    for ax in axes[0]:
        ax.set(xticks=[], yticks=[])
    return list(axes[0])


def table_of_axes(rows: int, columns: int, side: float = 1.7) -> np.ndarray:
    """A grid of axes without ticks, (rows, columns)."""
    size = (side * columns, side * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return axes


def picture(ax: Axes, image: Tensor, title: str = "") -> None:
    """An image, uint8 (3, H, W)."""
    ax.imshow(rgb(image))
    ax.set_title(title, fontsize=9)


def heat(ax: Axes, image: Tensor, values: Tensor, title: str = "", low: float | None = None, high: float | None = None):
    """A map (h, w) laid over a greyed image; without limits it spans its own range."""
    height, width = image.shape[-2:]
    ax.imshow(rgb(image).mean(2), cmap="gray", extent=(0, width, height, 0))
    ax.imshow(values.numpy(), cmap="turbo", alpha=0.6, extent=(0, width, height, 0), vmin=low, vmax=high)
    ax.set_title(title, fontsize=9)


def labels(ax: Axes, mask: Tensor, classes: Sequence[str], title: str = "", legend: bool = False) -> None:
    """A label map (h, w): 0 background (black), 1..C in the class colours, 255 grey."""
    lookup = np.full((256, 3), UNCERTAIN_COLOUR)
    lookup[: len(classes) + 1] = colours(len(classes))
    values = mask.numpy().astype(int)
    ax.imshow(lookup[values])
    ax.set_title(title, fontsize=9)
    if legend:
        shown = [v for v in np.unique(values)]
        name = lambda v: "background" if v == 0 else "uncertain" if v == 255 else classes[v - 1]
        handles = [Patch(facecolor=lookup[v], edgecolor="0.5", label=name(v)) for v in shown]
        ax.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=2, frameon=False)


def patches(ax: Axes, image: Tensor, grid: tuple[int, int], groups: Mapping[str, tuple[Tensor, str]], title: str = ""):
    """An image with groups of patches framed: name -> (bool (h, w), colour)."""
    height, width = image.shape[-2] / grid[0], image.shape[-1] / grid[1]
    ax.imshow(rgb(image))
    for offset, (selected, colour) in enumerate(groups.values()):
        inset = 0.8 * offset
        for i, j in selected.nonzero().tolist():
            corner = (j * width + inset, i * height + inset)
            ax.add_patch(
                Rectangle(corner, width - 2 * inset, height - 2 * inset, fill=False, edgecolor=colour, linewidth=1.5)
            )
    ax.set_title(title, fontsize=9)
    handles = [Patch(facecolor="none", edgecolor=colour, label=name) for name, (_, colour) in groups.items()]
    ax.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=2, frameon=False)


def windows(ax: Axes, values: Tensor, boxes: Sequence[tuple[int, int, int, str]], title: str = "") -> None:
    """A grid of small numbers (h, w) with square windows: (top, left, side, colour)."""
    shades = ListedColormap(["white", "#f3d27a", "#8fc27a"])
    ax.imshow(values.numpy(), cmap=shades, vmin=0, vmax=2)
    for (i, j), value in np.ndenumerate(values.numpy()):
        ax.text(j, i, int(value), ha="center", va="center", fontsize=7, color="0.35")
    for top, left, side, colour in boxes:
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=colour, linewidth=2.5))
    ax.set_title(title, fontsize=9)


def matrix(
    values: np.ndarray | Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str = ".2f",
    ax: Axes | None = None,
) -> None:
    """A matrix with its numbers written in, as a figure of its own or on `ax`; NaN stays blank."""
    values = np.asarray(values)
    if ax is None:
        _, ax = plt.subplots(figsize=(1.6 + 0.55 * len(columns), 1.2 + 0.4 * len(rows)), layout="constrained")
    sns.heatmap(values, annot=True, fmt=form, cmap="mako_r", cbar=False, ax=ax, annot_kws={"size": 8})
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, rotation=0, fontsize=8)
    ax.set_title(title, fontsize=10)


def co_occurrences(datasets: Sequence[Dataset[Sample]]) -> None:
    """P(column | row) of the image-level labels in %, one panel a dataset; a class in no image has a blank row."""
    classes = datasets[0].classes
    size = (0.8 + 0.36 * len(classes) * len(datasets), 1.3 + 0.3 * len(classes))
    figure, axes = plt.subplots(1, len(datasets), figsize=size, squeeze=False, sharey=True, layout="constrained")
    figure.suptitle("Of the images with the class of the row, how many have the class of the column (%)", fontsize=11)
    for ax, dataset in zip(axes[0], datasets):
        matrix(100 * co_occurrence(dataset.labels), classes, classes, dataset.split, ".0f", ax)


def samples(datasets: Sequence[Dataset[Sample]], count: int) -> None:
    """The first `count` images of each dataset above their masks, and the colours of the classes."""
    classes = datasets[0].classes
    axes = table_of_axes(2 * len(datasets), count)
    for dataset, images, masks in zip(datasets, axes[::2], axes[1::2]):
        for index in range(count):
            sample = dataset[index]
            present = [name for name, label in zip(classes, sample.label) if label]
            picture(images[index], sample.image, ", ".join(present))
            labels(masks[index], sample.mask, classes)
        images[0].set_ylabel(dataset.split, fontsize=9)
        masks[0].set_ylabel("mask", fontsize=9)
    named = zip(("background", *classes), colours(len(classes)))
    handles = [Patch(facecolor=colour, label=name) for name, colour in named]
    axes[0, 0].figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncol=count, frameon=False)


def histories(records: Sequence, terms: Sequence[str], title: str = "") -> None:
    """Loss terms over the steps, one panel a term, one line an arm (mean and range over seeds).

    Terms that no record has get no panel; ValueError when no record has any.
    """
    rows = [
        {"step": point["step"], "term": term, "value": point[term], "run": f"{r.method}.{r.variant}, {r.arm}"}
        for r in records
        for point in r.history
        for term in terms
        if term in point
    ]
    if not rows:
        known = dict.fromkeys(name for r in records for point in r.history for name in point if name != "step")
        raise ValueError(f"no run has any of the terms {', '.join(terms)}; they have {', '.join(known)}")
    frame = pd.DataFrame(rows)
    shown = [term for term in terms if term in set(frame["term"])]
    arms = frame["run"].unique()  # one order for all panels: an arm keeps its colour where another lacks the term
    figure, axes = plt.subplots(1, len(shown), figsize=(2.7 * len(shown), 2.7), squeeze=False, layout="constrained")
    for ax, term in zip(axes[0], shown):
        own = frame[frame["term"] == term]
        last = ax is axes[0][-1]
        sns.lineplot(own, x="step", y="value", hue="run", hue_order=arms, errorbar=("pi", 100), ax=ax, legend=last)
        ax.set(title=f"weighted L_{term}", ylabel="", xlabel="step")
    if axes[0][-1].get_legend():
        sns.move_legend(axes[0][-1], "upper left", bbox_to_anchor=(1.02, 1), title="", fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=11)


def token_clusters(records: Sequence, titles: Sequence[str]) -> None:
    """t-SNE of class tokens, one panel a record, coloured by class, with their silhouette."""
    figure, axes = plt.subplots(1, len(records), figsize=(3.4 * len(records), 3.6), squeeze=False, layout="constrained")
    for ax, record, title in zip(axes[0], records, titles):
        points, owners = np.array(record.tokens["tsne"]), np.array(record.tokens["classes"])
        own = colours(len(record.classes))[1:]
        for index, name in enumerate(record.classes):
            chosen = points[owners == index]
            ax.scatter(chosen[:, 0], chosen[:, 1], s=10, color=own[index], label=name)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{title}\nsilhouette {record.tokens['silhouette']:.2f}", fontsize=9)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def sensitivity(frame: pd.DataFrame, field: str, value: str, chosen: object, ylabel: str, ax: Axes) -> None:
    """Score against a hyper-parameter: every seed a dot, the mean a line, the recipe's value marked."""
    sns.lineplot(frame, x=field, y=value, errorbar=None, marker="o", color="0.6", ax=ax)
    sns.scatterplot(frame, x=field, y=value, s=14, color="tab:blue", ax=ax)
    ax.axvline(chosen, color="tab:orange", linestyle=":", linewidth=1.5)
    ax.set(ylabel=ylabel, xlabel="", title=field)


def bars(frame: pd.DataFrame, x: str, y: str, hue: str, ylabel: str, title: str, size=(9, 3.2)) -> None:
    """Grouped bars with the range over seeds as a whisker."""
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    sns.barplot(frame, x=x, y=y, hue=hue, errorbar=("pi", 100), err_kws={"linewidth": 1}, ax=ax)
    ax.set(ylabel=ylabel, xlabel="")
    ax.set_title(title, fontsize=10)
    ax.tick_params(axis="x", rotation=30)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def threshold_curves(ax: Axes, frame: pd.DataFrame, title: str = "") -> None:
    """Score over the background score: a line an arm (mean and range over seeds), the scores that were chosen as dots.

    Args:
        frame: arm, seed, threshold, value, and whether that threshold was `chosen` for that run.
    """
    arms = frame["arm"].unique()
    sns.lineplot(frame, x="threshold", y="value", hue="arm", hue_order=arms, errorbar=("pi", 100), ax=ax)
    look = {"edgecolor": "black", "linewidth": 0.6, "s": 28, "zorder": 3, "legend": False}
    sns.scatterplot(frame[frame["chosen"]], x="threshold", y="value", hue="arm", hue_order=arms, ax=ax, **look)
    ax.set(xlabel="background score", ylabel="mIoU, %")
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, frameon=False)


def paired_seeds(ax: Axes, frame: pd.DataFrame, ylabel: str, title: str = "") -> None:
    """Every run of a frame with arm, seed, value as a dot, runs of one seed joined by a line, the means as bars."""
    wide = frame.pivot(index="seed", columns="arm", values="value")[frame["arm"].unique()]
    places = np.arange(len(wide.columns))
    for seed, values in wide.iterrows():
        ax.plot(places, values, color="0.8", linewidth=1, marker="o", markerfacecolor="tab:blue", label=seed)
    ax.hlines(wide.mean(), places - 0.22, places + 0.22, color="black", linewidth=2, zorder=3)
    ax.set_xticks(places, wide.columns, rotation=20, ha="right", fontsize=8)
    ax.set(xlim=(-0.5, len(places) - 0.5), ylabel=ylabel)
    ax.set_title(title, fontsize=10)


def _tag_look(tag: int, classes: Sequence[str]) -> tuple[str, str, dict]:
    """Name of a tag of SeCo, colour behind its frame, and look of the frame."""
    if tag == -1:
        return "uncertain", "black", {"edgecolor": "0.8", "hatch": "///", "linewidth": 1.2}
    if tag == 0:
        return "background", "black", {"edgecolor": "white", "linestyle": "--", "linewidth": 1.5}
    return classes[tag - 1], "white", {"edgecolor": colours(len(classes))[tag], "linewidth": 2.2}


def tagged_patches(ax: Axes, corners: Tensor, size: int, tags: Tensor, classes: Sequence[str], legend: bool = True):
    """Frames of tagged patches over what `ax` shows: class colour, dashed for background, hatched where uncertain.

    Args:
        corners: (N, 2) row and column of the upper left corner, in pixels.
        size: side of a patch.
        tags: (N,) -1 uncertain, 0 background, 1..C class.
    """
    seen = {}
    for number, ((top, left), tag) in enumerate(zip(corners.tolist(), tags.tolist()), 1):
        name, behind, look = _tag_look(tag, classes)
        seen[name] = Patch(facecolor="0.5" if tag < 1 else "none", label=name, **look)
        for frame in ({"edgecolor": behind, "linewidth": 3.8}, look):
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), size, size, fill=False, **frame))
        place, box = (left + 0.05 * size, top + 0.05 * size), {"facecolor": "white", "pad": 1, "lw": 0}
        ax.text(*place, number, va="top", fontsize=7, bbox=box)
    if legend:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.02)}
        ax.legend(handles=list(seen.values()), fontsize=7, ncol=2, frameon=False, **below)


def numbered_patches(ax: Axes, image: Tensor, corners: Tensor, size: int, starred: Tensor, title: str = "") -> None:
    """An image with the numbers of its patches (from 1) at their centres, with a star at those `starred`, bool (N,)."""
    picture(ax, image, title)
    for number, ((top, left), star) in enumerate(zip(corners.tolist(), starred.tolist()), 1):
        box = {"facecolor": "gold" if star else "white", "pad": 1.5, "lw": 0, "alpha": 0.85}
        text = f"{number}★" if star else str(number)
        ax.text(left + size / 2, top + size / 2, text, ha="center", va="center", fontsize=8, bbox=box)


def split_histogram(ax: Axes, values: Tensor, mean: float, title: str = "") -> None:
    """Histogram of similarities, those below their mean in another colour than the others, the mean as a line."""
    bins = np.linspace(float(values.min()), float(values.max()) + 1e-6, 25)
    below = values < mean
    ax.hist([values[below], values[~below]], bins, stacked=True, color=["crimson", "tab:green"])
    ax.axvline(mean, color="black", linestyle=":", linewidth=1.5)
    ax.set(yticks=[])
    ax.tick_params(axis="x", labelsize=7)
    ax.set_title(title, fontsize=8)


ROLES = {1: ("pulled", "tab:green"), -1: ("pushed off", "crimson"), 0: ("takes no part", "0.75")}


def pair_bars(ax: Axes, values: Tensor, names: Sequence[str], roles: Sequence[int], title: str, xlabel: str) -> None:
    """One bar a partner of a contrast, coloured by what the loss does to the pair: 1 pulls, -1 pushes off, else 0."""
    ax.barh(range(len(names)), values.tolist(), color=[ROLES[int(role)][1] for role in roles])
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=9)
    shown = [look for role, look in ROLES.items() if role in [int(r) for r in roles]]
    handles = [Patch(facecolor=colour, label=name) for name, colour in shown]
    ax.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, frameon=False)


def prototype_paths(ax: Axes, points: np.ndarray, classes: Sequence[str], title: str = "") -> None:
    """Where the prototypes of the classes went in two dimensions, (steps, C, 2): light at first, dark at last."""
    own = colours(len(classes))[1:]
    for index, name in enumerate(classes):
        ax.scatter(*points[:, index].T, s=14, color=own[index], alpha=np.linspace(0.15, 1, len(points)), lw=0)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(classes, own)]
    ax.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def growing_set(ax: Axes, values: Sequence[float], theta: float, title: str = "") -> None:
    """Algorithm 1 of APC on sorted scores: which of them join the set, and the score that each one must exceed."""
    values = np.asarray(values, dtype=float)
    means, sizes = values.cumsum() / np.arange(1, len(values) + 1), np.arange(2, len(values) + 1)
    needed = (1 - sizes * (1 - theta)) * means[:-1]  # M_i > theta M_(i-1), solved for the i-th score
    joined = np.append(True, np.logical_and.accumulate(means[1:] > theta * means[:-1]))
    ax.bar(np.arange(1, len(values) + 1), values, color=np.where(joined, "tab:orange", "0.8"))
    ax.hlines(needed, sizes - 0.45, sizes + 0.45, colors="tab:blue", linestyles=":", linewidth=2)
    ax.set(xticks=np.arange(1, len(values) + 1), ylim=(0, 1.1 * values[0]), xlabel="rank of the patch", ylabel="score")
    ax.set_title(title or f"theta = {theta:g}: k = {joined.sum()}, y = {means[joined.sum() - 1]:.2g}", fontsize=9)
    handles = [Patch(color="tab:orange", label="in the set"), Patch(color="0.8", label="refused")]
    needs = ax.plot([], [], color="tab:blue", linestyle=":", linewidth=2, label="needed to join")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
    ax.legend(handles=[*handles, *needs], fontsize=7, frameon=False, ncol=3, **below)


def zones(frame: pd.DataFrame, names: Sequence[str], ylabel: str, title: str) -> None:
    """Profiles across zones: a line an arm (mean and range over seeds) of a frame with arm, zone (0, 1, ...), value."""
    figure, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    sns.lineplot(frame, x="zone", y="value", hue="arm", errorbar=("pi", 100), marker="o", ax=ax)
    ax.set(ylabel=ylabel, xlabel="", ylim=(0, None))
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def affinity_arrows(
    ax: Axes, image: Tensor, strengths: Tensor, radius: int, stride: int, cell: tuple[int, int], title: str = ""
) -> None:
    """The neighbourhood of a cell: an arrow to every cell that it is paired with, as thick and dark as their affinity.

    Args:
        image: uint8 (3, H, W).
        strengths: (O, S) in 0..1 of the pairs of this image, see `wsss.affinity`.
        radius: that of the pairs.
        stride: pixels along one side of a cell.
        cell: row and column; cells at the border have few pairs or none.
    """
    grid = tuple(-(-side // stride) for side in image.shape[1:])
    sources, partners = pair_indices(grid, radius)
    own = cell[0] * grid[1] + cell[1]
    as_source, as_partner = sources == own, partners == own
    ends = [*partners[:, as_source].flatten().tolist(), *sources.expand_as(partners)[as_partner].tolist()]
    values = [*strengths[:, as_source].flatten().tolist(), *strengths[as_partner].tolist()]
    centre = lambda index: ((index % grid[1] + 0.5) * stride - 0.5, (index // grid[1] + 0.5) * stride - 0.5)
    picture(ax, image, title)
    for end, value in zip(ends, values):
        look = {"arrowstyle": "-|>", "mutation_scale": 9 * value, "shrinkA": 0, "shrinkB": 0}
        look |= {"linewidth": 3 * value, "color": plt.cm.plasma(1 - value), "alpha": min(1, 0.2 + value)}
        ax.annotate("", centre(end), centre(own), arrowprops=look)
    (x, y), reach = centre(own), (radius + 0.5) * stride
    ax.plot(x, y, "o", color="white", markeredgecolor="black", markersize=6, zorder=4)
    ax.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach))


def seed_dots(frame: pd.DataFrame, panels: Sequence[str], xlabel: str, absent: Callable[[str, str], str]) -> None:
    """Every run a dot, its arm a line and its protocol a panel, without a CRF and with one; bars are means over seeds.

    Args:
        frame: arm, protocol, crf (bool), seed, value.
        panels: the protocols.
        absent: says what stands where an arm has no run under a protocol, from their names.
    """
    arms = list(frame["arm"].unique())
    size = (1.2 + 2.3 * len(panels), 1.1 + 0.36 * len(arms))
    same = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", **same)
    looks = {False: ("without CRF", "tab:blue", -0.17), True: ("with CRF", "tab:orange", 0.17)}
    middle = (frame["value"].min() + frame["value"].max()) / 2
    for ax, panel in zip(axes[0], panels):
        own = frame[frame["protocol"] == panel]
        for place, arm in enumerate(arms):
            if arm not in set(own["arm"]):
                ax.text(middle, place, absent(arm, panel), ha="center", va="center", fontsize=8, color="0.6")
            for crf, (_, colour, offset) in looks.items():
                values = own.loc[(own["arm"] == arm) & (own["crf"] == crf), "value"]
                ax.plot(values, [place + offset] * len(values), "o", color=colour, markersize=3.5, alpha=0.7)
                ax.vlines(values.mean(), place + offset - 0.16, place + offset + 0.16, color=colour, linewidth=2)
        ax.set_title(panel, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
    axes[0, 0].set(yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5))
    figure.supxlabel(xlabel, fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour, _ in looks.values()]
    axes[0, -1].legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)


def gallery(
    samples: Sequence[Sample],
    titles: Sequence[str],
    seen: Mapping[str, np.ndarray],
    arms: Sequence[str],
    ceiling: str,
    classes: Sequence[str],
) -> None:
    """Images, three rows each: map, decoder and retrained network of every arm; beside them image, truth and a ceiling.

    Args:
        titles: what to say of each image.
        seen: pictures, see `wsss.gallery`.
        ceiling: the arm whose decoder stands below the truth.
    """
    whats = ("map", "decoder", "retrained")
    axes = table_of_axes(len(whats) * len(samples), 1 + len(arms), 1.05)
    for sample, title, rows in zip(samples, titles, np.split(axes, len(samples))):
        picture(rows[0, 0], sample.image)
        labels(rows[1, 0], sample.mask, classes)
        labels(rows[2, 0], torch.from_numpy(seen[f"{ceiling}/{sample.name}/decoder"]), classes)
        for ax, text in zip(rows[:, 0], (title, "truth", ceiling)):
            ax.set_ylabel(text, fontsize=8)
        for arm, column in zip(arms, rows[:, 1:].T):
            for what, ax in zip(whats, column):
                own = seen.get(f"{arm}/{sample.name}/{what}")
                if own is None:
                    look = {"ha": "center", "va": "center", "fontsize": 8, "color": "0.5"}
                    ax.text(0.5, 0.5, f"no {what}", transform=ax.transAxes, **look)
                    ax.set_frame_on(False)
                elif what == "map":
                    values = resize(torch.from_numpy(own)[None, None] / 255, tuple(sample.image.shape[1:]))[0, 0]
                    heat(ax, sample.image, values, low=0, high=1)
                else:
                    labels(ax, torch.from_numpy(own), classes)
        for what, ax in zip(whats, rows[:, 1]):
            ax.set_ylabel(what, fontsize=8)
    for arm, ax in zip(("image", *arms), axes[0]):
        ax.set_title(arm, fontsize=9)
