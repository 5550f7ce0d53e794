"""Pretraining of the tiny backbones on single-object scenes, with image labels only.

A small vision transformer that is only taught to name an image copies the class into every token, and no map can be
read from it. Region CutMix cures that: a rectangle of whole tokens is pasted from another image, and each of the two
regions is classified on its own, by the mean of its highest patch logits, with the label of the image it came from.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from wsss.backbones.conformer import TINY_CONFORMER, TINY_CONFORMER_WEIGHTS, tiny_conformer
from wsss.backbones.resnet38 import TINY_RESNET, WEIGHTS, build_resnet38
from wsss.backbones.vit import TINY, TINY_WEIGHTS, tiny_vit
from wsss.data.scenes import PRETRAINING_CLASSES, pretraining_image
from wsss.data.transforms import normalise
from wsss.files import write_atomic

CROP, PATCH = 64, 8
TRAIN_IMAGES, VAL_IMAGES = 20_000, 1_000
MIX_PROBABILITY, POOLED_SHARE, SMOOTHING = 0.8, 0.2, 0.05


def draw_images(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images `first`.. of the pretraining set: uint8 (N, 3, 80, 80) and class indices (N,)."""
    drawn = [pretraining_image(index) for index in tqdm(range(first, first + count), desc="drawing", unit="image")]
    images = torch.stack([torch.from_numpy(image) for image, _ in drawn]).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in drawn])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, 80, 80) -> normalised float (B, 3, 64, 64): random crop, mirror, contrast and colour shift."""
    batch, _, height, width = images.shape
    top, left = (torch.randint(0, n - CROP + 1, (batch, 1), generator=generator) for n in (height, width))
    rows, columns = top + torch.arange(CROP), left + torch.arange(CROP)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None]]  # (B, 64, 64, 3)
    images = normalise(picked.permute(0, 3, 1, 2))
    contrast = torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.2, generator=generator)
    return images * contrast + torch.empty(batch, 3, 1, 1).uniform_(-0.4, 0.4, generator=generator)


def rectangles(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """Random rectangles of whole tokens, each 3 .. side-2 long: bool (B, side, side), all False for one in five."""
    length = torch.randint(3, side - 1, (batch, 2), generator=generator)
    start = (torch.rand(batch, 2, generator=generator) * (side + 1 - length)).long()
    cells = torch.arange(side)
    inside = (cells >= start[..., None]) & (cells < (start + length)[..., None])  # (B, 2, side)
    mixed = torch.rand(batch, 1, 1, generator=generator) < MIX_PROBABILITY
    return inside[:, 0, :, None] & inside[:, 1, None, :] & mixed


def pool_region(logits: Tensor, region: Tensor) -> Tensor:
    """Mean of the highest fifth of the patch logits (B, L, K) within a region (B, L) -> (B, K)."""
    ranked = logits.masked_fill(~region[..., None], -torch.inf).sort(1, descending=True)[0]
    count = (region.sum(1) * POOLED_SHARE).round().clamp(min=1)[:, None, None]
    kept = torch.arange(logits.shape[1])[None, :, None] < count
    return torch.where(kept & ranked.isfinite(), ranked, 0).sum(1) / count[:, 0]


class RegionClassifier(nn.Module):
    """A tiny backbone with heads, taught by region CutMix.

    Its `forward` takes images (B, 3, 64, 64) and, in training, indices of the kept patches (B, k); it returns logits of
    the image (B, K), and those of every kept patch (B, k, K), once or more.
    """

    DROP = 0.0  # share of the patches that training leaves out; maps have none to drop

    def loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Region CutMix of a batch with itself, rolled by one."""
        batch, side = len(images), CROP // PATCH
        region = rectangles(batch, side, generator)
        pixels = region.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        images = torch.where(pixels, images.roll(1, 0), images)
        other, region = labels.roll(1), region.flatten(1)
        kept = torch.rand(batch, side * side, generator=generator).topk(int(side * side * (1 - self.DROP)), 1).indices
        class_logits, *patch_logits = self(images, kept)
        share, pasted = region.float().mean(1), region.gather(1, kept)
        nll = lambda logits, target: F.cross_entropy(logits, target, label_smoothing=SMOOTHING, reduction="none")
        own = nll(class_logits, labels) + sum(nll(pool_region(logits, ~pasted), labels) for logits in patch_logits)
        foreign = nll(class_logits, other) + sum(nll(pool_region(logits, pasted), other) for logits in patch_logits)
        return ((1 - share) * own + share * torch.where(pasted.any(1), foreign, 0)).mean()


