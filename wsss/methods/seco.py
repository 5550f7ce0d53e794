"""SeCo: separate co-occurring classes by tagged patches, conquer them by two contrasts (CVPR 2024).

In the order of the paper: patches and their tags (eq. 1, Sec. 3.3), the contrast with class prototypes (eqs. 3, 4), the
reservoir of patches, rectification of tags and the contrast among patches (eqs. 5-8), and the whole method (eq. 9).
Shapes: B images, C classes, N patches an image of p x p pixels, M rows of a contrast, Q slots of the reservoir, D
channels. A tag is int64: -1 uncertain, 0 background, 1..C class. A tag mask holds the same values for pixels, and 255
outside the image.

Functions named `..._released` compute what the public implementation computes where that is not the printed equation.
"""

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data import Sample
from wsss.data.transforms import StrongView, normalise
from wsss.maps import UNCERTAIN as LEFT_OUT
from wsss.maps import resize, three_way
from wsss.methods.cam import Cam, CamConfig
from wsss.methods.common import check_choice, check_variant, full_precision, gathered

UNCERTAIN = -1
PROTOTYPE_RULES = ("weighted", "single", "equal")


# ------------------------------------------------------------------------------------------------- patches and tags


def pseudo_mask(cam: Tensor, labels: Tensor, high: float, low: float, valid: Tensor | None = None) -> Tensor:
    """M_aux, the tags of the pixels (SeCo, Sec. 3.3): 0 up to `low`, uncertain up to `high`, else the strongest class.

    Args:
        cam: (B, C, H, W) in 0..1.
        labels: (B, C) of 0/1.
        valid: bool (B, H, W), False outside the image, which becomes 255. None: all inside.

    Returns:
        int64 (B, H, W) in {-1, 0, 1..C, 255}.
    """
    mask = three_way(cam, labels, high, low)
    mask = mask.masked_fill(mask == LEFT_OUT, UNCERTAIN)
    return mask if valid is None else mask.masked_fill(~valid, LEFT_OUT)


