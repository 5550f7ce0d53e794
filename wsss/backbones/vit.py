"""Vision transformers with one class token per class, registers, and taps into their blocks.

`MultiTokenViT` takes the blocks of a timm vision transformer and gives it several class tokens (MCTformer, MoRe),
register tokens that are dropped at the end (MoRe), any image size, and access to intermediate tokens and to the
attention between class and patch tokens. The attention of a tapped block is computed here from its own query and key
projections, so that it is there whether or not timm runs a fused attention kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from wsss.backbones.weights import load_weights, read_weights

TINY = "vit_tiny_scenes"
TINY_WEIGHTS = Path(__file__).parents[2] / "data" / f"{TINY}.safetensors"
POSITION_RESIZING = ("antialias", "bicubic", "offset")
TOKEN_INITS = ("copy", "noise")
HEADS = ("head.", "head_dist.", "pre_logits.")  # classifiers that files may hold besides


class ConvStem(nn.Module):
    """Patch embedding by three stride-2 convolutions: images (B, 3, 8h, 8w) -> tokens (B, h*w, D).

    It learns far faster from a few thousand images than one linear map of a whole patch.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_):
        super().__init__()
        if patch_size != 8:
            raise ValueError(f"ConvStem: patch_size must be 8 (three stride-2 convolutions), not {patch_size}")
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        layers = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.GroupNorm(1, after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.patch_size, self.grid_size = (8, 8), (img_size // 8, img_size // 8)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def tiny_vit(image_size: int, num_classes: int = 0) -> VisionTransformer:
    """The embedded benchmark's backbone, without weights: 6 blocks of 96 channels and 3 heads, patch 8."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=3,
        num_classes=num_classes,
        embed_layer=ConvStem,
    )


@dataclass
class Tokens:
    """What a forward pass gives: B images, C class tokens, L = h*w row-major patches, D channels.

    Attributes:
        classes: (B, C, D) class tokens after the final norm.
        patches: (B, L, D) patch tokens after the final norm.
        grid: (h, w).
        taps: block index -> (B, L, D) patch tokens as that block left them, not normalised.
        attention: block index -> (B, heads, C, h, w) attention of the class tokens to the patches; the softmax runs
            over all tokens, so that a row sums to less than 1.
        class_patch_logits: block index -> (B, C, h, w) the unscaled products q.k, summed over heads.
    """

    classes: Tensor
    patches: Tensor
    grid: tuple[int, int]
    taps: dict[int, Tensor]
    attention: dict[int, Tensor]
    class_patch_logits: dict[int, Tensor]

    def as_map(self, patches: Tensor) -> Tensor:
        """(B, L, D) tokens -> (B, D, h, w) map."""
        return patches.transpose(1, 2).unflatten(2, self.grid)


class MultiTokenViT(nn.Module):
    """A timm vision transformer with `class_tokens` class tokens and `registers` registers in front of its patches.

    Args:
        name: a timm model name, or "vit_tiny_scenes" (the embedded benchmark's backbone, weights in `data/`).
        class_tokens: number of class tokens C.
        registers: number of tokens that take part in attention and are dropped from the output.
        image_size: side of the training images in pixels; sets the tiny backbone's position grid.
        token_init: "copy" starts every prefix token as the pretrained class token; "noise" adds N(0, 0.02), which
            breaks the symmetry that L_mct cannot break (its gradient is exactly zero between equal tokens).
        pos_resize: how the patches' position embedding follows the image size: "antialias" (timm's way), "bicubic"
            (plain), or "offset" (bicubic with sampling ratio (n + 0.1) / grid, as MoRe's released code has it).
        pretrained: load weights; timm fetches its own, the tiny backbone's are in the repository.
        weights: a file to load instead, under timm's names or those of a code that timm knows; its grid of positions is
            kept, and `pos_resize` alone brings it to another size.
        vit: a ready timm vision transformer to wrap instead of building `name` (tests).
    """

    def __init__(
        self,
        name: str = TINY,
        class_tokens: int = 1,
        registers: int = 0,
        image_size: int = 80,
        token_init: str = "copy",
        pos_resize: str = "bicubic",
        pretrained: bool = True,
        weights: str | Path = "",
        vit: VisionTransformer | None = None,
    ):
        super().__init__()
        _choose("token_init", token_init, TOKEN_INITS)
        _choose("pos_resize", pos_resize, POSITION_RESIZING)
        vit = vit or _build(name, image_size, pretrained, weights)
        self.name, self.pos_resize = name, pos_resize
        self.num_class_tokens, self.num_registers = class_tokens, registers
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.patch_embed.strict_img_size = False  # timm would refuse other sizes; `forward` checks them itself
        self.patch_size, self.native_grid = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size
        self.embed_dim, self.depth = vit.embed_dim, len(vit.blocks)
        if vit.cls_token is None or vit.pos_embed.shape[1] != 1 + vit.patch_embed.num_patches:
            raise ValueError(f"backbone {name!r}: needs a vision transformer with one class token and a position for it")
        prefix = registers + class_tokens
        tokens = vit.cls_token.detach().repeat(1, prefix, 1)
        positions = vit.pos_embed.detach()[:, :1].repeat(1, prefix, 1)
        if registers:
            positions[:, :registers] = nn.init.trunc_normal_(torch.empty(registers, self.embed_dim), a=-2, b=2)
        if token_init == "noise":
            tokens = tokens + 0.02 * torch.randn_like(tokens)
        self.cls_token = nn.Parameter(tokens)
        self.pos_embed = nn.Parameter(torch.cat([positions, vit.pos_embed.detach()[:, 1:]], 1))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Take over the grid of positions that a checkpoint has: it is that of the weights which its run started from."""
        positions, extra = state_dict.get(f"{prefix}pos_embed"), self.num_registers + self.num_class_tokens
        side = math.isqrt(max(0, positions.shape[1] - extra)) if positions is not None else 0
        if side and positions.shape[1] == extra + side * side and positions.shape != self.pos_embed.shape:
            self.native_grid, self.pos_embed = (side, side), nn.Parameter(torch.empty_like(positions))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (1, R + C + h*w, D) for a grid of (h, w) patches."""
        if tuple(grid) == tuple(self.native_grid):
            return self.pos_embed
        split = self.num_registers + self.num_class_tokens
        prefix, patches = self.pos_embed[:, :split], self.pos_embed[:, split:]
        patches = patches.transpose(1, 2).unflatten(2, self.native_grid)
        if self.pos_resize == "offset":
            ratio = tuple((n + 0.1) / m for n, m in zip(grid, self.native_grid))
            patches = F.interpolate(patches, scale_factor=ratio, mode="bicubic", align_corners=False)
        else:
            antialias = self.pos_resize == "antialias"
            patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False, antialias=antialias)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: Tensor, taps: Sequence[int] = (), attention: Sequence[int] = ()) -> Tokens:
        """Run images (B, 3, H, W); `taps` and `attention` name blocks, negative ones from the end.

        Raises:
            ValueError: H or W is not a multiple of the patch size.
            TypeError: the attention of a block was asked for that does not have the query-key projection it needs.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            fixed = tuple(max(1, round(n / self.patch_size)) * self.patch_size for n in (height, width))
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"resize or crop to {fixed[0]}x{fixed[1]} (recipe field `crop` or `eval_size`)"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        taps, attention = {self._block(i): i for i in taps}, {self._block(i): i for i in attention}
        out = Tokens(None, None, grid, {}, {}, {})
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.position_embedding(grid)
        split = self.num_registers + self.num_class_tokens
        for index, block in enumerate(self.blocks):
            if index in attention:
                name = attention[index]
                out.attention[name], out.class_patch_logits[name] = self._class_attention(block, index, tokens, grid)
            tokens = block(tokens)
            if index in taps:
                out.taps[taps[index]] = tokens[:, split:]
        tokens = self.norm(tokens)
        out.classes, out.patches = tokens[:, self.num_registers : split], tokens[:, split:]
        return out

    def _block(self, index: int) -> int:
        if not -self.depth <= index < self.depth:
            raise ValueError(f"block {index} does not exist: backbone {self.name!r} has {self.depth} blocks")
        return index % self.depth

    def _class_attention(self, block: nn.Module, index: int, tokens: Tensor, grid) -> tuple[Tensor, Tensor]:
        """Attention (B, heads, C, h, w) and head-summed logits (B, C, h, w) of the class tokens in `block`."""
        layer = getattr(block, "attn", None)
        if not all(hasattr(layer, field) for field in ("qkv", "num_heads", "scale")):
            raise TypeError(
                f"block {index} of {self.name!r} hides its attention: {type(layer).__name__} has no `qkv` projection. "
                "Use a timm VisionTransformer whose blocks have one."
            )
        batch, length, dim = tokens.shape
        qkv = layer.qkv(block.norm1(tokens)).reshape(batch, length, 3, layer.num_heads, dim // layer.num_heads)
        query, key = (t.transpose(1, 2) for t in qkv.unbind(2)[:2])  # (B, heads, N, D / heads)
        query = getattr(layer, "q_norm", nn.Identity())(query)
        key = getattr(layer, "k_norm", nn.Identity())(key)
        split = self.num_registers + self.num_class_tokens
        logits = query[:, :, self.num_registers : split] @ key.transpose(-2, -1)  # (B, heads, C, N)
        weights = (logits * layer.scale).softmax(-1)[..., split:].unflatten(-1, grid)
        return weights, logits[..., split:].sum(1).unflatten(-1, grid)


def _build(name: str, image_size: int, pretrained: bool, weights: str | Path) -> VisionTransformer:
    if name == TINY and not weights:
        weights = TINY_WEIGHTS
        if pretrained and not weights.exists():
            raise FileNotFoundError(f"{weights} is missing: restore it with git, or make it with `wsss pretrain`")
    if pretrained and weights:
        return _from_file(name, image_size, weights)
    return tiny_vit(image_size) if name == TINY else timm.create_model(name, pretrained=pretrained, num_classes=0)


def _from_file(name: str, image_size: int, path: str | Path) -> VisionTransformer:
    """The network with the grid of positions that the file has: timm would resize them, with antialiasing."""
    state = read_weights(path)
    positions = [value.shape[1] - 1 for key, value in state.items() if key.endswith("pos_embed") and value.ndim == 3]
    side = math.isqrt(positions[0]) if positions else 0
    if name == TINY:
        vit = tiny_vit(8 * side or image_size)
    else:
        vit = timm.create_model(name, num_classes=0)
        if side:
            patch = vit.patch_embed.patch_size[0]
            vit.set_input_size((side * patch, side * patch))
    if not set(vit.state_dict()) <= set(state):  # another code's names
        state = checkpoint_filter_fn(state, vit)
    load_weights(vit, state, path, HEADS)
    return vit


def _choose(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} = {value!r} is not one of {', '.join(choices)}")
