import pytest
import torch
import torch.nn.functional as F

from wsss.affinity import (
    affinity_loss,
    affinity_targets,
    merge_crf_labels,
    pair_affinity,
    pair_indices,
    pair_offsets,
    pool_for_walk,
    psa_background,
    random_walk,
    random_walk_states,
    transition_matrix,
)
from wsss.maps import resize

RADIUS, STRIDE = 5, 8
TRANSCAM = {"background": torch.tensor(0.42), "beta": 14, "doublings": 7}  # the reference's background is float32
PSA = {"alpha": 16, "beta": 8, "doublings": 8}
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def embedding_of(data):
    """The affinity network's embedding of its stub taps, which stands for that of an image."""
    parts = [
        F.elu(torch.einsum("oi,ihw->ohw", data[f"w_f8_{tap}"], data[f"conv{level}"]))
        for tap, level in ((3, 4), (4, 5), (5, 6))
    ]
    return F.elu(torch.einsum("oi,ihw->ohw", data["w_f9"], torch.cat(parts)))[None]


def test_golden_transcam_pairs(golden):
    data = golden("transcam_psa")
    assert torch.equal(pair_offsets(RADIUS), data["offsets_r5"])
    sources, partners = pair_indices(data["label_merged"].shape, RADIUS)
    assert torch.equal(sources, data["lab_ind_from"])
    assert torch.equal(partners, data["lab_ind_to"])
    sources, partners = pair_indices(data["narrow_embedding"].shape[1:], RADIUS)
    assert torch.equal(sources, data["narrow_ind_from"])
    assert torch.equal(partners, data["narrow_ind_to"])
    narrow = pair_indices(data["narrow_embedding"].shape[1:], data["narrow_radius"])
    assert torch.equal(partners, narrow[1])


def test_golden_transcam_merged_labels(golden):
    data = golden("transcam_psa")
    maps = data["label_la"].long(), data["label_ha"].long(), data["label_pad"]
    assert torch.equal(merge_crf_labels(*maps), data["label_merged"].long())
    assert torch.equal(merge_crf_labels(*maps, rule="psa"), data["label_merged_psa"].long())


