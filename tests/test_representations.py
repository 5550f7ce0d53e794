"""What is said of tokens, patches and activations, on networks whose answer is known."""

import numpy as np
import pytest
import torch
from conformers import small_conformer
from torch import nn

from wsss.data import Sample
from wsss.data.scenes import Scenes
from wsss.data.transforms import normalise
from wsss.methods.apc import pool
from wsss.methods.transcam import TransCAM, TransCAMConfig
from wsss.representations import (
    DistanceStream,
    boundary_band,
    depths,
    describe_activation,
    describe_patches,
    describe_sizes,
    describe_tokens,
    majority_labels,
)

CLASSES, DIM, PATCHES = 3, 6, 5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Toy(torch.utils.data.Dataset):
    """Eight black images; image i shows class i % 3 and, every other one, the next class too."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        label = torch.zeros(CLASSES)
        label[index % 3] = 1
        label[(index + index % 2) % 3] = 1
        image = torch.full((3, 4, 4), index, dtype=torch.uint8)
        return Sample(image, label, torch.zeros(4, 4, dtype=torch.int64), str(index))


class Stub(nn.Module):
    """Class tokens along one axis a class, of random length and with `noise`; random patches."""

    def __init__(self, noise=0.0, patches=None):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        random = torch.Generator().manual_seed(0)
        length = torch.rand(8, CLASSES, 1, generator=random) + 0.5
        self.classes = length * torch.eye(CLASSES, DIM) + noise * torch.randn(8, CLASSES, DIM, generator=random)
        self.patches = torch.randn(8, PATCHES, DIM, generator=random) + 0.5 if patches is None else patches
        self.seen = []

    def tokens(self, images):
        assert not torch.is_grad_enabled() and not self.training
        start = sum(self.seen)
        self.seen.append(len(images))
        return self.classes[start : start + len(images)], self.patches[start : start + len(images)]


def present():
    return [(i, c) for i in range(8) for c in range(CLASSES) if Toy()[i].label[c]]


def test_separated_tokens_have_a_silhouette_of_one():
    described = describe_tokens(Stub(), Toy(), 8)
    assert described["silhouette"] == pytest.approx(1, abs=1e-3)
    assert described["classes"] == [c for _, c in present()], "tokens of the classes in the image, in order"
    assert np.array(described["tsne"]).shape == (len(present()), 2)


def test_silhouette_against_its_definition():
    method = Stub(noise=0.5)
    tokens = [(c, method.classes[i, c].double().numpy()) for i, c in present()]
    cosine = lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    values = []
    for own, token in tokens:
        mean = lambda c: np.mean([cosine(token, t) for k, t in tokens if k == c and t is not token])
        inside, outside = mean(own), min(mean(c) for c in range(CLASSES) if c != own)
        values.append((outside - inside) / max(inside, outside))
    described = describe_tokens(method, Toy(), 8)
    assert described["silhouette"] == pytest.approx(np.mean(values), abs=1e-4)
    assert described["silhouette"] < 0.9


def test_patch_similarity_against_a_double_loop():
    method, values = Stub(), []
    for patches in method.patches.double().numpy():
        for i in range(PATCHES):
            for j in range(PATCHES):
                if i != j:
                    lengths = np.linalg.norm(patches[i]) * np.linalg.norm(patches[j])
                    values.append(patches[i] @ patches[j] / lengths)
    assert describe_tokens(method, Toy(), 8)["patch_similarity"] == pytest.approx(np.mean(values), abs=1e-4)


def test_equal_patches_are_wholly_smooth_and_opposite_ones_are_not():
    equal = torch.ones(8, PATCHES, DIM) * torch.arange(1, PATCHES + 1)[:, None]
    assert describe_tokens(Stub(patches=equal), Toy(), 8)["patch_similarity"] == 1
    opposite = torch.ones(8, 2, DIM) * torch.tensor([1.0, -1])[:, None]
    assert describe_tokens(Stub(patches=opposite), Toy(), 8)["patch_similarity"] == -1


def test_same_seed_same_picture():
    first, again, other = (describe_tokens(Stub(noise=0.5), Toy(), 8, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["tsne"] != other["tsne"] and first["silhouette"] == other["silhouette"]


def test_only_the_first_images_count():
    method = Stub()
    described = describe_tokens(method, Toy(), 6)
    assert method.seen == [6] and described["classes"] == [c for i, c in present() if i < 6]


# ------------------------------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden_apc_dist(golden, dtype, tolerance):
    data = golden("apc_dist")
    stream = DistanceStream(data["num_classes"])
    for features, labels in zip(data["F"].to(dtype).split(7), data["label"].split(7), strict=True):
        stream.update(features, labels, data["ignore"])
    found = stream.result()
    assert torch.equal(found.count, data["count"])
    names = {
        **{name: name for name in ("intra_per_class", "inter_matrix", "intra", "inter", "intra_micro", "inter_micro")},
        **{name.replace("proto_", "prototype_"): name for name in ("intra_proto_per_class",)},
        "intra_prototype": "intra_proto",
        "inter_prototype": "inter_proto",
        "prototype": "prototype",
    }
    for ours, theirs in names.items():
        value, expected = torch.as_tensor(getattr(found, ours)).double(), torch.as_tensor(data[theirs]).double()
        if ours == "prototype":
            value, expected = value[data["count"] > 0], expected[data["count"] > 0]
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, equal_nan=True, msg=ours)


def test_majority_label_of_a_patch():
    mask = torch.tensor([[[0, 0, 3, 3], [0, 1, 255, 255], [1, 2, 2, 0], [2, 1, 0, 255]]])
    assert majority_labels(mask, 2).tolist() == [[[0, 3], [1, 0]]]
    assert majority_labels(mask, 4).shape == (1, 1, 1)


def test_boundary_band_keeps_pixels_near_another_label():
    mask = torch.zeros(1, 9, 9, dtype=torch.long)
    mask[0, :, 6:] = 2
    band = boundary_band(mask, 2)
    assert torch.equal(band[0, :, 4:8], mask[0, :, 4:8])
    assert (band[0, :, :4] == 255).all() and (band[0, :, 8:] == 255).all()
    assert (boundary_band(torch.zeros_like(mask)) == 255).all(), "no contour, no band"


def test_depths_are_distances_to_the_contour():
    inside = np.zeros((7, 9), bool)
    inside[2:5, 2:7] = True
    found = depths(inside)
    assert found[3, 4] == 2 and found[2, 4] == 1 and found[1, 4] == -1 and found[0, 4] == -2
    assert found[0, 0] == pytest.approx(-np.hypot(2, 2), abs=1e-3)


class Squares(torch.utils.data.Dataset):
    """Six images of 16 x 16; image i has a square of class i % 2 + 1 at its left."""

    classes = ("a", "b")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        mask, label = torch.zeros(16, 16, dtype=torch.int64), torch.zeros(2)
        mask[2:14, :8] = index % 2 + 1
        label[index % 2] = 1
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        image[index % 2, 2:14, :8] = 200
        return Sample(image, label, mask, str(index))


class Sure(nn.Module):
    """Patches of 4 x 4 pixels that know their class from their colour; their features are their scores."""

    class config:
        theta, max_k = 0.9, 6

    class backbone:
        patch_size = 4

    def __init__(self, pooling):
        super().__init__()
        self.pooling, self.weight, self.decoder = pooling, nn.Parameter(torch.zeros(())), "its own arg max"

    def patch_scores(self, images):
        means = torch.nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        scores = torch.cat([torch.full_like(means[..., :1], -1.5), means[..., :2]], 2).mul(5).softmax(2)
        return scores, scores

    def pool(self, scores):
        return pool(scores, self.pooling, self.config.max_k, self.config.theta)

    def segment(self, images):
        return self.patch_scores(images)[1].transpose(1, 2).unflatten(2, (4, 4)).log()


def test_patches_of_a_network_that_is_sure():
    described = {pooling: describe_patches(Sure(pooling), Squares(), 6) for pooling in ("adaptive", "max", "average")}
    own = described["adaptive"]
    assert 2 * own["intra"] < own["inter"] and 2 * own["intra_prototype"] < own["inter_prototype"]
    assert len(own["k_shares"]) == 6 and sum(own["k_shares"]) == pytest.approx(1, abs=1e-3)
    assert 1 < own["k_mean"] <= 6 and described["max"]["k_mean"] == 1 and described["max"]["k_shares"][0] == 1
    assert described["max"]["k_rank_correlation"] is None, "a constant k has no rank"
    outer, near, edge, inner = own["heat"]
    assert outer < near < edge < inner
    assert described["max"]["outlier_error"] > 0.9, "one patch is enough for max pooling"
    assert described["adaptive"]["outlier_error"] == described["max"]["outlier_error"], "it starts with that one"
    assert described["average"]["outlier_rise"] < 2 / 16, "one of 16 patches"
    assert own["outlier_rise"] <= own["outlier_error"]
    assert 0.5 < own["boundary_miou"] < 1


def test_the_same_seed_injects_the_same_outliers():
    one, same = (describe_patches(Sure("average"), Squares(), 6, seed=3) for _ in range(2))
    assert one == same


class Blurred(nn.Module):
    """A decoder that knows the classes of `Squares` from their colour, on a grid of patches of 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def segment(self, images):
        means = torch.nn.functional.avg_pool2d(images, 4)
        return torch.cat([torch.full_like(means[:, :1], -1.5), means[:, :2]], 1) * self.weight