class ViTClassifier(RegionClassifier):
    """The tiny vision transformer with a class-token head and a patch head."""

    DROP = 0.25

    def __init__(self):
        super().__init__()
        self.backbone = tiny_vit(CROP, len(PRETRAINING_CLASSES))
        self.patch_head = nn.Linear(self.backbone.embed_dim, len(PRETRAINING_CLASSES))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        vit = self.backbone
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, vit.embed_dim))
        prefix = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = vit.norm(vit.blocks(torch.cat([prefix, patches], 1)))
        return vit.head(tokens[:, 0]), self.patch_head(tokens[:, 1:])


class ConformerClassifier(RegionClassifier):
    """The tiny Conformer: heads on its class token, its last map and its patch tokens."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny_conformer(num_classes=0, last_stride=1)
        self.class_head, self.token_head = (nn.Linear(self.backbone.embed_dim, len(PRETRAINING_CLASSES)) for _ in range(2))
        self.map_head = nn.Linear(self.backbone.num_features, len(PRETRAINING_CLASSES))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features(images)
        patches = self.map_head(_as_patches(features.map)), self.token_head(features.tokens[:, 1:])
        return self.class_head(features.tokens[:, 0]), *(_picked(logits, kept) for logits in patches)


class ResNetClassifier(RegionClassifier):
    """The tiny ResNet38: its last map is pooled to patches, and these to the image."""

    def __init__(self):
        super().__init__()
        self.backbone = build_resnet38(TINY_RESNET, pretrained=False)
        self.head = nn.Linear(self.backbone.out_channels["conv6"], len(PRETRAINING_CLASSES))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.backbone(images)["conv6"]
        logits = self.head(_as_patches(F.avg_pool2d(x, PATCH // self.backbone.stride)))
        return logits.mean(1), _picked(logits, kept)


def _as_patches(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h * w, D)."""
    return x.flatten(2).transpose(1, 2)


def _picked(logits: Tensor, kept: Tensor | None) -> Tensor:
    """The logits (B, L, K) of the kept patches, in the order of `kept` (B, k)."""
    return logits if kept is None else logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[2]))


CLASSIFIERS = {
    TINY: (ViTClassifier, TINY_WEIGHTS),
    TINY_CONFORMER: (ConformerClassifier, TINY_CONFORMER_WEIGHTS),
    TINY_RESNET: (ResNetClassifier, WEIGHTS[TINY_RESNET]),
}


@torch.no_grad()
def accuracy(model: RegionClassifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of centre-cropped images that the class token and the pooled patches name rightly."""
    margin = (images.shape[-1] - CROP) // 2
    hits = torch.zeros(2)
    for chunk, truth in zip(images.split(100), labels.split(100)):
        classes, patches, *_ = model(normalise(chunk[..., margin : margin + CROP, margin : margin + CROP]))
        pooled = pool_region(patches, torch.ones(patches.shape[:2], dtype=torch.bool))
        hits += torch.stack([(classes.argmax(1) == truth).sum(), (pooled.argmax(1) == truth).sum()])
    return tuple((hits / len(images)).tolist())


def pretrain(
    backbone: str = TINY, epochs: int = 24, batch_size: int = 64, lr: float = 1.5e-3, seed: int = 0, out: Path | None = None
) -> None:
    """Pretrain one of `CLASSIFIERS` on one CPU thread; write its weights (fp16) and a log beside them.

    Args:
        out: file of the weights; the committed ones unless given.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    images, labels = draw_images(0, TRAIN_IMAGES)
    held_out = draw_images(TRAIN_IMAGES, VAL_IMAGES)
    classifier, committed = CLASSIFIERS[backbone]
    model, out = classifier(), out or committed
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True)
    steps = TRAIN_IMAGES // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.1)
    named = "" if backbone == TINY else f"--backbone {backbone} "
    log = f"wsss pretrain {named}--epochs {epochs} --batch-size {batch_size} --lr {lr} --seed {seed}"
    log += f"  (torch {torch.__version__})\nepoch,loss,accuracy_class_token,accuracy_patches,seconds\n"
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(TRAIN_IMAGES, generator=generator)[: steps * batch_size].view(steps, batch_size)
        for picked in tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", unit="step", leave=False):
            loss = model.loss(augment(images[picked], generator), labels[picked], generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        scores = accuracy(model.eval(), *held_out)
        model.train()
        log += f"{epoch + 1},{total / steps:.4f},{scores[0]:.4f},{scores[1]:.4f},{time.perf_counter() - start:.0f}\n"
        print(log.splitlines()[-1], flush=True)
        write_atomic(out.with_suffix(".log.csv"), log)
        write_atomic(out, save(_half(model.backbone.state_dict())))


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights in half precision, without the heads of a classifier."""
    return {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in state.items()
        if "head" not in key
    }