def test_golden_transcam_targets(golden):
    data = golden("transcam_psa")
    targets = affinity_targets(data["label_merged"].long()[None], RADIUS)
    for ours, theirs in zip(targets, ("aff_bg", "aff_fg", "aff_neg"), strict=True):
        assert torch.equal(ours[0], data[theirs].bool()), theirs


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_transcam_affinity(golden, dtype, tolerance):
    data = golden("transcam_psa")
    torch.testing.assert_close(embedding_of(data)[0], data["embedding"], rtol=0, atol=1e-9)
    for name in ("", "narrow_"):
        affinity = pair_affinity(data[f"{name}embedding"][None].to(dtype), RADIUS)[0]
        torch.testing.assert_close(affinity, data[f"{name}aff"].to(dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_transcam_affinity_loss(golden, dtype, tolerance):
    data = golden("transcam_psa")
    affinity = pair_affinity(data["loss_embedding"][None].to(dtype), RADIUS)
    loss = affinity_loss(affinity, affinity_targets(data["label_merged"].long()[None], RADIUS))
    expected = [data[f"loss_{name}"] for name in ("total", "bg", "fg", "neg")]
    torch.testing.assert_close(torch.stack(loss), torch.tensor(expected, dtype=dtype), rtol=0, atol=tolerance)


def test_golden_transcam_transition_matrix(golden):
    data = golden("transcam_psa")
    embedding = data["embedding"][None]
    transition = transition_matrix(
        pair_affinity(embedding, RADIUS), embedding.shape[2:], RADIUS, TRANSCAM["beta"]
    ).to_dense()
    columns = data["rw_trans_1step"].shape[1]
    full = torch.linalg.matrix_power(transition, 2 ** TRANSCAM["doublings"])
    for ours, theirs in ((transition, "rw_trans_1step"), (full, "rw_trans_full")):
        torch.testing.assert_close(ours.T[:, :columns].float(), data[theirs], rtol=0, atol=1e-6)
    once = transition_matrix(pair_affinity(embedding, RADIUS), embedding.shape[2:], RADIUS, 1).to_dense()
    linked = (once > 0) == (data["aff_dense"] > 0)
    assert linked.all()
    weight = once / once.diagonal()[:, None]
    torch.testing.assert_close(weight.float(), data["aff_dense"], rtol=0, atol=1e-6)
    assert (once.diagonal() == 1).sum() == data["n_isolated"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rule", ["transcam", "psa"])
def test_golden_transcam_walk(golden, rule, dtype, tolerance):
    data = golden("transcam_psa")
    cams = data["rw_cam"][None].to(dtype)
    background = TRANSCAM["background"] if rule == "transcam" else psa_background(cams, PSA["alpha"])
    settings = TRANSCAM if rule == "transcam" else PSA
    pooled = pool_for_walk(cams, background, STRIDE)
    torch.testing.assert_close(pooled[0], data[f"rw_{rule}_pooled"].to(dtype), rtol=0, atol=max(tolerance / 10, 1e-9))
    affinity = pair_affinity(embedding_of(data).to(dtype), RADIUS)
    walked = random_walk(pooled, affinity, RADIUS, settings["beta"], settings["doublings"])
    torch.testing.assert_close(walked[0], data[f"rw_{rule}_out"].to(dtype), rtol=0, atol=tolerance)
    height, width = cams.shape[2:]
    large = resize(walked, [STRIDE * side for side in walked.shape[2:]])[0, :, :height, :width]
    prediction = F.pad(data["rw_classes"], (1, 0))[large.argmax(0)]
    assert torch.equal(prediction, data[f"rw_{rule}_pred"].long())


def walk_by_matrix(maps, embedding, radius, beta, steps):
    """The walk of one image: every pair of cells within the radius, one at a time, and a dense matrix."""
    planes, height, width = maps.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    weight = torch.eye(len(cells), dtype=maps.dtype)
    reach = radius - 1
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            below = v > y or (v == y and u > x)
            near = (v - y) ** 2 + (u - x) ** 2 < radius**2
            if below and near and y < height - reach and reach <= x < width - reach:
                weight[i, j] = weight[j, i] = (-(embedding[:, y, x] - embedding[:, v, u]).abs().mean()).exp() ** beta
    transition = weight / weight.sum(0)
    return (maps.flatten(1) @ torch.linalg.matrix_power(transition, steps)).view(planes, height, width)


def test_the_walk_of_a_batch_equals_a_dense_walk_of_each_image():
    torch.manual_seed(0)
    maps, embedding = torch.rand(3, 2, 7, 9).double(), torch.randn(3, 4, 7, 9).double()
    states = list(zip(range(8), random_walk_states(maps, pair_affinity(embedding, 3), 3, beta=2)))
    for steps in (1, 2, 8):
        expected = torch.stack([walk_by_matrix(*image, 3, 2, steps) for image in zip(maps, embedding)])
        torch.testing.assert_close(states[steps - 1][1], expected)
    torch.testing.assert_close(random_walk(maps, pair_affinity(embedding, 3), 3, 2, 3), expected)


def test_isolated_cells_keep_their_scores_and_constant_maps_stay():
    torch.manual_seed(0)
    maps, affinity = torch.rand(1, 2, 12, 13), pair_affinity(torch.randn(1, 4, 12, 13), RADIUS)
    walked = random_walk(maps, affinity, RADIUS, 8, 4)
    sources, partners = pair_indices((12, 13), RADIUS)
    alone = torch.ones(12 * 13, dtype=torch.bool)
    alone[sources] = alone[partners] = False
    assert 0 < alone.sum() < 20
    same = (walked == maps).all(1).flatten()
    assert torch.equal(same, alone)
    constant = random_walk(torch.full_like(maps, 0.3), affinity, RADIUS, 8, 4)
    torch.testing.assert_close(constant, torch.full_like(maps, 0.3))


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (4, 4)])
def test_a_grid_too_narrow_for_pairs(size):
    """A side below 5 leaves radius 1 at most, which has no pairs."""
    maps, embedding = torch.rand(2, 3, *size), torch.rand(2, 4, *size, requires_grad=True)
    affinity = pair_affinity(embedding, RADIUS)
    assert affinity.shape[:2] == (2, 0)
    assert torch.equal(random_walk(maps, affinity, RADIUS, 14, 7), maps)
    loss = affinity_loss(affinity, affinity_targets(torch.zeros(2, *size, dtype=torch.long), RADIUS))
    assert [part.item() for part in loss] == [0, 0, 0, 0]
    loss.total.backward()
    assert (embedding.grad == 0).all()


@pytest.mark.parametrize(("shortest", "radius"), [(5, 2), (6, 2), (9, 4), (10, 4), (11, 5), (30, 5)])
def test_the_radius_shrinks_on_narrow_grids(shortest, radius):
    assert torch.equal(pair_indices((shortest, 30), 5)[1], pair_indices((shortest, 30), radius)[1])
    assert len(pair_indices((30, shortest), 5)[1]) == len(pair_offsets(radius))


def test_targets_by_hand():
    labels = torch.tensor([[[0, 1, 1, 0, 2], [0, 0, 1, 255, 2]] + 3 * [[0] * 5]])
    sources, partners = pair_indices((5, 5), 2)
    targets = affinity_targets(labels, 2)
    flat = labels.flatten().tolist()
    kinds = {"background": 0, "foreground": 0, "different": 0}
    for o in range(len(partners)):
        for s, source in enumerate(sources.tolist()):
            pair = flat[source], flat[partners[o, s]]
            known = 255 not in pair
            expected = {
                "background": known and pair == (0, 0),
                "foreground": known and pair[0] == pair[1] != 0,
                "different": known and pair[0] != pair[1],
            }
            for kind, value in expected.items():
                assert getattr(targets, kind)[0, o, s] == value
                kinds[kind] += value
    assert min(kinds.values()) > 0


def test_merged_labels_by_hand():
    confident, generous = torch.tensor([0, 0, 3, 3, 3, 0]), torch.tensor([0, 3, 3, 0, 4, 0])
    outside = torch.tensor([False] * 5 + [True])
    assert merge_crf_labels(confident, generous, outside).tolist() == [0, 255, 3, 3, 3, 0]
    assert merge_crf_labels(confident, generous, outside, "psa").tolist() == [0, 255, 3, 0, 3, 255]


def test_the_gradient_of_the_affinity():
    torch.manual_seed(0)
    embedding = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda leaf: pair_affinity(leaf, 3), embedding)
    labels = torch.randint(3, (2, 7, 6))
    affinity_loss(pair_affinity(embedding, 3), affinity_targets(labels, 3)).total.backward()
    sources, partners = pair_indices((7, 6), 3)
    paired = torch.zeros(7 * 6, dtype=torch.bool)
    paired[sources] = paired[partners] = True
    assert torch.equal((embedding.grad.abs().sum((0, 1)) > 0).flatten(), paired)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    embedding = torch.randn(1, 16, 11, 11).half().requires_grad_()
    affinity = pair_affinity(embedding, RADIUS)
    assert affinity.dtype == torch.float32
    assert torch.equal(affinity, pair_affinity(embedding.float(), RADIUS))
    affinity.sum().backward()
    assert embedding.grad.dtype == torch.float16


