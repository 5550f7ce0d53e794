"""Every figure: what its axes show, name and explain."""

from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from wsss import plots
from wsss.affinity import pair_affinity, pair_offsets
from wsss.data import Sample
from wsss.data.classes import palette
from wsss.methods.apc import adaptive_k_pooling

matplotlib.use("Agg")
IMAGE = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
MASK = torch.tensor([[0, 1, 2], [255, 0, 1]])


@pytest.fixture(autouse=True)
def ax():
    yield plt.subplots()[1]
    plt.gcf().canvas.draw()  # every figure can be drawn, the one of the test is the current one
    plt.close("all")


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def panels(count):
    """The axes of the current figure."""
    axes = plt.gcf().axes
    assert len(axes) == count
    return axes


def test_a_row_and_a_table_of_axes_without_ticks():
    axes = plots.row(3, "Three")
    assert len(axes) == 3 and axes[0].figure.get_suptitle() == "Three"
    assert plots.row(1)[0].figure.get_suptitle() == ""
    grid = plots.table_of_axes(2, 3)
    assert grid.shape == (2, 3) and not any(a.get_xticks().size or a.get_yticks().size for a in grid.flat)


def test_a_picture_shows_the_image(ax):
    plots.picture(ax, IMAGE, "an image")
    np.testing.assert_array_equal(ax.images[0].get_array(), IMAGE.permute(1, 2, 0))
    assert ax.get_title() == "an image"


def test_a_map_covers_its_image_and_keeps_its_limits(ax):
    values = torch.tensor([[-1.0, 0], [2, 3]])
    plots.heat(ax, IMAGE, values, "lam", low=-2, high=4)
    grey, overlay = ax.images
    assert grey.get_extent() == overlay.get_extent() == [0, 8, 6, 0]
    np.testing.assert_allclose(grey.get_array(), IMAGE.double().mean(0))
    np.testing.assert_array_equal(overlay.get_array(), values)
    assert overlay.get_clim() == (-2, 4) and ax.get_title() == "lam"
    plots.heat(ax, IMAGE, values)
    assert ax.images[-1].get_clim() == (-1, 3), "its own range without limits"


def test_labels_have_the_colours_of_their_classes(ax):
    plots.labels(ax, MASK, ("boat", "train"), "truth", legend=True)
    shown = ax.images[0].get_array()
    colours = palette(2) / 255
    for value, expected in [(0, colours[0]), (1, colours[1]), (2, colours[2]), (255, plots.UNCERTAIN_COLOUR)]:
        np.testing.assert_allclose(shown[MASK.numpy() == value], np.tile(expected, ((MASK == value).sum(), 1)))
    assert legend_of(ax) == ["background", "boat", "train", "uncertain"] and ax.get_title() == "truth"
    faces = [patch.get_facecolor()[:3] for patch in ax.get_legend().get_patches()]
    np.testing.assert_allclose(faces, [*colours, plots.UNCERTAIN_COLOUR])


def test_a_legend_names_only_what_is_there(ax):
    plots.labels(ax, torch.full((2, 2), 2), ("boat", "train"), legend=True)
    assert legend_of(ax) == ["train"]


def test_labels_without_a_legend(ax):
    plots.labels(ax, MASK, ("boat", "train"))
    assert ax.get_legend() is None


def test_patches_are_framed_where_they_are(ax):
    chosen, other = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    chosen[1, 2] = other[0, 0] = other[2, 3] = True
    plots.patches(ax, IMAGE, (3, 4), {"confident": (chosen, "red"), "uncertain": (other, "blue")}, "relations")
    frames = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches]
    assert frames[0] == (4, 2, 2, 2) and ax.patches[0].get_edgecolor()[:3] == to_rgb("red")
    np.testing.assert_allclose(frames[1:], [(0.8, 0.8, 0.4, 0.4), (6.8, 4.8, 0.4, 0.4)])
    assert legend_of(ax) == ["confident", "uncertain"] and ax.get_title() == "relations"


def test_windows_show_their_numbers(ax):
    plots.windows(ax, torch.tensor([[0, 1, 2], [2, 1, 0]]), [(0, 1, 2, "red")], "kernel")
    assert [text.get_text() for text in ax.texts] == list("012210")
    [box] = ax.patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (0.5, -0.5, 2, 2)
    assert ax.get_title() == "kernel"


