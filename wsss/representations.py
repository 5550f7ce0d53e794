"""What a network's tokens look like: how well class tokens separate, and how alike the patches of an image are."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import nn
from torch.utils.data import Dataset

from wsss.data import Sample
from wsss.data.transforms import normalise


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
    points = TSNE(metric="cosine", init="random", perplexity=min(30, len(unit) // 4), random_state=seed).fit_transform(unit)
    return {
        "silhouette": round(float(silhouette_score(unit, owners, metric="cosine")), 4),
        "patch_similarity": round(float(torch.cat(similarity).mean()), 4),
        "tsne": np.round(points, 1).tolist(),
        "classes": owners.tolist(),
    }
