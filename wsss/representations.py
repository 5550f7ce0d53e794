"""What is inside a trained network: how class tokens separate, how alike patches are, where attention and maps lie."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.data.transforms import normalise, resize_for_evaluation
from wsss.maps import UNCERTAIN, minmax, resize
from wsss.metrics import ConfusionMatrix


@torch.no_grad()
def describe_tokens(method: nn.Module, dataset: Dataset[Sample], images: int, device="cpu", seed: int = 0) -> dict:
    """Class tokens of the classes that are in the first `images` images, as MoRe's figure 5 shows them.

    Args:
        method: has `tokens(images) -> (class tokens (B, C, D), patches (B, L, D))`.

    Returns:
        `silhouette`: mean silhouette (cosine, -1..1) of the tokens under their class;
        `tsne`: (N, 2) coordinates, `classes`: (N,) indices, of the same tokens;
        `patch_similarity`: mean cosine similarity between two patches of an image (over-smoothness is near 1).
    """
    method.to(device).eval()
    tokens, owners, similarity = [], [], []
    for start in range(0, min(images, len(dataset)), 50):
        samples = [dataset[i] for i in range(start, min(start + 50, images, len(dataset)))]
        classes, patches = method.tokens(torch.stack([normalise(s.image) for s in samples]).to(device))
        present = torch.stack([s.label for s in samples]).to(device) > 0.5
        tokens.append(classes[present].cpu())
        owners.append(present.nonzero()[:, 1].cpu())
        mean = F.normalize(patches, dim=2).mean(1)
        length = patches.shape[1]
        similarity.append((mean.square().sum(1) * length - 1) / (length - 1))  # mean over pairs of different patches
    tokens, owners = torch.cat(tokens).numpy(), torch.cat(owners).numpy()
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    perplexity = min(30, len(unit) // 4)
    points = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(unit)
    return {
        "silhouette": round(float(silhouette_score(unit, owners, metric="cosine")), 4),
        "patch_similarity": round(float(torch.cat(similarity).mean()), 4),
        "tsne": np.round(points, 1).tolist(),
        "classes": owners.tolist(),
    }


# ------------------------------------------------------------------------------------------------------------ patches

BAND = 3  # pixels on both sides of a contour that count as the boundary
ZONES = (-1.0, 0.0, 1.0)  # where the zones of a heat map meet: distance to the contour in patches, positive inside


@dataclass(frozen=True)
class ClassDistances:
    """How far patches lie apart (APC table 9): the cosine distance 1 - cos, 0..2, of embeddings by class.

    Attributes:
        count: (C,) embeddings of each class.
        intra_per_class: (C,) mean over pairs of different embeddings of a class; NaN with fewer than two.
        inter_matrix: (C, C) mean over all pairs of two classes; NaN on the diagonal and for empty classes.
        intra, inter: plain means over the classes, and over the pairs of classes, that are defined.
        intra_micro, inter_micro: the same over all pairs of embeddings.
        prototype: (C, e) mean of the unit vectors of a class, not scaled again; NaN for empty classes.
        intra_prototype_per_class: (C,) mean distance to the prototype; NaN with fewer than two embeddings.
        intra_prototype: its mean. inter_prototype: mean distance between the prototypes of two classes.
    """

    count: Tensor
    intra_per_class: Tensor
    inter_matrix: Tensor
    intra: float
    inter: float
    intra_micro: float
    inter_micro: float
    prototype: Tensor
    intra_prototype_per_class: Tensor
    intra_prototype: float
    inter_prototype: float


class DistanceStream:
    """Collects embeddings for `ClassDistances`: two sums a class, so that any number of them fits into memory.

    Args:
        num_classes: C, with the background.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.count = torch.zeros(num_classes, dtype=torch.float64)
        self.total = torch.zeros(())  # (C, e) as soon as e is known

    def update(self, features: Tensor, labels: Tensor, ignore: int = 255) -> None:
        """Add embeddings (n, e) of the classes `labels` (n,); those labelled `ignore` are left out."""
        kept = labels != ignore
        unit = F.normalize(features[kept].double().cpu(), dim=1)
        owner = F.one_hot(labels[kept].cpu(), self.num_classes).double()
        self.count += owner.sum(0)
        self.total = self.total + owner.T @ unit

    def result(self) -> ClassDistances:
        """The distances so far, in float64."""
        n, products = self.count, self.total @ self.total.T
        pairs, others = n * (n - 1), torch.outer(n, n)
        own = products.diagonal()
        intra = torch.where(pairs > 0, 1 - (own - n) / pairs, torch.nan)
        inter = torch.where(others > 0, 1 - products / others, torch.nan).fill_diagonal_(torch.nan)
        prototype = self.total / n[:, None]
        to_prototype = torch.where(pairs > 0, 1 - prototype.norm(dim=1), torch.nan)
        unit = F.normalize(prototype, dim=1)
        between = torch.where(inter.isnan(), torch.nan, 1 - unit @ unit.T)
        upper = torch.ones_like(others).triu(1) * others
        return ClassDistances(
            n.long(),
            intra,
            inter,
            intra.nanmean().item(),
            inter.nanmean().item(),  # symmetric, so as good as the upper half
            ((intra.nan_to_num() * pairs).sum() / pairs.sum()).item(),
            ((inter.nan_to_num() * upper).sum() / upper.sum()).item(),
            prototype,
            to_prototype,
            to_prototype.nanmean().item(),
            between.nanmean().item(),
        )


