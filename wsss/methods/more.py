"""MoRe: class-patch attention regularised by a category graph and by relations read from the CAM (AAAI 2025).

In the order of the paper: the category graph (eqs. 1-5), confident relations (eq. 7), uncertain relations (eqs. 8, 9),
the contrast between class tokens, and the whole method. Eq. 6 is `wsss.maps.three_way`. Shapes: B images, C classes,
L = h * w patches in row-major order, D channels; label maps hold 0 background, 1..C classes, 255 uncertain.

Functions named `..._released` compute what the public implementation computes where that is not the printed equation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from wsss.backbones.vit import MultiTokenViT, Tokens
from wsss.data import Sample
from wsss.maps import UNCERTAIN, token_similarity
from wsss.methods.cam import Cam, CamConfig
from wsss.methods.common import check_variant, full_precision
from wsss.representations import describe_tokens


@dataclass(frozen=True)
class CategoryGraph:
    """The directed graph of eqs. 1-4, K neighbours a class.

    Attributes:
        heads: h (B, C, D).
        tails: t (B, N, D); N = L patches (published) or C + L, class tokens first (released).
        neighbours: N_i (B, C, K), indices into `tails`, most similar first (eq. 2).
        similarity: s_ij (B, C, K), the scores of the neighbours before the softmax.
        relation: r (B, C, K), sums to 1 over K (eq. 1).
        edges: e (B, C, K, D) (eq. 3).
        weights: S(h, e, t) (B, C, K), sums to 1 over K (eq. 4).
        aggregated: a (B, C, D), sum of the neighbouring tails by weight.
    """

    heads: Tensor
    tails: Tensor
    neighbours: Tensor
    similarity: Tensor
    relation: Tensor
    edges: Tensor
    weights: Tensor
    aggregated: Tensor


class GraphCategoryRepresentation(nn.Module):
    """Graph Category Representation: class tokens X and patch tokens P -> class tokens Q (MoRe eqs. 1-5).

    | | published | released |
    |---|---|---|
    | tails | patches | class tokens and detached patches |
    | similarity (eqs. 1, 2) | cosine | h.t / sqrt(D) |
    | aggregation (eq. 4) | t.tanh(h+e) | (sum t)(sum tanh(h+e)) |
    | Q (eq. 5) | as printed | on a skip from X, h+a and h*a scaled by 0.1, biases, LayerNorm |

    Args:
        dim: D.
        variant: "published" or "released".
        neighbour_ratio: K as a share: of the L patches as published (392 of 784 is 0.5), so that it follows the size
            of the image; of the C classes as released, which is where the public code applies its 0.5.
        neighbours: K itself, whatever the number of patches; replaces `neighbour_ratio`.
        similarity: "cosine", "dot" or "scaled_dot"; None is the variant's.
        inner_product: whether eq. 4 is the inner product it is printed as; None is the variant's.
    """

    def __init__(
        self,
        dim: int,
        variant: str = "published",
        neighbour_ratio: float = 0.5,
        neighbours: int | None = None,
        similarity: str | None = None,
        inner_product: bool | None = None,
    ):
        super().__init__()
        self.released = check_variant(variant, "MoRe") == "released"
        self.neighbour_ratio = neighbour_ratio
        self.neighbours = neighbours
        self.similarity = similarity or ("scaled_dot" if self.released else "cosine")
        if self.similarity not in ("cosine", "dot", "scaled_dot"):
            raise ValueError(f"MoRe: similarity {similarity!r} is unknown; choose cosine, dot or scaled_dot")
        self.inner_product = not self.released if inner_product is None else inner_product
        self.head = nn.Linear(dim, dim)
        self.tail = nn.Linear(dim, dim)
        self.sum_projection = nn.Linear(dim, dim, bias=self.released)
        self.product_projection = nn.Linear(dim, dim, bias=self.released)
        self.norm = nn.LayerNorm(dim) if self.released else nn.Identity()

    def forward(self, class_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
        """X (B, C, D), P (B, L, D) -> Q (B, C, D), eq. 5."""
        graph = self.graph(class_tokens, patch_tokens)
        total = graph.heads + graph.aggregated
        product = graph.heads * graph.aggregated
        if self.released:
            total, product = 0.1 * total + class_tokens, 0.1 * product + class_tokens
        return self.norm(F.leaky_relu(self.sum_projection(total)) + F.leaky_relu(self.product_projection(product)))

    def graph(self, class_tokens: Tensor, patch_tokens: Tensor) -> CategoryGraph:
        """The graph of X (B, C, D) and P (B, L, D), eqs. 1-4.

        Raises:
            ValueError: K is below 1 or above the number of tails.
        """
        candidates = torch.cat([class_tokens, patch_tokens.detach()], dim=1) if self.released else patch_tokens
        heads, tails = self.head(class_tokens), self.tail(candidates)
        count = self.count_neighbours(class_tokens.shape[1], patch_tokens.shape[1])

        similarity, neighbours = self._similarity(heads, tails).topk(count, dim=-1)
        relation = similarity.softmax(dim=-1)
        # An embedding look-up: its backward pass is many times faster than that of fancy indexing or gather.
        first = torch.arange(len(tails), device=tails.device)[:, None, None] * tails.shape[1]
        chosen = F.embedding(neighbours + first, tails.flatten(0, 1))
        edges = relation[..., None] * chosen + (1 - relation[..., None]) * heads[:, :, None]

        gate = (heads[:, :, None] + edges).tanh()
        agreement = (chosen * gate).sum(-1) if self.inner_product else chosen.sum(-1) * gate.sum(-1)
        weights = agreement.softmax(dim=-1)
        aggregated = torch.einsum("bck,bckd->bcd", weights, chosen)
        return CategoryGraph(heads, tails, neighbours, similarity, relation, edges, weights, aggregated)

    def count_neighbours(self, num_classes: int, num_patches: int) -> int:
        """K for an image of L = `num_patches`; ValueError when it is below 1 or above the number of tails."""
        num_tails = num_patches + num_classes if self.released else num_patches
        if self.neighbours is not None:
            count, origin = self.neighbours, f"neighbours = {self.neighbours}"
        else:
            basis = num_classes if self.released else num_patches
            count, origin = int(self.neighbour_ratio * basis), f"neighbour_ratio = {self.neighbour_ratio} of {basis}"
        if not 1 <= count <= num_tails:
            raise ValueError(
                f"MoRe: {origin} gives K = {count} neighbours, but the graph has {num_tails} tails ({num_patches} "
                f"patches): choose 1 <= K <= {num_tails}, or a neighbour_ratio, which follows the image size"
            )
        return count

    def _similarity(self, heads: Tensor, tails: Tensor) -> Tensor:
        if self.similarity == "cosine":
            heads, tails = F.normalize(heads, dim=-1), F.normalize(tails, dim=-1)
        elif self.similarity == "scaled_dot":
            heads = heads * heads.shape[-1] ** -0.5
        return heads @ tails.transpose(1, 2)


def confident_relation_loss(
    class_tokens: Tensor,
    patch_tokens: Tensor,
    mask: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    similarity: str = "cosine",
    reduction: str = "image_mean",
) -> Tensor:
    """L_cre: every class token is contrasted over all patches, with the confident ones as positives (MoRe eq. 7).

    Args:
        class_tokens: Q (B, C, D).
        patch_tokens: P (B, L, D).
        mask: M_a (B, h, w); the confident cells of M_c are those with 1..C.
        labels: (B, C) of 0/1; pairs of absent classes do not count.
        temperature: tau.
        similarity: "cosine", or "dot" as the formula is printed.
        reduction: "image_mean" divides by the positive pairs of each image, then averages over the images (an image
            without any counts 0); "pair_mean" divides by those of the batch.
    """
    if similarity == "cosine":
        class_tokens, patch_tokens = F.normalize(class_tokens, dim=-1), F.normalize(patch_tokens, dim=-1)
    logits = class_tokens @ patch_tokens.transpose(1, 2) / temperature
    positive = _positive_pairs(mask, labels)
    totals = -(logits.log_softmax(dim=-1) * positive).sum((1, 2))
    pairs = positive.sum((1, 2))
    if reduction == "pair_mean":
        return totals.sum() / pairs.sum().clamp(min=1)
    return (totals / pairs.clamp(min=1)).mean()


def confident_relation_loss_released(
    class_tokens: Tensor, patch_tokens: Tensor, mask: Tensor, labels: Tensor, temperature: float = 0.5
) -> Tensor:
    """L_cre as released: patches raw and detached, a mean for each class, summed over the classes of an image.

    The 1e-4 that the public code adds to the sum of exponentials is one more logit, ln 1e-4, which keeps the logarithm
    finite where that code over- or underflows. Arguments as in `confident_relation_loss`.
    """
    logits = F.normalize(class_tokens, dim=-1) @ patch_tokens.detach().transpose(1, 2) / temperature
    floor = torch.full_like(logits[..., :1], math.log(1e-4))
    normaliser = torch.cat([logits, floor], dim=-1).logsumexp(dim=-1, keepdim=True)
    positive = _positive_pairs(mask, labels)
    per_class = ((normaliser - logits) * positive).sum(-1) / (positive.sum(-1) + 1e-4)
    return per_class.sum(1).mean()


def _positive_pairs(mask: Tensor, labels: Tensor) -> Tensor:
    """(B, C, L) bool: patch j is confidently of class c, which the image has."""
    classes = torch.arange(1, labels.shape[1] + 1, device=mask.device)
    return (mask.flatten(1)[:, None] == classes[:, None]) & (labels > 0)[..., None]


def kernel_search(mask: Tensor, kernel: int, proportion: float, strict: bool = True) -> tuple[Tensor, Tensor]:
    """U: the uncertain cells whose neighbourhood is mostly foreground or uncertain (MoRe eq. 8).

    In a d x d window around the cell every uncertain cell counts 1 and every foreground cell 2. The window of row i
    begins at row i - d // 2, also for even d; what lies outside the map counts 0, and the divisor stays d * d.

    Args:
        mask: M_a (B, h, w).
        kernel: d, in patches.
        proportion: phi, above 1 only if foreground is near.
        strict: compare with > as printed, or with >=.

    Returns:
        The sums (B, h, w), int64, of every cell, and U (B, h, w), bool.
    """
    uncertain = mask == UNCERTAIN
    sums = window_sums(uncertain + 2 * _foreground(mask), kernel)
    limit = round(proportion * kernel * kernel, 9)  # rounded, so that 1.1 * 100 is 110 and an equal sum is equal
    return sums, uncertain & (sums > limit if strict else sums >= limit)


def window_sums(values: Tensor, kernel: int) -> Tensor:
    """Sum of the integers (B, h, w) in the window of each cell: rows i - d // 2 to i - d // 2 + d - 1, 0 outside."""
    before = kernel // 2
    after = kernel - 1 - before
    padded = F.pad(values.float(), (before, after, before, after))
    return F.avg_pool2d(padded[:, None], kernel, stride=1, divisor_override=1)[:, 0].long()