def test_pooling_pads_every_plane_with_zeros():
    pooled = pool_for_walk(torch.ones(1, 2, 4, 6), 0.5, stride=4)
    torch.testing.assert_close(pooled, torch.tensor([[[[0.5, 0.25]], [[1, 0.5]], [[1, 0.5]]]]))
    maps = torch.tensor([-0.2, 0.5]).view(1, 2, 1, 1)
    assert psa_background(maps, 2).item() == 0.25
    assert psa_background(maps[:, :1], 2).item() == 1, "a score below 0 is no class"


def test_bad_input_is_named():
    maps, affinity = torch.rand(1, 2, 12, 13), torch.rand(1, 34, 40)
    with pytest.raises(ValueError, match="radius is 0"):
        pair_offsets(0)
    with pytest.raises(ValueError, match=r"labels have shape \(5, 5\)"):
        affinity_targets(torch.zeros(5, 5), 5)
    with pytest.raises(ValueError, match=r"expected \(B, D, h, w\)"):
        pair_affinity(torch.zeros(3, 5, 5), 5)
    with pytest.raises(ValueError, match="same grid and radius"):
        affinity_loss(affinity, affinity_targets(torch.zeros(1, 12, 14), 5))
    with pytest.raises(ValueError, match=r"12 x 14 cells with radius 5 needs \(B, 34, 48\)"):
        random_walk(torch.rand(1, 2, 12, 14), affinity, 5, 14, 7)
    with pytest.raises(ValueError, match="2 images have maps, but 1 have affinities"):
        random_walk(maps.expand(2, -1, -1, -1), affinity, 5, 14, 7)
    with pytest.raises(ValueError, match=r"expected \(B, K, h, w\)"):
        random_walk(maps[0], affinity, 5, 14, 7)
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        pool_for_walk(maps[0], 0.42)
    with pytest.raises(ValueError, match=r"give a number or \(1, 1, 12, 13\)"):
        pool_for_walk(maps, maps)
    with pytest.raises(ValueError, match="same shape"):
        merge_crf_labels(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="'seam' is unknown; choose one of transcam, psa"):
        merge_crf_labels(torch.zeros(2), torch.zeros(2), rule="seam")