def test_a_matrix_has_its_numbers_written_in(ax):
    plots.matrix(torch.tensor([[0.125, 1], [2, 3]]), ["a", "b"], ["c", "d"], "co-occurrence", ".1f", ax)
    assert [text.get_text() for text in ax.texts] == ["0.1", "1.0", "2.0", "3.0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["c", "d"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_title() == "co-occurrence"
    plots.matrix(np.eye(2), ["a", "b"], ["c", "d"], "own figure")
    assert plt.gcf() is not ax.figure and panels(1)[0].get_title() == "own figure"


class Toy:
    """Two images of the classes boat and train."""

    classes, split = ("boat", "train"), "val"
    labels = torch.tensor([[1.0, 1], [1, 0]])

    def __getitem__(self, index):
        return Sample(IMAGE, self.labels[index], torch.zeros(6, 8, dtype=torch.int64), "")


def test_co_occurrences_of_every_dataset():
    plots.co_occurrences([Toy(), Toy()])
    assert "class of the row" in plt.gcf().get_suptitle() and "%" in plt.gcf().get_suptitle()
    for ax in panels(2):
        assert ax.get_title() == "val"
        assert [text.get_text() for text in ax.texts] == ["100", "50", "100", "100"]


def test_samples_stand_above_their_masks():
    plots.samples([Toy()], 2)
    axes = panels(4)
    assert [ax.get_title() for ax in axes] == ["boat, train", "boat", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["val", "", "mask", ""]
    np.testing.assert_array_equal(axes[0].images[0].get_array(), IMAGE.permute(1, 2, 0))
    assert [text.get_text() for text in plt.gcf().legends[0].get_texts()] == ["background", "boat", "train"]


def record(arm, seed, *terms):
    history = [{"step": step, "lr": 0.1, **{term: step + seed + len(arm) for term in terms}} for step in (1, 2)]
    return SimpleNamespace(method="more", variant="published", arm=arm, seed=seed, history=history)


def coloured(ax):
    """Colour -> the values of its line."""
    return {line.get_color(): list(line.get_ydata()) for line in ax.get_lines() if len(line.get_xdata())}


def test_histories_have_a_panel_a_term_and_a_line_an_arm():
    full = [record("full", seed, "cls", "cre") for seed in (0, 2)]
    plots.histories([record("w/o L_cre", 0, "cls"), *full], ("cls", "cre", "ure"), "Losses")
    cls, cre = panels(2)
    assert (cls.get_title(), cre.get_title()) == ("weighted L_cls", "weighted L_cre"), "no panel for a term nobody has"
    assert plt.gcf().get_suptitle() == "Losses"
    assert sorted(coloured(cls).values()) == [[6, 7], [10, 11]], "the mean over seeds"
    [(colour, values)] = coloured(cre).items()
    assert values == [6, 7] and coloured(cls)[colour] == values, "an arm has the same colour in every panel"
    assert legend_of(cre) == ["more.published, w/o L_cre", "more.published, full"], "every arm is explained"
    assert cls.get_legend() is None


def test_histories_of_terms_that_nobody_has():
    with pytest.raises(ValueError, match="no run has any of the terms kd, ssc; they have lr, cls, cre"):
        plots.histories([record("full", 0, "cls", "cre")], ("kd", "ssc"))


def test_token_clusters_by_class_with_their_silhouette():
    tokens = {"tsne": [[0, 1], [2, 3], [4, 5]], "classes": [0, 1, 1], "silhouette": 0.456}
    records = [SimpleNamespace(tokens=tokens, classes=["boat", "train"])] * 2
    plots.token_clusters(records, ["without GCR", "with GCR"])
    first, last = panels(2)
    assert first.get_title() == "without GCR\nsilhouette 0.46" and last.get_title() == "with GCR\nsilhouette 0.46"
    boats, trains = last.collections
    np.testing.assert_array_equal(boats.get_offsets(), [[0, 1]])
    np.testing.assert_array_equal(trains.get_offsets(), [[2, 3], [4, 5]])
    np.testing.assert_allclose(trains.get_facecolor()[0, :3], palette(2)[2] / 255)
    assert legend_of(last) == ["boat", "train"] and first.get_legend() is None


def test_sensitivity_shows_seeds_mean_and_the_recipes_value(ax):
    frame = pd.DataFrame({"lr": [1, 1, 2, 2], "miou": [40.0, 42, 50, 52]})
    plots.sensitivity(frame, "lr", "miou", 2, "mIoU (%)", ax)
    mean, chosen = ax.get_lines()
    assert list(mean.get_ydata()) == [41, 51] and set(chosen.get_xdata()) == {2}
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), frame)
    assert (ax.get_title(), ax.get_ylabel()) == ("lr", "mIoU (%)")