def uncertain_relation_loss(
    class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, selected: Tensor, reduction: str = "image_mean"
) -> Tensor:
    """L_ure: the selected uncertain patches are pulled to the present classes and off the absent ones (MoRe eq. 9).

    Args:
        class_tokens: Q (B, C, D).
        patch_tokens: P (B, L, D).
        labels: (B, C) of 0/1.
        selected: U (B, h, w), bool.
        reduction: "image_mean" divides by the pairs of each image, then averages over the images (an image where U is
            empty counts 0); "batch_pairs" divides by those of the batch.
    """
    cosine = F.normalize(class_tokens, dim=-1) @ F.normalize(patch_tokens, dim=-1).transpose(1, 2)
    present = (labels > 0)[..., None]
    chosen = selected.flatten(1)[:, None]
    positive, negative = present & chosen, ~present & chosen
    pairs = positive.sum((1, 2)), negative.sum((1, 2))
    totals = ((1 - cosine) * positive).sum((1, 2)), (cosine * negative).sum((1, 2))
    if reduction == "batch_pairs":
        pairs, totals = [count.sum() for count in pairs], [total.sum() for total in totals]
    return sum(total / count.clamp(min=1) for total, count in zip(totals, pairs)).mean()


@dataclass(frozen=True)
class CornerTokens:
    """What `corner_search` chose, S places an image.

    Attributes:
        index: (B, S), the row-major patch index of each place.
        chosen: (B, S) bool; places that are not used are False.
        extra: (B, S) bool; the place belongs to a token that fills up a short list.
        accepted: (B, h, w) bool; every token that passed the test, before the draw.
    """

    index: Tensor
    chosen: Tensor
    extra: Tensor
    accepted: Tensor