def majority_labels(masks: Tensor, patch: int) -> Tensor:
    """The label of most pixels of a patch, the lowest of equally many: int64 (B, H, W) -> (B, H / patch, W / patch)."""
    cells = masks.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3)
    return cells.mode(3).values


def boundary_band(masks: Tensor, width: int = BAND, ignore: int = 255) -> Tensor:
    """Masks int64 (B, H, W) with `ignore` everywhere but within `width` pixels of a pixel of another label (trimap)."""
    values = masks[:, None].float()
    high, low = (sign * F.max_pool2d(sign * values, 2 * width + 1, 1, width) for sign in (1, -1))
    return masks.where((high != low)[:, 0], ignore)


def depths(inside: np.ndarray) -> np.ndarray:
    """Distance to the contour in pixels, bool (H, W) -> (H, W): positive inside the object, negative outside."""
    distance = lambda region: cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance(inside) - distance(~inside)


@torch.no_grad()
def describe_patches(method: nn.Module, dataset: Dataset[Sample], images: int, seed: int = 0) -> dict:
    """What the patches of a trained network with patch scores look like, for the claims of APC.

    Masks are read to measure, never to train. Images are fed at their own size, which must be one for all of them.

    Args:
        method: an `APC`.
        images: how many of the first images of `dataset` are looked at.
        seed: of the places where outliers are injected.

    Returns:
        `inter`, `intra`, `inter_prototype`, `intra_prototype`: cosine distances of F_out, by the majority label of a
            patch (`ClassDistances`);
        `k_mean`, `k_shares` (list, k = 1 .. K or more): chosen k of the classes in each image, background included;
        `k_rank_correlation`: Spearman, between k and the number of patches with a score above theta times the best;
        `outlier_error`: mean score of a class that is not in the image, after one patch, at a random place, got the
            scores of the patch of another image that is most sure of the class;
        `outlier_rise`: by how much that one patch raises the score;
        `boundary_miou`: mIoU of the decoder within `BAND` pixels of the contours; NaN (None) without a decoder;
        `heat` (list of four): mean probability of a class in the image farther than one patch outside the object, less
            than that outside, less than one patch inside, farther inside.
    """
    method.eval()
    device, patch = next(method.parameters()).device, method.backbone.patch_size
    classes, random = len(dataset.classes) + 1, torch.Generator().manual_seed(seed)
    distances, boundary = DistanceStream(classes), ConfusionMatrix(classes)
    chosen, near, outliers, heats, zones = [], [], [], [], []
    for start in range(0, min(images, len(dataset)), 50):
        samples = [dataset[i] for i in range(start, min(start + 50, images, len(dataset)))]
        inputs = torch.stack([normalise(s.image) for s in samples]).to(device)
        masks, labels = torch.stack([s.mask for s in samples]), torch.stack([s.label for s in samples])
        features, scores = method.patch_scores(inputs)
        distances.update(features.flatten(0, 1), majority_labels(masks, patch).flatten())
        present = F.pad(labels, (1, 0), value=1.0) > 0.5
        chosen.append(method.pool(scores)[1].cpu()[present])
        near.append((scores > method.config.theta * scores.amax(1, keepdim=True)).sum(1).cpu()[present])
        outliers.append(_outlier_scores(method, scores, present.to(device), random))
        if method.decoder is not None:
            predictions = resize(method.segment(inputs), masks.shape[-2:]).argmax(1)
            boundary.update(predictions.cpu(), boundary_band(masks))
        grid = [side // patch for side in masks.shape[-2:]]
        probabilities = resize(scores.transpose(1, 2).unflatten(2, grid), masks.shape[-2:]).cpu()
        for index, c in labels.nonzero().tolist():
            heats.append(probabilities[index, c + 1].numpy().ravel())
            zones.append(np.digitize(depths((masks[index] == c + 1).numpy()) / patch, ZONES).ravel())
    chosen, near, outliers = torch.cat(chosen), torch.cat(near), torch.cat(outliers, dim=1)
    heats, zones, found = np.concatenate(heats), np.concatenate(zones), distances.result()
    rank = spearmanr(chosen.numpy(), near.numpy()).statistic if chosen.unique().numel() > 1 else math.nan
    shares = torch.bincount(chosen.clamp(max=method.config.max_k), minlength=method.config.max_k + 1)[1:] / len(chosen)
    plain = lambda value: round(float(value), 4) if math.isfinite(value) else None
    return {
        **{name: plain(getattr(found, name)) for name in ("inter", "intra", "inter_prototype", "intra_prototype")},
        "k_mean": plain(chosen.double().mean()),
        "k_shares": [plain(share) for share in shares],
        "k_rank_correlation": plain(rank),
        "outlier_error": plain(outliers[1].mean()),
        "outlier_rise": plain((outliers[1] - outliers[0]).mean()),
        "boundary_miou": plain(boundary.scores().miou),
        "heat": [plain(heats[zones == zone].mean()) for zone in range(len(ZONES) + 1)],
    }


def _outlier_scores(method: nn.Module, scores: Tensor, present: Tensor, random: torch.Generator) -> Tensor:
    """Image scores of absent classes without and with an outlier patch, (2, n): one for each image and each class that
    the image after it has and itself does not have.
    """
    following = scores.roll(-1, 0)
    images, classes = (present.roll(-1, 0) & ~present).nonzero(as_tuple=True)
    best = following[images, :, classes].argmax(1)
    injected = scores[images].clone()
    places = torch.randint(scores.shape[1], (len(images),), generator=random).to(scores.device)
    rows = torch.arange(len(images), device=scores.device)
    injected[rows, places] = following[images, best]
    return torch.stack([method.pool(s)[0][rows, classes] for s in (scores[images], injected)]).cpu()


def describe_sizes(method: nn.Module, dataset: Dataset[Sample], images: int, sizes: Sequence[int]) -> dict:
    """What it costs and brings to feed images at other sizes than those of the training (APC table 1).

    Args:
        method: has a decoder.
        images: how many of the first images of `dataset` are scored.
        sizes: sides in pixels that images are squashed to.

    Returns:
        `sizes`, and for each of them `size_miou`: of the decoder, no labels used (fraction); `size_seconds`: a forward
        pass of one image; `size_memory_mb`: the tensors, weights included, that such a pass keeps for a backward pass.
    """
    method.eval()
    device, batch = next(method.parameters()).device, 50
    samples = [dataset[i] for i in range(min(images, len(dataset)))]
    scores, times, memory = [], [], []
    for size in sizes:
        matrix, elapsed, kept = ConfusionMatrix(len(dataset.classes) + 1), 0.0, []
        for start in range(0, len(samples), batch):
            own = samples[start : start + batch]
            inputs = torch.stack([resize_for_evaluation(s.image, size) for s in own]).to(device)
            with torch.no_grad():
                begin = time.perf_counter()
                logits = method.segment(inputs).cpu()
                elapsed += time.perf_counter() - begin
            for prediction, sample in zip(logits, own):
                matrix.update(resize(prediction[None], sample.mask.shape)[0].argmax(0), sample.mask)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            method.segment(inputs[:1])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        scores.append(round(matrix.scores().miou, 4))
        times.append(round(elapsed / len(samples), 6))
        memory.append(round(sum(storages.values()) / 2**20, 2))
    return {"sizes": list(sizes), "size_miou": scores, "size_seconds": times, "size_memory_mb": memory}


def describe_activation(method: nn.Module, dataset: Dataset[Sample], images: int) -> dict:
    """How much of the attention and of the maps of TransCAM lies on the background (BNR 3.3, figures 1 and 5).

    The attention of a patch is what it gets from all patches in A* (BNR eq. 4), as a multiple of the mean. A map's
    activation is its value between 0 (its least pixel) and 1 (its highest), for the classes of the image.

    Returns:
        `attention_background`, `attention_object`: mean attention of patches without and with an object (by the
        majority of their pixels; patches that are void do not count). For each of the maps "cam" and "transcam",
        `<map>_background`: mean activation of pixels of the background; `<map>_object`: of the pixels of the map's own
        class; `<map>_other`: of objects of other classes (None where there are none).
    """
    method.eval()
    device, patch = next(method.parameters()).device, method.backbone.patch_size
    found: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, min(images, len(dataset)), 50):
        samples = [dataset[i] for i in range(start, min(start + 50, images, len(dataset)))]
        inputs = torch.stack([normalise(s.image) for s in samples]).to(device)
        masks, labels = torch.stack([s.mask for s in samples]), torch.stack([s.label for s in samples])
        with torch.no_grad():
            got = method.received_attention(inputs).flatten(1).cpu()
            maps = {name: minmax(resize(values, masks.shape[1:])).cpu() for name, values in method.maps(inputs).items()}
        patches = majority_labels(masks, patch).flatten(1)
        found["attention_background"].append(got[patches == 0])
        found["attention_object"].append(got[(patches > 0) & (patches != UNCERTAIN)])
        image, c = labels.nonzero(as_tuple=True)
        truth = masks[image]
        places = {"background": truth == 0, "object": truth == c[:, None, None] + 1}
        places["other"] = ~(places["background"] | places["object"] | (truth == UNCERTAIN))
        for name in ("cam", "transcam"):
            for place, inside in places.items():
                found[f"{name}_{place}"].append(maps[name][image, c][inside])
    means = {name: torch.cat(values).double().mean().item() for name, values in found.items()}
    return {name: round(mean, 4) if math.isfinite(mean) else None for name, mean in means.items()}