def test_bars_with_the_range_over_seeds():
    frame = pd.DataFrame(
        {
            "class": ["boat", "boat", "boat", "boat", "train", "train"],
            "miou": [10.0, 30, 50, 60, 70, 80],
            "arm": ["full", "full", "base", "base", "full", "base"],
        }
    )
    plots.bars(frame, "class", "miou", "arm", "IoU (%)", "Per class")
    [ax] = panels(1)
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[20, 70], [55, 80]]
    assert list(ax.get_lines()[0].get_ydata()) == [10, 30], "the whisker spans the seeds"
    assert (ax.get_title(), ax.get_ylabel(), legend_of(ax)) == ("Per class", "IoU (%)", ["full", "base"])


def test_threshold_curves_mark_what_every_seed_chose(ax):
    rows = [
        {"arm": arm, "seed": seed, "threshold": t, "value": height + seed + t, "chosen": t == choice + seed}
        for arm, height, choice in (("baseline", 50, 1), ("BNR", 60, 0))
        for seed in (0, 1)
        for t in (0, 1, 2)
    ]
    plots.threshold_curves(ax, pd.DataFrame(rows), "on val")
    lines = coloured(ax)
    assert list(lines.values()) == [[50.5, 51.5, 52.5], [60.5, 61.5, 62.5]], "the mean over seeds"
    bands = [band.get_paths()[0].get_extents() for band in ax.collections[:2]]
    assert [(band.y0, band.y1) for band in bands] == [(50, 53), (60, 63)], "the range over seeds"
    dots = ax.collections[2]
    np.testing.assert_array_equal(dots.get_offsets(), [[1, 51], [2, 53], [0, 60], [1, 62]])
    assert [to_rgb(c[:3]) for c in dots.get_facecolor()[::2]] == [to_rgb(colour) for colour in lines]
    assert legend_of(ax) == ["baseline", "BNR"] and ax.get_title() == "on val"


def test_runs_of_one_seed_are_joined(ax):
    frame = pd.DataFrame({"arm": ["b", "b", "a", "a"], "seed": [0, 1, 0, 1], "value": [50.0, 52, 60, 61]})
    plots.paired_seeds(ax, frame, "mIoU, %", "seeds")
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[50, 60], [52, 61]]
    [means] = ax.collections
    assert [segment[0, 1] for segment in means.get_segments()] == [51, 60.5]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["b", "a"], "in the order of the frame"
    assert (ax.get_title(), ax.get_ylabel()) == ("seeds", "mIoU, %")


def test_growing_set_colours_what_algorithm_1_takes(ax):
    scores = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    plots.growing_set(ax, scores, 0.9)
    k = adaptive_k_pooling(scores[None, :, None], 6, 0.9)[1].item()
    taken = [to_rgb(bar.get_facecolor()) == to_rgb("tab:orange") for bar in ax.patches[:6]]
    assert taken == [True] * k + [False] * (6 - k) and 1 < k < 6
    needed = [segment[0, 1] for segment in ax.collections[0].get_segments()]
    assert needed[0] == pytest.approx(0.8 * 0.9), "v_2 > 0.8 M_1"
    assert needed[4] == pytest.approx(0.4 * 0.58), "v_6 > 0.4 M_5"
    assert ax.get_title() == f"theta = 0.9: k = {k}, y = 0.8"
    assert legend_of(ax) == ["in the set", "refused", "needed to join"]