def draw_corners(mask: Tensor, size: int, count: int, priority: Tensor | None = None) -> Tensor:
    """Where an image is cut into patches: around uncertain pixels, as the released code does; the paper does not say.

    A centre lies at least size // 2 pixels from the border. Where fewer than `count` of them are uncertain, all may be
    drawn.

    Args:
        mask: tag mask (B, H, W).
        size: p, in pixels.
        count: N.
        priority: (B, H, W) numbers; the centres with the smallest ones are taken. None draws them.

    Returns:
        int64 (B, N, 2): row and column of the upper left corner.

    Raises:
        ValueError: the patch does not fit into the image, or fits at fewer than N places.
    """
    height, width = mask.shape[1:]
    margin = size // 2
    rows, columns = height - 2 * margin, width - 2 * margin
    if size < 1 or min(rows, columns) < 1 or rows * columns < count:
        raise ValueError(
            f"SeCo: {count} patches of {size}x{size} pixels do not fit into an image of {height}x{width}; choose a "
            "smaller patch_size, fewer patches or a larger crop"
        )
    if priority is None:
        priority = torch.rand(mask.shape, device=mask.device)
    inner = slice(margin, margin + rows), slice(margin, margin + columns)
    candidates = (mask[:, inner[0], inner[1]] == UNCERTAIN).flatten(1)
    candidates |= candidates.sum(1, keepdim=True) < count
    ranked = priority[:, inner[0], inner[1]].flatten(1).float().masked_fill(~candidates, torch.inf)
    index = ranked.topk(count, largest=False).indices
    return torch.stack([index // columns, index % columns], dim=-1)


def cut(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """x = crp(I): images (B, D, H, W) -> patches (B, N, D, p, p), or masks (B, H, W) -> (B, N, p, p).

    Args:
        corners: (B, N, 2) upper left corners.
        size: p.
    """
    steps = torch.arange(size, device=images.device)
    rows = (corners[..., 0, None] + steps)[..., :, None]
    columns = (corners[..., 1, None] + steps)[..., None, :]
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    if images.ndim == 3:
        return images[image, rows, columns]
    return images.movedim(1, -1)[image, rows, columns].movedim(-1, 2)


def patch_tags(mask_patches: Tensor, num_classes: int, threshold: float, reading: str = "a") -> Tensor:
    """The tag of each patch from its part of the mask (SeCo, Sec. 3.3, which leaves two readings).

    Reading "a": background where the share of pixels that are of a class or uncertain is at most `threshold`, else the
    class where there is exactly one, else uncertain. Reading "b": a class counts where its own share is above
    `threshold`; one makes the tag, several make it uncertain; without any it is background as in "a", else uncertain.

    Args:
        mask_patches: (B, N, p, p) of a tag mask; what is outside the image counts as background.
        num_classes: C.
        threshold: phi.

    Returns:
        int64 (B, N).

    Raises:
        ValueError: an unknown reading, or a class above C.
    """
    check_choice("SeCo: reading", reading, ("a", "b"))
    counts, area = _counts(mask_patches, num_classes), mask_patches.shape[-2] * mask_patches.shape[-1]
    little = counts[..., 1:].sum(-1) / area <= threshold
    classes = counts[..., 1:-1] / area > (0 if reading == "a" else threshold)
    found = classes.sum(-1)
    tags = torch.where(found == 1, classes.byte().argmax(-1) + 1, UNCERTAIN)
    return tags.masked_fill(little if reading == "a" else little & (found == 0), 0)


def _counts(mask: Tensor, num_classes: int) -> Tensor:
    """Pixels of (..., p, p) by tag: int64 (..., C + 2), background first, then the classes, uncertain last."""
    tags = mask.masked_fill(mask == LEFT_OUT, 0).flatten(-2)
    _check_tags(tags, num_classes)
    index = torch.where(tags == UNCERTAIN, num_classes + 1, tags)
    counts = torch.zeros(*index.shape[:-1], num_classes + 2, dtype=torch.int64, device=mask.device)
    return counts.scatter_add_(-1, index, torch.ones_like(index))


def _check_tags(tags: Tensor, num_classes: int) -> None:
    if tags.numel() and not UNCERTAIN <= tags.min() <= tags.max() <= num_classes:
        raise ValueError(
            f"SeCo: tags lie between {int(tags.min())} and {int(tags.max())}; expected -1 (uncertain), 0 (background) "
            f"and 1..{num_classes}"
        )


def patch_tags_released(mask: Tensor, corners: Tensor, size: int, num_classes: int, threshold: float) -> Tensor:
    """Tags as released: of the two views of the whole image, then of the patches.

    The share of the target is a sum of class *indices* (uncertain pixels count 1), so that a class passes the more
    easily the higher its index is. Where an image's mask has exactly one class, its uncertain pixels count as that
    class when a patch's classes are listed. A whole view has the class of the mask, -1 for several, and 1 for none.

    Args:
        mask: tag mask (B, H, W).
        corners: (B, N, 2).
        size: p.

    Returns:
        int64 (B, 2 + N).
    """
    whole = _counts(mask, num_classes)[..., 1:-1] > 0
    single = whole.sum(-1) == 1
    view = torch.where(single, whole.byte().argmax(-1) + 1, UNCERTAIN).masked_fill(~whole.any(-1), 1)
    counts = _counts(cut(mask, corners, size), num_classes)
    worth = torch.arange(num_classes + 2, device=mask.device)
    worth[-1] = 1
    classes = counts[..., 1:-1] > 0
    classes |= (whole & single[:, None])[:, None] & (counts[..., -1:] > 0)
    tags = torch.where(classes.sum(-1) == 1, classes.byte().argmax(-1) + 1, UNCERTAIN)
    tags = tags.masked_fill((counts * worth).sum(-1) / size**2 <= threshold, 0)
    return torch.cat([view[:, None].expand(-1, 2), tags], dim=1)


class ProjectionHead(nn.Module):
    """O_q and O_k of eq. 2: a perceptron of three layers and unit length, class tokens (..., D) -> (..., out)."""

    def __init__(self, dim: int, width: int, out: int | None = None):
        super().__init__()
        sizes = [(dim, width), (width, width), (width, out or dim)]
        first, second, third = (nn.Linear(*size) for size in sizes)
        for layer in (first, second, third):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.layers(tokens), dim=-1)


# ---------------------------------------------------------------------------------------- contrast with prototypes


def prototype_weights(prototypes: Tensor, class_token: Tensor, label: Tensor) -> Tensor:
    """W of eq. 3 for one image: softmax, over its classes, of the cosine between its class token and their prototypes.

    Args:
        prototypes: P (C, D).
        class_token: Z (D,).
        label: (C,) of 0/1.

    Returns:
        (C,): 0 for classes that are not in the image, 1 for a single class.
    """
    cosine = F.cosine_similarity(prototypes, class_token[None], dim=-1)
    present = label > 0
    return torch.where(present, cosine.masked_fill(~present, -torch.inf).softmax(0), 0) if present.any() else label * 0


@torch.no_grad()
def update_prototypes(
    prototypes: Tensor,
    class_tokens: Tensor,
    labels: Tensor,
    eta: float,
    rule: str = "weighted",
    unit_tokens: bool = False,
) -> Tensor:
    """P_l <- Norm(eta P_l + W_l (1 - eta) Z_l), image after image (SeCo eq. 3).

    The weights of an image depend on the prototypes that the image before it left, so that the recursion cannot be
    unrolled; a step of it costs a few operations on P.

    Args:
        prototypes: P (C, D).
        class_tokens: Z (B, D).
        labels: (B, C) of 0/1.
        eta: momentum.
        rule: "weighted" (eq. 3), "single" (only images with one class), "equal" (W = 1 for every class of an image).
        unit_tokens: whether Z is brought to unit length first.

    Returns:
        P (C, D) after the batch; rows of classes without an image stay as they were.

    Raises:
        ValueError: an unknown rule.
    """
    check_choice("SeCo: prototype_rule", rule, PROTOTYPE_RULES)
    for token, label in zip(F.normalize(class_tokens, dim=-1) if unit_tokens else class_tokens, labels):
        present = label > 0
        weight = prototype_weights(prototypes, token, label) if rule == "weighted" else present.to(token.dtype)
        moved = F.normalize(eta * prototypes + (1 - eta) * weight[:, None] * token, dim=-1)
        touched = present & (present.sum() == 1) if rule == "single" else present
        prototypes = torch.where(touched[:, None], moved, prototypes)
    return prototypes


@torch.no_grad()
def update_prototypes_released(prototypes: Tensor, class_tokens: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """Prototypes as released: images of one class only, and unit length once, at the end of the batch, for all rows.

    Without the norm in between the recursion unrolls: of n images of a class, the j-th has the weight
    (1 - m) m^(n - j). Arguments as in `update_prototypes`.
    """
    single = (labels > 0) & ((labels > 0).sum(1, keepdim=True) == 1)
    later = single.sum(0) - single.cumsum(0)  # images of the class that follow in the batch
    weights = torch.where(single, (1 - momentum) * momentum ** later.to(class_tokens.dtype), 0)
    kept = momentum ** single.sum(0).to(class_tokens.dtype)
    return F.normalize(kept[:, None] * prototypes + weights.T @ class_tokens, dim=-1)


def global_contrast_loss(queries: Tensor, prototypes: Tensor, tags: Tensor, temperature: float) -> Tensor:
    """L_LiG: a patch is pulled to the prototype of its class and pushed off those of the batch's other classes (eq. 4).

    Args:
        queries: q (M, D).
        prototypes: P (C, D).
        tags: (M,); background and uncertain patches do not count.
        temperature: tau_g.

    Returns:
        A scalar; 0 where no patch has a class.

    Raises:
        ValueError: a tag above C.
    """
    _check_tags(tags, len(prototypes))
    own = F.one_hot(tags.clamp(min=1) - 1, len(prototypes)).bool() & (tags >= 1)[:, None]
    logits = queries @ prototypes.T / temperature
    # A finite number, so that a batch without any class has a gradient of zeros instead of NaN.
    logits = logits.masked_fill(~own.any(0), torch.finfo(logits.dtype).min)
    log_share = logits.log_softmax(-1)
    return -log_share.where(own, 0).sum() / own.sum().clamp(min=1)


# -------------------------------------------------------------------------------------------- contrast among patches


class Reservoir(nn.Module):
    """The semantic reservoir and its tag pool (SeCo eq. 5): a ring of the Q latest keys, in the module's state.

    Args:
        capacity: Q.
        dim: D.
        variant: "published" starts empty (tag -1, which no contrast counts), "released" with random background.
    """

    def __init__(self, capacity: int, dim: int, variant: str = "published"):
        super().__init__()
        released = check_variant(variant, "SeCo") == "released"
        keys = F.normalize(torch.randn(capacity, dim), dim=0) if released else torch.zeros(capacity, dim)
        self.register_buffer("keys", keys)
        self.register_buffer("tags", torch.full((capacity,), 0 if released else UNCERTAIN))
        self.register_buffer("pointer", torch.tensor(0))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, tags: Tensor) -> None:
        """Overwrite the oldest slots by keys (M, D) and their tags (M,).

        Raises:
            ValueError: M is larger than the reservoir.
        """
        capacity = len(self.keys)
        if len(keys) > capacity:
            raise ValueError(
                f"SeCo: reservoir = {capacity} slots cannot take the {len(keys)} patches of one batch; "
                "choose a larger reservoir"
            )
        slots = (self.pointer + torch.arange(len(keys), device=keys.device)) % capacity
        self.keys[slots] = keys.to(self.keys.dtype)
        self.tags[slots] = tags
        self.pointer.copy_((self.pointer + len(keys)) % capacity)


@dataclass(frozen=True)
class Rectification:
    """What `rectify_tags` found, for M queries.

    Attributes:
        tags: (M,) after rectification.
        mean_similarity: mu (M,) (eq. 6); NaN for an uncertain query and for one whose tag no key has.
        positives: |R+| (M,), the keys with the query's tag.
        below: N_v (M,), those of them that are less similar than mu.
    """

    tags: Tensor
    mean_similarity: Tensor
    positives: Tensor
    below: Tensor


@torch.no_grad()
def rectify_tags(queries: Tensor, tags: Tensor, keys: Tensor, key_tags: Tensor, sigma: float) -> Rectification:
    """A tag becomes uncertain where more than a share sigma of its keys is less similar than their mean (eqs. 6, 7).

    Args:
        queries: q (M, D).
        tags: (M,).
        keys, key_tags: the reservoir before these patches enter it, (Q, D) and (Q,).
    """
    similarity = queries @ keys.T
    positive = _positives(tags, key_tags)
    count = positive.sum(1)
    mean = similarity.where(positive, 0).sum(1) / count  # NaN without positives, and then nothing lies below it
    below = (positive & (similarity < mean[:, None])).sum(1)
    return Rectification(tags.masked_fill(below > sigma * count, UNCERTAIN), mean, count, below)


def _positives(tags: Tensor, key_tags: Tensor) -> Tensor:
    """Pairs (M, Q) with one tag that is not uncertain."""
    return (tags[:, None] == key_tags) & (tags != UNCERTAIN)[:, None]


def local_contrast_loss(
    queries: Tensor,
    tags: Tensor,
    keys: Tensor,
    key_tags: Tensor,
    temperature: float,
    reduction: str = "pairs",
    with_queries: bool = False,
) -> Tensor:
    """L_LiL: a patch is pulled to the patches of its tag and pushed off all others (SeCo eq. 8).

    Background is a tag like any other. Uncertain patches count on neither side.

    Args:
        queries: q (M, D).
        tags: (M,).
        keys, key_tags: the reservoir, these patches included, (Q, D) and (Q,).
        temperature: tau_l.
        reduction: "pairs" divides by the positive pairs of the batch, "anchors" by those of each query, and averages
            over the queries that have some.
        with_queries: whether the batch's other queries are candidates too, as eq. 5 has it.

    Returns:
        A scalar; 0 where there is no positive pair.

    Raises:
        ValueError: an unknown reduction.
    """
    check_choice("SeCo: reduction", reduction, ("pairs", "anchors"))
    itself = None
    if with_queries:
        keys, key_tags = torch.cat([keys, queries]), torch.cat([key_tags, tags])
        itself = torch.eye(len(queries), dtype=torch.bool, device=tags.device)
        itself = F.pad(itself, (len(keys) - len(queries), 0))
    left_out = (key_tags == UNCERTAIN)[None].expand(len(queries), -1)
    left_out = left_out if itself is None else left_out | itself
    logits = (queries @ keys.T / temperature).masked_fill(left_out, torch.finfo(queries.dtype).min)
    positive = _positives(tags, key_tags) & ~left_out
    log_share = logits.log_softmax(-1).where(positive, 0)
    count = positive.sum(1)
    if reduction == "pairs":
        return -log_share.sum() / count.sum().clamp(min=1)
    return -(log_share.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def local_contrast_loss_released(
    queries: Tensor, tags: Tensor, keys: Tensor, key_tags: Tensor, temperature: float, rectify: bool = True
) -> tuple[Tensor, Tensor]:
    """L_LiL and rectification as released.

    With s the products over tau less their row maximum: a query whose tag more than 10 / 11 of all columns share turns
    into background and loses its pull, but not its push. The logarithm of the denominator counts once for every column
    instead of once for every positive pair, and the row maximum (with all that equal it) is missing from the
    denominator. Equality with 0 decides, so that exact products matter.

    Args:
        queries: q (M, D).
        tags: (M,).
        keys, key_tags: the batch's keys followed by the reservoir that holds them too, (K, D) and (K,).
        temperature: tau_l.
        rectify: whether tags are rectified.

    Returns:
        The loss, a scalar, and the rectified tags (M,).
    """
    scores = queries @ keys.T / temperature
    scores = scores - scores.amax(1, keepdim=True).detach()
    certain = (tags != UNCERTAIN)[:, None]
    pull = scores * _positives(tags, key_tags)
    with torch.no_grad():
        below = (pull < pull.mean(1, keepdim=True)).sum(1)
        noisy = rectify & (below > 10 * (pull.shape[1] - below + 1e-6))
    rectified = tags.masked_fill(noisy, 0)
    pull = pull.masked_fill(noisy[:, None], 0)
    compared = certain & (key_tags != UNCERTAIN) & (scores != 0)
    denominator = scores.exp().where(compared, 0).sum(1)
    pairs = (pull != 0).sum()
    rows = pull.sum(1) - pull.shape[1] * (denominator + 1e-12).log()
    counted = (pairs > 0) & (denominator > 0) & (rows < 0)
    loss = -rows.where(counted, 0).sum() / pairs.clamp(min=1) / len(queries)
    return loss, rectified


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place (SeCo, Sec. 3.5)."""
    torch._foreach_lerp_(list(teacher), list(student), 1 - momentum)


# -------------------------------------------------------------------------------------------------- the whole method


@dataclass(frozen=True)
class SeCoConfig(CamConfig):
    """Hyper-parameters of SeCo, besides those of the baseline. The defaults are the released ones on VOC.

    Attributes:
        variant: "published" follows the equations, "released" the public code.
        patch_size, patches: p in pixels, and N. The released code adds two views of the whole image.
        tag_thresholds: (high, low) of the tag mask.
        tag_threshold: phi, the share of a patch that must not be background.
        tag_switch: step from which tags come from the main CAM instead of the auxiliary one.
        tagging: "class", or "foreground", which only tells foreground (tag 1) from background.
        label_switch: step from which the decoder's labels come from the main CAM instead of the auxiliary one.
        prototype_start, prototype_momentum: of eq. 3; eta.
        prototype_rule, unit_class_tokens: see `update_prototypes`; not used by the released variant.
        weight_lig, weight_lil, contrast_start: alpha, beta; both are on from the same step on.
        temperature_lig, temperature_lil: tau_g, tau_l.
        reservoir: Q.
        ema_momentum: of the local teacher.
        rectify, sigma: whether tags are rectified, and the share of eq. 7 (the released code has 10 / 11 written in).
        projection_width: hidden width of the projection head.
        blur_sigma: range of the strong view's blur, in pixels.
    """

    variant: str = "released"
    decoder_width: int = 0
    decoder_dilation: int = 6
    patch_size: int = 64
    patches: int = 10
    tag_thresholds: Sequence[float] = (0.7, 0.25)
    tag_threshold: float = 0.2
    tag_switch: int = 10001
    tagging: str = "class"
    label_switch: int = 0
    prototype_start: int = 600
    prototype_momentum: float = 0.9
    prototype_rule: str = "single"
    unit_class_tokens: bool = False
    weight_lig: float = 0.5
    weight_lil: float = 0.5
    contrast_start: int = 1001
    temperature_lig: float = 0.1
    temperature_lil: float = 0.08
    reservoir: int = 4608
    ema_momentum: float = 0.999
    rectify: bool = True
    sigma: float = 10 / 11
    projection_width: int = 2048
    blur_sigma: Sequence[float] = (0.1, 2.0)

    def __post_init__(self):
        super().__post_init__()
        check_variant(self.variant, "SeCo")
        check_choice("SeCo: tagging", self.tagging, ("class", "foreground"))
        check_choice("SeCo: prototype_rule", self.prototype_rule, PROTOTYPE_RULES)
        if self.patch_size < 1 or self.patches < 1 or self.reservoir < 1:
            raise ValueError(
                f"SeCo: patch_size = {self.patch_size}, patches = {self.patches} and reservoir = {self.reservoir} must "
                "all be at least 1"
            )


class SeCo(Cam):
    """SeCo: the baseline, tagged patches, a teacher that follows the student, prototypes, and the two contrasts.

    The student is the encoder of the whole images too: the paper's global teacher shares its weights.

    | | published | released |
    |---|---|---|
    | rows of the contrasts | N patches | two views of the whole image, N patches |
    | tags | share of pixels (`patch_tags`) | `patch_tags_released` |
    | key of a patch | its strong view | half the time the mirrored place |
    | prototypes (eq. 3) | `update_prototypes` | `update_prototypes_released` |
    | rectification (eqs. 6, 7) | before keys enter; uncertain; new tags kept | after; background; old tags kept |
    | L_LiL (eq. 8) | against the reservoir | `..._released`, current keys twice |

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: vision transformer with one class token. Its position embedding is frozen, as in the released code.

    Raises:
        ValueError: the patch size is not a multiple of the backbone's.
    """

    Config = SeCoConfig
    batch_fields = ("valid",)

    def __init__(self, config: SeCoConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__(config, num_classes, backbone)
        if config.patch_size % backbone.patch_size:
            raise ValueError(
                f"SeCo: patch_size = {config.patch_size} is not a multiple of the backbone's patch of "
                f"{backbone.patch_size} pixels"
            )
        self.published = config.variant == "published"
        self.backbone.pos_embed.requires_grad_(False)
        self.contrasts = bool(config.weight_lig or config.weight_lil)
        if self.contrasts:
            dim = backbone.embed_dim
            self.views = StrongView(tuple(config.blur_sigma), released=not self.published)
            self.student_head = ProjectionHead(dim, config.projection_width)
            self.teacher = deepcopy(backbone).requires_grad_(False)
            self.teacher_head = deepcopy(self.student_head).requires_grad_(False)
            prototypes = torch.randn(num_classes, dim)
            self.register_buffer("prototypes", F.normalize(prototypes, dim=-1) if self.published else prototypes)
            self.reservoir = Reservoir(config.reservoir, dim, config.variant)

    def relation_losses(
        self, batch: dict[str, Tensor], tokens: Tokens, seeds: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """L_LiG and L_LiL (eq. 9); teacher and reservoir are kept up to date before these are on, too."""
        config, images, labels = self.config, batch["image"], batch["label"]
        if not self.contrasts:
            return {}
        source = "cam_aux" if step < config.tag_switch else "cam"
        mask = self.tag_mask(images, seeds[source], labels, batch.get("valid"))
        corners = draw_corners(mask, config.patch_size, config.patches)
        tags = self.tags(mask, corners)
        patches, strong = (cut(view, corners, config.patch_size) for view in (images, batch["strong"]))
        whole, on = tokens.classes[:, 0], step >= config.contrast_start
        with torch.set_grad_enabled(on and torch.is_grad_enabled()):
            queries, keys = self.represent(whole, patches, strong, batch.get("second"))
        with full_precision(images):
            if step >= config.prototype_start:
                self._update_prototypes(whole.detach(), labels)
            return self.contrast(queries.flatten(0, 1), keys.flatten(0, 1), tags.flatten(), on)

    def tag_mask(self, images: Tensor, seed: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """`pseudo_mask` (B, H, W) of images (B, 3, H, W), from one of their seed maps (B, C, h, w) in 0..1."""
        return pseudo_mask(resize(seed, images.shape[-2:]), labels, *self.config.tag_thresholds, valid)

    def tags(self, mask: Tensor, corners: Tensor) -> Tensor:
        """Tags of the patches at `corners` (B, N, 2) of a tag mask (B, H, W): (B, N), or as released (B, 2 + N)."""
        config = self.config
        if self.published:
            tags = patch_tags(cut(mask, corners, config.patch_size), self.num_classes, config.tag_threshold)
        else:
            tags = patch_tags_released(mask, corners, config.patch_size, self.num_classes, config.tag_threshold)
        return tags.clamp(max=1) if config.tagging == "foreground" else tags

    def represent(
        self, whole: Tensor, patches: Tensor, strong: Tensor, second: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q and k of eq. 2, of unit length: the student encodes, the teacher moves, the teacher encodes.

        Args:
            whole: class tokens of the images (B, D).
            patches, strong: (B, N, 3, p, p), the patches and their strong views.
            second: (B, 3, H, W), as released: another view of the images.

        Returns:
            (B, N, D) each; as released (B, 2 + N, D), the images and their second view first, whose keys are the
            student's tokens seen through the teacher's head.
        """
        tokens = _class_tokens(self.backbone, patches)
        views = None
        if second is not None:
            views = torch.stack([whole, self.backbone(second).classes[:, 0]], dim=1)
            tokens = torch.cat([views, tokens], dim=1)
        with full_precision(tokens):
            queries = self.student_head(tokens)
        with torch.no_grad():
            for teacher, student in ((self.teacher, self.backbone), (self.teacher_head, self.student_head)):
                ema_update(teacher.parameters(), student.parameters(), self.config.ema_momentum)
            tokens = _class_tokens(self.teacher, strong)
            if views is not None:
                tokens = torch.cat([views, tokens], dim=1)
            with full_precision(tokens):
                return queries, self.teacher_head(tokens)

    def contrast(self, queries: Tensor, keys: Tensor, tags: Tensor, on: bool = True) -> dict[str, Tensor]:
        """Rectify the tags, let keys and tags enter the reservoir, and return the weighted L_LiG and L_LiL.

        Args:
            queries, keys: (M, D).
            tags: (M,).
            on: whether losses are wanted; without them the reservoir is filled all the same.
        """
        config, memory = self.config, self.reservoir
        if self.published and config.rectify:
            tags = rectify_tags(queries, tags, memory.keys, memory.tags, config.sigma).tags
        memory.enqueue(gathered(keys), gathered(tags))
        if not on:
            return {}
        terms = {}
        if self.published:
            if config.weight_lil:
                terms["lil"] = local_contrast_loss(queries, tags, memory.keys, memory.tags, config.temperature_lil)
        elif config.weight_lil or config.rectify:
            candidates = torch.cat([keys, memory.keys]), torch.cat([tags, memory.tags])
            lil, tags = local_contrast_loss_released(queries, tags, *candidates, config.temperature_lil, config.rectify)
            if config.weight_lil:
                terms["lil"] = lil
        if config.weight_lig:
            terms["lig"] = global_contrast_loss(queries, self.prototypes, tags, config.temperature_lig)
        return {name: getattr(config, f"weight_{name}") * term for name, term in terms.items()}

    def label_source(self, step: int) -> str:
        """The seed map that becomes the decoder's pseudo label at `step`."""
        return "cam_aux" if step < self.config.label_switch else "cam"

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """See the function `describe`; nothing without the contrasts, or for tags that are not classes."""
        return describe(self, dataset, images) if self.contrasts and self.config.tagging == "class" else {}

    def _update_prototypes(self, class_tokens: Tensor, labels: Tensor) -> None:
        config, class_tokens, labels = self.config, gathered(class_tokens), gathered(labels)
        if self.published:
            options = config.prototype_momentum, config.prototype_rule, config.unit_class_tokens
            updated = update_prototypes(self.prototypes, class_tokens, labels, *options)
        else:
            updated = update_prototypes_released(self.prototypes, class_tokens, labels, config.prototype_momentum)
        self.prototypes.copy_(updated)


def _class_tokens(encoder: MultiTokenViT, patches: Tensor) -> Tensor:
    """(B, N, 3, p, p) -> (B, N, D)"""
    return encoder(patches.flatten(0, 1)).classes[:, 0].unflatten(0, patches.shape[:2])


# ------------------------------------------------------------------------------- what the network learned (Sec. 5.3)


@torch.no_grad()
def describe(method: SeCo, dataset: Dataset[Sample], images: int) -> dict:
    """What a trained network holds, for figures 5 and 6 and for the claims on tags, prototypes and reservoir.

    True masks only judge; nothing is learned from them. The true tag of a patch is what reading "a" says of its true
    mask. Four random patches an image, in places that do not depend on the method.

    Args:
        dataset: training images with masks.
        images: how many of them, from the first on.

    Returns:
        Plain numbers by name, None where there is nothing to average:
        `prototype_similarity`: cosines of the prototypes, (C, C);
        `prototype_neighbour`: largest cosine of a prototype to another one, mean over classes;
        `tag_accuracy`, `tag_accuracy_final`: of the patches whose tag and true tag are both certain, the share in which
            they are equal, for tags from the auxiliary and from the main CAM;
        `diversity`, `diversity_final`: 1 - correlation of the maps of two classes of an image, auxiliary and main CAM;
        `similarity_true`, `similarity_false`: mean mu (eq. 6) of those patches that are tagged as a class, truly or
            falsely;
        `mixed_second`, `mixed_absent`: of patches with two classes, the mean cosine to the prototype of the less
            similar one of them, and to those of the classes that their image does not have;
        `pair_similarity_weighted`, `_equal`, `_single`: mean cosine between the prototypes of two classes that share
            images, weighted by how many, after these images have updated the prototypes by each rule;
        `drift`: 1 - cosine between a tag's mean key in the older and the newer half of the reservoir, mean over tags.
    """
    generator = torch.Generator().manual_seed(0)
    found = [
        _judge(method.eval(), [dataset[i] for i in range(start, min(start + 50, images, len(dataset)))], generator)
        for start in range(0, min(images, len(dataset)), 50)
    ]
    found = {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
    prototypes, labels = F.normalize(method.prototypes, dim=-1), dataset.labels[:images].to(method.prototypes)
    cosine = prototypes @ prototypes.T
    numbers = {
        "prototype_neighbour": (cosine - 2 * torch.eye(len(cosine)).to(cosine)).amax(1),
        "diversity": found["diversity"],
        "diversity_final": found["diversity_final"],
        "mixed_second": found["mixed_second"],
        "mixed_absent": found["mixed_absent"],
        "drift": _drift(method.reservoir),
    }
    known = found["true_tag"] != UNCERTAIN
    for name in ("tag", "tag_final"):
        judged = known & (found[name] != UNCERTAIN)
        numbers[name.replace("tag", "tag_accuracy")] = (found[name] == found["true_tag"])[judged]
    right, of_class = found["tag"] == found["true_tag"], known & (found["tag"] > 0)
    numbers["similarity_true"] = found["similarity"][of_class & right]
    numbers["similarity_false"] = found["similarity"][of_class & ~right]
    together = (labels.T @ labels).triu(1)
    for rule in ("weighted", "equal", "single"):
        moved = update_prototypes(
            prototypes, found["class_token"].to(labels), labels, method.config.prototype_momentum, rule
        )
        numbers[f"pair_similarity_{rule}"] = (moved @ moved.T * together).sum() / together.sum()
    averages = {name: values.double().nanmean().item() for name, values in numbers.items()}
    similarity = [[round(value, 3) for value in row] for row in cosine.tolist()]
    plain = {name: round(value, 4) if math.isfinite(value) else None for name, value in averages.items()}
    return {"prototype_similarity": similarity} | plain


def _judge(method: SeCo, samples: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
    """Tags, similarities and maps of some images, flat over patches or pairs, and class tokens; see `describe`."""
    size, device, classes = method.config.patch_size, method.prototypes.device, method.num_classes
    images = torch.stack([normalise(sample.image) for sample in samples]).to(device)
    labels = torch.stack([sample.label for sample in samples]).to(device)
    truth = torch.stack([sample.mask for sample in samples]).to(device)
    tokens = method.encode(images)
    seeds = method.seeds(images, method.token_maps(tokens))
    places = torch.rand(truth.shape, generator=generator).to(device)
    corners = draw_corners(torch.full_like(truth, UNCERTAIN), size, 4, places)
    tags = {
        name: method.tags(method.tag_mask(images, seeds[seed], labels), corners)[:, -4:].flatten()
        for name, seed in (("tag", "cam_aux"), ("tag_final", "cam"))
    }
    true_patches = cut(truth, corners, size)
    queries = method.student_head(_class_tokens(method.backbone, cut(images, corners, size))).flatten(0, 1)
    memory = method.reservoir
    inside = (_counts(true_patches, classes)[..., 1:-1] > 0.1 * size**2).flatten(0, 1)
    mixed = inside.sum(1) == 2
    cosine = queries @ F.normalize(method.prototypes, dim=-1).T
    absent = (labels == 0).repeat_interleave(4, dim=0)
    pairs = (labels[:, :, None] * labels[:, None]).triu(1).bool()
    return tags | {
        "true_tag": patch_tags(true_patches, classes, method.config.tag_threshold).flatten(),
        "similarity": rectify_tags(queries, tags["tag"], memory.keys, memory.tags, 1.0).mean_similarity,
        "mixed_second": cosine.masked_fill(~inside, torch.inf).amin(1)[mixed],
        "mixed_absent": (cosine.where(absent, 0).sum(1) / absent.sum(1))[mixed],
        "diversity": _dissimilarity(seeds["cam_aux"])[pairs],
        "diversity_final": _dissimilarity(seeds["cam"])[pairs],
        "class_token": tokens.classes[:, 0],
    }


def _dissimilarity(maps: Tensor) -> Tensor:
    """1 - correlation over the pixels of every two maps of an image: (B, C, h, w) -> (B, C, C)."""
    maps = maps.flatten(2)
    maps = F.normalize(maps - maps.mean(2, keepdim=True), dim=2)
    return 1 - maps @ maps.mT


def _drift(memory: Reservoir) -> Tensor:
    """1 - cosine of the mean keys of each tag in the older and in the newer half of the reservoir, for tags in both."""
    order = (memory.pointer + torch.arange(len(memory.keys), device=memory.keys.device)) % len(memory.keys)
    halves = [(memory.keys[part], memory.tags[part]) for part in order.chunk(2)]
    tags = range(int(memory.tags.max()) + 1)
    if not tags:
        return torch.full((1,), torch.nan)
    means = [torch.stack([keys[owner == tag].mean(0) for tag in tags]) for keys, owner in halves]
    return 1 - F.cosine_similarity(*means)