def test_larger_images_cost_more_and_show_more():
    told = describe_sizes(Blurred(), Squares(), 6, [8, 16, 32])
    assert told["sizes"] == [8, 16, 32]
    assert 0 < told["size_miou"][0] < told["size_miou"][1] < told["size_miou"][2] <= 1
    assert all(0 < seconds < 1 for seconds in told["size_seconds"])
    first, second, third = (3 * (side // 4) ** 2 * 4 / 2**20 for side in (8, 16, 32))  # what the product keeps
    assert told["size_memory_mb"] == [round(v + 4 / 2**20, 2) for v in (first, second, third)]
    assert describe_sizes(Blurred(), Squares(), 6, [16])["size_miou"] == told["size_miou"][1:2]


# --------------------------------------------------------------------------------------------------------- activation


class Pairs(torch.utils.data.Dataset):
    """Images of 16 x 16 of the classes a (above) and b (below, but in the first), with a void column and corner."""

    classes = ("a", "b")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        mask = torch.zeros(16, 16, dtype=torch.int64)
        mask[1:7, 2:9] = 1
        mask[9:15, 5:12] = 2 if index else 0
        mask[:, 15] = mask[:4, 12:] = 255
        image = torch.full((3, 16, 16), index, dtype=torch.uint8)
        return Sample(image, torch.tensor([1.0, float(index > 0)]), mask, str(index))


class Active(nn.Module):
    """Attention and maps on patches of 4 x 4 pixels, random but the same for an image whenever it comes."""

    class backbone:
        patch_size = 4

    def __init__(self):
        super().__init__()
        self.weight, random = nn.Parameter(torch.zeros(())), torch.Generator().manual_seed(0)
        self.attention = torch.rand(3, 4, 4, generator=random)
        self.values = {name: torch.randn(3, 2, 4, 4, generator=random) for name in ("cam", "transcam")}
        self.levels = normalise(torch.arange(3, dtype=torch.uint8)[None, :, None].expand(3, -1, 1))[0, :, 0]

    def index(self, images):
        assert not torch.is_grad_enabled() and not self.training
        return (images[:, 0, 0, 0, None] - self.levels).abs().argmin(1)

    def received_attention(self, images):
        return self.attention[self.index(images)]

    def maps(self, images):
        chosen = self.index(images)
        return {name: values[chosen] for name, values in self.values.items()} | {
            "class_logits": torch.zeros(len(images), 2, 1, 1)
        }


def test_activation_against_loops():
    method, found = Active(), {}
    for index in range(3):
        sample = Pairs()[index]
        for row, column in np.ndindex(4, 4):
            cell = sample.mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist()
            label = max(sorted(set(cell)), key=cell.count)
            kind = {0: "background", 255: None}.get(label, "object")
            if kind:
                found.setdefault(f"attention_{kind}", []).append(method.attention[index, row, column].item())
        for name, values in method.values.items():
            for c in sample.label.nonzero()[:, 0].tolist():
                large = torch.nn.functional.interpolate(values[index, c][None, None], (16, 16), mode="bilinear")[0, 0]
                large = (large - large.min()) / (large.max() - large.min())
                for row, column in np.ndindex(16, 16):
                    truth = sample.mask[row, column].item()
                    kind = {0: "background", c + 1: "object", 255: None}.get(truth, "other")
                    if kind:
                        found.setdefault(f"{name}_{kind}", []).append(large[row, column].item())
    described = describe_activation(method, Pairs(), 3)
    assert described == {name: pytest.approx(np.mean(values), abs=2e-4) for name, values in found.items()}
    assert len(described) == 8


def test_activation_of_the_first_images_without_another_class():
    described = describe_activation(Active(), Pairs(), 1)
    assert described["cam_other"] is None and described["transcam_other"] is None
    assert described["cam_object"] != describe_activation(Active(), Pairs(), 3)["cam_object"]


def test_activation_of_transcam():
    """A whole network: its attention is a multiple of the mean, so the two places lie on both sides of 1."""
    torch.manual_seed(0)
    method = TransCAM(TransCAMConfig(), 10, small_conformer())
    described = method.describe(Scenes("train", images=3), 2)
    low, high = sorted(described[f"attention_{place}"] for place in ("background", "object"))
    assert low < 1 < high
    assert all(0 <= described[f"{name}_object"] <= 1 for name in ("cam", "transcam"))