def test_zones_have_a_line_for_each_arm():
    frame = pd.DataFrame({"arm": ["a", "a", "b", "b"] * 2, "zone": [0, 1] * 4, "value": [1.0, 2, 3, 4, 3, 4, 5, 6]})
    plots.zones(frame, ["outside", "inside"], "probability", "Heat")
    [ax] = panels(1)
    assert [list(line.get_ydata()) for line in ax.get_lines()[:2]] == [[2, 3], [4, 5]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["outside", "inside"]
    assert (ax.get_title(), ax.get_ylabel(), legend_of(ax)) == ("Heat", "probability", ["a", "b"])


CORNERS = torch.tensor([[0, 0], [1, 2], [2, 3]])


def test_patches_are_framed_by_their_tags(ax):
    plots.tagged_patches(ax, CORNERS, 3, torch.tensor([2, 0, -1]), ("boat", "train"))
    frames = [patch for patch in ax.patches if patch.get_width() == 3]
    assert [patch.get_xy() for patch in frames[1::2]] == [(-0.5, -0.5), (1.5, 0.5), (2.5, 1.5)], "x is the column"
    assert not any(patch.get_fill() for patch in frames)
    train, background, uncertain = frames[1::2]  # each lies over a broader frame that sets it off the image
    assert all(low.get_linewidth() > high.get_linewidth() for low, high in zip(frames[::2], frames[1::2]))
    np.testing.assert_allclose(train.get_edgecolor()[:3], palette(2)[2] / 255)
    assert (background.get_linestyle(), uncertain.get_linestyle()) == ("--", "solid")
    assert not train.get_hatch() and not background.get_hatch() and uncertain.get_hatch()
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert legend_of(ax) == ["train", "background", "uncertain"]


def test_patches_without_a_legend(ax):
    plots.tagged_patches(ax, CORNERS[:1], 3, torch.tensor([1]), ("boat",), legend=False)
    assert ax.get_legend() is None


def test_patches_are_numbered_at_their_centres(ax):
    plots.numbered_patches(ax, IMAGE, CORNERS, 4, torch.tensor([False, True, False]), "a grid")
    assert [text.get_text() for text in ax.texts] == ["1", "2★", "3"]
    assert [text.get_position() for text in ax.texts] == [(2, 2), (4, 3), (5, 4)]
    assert ax.get_title() == "a grid"


def test_a_histogram_tells_values_below_the_mean_from_the_others(ax):
    plots.split_histogram(ax, torch.tensor([0.1, 0.2, 0.8, 0.9, 0.9]), 0.58, "mu")
    counts = {}
    for bar in ax.patches:
        colour = to_rgb(bar.get_facecolor())
        counts[colour] = counts.get(colour, 0) + bar.get_height()
    assert counts == {to_rgb("crimson"): 2, to_rgb("tab:green"): 3}
    assert set(ax.get_lines()[0].get_xdata()) == {0.58} and ax.get_title() == "mu"
    plots.split_histogram(ax, torch.tensor([0.5]), 0.5)  # a single value has no range


def test_pairs_are_coloured_by_what_happens_to_them(ax):
    plots.pair_bars(ax, torch.tensor([0.5, -0.2]), ["boat", "train"], [1, -1], "a patch", "cosine")
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [0.5, -0.2])
    assert [to_rgb(bar.get_facecolor()) for bar in ax.patches] == [to_rgb("tab:green"), to_rgb("crimson")]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["boat", "train"] and ax.yaxis_inverted()
    assert legend_of(ax) == ["pulled", "pushed off"] and (ax.get_title(), ax.get_xlabel()) == ("a patch", "cosine")


def test_prototypes_grow_darker_on_their_way(ax):
    points = np.arange(12.0).reshape(3, 2, 2)  # three steps, two classes
    plots.prototype_paths(ax, points, ("boat", "train"), "t-SNE")
    boat, train = ax.collections
    np.testing.assert_array_equal(boat.get_offsets(), points[:, 0])
    alphas = boat.get_alpha()
    assert list(alphas) == sorted(alphas) and alphas[-1] == 1
    assert to_rgb(train.get_facecolor()[-1]) == tuple(palette(2)[2] / 255)
    assert legend_of(ax) == ["boat", "train"] and ax.get_title() == "t-SNE"