def corner_search(
    mask: Tensor, kernel: int, proportion: float, limit: int, priority: Tensor | None = None
) -> CornerTokens:
    """The uncertain tokens of the released code, where eq. 8 selects something else.

    It tests the cell (i, j) = (a + d // 2, b + d // 2) of every window (a, b) with a < h - d and b < w - d by >=, and
    then takes the *corner* (a, b) of the window instead of its centre. At most `limit` tokens are kept at random;
    n < `limit` are filled up by (limit - n) // 4 tokens of windows with foreground at the centre or, where these are
    too few, of any windows.

    Args:
        mask: M_a (B, h, w).
        kernel: d, in patches.
        proportion: phi.
        limit: tokens of an image at most (8).
        priority: (B, h, w) numbers; of the candidates, those with the smallest numbers are kept. None draws them.

    Raises:
        ValueError: the kernel does not fit into the map.
    """
    height, width = mask.shape[1:]
    rows, columns = height - kernel, width - kernel
    if min(rows, columns) < 1:
        raise ValueError(
            f"MoRe: kernel_size = {kernel} leaves no window on a map of {height}x{width} patches; "
            "choose a smaller kernel_size or a larger crop"
        )
    if priority is None:
        priority = torch.rand(mask.shape, device=mask.device)
    priority = priority[:, :rows, :columns].flatten(1).float()

    def by_corner(cells: Tensor) -> Tensor:
        return cells[:, kernel // 2 :, kernel // 2 :][:, :rows, :columns].flatten(1)

    accepted = by_corner(kernel_search(mask, kernel, proportion, strict=False)[1])
    missing = ((limit - accepted.sum(1, keepdim=True)) // 4).clamp(min=0)
    foreground = by_corner(_foreground(mask))
    fillers = foreground | (foreground.sum(1, keepdim=True) < missing)

    first, found = _smallest(priority, accepted, limit)
    fill, filled = _smallest(priority, fillers, limit // 4)
    filled &= torch.arange(fill.shape[1], device=mask.device) < missing
    index = torch.cat([first, fill], dim=1)
    return CornerTokens(
        index=index // columns * width + index % columns,
        chosen=torch.cat([found, filled], dim=1),
        extra=torch.cat([torch.zeros_like(found), filled], dim=1),
        accepted=F.pad(accepted.unflatten(1, (rows, columns)), (0, kernel, 0, kernel)),
    )


def _smallest(priority: Tensor, candidates: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The up to `limit` candidates of each row with the smallest priority: their index, and whether there is one."""
    ranked = priority.masked_fill(~candidates, math.inf)
    values, index = ranked.topk(min(limit, ranked.shape[1]), largest=False)
    return index, values.isfinite()


def _foreground(mask: Tensor) -> Tensor:
    return (mask > 0) & (mask != UNCERTAIN)


def uncertain_relation_loss_released(
    class_tokens: Tensor, patch_tokens: Tensor, labels: Tensor, tokens: CornerTokens
) -> Tensor:
    """L_ure as released: the absolute cosine to the detached class tokens.

    A token's terms are divided by its number of classes plus one, and averaged over the chosen tokens of the batch. The
    best value for an image of one label is 0.25. Arguments as in `uncertain_relation_loss`, `tokens` from
    `corner_search`.
    """
    index = tokens.index[..., None].expand(-1, -1, patch_tokens.shape[-1])
    patches = F.normalize(patch_tokens.gather(1, index), dim=-1)
    cosine = (patches @ F.normalize(class_tokens.detach(), dim=-1).transpose(1, 2)).abs()
    present = (labels > 0).to(cosine)[:, None]
    positive = (cosine * present).sum(-1) / (present.sum(-1) + 1)
    negative = (cosine * (1 - present)).sum(-1) / ((1 - present).sum(-1) + 1)
    per_token = 0.5 * (1 - positive) + 0.5 * negative
    return (per_token * tokens.chosen).sum() / tokens.chosen.sum().clamp(min=1)


def multi_class_token_loss(class_tokens: Tensor, temperature: float = 0.07, labels: Tensor | None = None) -> Tensor:
    """L_mct: every class token is told apart from the others of its image (MoRe eq. 10, after MCTformer+).

    Args:
        class_tokens: Q (B, C, D).
        temperature: of the softmax over the cosine similarities.
        labels: (B, C) of 0/1; with them the result is the mean of the contrast and of the soft margin loss of the
            normalised tokens' means. These lie within +-1 / sqrt(D) and tell a token of its class only faintly.
    """
    tokens = F.normalize(class_tokens, dim=-1)
    logits = tokens @ tokens.transpose(1, 2) / temperature
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    contrast = F.cross_entropy(logits.flatten(0, 1), own.flatten())
    if labels is None:
        return contrast
    return 0.5 * contrast + 0.5 * F.multilabel_soft_margin_loss(tokens.mean(-1), labels)


@dataclass(frozen=True)
class MoReConfig(CamConfig):
    """Hyper-parameters of MoRe, besides those of the baseline. The defaults are the released ones on VOC.

    Attributes:
        variant: "published" follows the equations, "released" the public code.
        use_gcr: whether the class tokens pass through the category graph; without it Q are the encoder's class tokens.
        neighbour_ratio, neighbours: K of eqs. 1 and 2, see `GraphCategoryRepresentation`; 0 `neighbours` means that
            the ratio decides.
        weight_mct, mct_temperature, mct_with_cls: L_mct and its form, see `multi_class_token_loss`.
        weight_cre, cre_start, cre_temperature: alpha, tau of L_cre.
        weight_ure, ure_start: beta, of L_ure.
        kernel_size, kernel_proportion: d and phi of eq. 8.
        max_uncertain_tokens: tokens of an image in the released L_ure, at most.
        mask_switch: the step from which the masks of L_cre and L_ure come from the main CAM, with these thresholds:
        confident_thresholds, uncertain_thresholds: lambda_h and lambda_l of eq. 6, for L_cre and L_ure.
        early_confident_thresholds, early_uncertain_thresholds: the same for the auxiliary CAM, before the switch.
    """

    variant: str = "released"
    use_gcr: bool = True
    neighbour_ratio: float = 0.5
    neighbours: int = 0
    weight_mct: float = 1.0
    mct_temperature: float = 0.07
    mct_with_cls: bool = False
    weight_cre: float = 0.2
    cre_start: int = 0
    cre_temperature: float = 0.5
    weight_ure: float = 0.1
    ure_start: int = 0
    kernel_size: int = 6
    kernel_proportion: float = 1.2
    max_uncertain_tokens: int = 8
    mask_switch: int = 10001
    confident_thresholds: Sequence[float] = (0.6, 0.35)
    uncertain_thresholds: Sequence[float] = (0.6, 0.35)
    early_confident_thresholds: Sequence[float] = (0.5, 0.25)
    early_uncertain_thresholds: Sequence[float] = (0.7, 0.25)

    def __post_init__(self):
        super().__post_init__()
        check_variant(self.variant, "MoRe")


class MoRe(Cam):
    """MoRe: the baseline, one class token for each class, the category graph and the two relation losses.

    | | published | released |
    |---|---|---|
    | L_cre, L_ure | eqs. 7-9 | the functions `..._released` |
    | LAM | cosine of Q and P | their inner product |
    | pseudo label of the decoder | LAM | CAM |
    | a score equal to a threshold | uncertain | background at the low, uncertain at the high one |

    Args:
        config: hyper-parameters.
        num_classes: C, foreground classes.
        backbone: vision transformer with C class tokens.

    Raises:
        ValueError: the backbone has another number of class tokens.
    """

    Config = MoReConfig
    map_names = ("cam", "cam_aux", "lam", "fused")  # fused is cam times lam, which the evaluation multiplies
    crf_maps = ("cam", "lam")
    mask_map = "lam"

    def __init__(self, config: MoReConfig, num_classes: int, backbone: MultiTokenViT):
        super().__init__(config, num_classes, backbone)
        if backbone.num_class_tokens != num_classes:
            raise ValueError(
                f"MoRe: the backbone has {backbone.num_class_tokens} class tokens and the dataset {num_classes} "
                f"classes; build it with class_tokens={num_classes}"
            )
        self.published = config.variant == "published"
        if self.published:
            self.seed_maps, self.label_map, self.strict = (*Cam.seed_maps, "lam"), "lam", True
        self.gcr = None
        if config.use_gcr:
            self.gcr = GraphCategoryRepresentation(
                backbone.embed_dim, config.variant, config.neighbour_ratio, config.neighbours or None
            )

    @staticmethod
    def class_tokens(num_classes: int) -> int:
        """How many class tokens the backbone needs for C classes."""
        return num_classes

    def encode(self, images: Tensor) -> Tokens:
        """Tokens of images (B, 3, H, W); their class tokens are Q."""
        tokens = super().encode(images)
        if self.gcr is None:
            return tokens
        return replace(tokens, classes=self.gcr(tokens.classes, tokens.patches).to(tokens.classes.dtype))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Q (B, C, D) and P (B, L, D) of images (B, 3, H, W)."""
        tokens = self.encode(images)
        return tokens.classes, tokens.patches

    def describe(self, dataset: Dataset[Sample], images: int) -> dict:
        """See `describe_tokens`."""
        return describe_tokens(self, dataset, images, next(self.parameters()).device)

    def token_maps(self, tokens: Tokens) -> dict[str, Tensor]:
        """The raw maps "cam", "cam_aux" and "lam", (B, C, h, w)."""
        kind = "cosine" if self.published else "dot"
        lam = token_similarity(tokens.as_map(tokens.patches), tokens.classes, kind)
        return super().token_maps(tokens) | {"lam": lam}

    def relation_losses(
        self, batch: dict[str, Tensor], tokens: Tokens, seeds: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """L_mct, L_cre and L_ure (eq. 10), as far as they are on."""
        config, labels = self.config, batch["label"]
        if step < config.mask_switch:
            seed = seeds["cam_aux"]
            confident, uncertain = config.early_confident_thresholds, config.early_uncertain_thresholds
        else:
            seed = seeds["cam"]
            confident, uncertain = config.confident_thresholds, config.uncertain_thresholds
        terms = {}
        with full_precision(tokens.classes):
            if config.weight_mct:
                named = labels if config.mct_with_cls else None
                terms["mct"] = config.weight_mct * multi_class_token_loss(tokens.classes, config.mct_temperature, named)
            if config.weight_cre and step >= config.cre_start:
                mask = self.cell_labels(seed, tokens, labels, confident)
                loss = confident_relation_loss if self.published else confident_relation_loss_released
                value = loss(tokens.classes, tokens.patches, mask, labels, config.cre_temperature)
                terms["cre"] = config.weight_cre * value
            if config.weight_ure and step >= config.ure_start:
                mask = self.cell_labels(seed, tokens, labels, uncertain)
                terms["ure"] = config.weight_ure * self._uncertain_loss(tokens, mask, labels)
        return terms

    def attention_lam(self, images: Tensor, blocks: Sequence[int] = (-1,)) -> Tensor:
        """What the paper starts from: class-to-patch attention (B, C, h, w), mean over heads, summed over `blocks`."""
        attention = self.backbone(images, attention=blocks).attention
        return sum(attention[block].mean(1) for block in blocks)

    def _uncertain_loss(self, tokens: Tokens, mask: Tensor, labels: Tensor) -> Tensor:
        kernel, proportion = self.config.kernel_size, self.config.kernel_proportion
        if self.published:
            selected = kernel_search(mask, kernel, proportion)[1]
            return uncertain_relation_loss(tokens.classes, tokens.patches, labels, selected)
        corners = corner_search(mask, kernel, proportion, self.config.max_uncertain_tokens)
        return uncertain_relation_loss_released(tokens.classes, tokens.patches, labels, corners)
