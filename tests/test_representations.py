"""What is said of tokens, on tokens whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from wsss.data import Sample
from wsss.representations import describe_tokens

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