def test_arrows_lead_from_a_cell_to_all_it_is_paired_with(ax):
    image = torch.zeros(3, 28, 36, dtype=torch.uint8)  # 7 x 9 cells of 4 pixels
    embedding = torch.rand(1, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    strengths = pair_affinity(embedding, 3)[0]
    plots.affinity_arrows(ax, image, strengths, 3, 4, (3, 4), "a cell")
    starts, ends = ({getattr(arrow, place) for arrow in ax.texts} for place in ("xyann", "xy"))
    assert starts == {(17.5, 13.5)} and len(ends) == len(ax.texts) == 2 * len(pair_offsets(3))
    for arrow in ax.texts:
        x, y = (int(place // 4) for place in arrow.xy)
        assert 0 < (x - 4) ** 2 + (y - 3) ** 2 < 9, "nearer than the radius, on the grid of cells"
        affinity = (-(embedding[0, :, 3, 4] - embedding[0, :, y, x]).abs().mean()).exp().item()
        assert arrow.arrow_patch.get_linewidth() == pytest.approx(3 * affinity, rel=1e-5)
    assert ax.get_title() == "a cell" and ax.get_xlim() == (3.5, 31.5) and ax.get_ylim() == (27.5, -0.5)


def test_a_cell_in_the_corner_has_no_arrows(ax):
    image = torch.zeros(3, 27, 30, dtype=torch.uint8)  # 7 x 8 cells, the last ones not whole
    plots.affinity_arrows(ax, image, pair_affinity(torch.zeros(1, 1, 7, 8), 3)[0], 3, 4, (0, 0))
    assert not ax.texts


def test_every_seed_is_a_dot_in_the_panel_of_its_protocol():
    rows = [("x", "decoder", False, 0, 50.0), ("x", "decoder", False, 1, 60.0), ("x", "decoder", True, 0, 70.0)]
    rows += [("x", "retrained", False, 0, 40.0), ("y", "retrained", False, 0, 45.0)]
    frame = pd.DataFrame(rows, columns=["arm", "protocol", "crf", "seed", "value"])
    plots.seed_dots(frame, ["decoder", "retrained"], "mIoU, %", lambda arm, panel: f"{arm}: no {panel}")
    decoder, retrained = panels(2)
    dots = lambda ax: sorted(x for line in ax.lines for x in line.get_xdata())
    assert dots(decoder) == [50, 60, 70] and dots(retrained) == [40, 45]
    means = [segment[0][0] for bars in decoder.collections for segment in bars.get_segments() if len(segment)]
    assert sorted(m for m in means if np.isfinite(m)) == [55, 70]
    assert [t.get_text() for t in decoder.texts] == ["y: no decoder"] and not retrained.texts
    assert [t.get_text() for t in decoder.get_yticklabels()] == ["x", "y"]
    assert legend_of(retrained) == ["without CRF", "with CRF"] and retrained.get_title() == "retrained"


def test_a_gallery_has_three_rows_an_image_and_says_what_is_missing():
    sample = Sample(IMAGE, torch.ones(2), torch.ones(6, 8).long(), "one")
    mask, other = np.full((6, 8), 2, np.uint8), np.zeros((6, 8), np.uint8)
    seen = {"x/one/map": np.array([[0, 255]], np.uint8), "x/one/retrained": mask, "top/one/decoder": other}
    plots.gallery([sample], ["a boat"], seen, ["x"], "top", ("boat", "train"))
    image, map_, truth, decoder, ceiling, retrained = panels(6)
    np.testing.assert_array_equal(image.images[0].get_array(), IMAGE.permute(1, 2, 0))
    values = map_.images[-1].get_array()
    assert values.shape == (6, 8) and map_.images[-1].get_clim() == (0, 1)
    assert (values[:, 0] == 0).all() and (values[:, -1] == 1).all()
    colours = palette(2) / 255
    for ax, colour in ((truth, colours[1]), (ceiling, colours[0]), (retrained, colours[2])):
        np.testing.assert_allclose(ax.images[0].get_array()[0, 0], colour)
    assert not decoder.images and decoder.texts[0].get_text() == "no decoder"
    assert [ax.get_ylabel() for ax in (image, truth, ceiling)] == ["a boat", "truth", "top"]
    assert [ax.get_title() for ax in (image, map_)] == ["image", "x"]
