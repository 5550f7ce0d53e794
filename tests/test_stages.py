"""What one network leaves and the next one learns from: label maps by networks whose answers are known."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsss.affinity import merge_crf_labels
from wsss.backbones.resnet38 import ResNet38
from wsss.data import DataError, Sample
from wsss.data.scenes import Scenes
from wsss.data.transforms import normalise
from wsss.evaluation import EvalConfig, Request, batches_of_one_size, evaluate
from wsss.methods.affinity import AffinityConfig, AffinityNet
from wsss.methods.common import Method
from wsss.metrics import ConfusionMatrix
from wsss.refine import dense_crf, label_probabilities
from wsss.stages import (
    Relabelled,
    Trained,
    affinity_labels,
    given_maps,
    pseudo_masks,
    relabel,
    score_masks,
    walked_maps,
)

CLASSES = 3
CONFIG = EvalConfig(
    eval_size=0,
    map_scales=(1.0,),
    decoder_scales=(1.0,),
    eval_flip=False,
    map_relu=(),
    threshold_cam=0.5,
    threshold_lam=0.5,
    threshold_fused=0.5,
    crf_gaussian=(3, 3),
    crf_bilateral=(10, 9, 30),
    crf_iterations=3,
    train_images=0,
    decoder_crf=False,
)
WITHOUT_CRF = replace(CONFIG, crf_iterations=0)  # its posterior are the labels that it is given
CORE, REST = 1.0, 0.4  # scores of the two halves of an object: above both background scores, and between them


class Objects(torch.utils.data.Dataset):
    """Images of several sizes with one or two rectangles of one colour each on grey, and a void line below."""

    identity, split, classes = "objects", "train", ("a", "b", "c")

    def __init__(self, sizes=((40, 60), (40, 60), (42, 58), (40, 60), (42, 58)), split="train"):
        random, self.split, self.samples = np.random.default_rng(0), split, []
        for index, (height, width) in enumerate(sizes):
            image = random.integers(100, 130, (3, height, width)).astype(np.uint8)
            mask, own = np.zeros((height, width), np.int64), [index % CLASSES, (index + index % 2) % CLASSES]
            for c, left in zip(own, (8, 36)):
                mask[8:32, left : left + 16] = c + 1
                image[:, 8:32, left : left + 16] = random.integers(0, 20, (3, 24, 16))
                image[c, 8:32, left : left + 16] += 200
            mask[-1] = 255
            label = torch.zeros(CLASSES).index_fill(0, torch.tensor(own), 1)
            self.samples.append(Sample(torch.from_numpy(image), label, torch.from_numpy(mask), f"image_{index}"))
        self.labels, self.names = torch.stack([s.label for s in self.samples]), [s.name for s in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def fingerprint(image):
    """Tells normalised images (3, H, W) apart."""
    return image.numpy().tobytes()


def seed_map(sample, classes=CLASSES):
    """(C, H, W): `CORE` in the upper half of the image but for every fifth column, else `REST`; 0 around objects."""
    rows, columns = (torch.arange(side) for side in sample.mask.shape)
    score = torch.where((rows[:, None] < len(rows) // 2) & (columns % 5 > 0), CORE, REST)
    return (sample.mask == torch.arange(1, classes + 1)[:, None, None]) * score


class Oracle(Method):
    """A classifier whose map "cam" is the `seed_map` of the images of a dataset."""

    map_names, mask_map = ("cam",), "cam"

    def __init__(self, dataset):
        super().__init__()
        self.weight, self.num_classes, self.seen = nn.Parameter(torch.zeros(())), len(dataset.classes), []
        samples = [dataset[index] for index in range(len(dataset))]
        self.known = {fingerprint(normalise(s.image)): (s.name, seed_map(s, self.num_classes)) for s in samples}

    def maps(self, images):
        assert not self.training
        names, maps = zip(*(self.known[fingerprint(image)] for image in images.cpu()))
        self.seen += names
        return {"cam": torch.stack(maps), "class_logits": torch.zeros(len(images), self.num_classes, 1, 1)}


class KnowingAffinity(AffinityNet):
    """Its embedding is the truth at the cells' upper left pixels, so that a walk never leaves an object."""

    def __init__(self, dataset, **settings):
        backbone = ResNet38((16, 16, 16, 8, 12, 16, 20), (1, 1, 1, 1), (2, 2, 1), (0.0, 0.0))
        config = AffinityConfig(**{"tap_widths": (4, 4, 4), "embedding_width": 8, "frozen_stages": ()} | settings)
        super().__init__(config, len(dataset.classes), backbone)
        samples = [dataset[index] for index in range(len(dataset))]
        self.known = {s.image.shape[1:]: [] for s in samples}
        for s in samples:
            self.known[s.image.shape[1:]].append((normalise(s.image), s.mask))

    def embed(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return torch.stack([self._of(image) for image in images.cpu()])

    def _of(self, image):
        for (height, width), known in self.known.items():
            for own, mask in known:
                if torch.equal(image[:, :height, :width], own) and not image[:, height:].any():
                    cells = F.pad(mask, (0, -width % 4, 0, -height % 4), value=255)[::4, ::4]
                    return 100 * F.one_hot(cells, 256).permute(2, 0, 1).float()
        raise AssertionError("an image that is padded with zeros at the right and below")


@pytest.fixture
def dataset():
    return Objects()


@pytest.fixture
def seeds(dataset):
    return Trained(Oracle(dataset).eval(), CONFIG)


def stage(dataset, config=CONFIG, **settings):
    torch.manual_seed(0)
    return Trained(KnowingAffinity(dataset, **settings), config)


def everything(dataset):
    return batches_of_one_size(dataset, range(len(dataset)))


def by_name(labelled):
    return {sample.name: mask for sample, mask in labelled}


# ---------------------------------------------------------------------------------------------------------- label maps


def test_labels_of_affinity_are_certain_where_both_background_scores_agree(dataset, seeds):
    labels = by_name(affinity_labels(seeds, stage(dataset, WITHOUT_CRF), everything(dataset)))
    assert sorted(labels) == dataset.names
    for sample in dataset.samples:
        score = seed_map(sample).amax(0)
        expected = torch.where(score == CORE, sample.mask, torch.where(score == REST, 255, 0))
        assert torch.equal(labels[sample.name], expected), sample.name


def test_labels_of_affinity_pass_the_crf_of_their_stage(dataset, seeds):
    """Not that of the classifier."""
    other = replace(seeds, config=replace(CONFIG, crf_bilateral=(1, 50, 50), crf_iterations=1))
    labels = by_name(affinity_labels(other, stage(dataset), everything(dataset)))
    changed = 0
    for sample in dataset.samples:
        refined, scores = [], seed_map(sample)
        for threshold in (0.6, 0.25):
            plain = (scores.argmax(0) + 1).masked_fill(scores.amax(0) <= threshold, 0)
            probabilities = label_probabilities(plain, CLASSES + 1)
            posterior = dense_crf(sample.image.permute(1, 2, 0), probabilities, **CONFIG.crf)
            refined.append(posterior.argmax(0))
            changed += (refined[-1] != plain).sum().item()
        assert torch.equal(labels[sample.name], merge_crf_labels(*refined)), sample.name
    assert changed > 100, "the CRF moves something"


def test_absent_classes_make_no_labels(dataset, seeds):
    """The seeds of a class that the image does not have are left out."""
    for sample in dataset.samples:
        sample.label.zero_()
    affinity = stage(dataset, WITHOUT_CRF)
    labels = by_name(affinity_labels(seeds, affinity, everything(dataset)))
    masks = by_name(pseudo_masks([affinity, seeds], everything(dataset), crf=False))
    assert all((mask == 0).all() for mask in (*labels.values(), *masks.values()))


def test_walked_maps_fill_objects_and_keep_the_size_of_the_image(dataset, seeds):
    affinity = stage(dataset, radius=3)
    for samples in everything(dataset):
        with torch.no_grad():
            walked = walked_maps(affinity, seeds, samples)
        height, width = samples[0].image.shape[1:]
        assert walked.shape == (len(samples), CLASSES + 1, height, width)
        for sample, planes in zip(samples, walked):
            for left, c in zip((8, 36), sample.mask[10, [10, 40]].tolist()):
                inside = planes[:, 12:28, left + 4 : left + 12]  # away from the border, where planes are interpolated
                mean = seed_map(sample)[c - 1, 8:32, left : left + 16].mean()
                torch.testing.assert_close(inside[c], mean.expand_as(inside[c]), rtol=0, atol=0.02)
                torch.testing.assert_close(inside[0], torch.full_like(inside[0], 0.42), rtol=0, atol=1e-3)


def test_a_random_walk_on_scenes_turns_half_an_object_into_a_whole_one():
    """End to end on 80 x 80 scenes: only in the upper half of an image do seeds pass the background score."""
    dataset = Scenes("train", images=6)
    seeds, affinity = Trained(Oracle(dataset).eval(), CONFIG), stage(dataset, background=0.42)
    matrices = {name: ConfusionMatrix(11) for name in ("seeds", "walk")}
    for name, chain in (("seeds", [seeds]), ("walk", [affinity, seeds])):
        for sample, mask in pseudo_masks(chain, everything(dataset), crf=False):
            assert mask.dtype == torch.int64 and mask.shape == sample.mask.shape
            assert set(mask.unique().tolist()) <= {0, *(sample.label.nonzero()[:, 0] + 1).tolist()}
            matrices[name].update(mask, sample.mask)
    before, after = (matrices[name].scores().mean_recall for name in ("seeds", "walk"))
    assert after > before + 0.15


def test_masks_of_a_method_alone_are_those_that_are_scored(dataset, seeds):
    for crf, threshold in ((False, 0.5), (False, 0.3), (True, 0.5)):
        own = replace(seeds, config=replace(CONFIG, threshold_cam=threshold))
        matrix = ConfusionMatrix(CLASSES + 1)
        for sample, mask in pseudo_masks([own], everything(dataset), crf):
            matrix.update(mask, sample.mask)
        request = Request("maps-given-labels", "cam", crf)
        [scores] = evaluate(own.method, dataset, [request], own.config, progress=False).values()
        assert torch.equal(matrix.scores().iou, scores.iou), request.key
    assert (matrix.scores().iou > 0).all()


def test_masks_of_a_chain_pass_the_crf_of_the_affinity_network(dataset, seeds):
    affinity = stage(dataset)
    other = replace(seeds, config=replace(CONFIG, crf_bilateral=(1, 50, 50), crf_iterations=1))
    plain, refined = (by_name(pseudo_masks([affinity, other], everything(dataset), crf)) for crf in (False, True))
    assert any(not torch.equal(plain[name], refined[name]) for name in plain)
    for sample in dataset.samples:
        probabilities = label_probabilities(plain[sample.name], CLASSES + 1)
        posterior = dense_crf(sample.image.permute(1, 2, 0), probabilities, **CONFIG.crf)
        assert torch.equal(refined[sample.name], posterior.argmax(0))


def test_scores_of_masks_are_those_of_the_first_images(dataset, seeds):
    chain = [stage(dataset), seeds]
    scores = score_masks(chain, dataset, 3)
    assert list(scores) == ["maps-given-labels/walk", "maps-given-labels/walk+crf"]
    for (key, found), crf in zip(scores.items(), (False, True)):
        matrix = ConfusionMatrix(CLASSES + 1)
        for sample, mask in pseudo_masks(chain, batches_of_one_size(dataset, range(3)), crf):
            matrix.update(mask, sample.mask)
        assert torch.equal(found.iou, matrix.scores().iou), key
    assert sorted(set(seeds.method.seen)) == dataset.names[:3]
    assert scores["maps-given-labels/walk"].iou.tolist() != scores["maps-given-labels/walk+crf"].iou.tolist()
    [whole, _], [part, _] = score_masks(chain, dataset).values(), scores.values()
    assert not torch.equal(whole.iou, part.iou)


@pytest.mark.parametrize("change", [{"mask_map": ""}, {"probability_maps": ("cam",)}])
def test_seeds_need_a_background_score(dataset, seeds, change):
    for name, value in change.items():
        setattr(seeds.method, name, value)
    with pytest.raises(ValueError, match="Oracle has no class maps with a background score.*cam, more, seco and"):
        given_maps(seeds, dataset.samples[:1])


# --------------------------------------------------------------------------------------------------------------- files


def quadrants(batches):
    """Label maps that tell images apart: the class of the image's number, in the upper left quarter."""
    for samples in batches:
        for sample in samples:
            mask = torch.zeros(sample.image.shape[1:], dtype=torch.int64)
            mask[: len(mask) // 2, : mask.shape[1] // 2] = 1 + int(sample.name[-1])
            yield sample, mask


def test_relabelled_images_have_the_written_masks(dataset, tmp_path):
    relabelled = relabel(dataset, tmp_path / "labels", quadrants, images=4, progress=False)
    assert (relabelled.identity, relabelled.split, relabelled.classes) == ("objects", "train", ("a", "b", "c"))
    assert len(relabelled) == 4 and relabelled.names == dataset.names[:4]
    assert torch.equal(relabelled.labels, dataset.labels[:4])
    expected = by_name(quadrants(everything(dataset)))
    for index in range(4):
        sample, original = relabelled[index], dataset[index]
        assert sample.mask.dtype == torch.int64 and torch.equal(sample.mask, expected[sample.name])
        assert sample.image is original.image and sample.label is original.label and sample.name == original.name
        assert set(original.mask.unique().tolist()) != set(sample.mask.unique().tolist()), "the truth is left alone"
    files = list((tmp_path / "labels").iterdir())
    assert sorted(path.name for path in files) == [f"{name}.png" for name in dataset.names[:4]], "nothing else"
    assert all(path.stat().st_size < 4096 for path in files)


@pytest.mark.parametrize("images, expected", [(0, 5), (2, 2), (9, 5)])
def test_how_many_images_are_relabelled(dataset, tmp_path, images, expected):
    assert len(relabel(dataset, tmp_path, quadrants, images, progress=False)) == expected


def test_uncertain_pixels_survive_the_file(dataset, tmp_path):
    void = lambda batches: ((sample, torch.full_like(mask, 255)) for sample, mask in quadrants(batches))
    assert (relabel(dataset, tmp_path, void, 1, progress=False)[0].mask == 255).all()


def test_a_kill_in_the_middle_goes_on_and_keeps_what_is_there(dataset, tmp_path):
    def killed(batches):
        for count, pair in enumerate(quadrants(batches)):
            if count == 2:
                raise KeyboardInterrupt
            yield pair

    asked = []

    def spied(batches):
        for sample, mask in quadrants(batches):
            asked.append(sample.name)
            yield sample, mask

    with pytest.raises(KeyboardInterrupt):
        relabel(dataset, tmp_path, killed, progress=False)
    there = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(there) == 2 and not any(name.startswith(".") for name in there), "no half of a file"
    relabelled = relabel(dataset, tmp_path, spied, progress=False)
    assert sorted(asked + [name.removesuffix(".png") for name in there]) == dataset.names, "only the missing ones"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in there} == there
    expected = by_name(quadrants(everything(dataset)))
    assert all(torch.equal(sample.mask, expected[sample.name]) for sample in (relabelled[i] for i in range(5)))
    asked.clear()
    relabel(dataset, tmp_path, spied, progress=False)
    assert asked == []


def test_a_label_map_that_is_missing_unreadable_or_of_another_size_is_named(dataset, tmp_path):
    relabelled = Relabelled(dataset, tmp_path, 5)
    path = tmp_path / "image_2.png"
    with pytest.raises(DataError, match=f"{path}: this label map is missing or unreadable; remove {tmp_path} and"):
        relabelled[2]
    path.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=f"{path}: this label map is missing or unreadable"):
        relabelled[2]
    cv2.imwrite(str(path), np.zeros((40, 60), np.uint8))
    with pytest.raises(DataError, match=rf"{path}: this label map is \(40, 60\), the image \(42, 58\); remove"):
        relabelled[2]
    cv2.imwrite(str(path), np.zeros((42, 58, 3), np.uint8))
    with pytest.raises(DataError, match=rf"{path}: this label map is \(42, 58, 3\)"):
        relabelled[2]
