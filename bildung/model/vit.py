"""The Vision Transformer: an image is a sequence of patches (Dosovitskiy et al. 2021, arXiv 2010.11929, eqs 1-4).

    image H x W x C -> N = HW / P² patches, each a vector of P²C numbers -> linear to D

    [CLS] p1 p2 ... pN  +  positions (N + 1) x D  ->  blocks that all see each other -> norm -> head of [CLS]

That is the only change to an encoder of text: what stands below the blocks. The patch projection is a convolution of
stride P, and files keep its weight as one, [D, C, P, P]; here it is the matrix [D, C·P·P] it amounts to, a Linear like
every other.
"""

# B batch, C channels, P patch size, N = (H/P)(W/P) patches, K register tokens, L = 1 + K + N tokens, D hidden_size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bildung.core.errors import DataError, ModelFileError
from bildung.model.base import Model
from bildung.model.config import ImageShape, ModelConfig
from bildung.model.heads import ClassificationHead, Pooler
from bildung.model.linear import dense_linear
from bildung.model.taps import Taps
from bildung.model.transformer import Reading, Stack, stack_sites


class PatchStack(Stack):
    """Patches, class token and positions below a stack of blocks that all see each other."""

    def __init__(self, config: ModelConfig, taps: Taps, prefix: str = ""):
        super().__init__()
        assert config.image is not None
        self.image: ImageShape = config.image
        rows, columns = self.image.grid
        size = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        # Stands in for hidden patches where a model learns to fill them in (DINOv2); files have it, few use it.
        self.mask_token = nn.Parameter(torch.empty(1, size)) if self.image.mask_token else None
        # Tokens without content or position, room for what a model computes (Darcet et al. 2023, arXiv 2309.16588).
        registers = self.image.registers
        self.register_tokens = nn.Parameter(torch.empty(1, registers, size)) if registers else None
        self.embed_positions = nn.Parameter(torch.empty(1, 1 + rows * columns, size))
        self.patch_embed = dense_linear(self.image.num_channels * self.image.patch_size**2, size, bias=True)
        self.add_blocks(config, taps, prefix)
        self.embed_site, self.pos_site = f"{prefix}embed", f"{prefix}pos_embed"

    def forward(self, pixels_BCHW: Tensor, dtype: torch.dtype, masked_BN: Tensor | None = None) -> Tensor:
        """States BLD after the final norm. For an image of another size than the model's, positions are stretched.

        masked_BN: True hides a patch behind the mask token. Raises DataError for pixels that do not fit.
        """
        patches_BNJ = patches_of(pixels_BCHW.to(dtype), self.image)
        rows, columns = (side // self.image.patch_size for side in pixels_BCHW.shape[-2:])
        x_BND = self.taps(self.embed_site, self.patch_embed(patches_BNJ))
        if masked_BN is not None:
            x_BND = self._masked(x_BND, masked_BN)
        x_BLD = torch.cat((self.cls_token.to(dtype).expand(len(x_BND), -1, -1), x_BND), dim=1)
        x_BLD = x_BLD + self.taps(self.pos_site, self.positions(rows, columns).to(dtype).expand_as(x_BLD))
        if self.register_tokens is not None:
            registers_BKD = self.register_tokens.to(dtype).expand(len(x_BND), -1, -1)
            x_BLD = torch.cat((x_BLD[:, :1], registers_BKD, x_BLD[:, 1:]), dim=1)
        return self.run(x_BLD, Reading(torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position vectors 1LD for a grid of patches. The class token's stays; the others are an image of vectors,
        resized to the new grid in float32 by `size=` (a scale factor is off by one for some sizes: DINOv2 PR 378)."""
        if (rows, columns) == self.image.grid:
            return self.embed_positions
        own, grid = self.embed_positions[:, :1], self.embed_positions[:, 1:]
        image_1DRC = grid.float().reshape(1, *self.image.grid, -1).permute(0, 3, 1, 2)
        mode, _, antialias = self.image.interpolation.partition("-")
        image_1DRC = F.interpolate(
            image_1DRC, size=(rows, columns), mode=mode, align_corners=False, antialias=bool(antialias)
        )
        return torch.cat((own, image_1DRC.flatten(2).transpose(1, 2).to(own.dtype)), dim=1)

    def _masked(self, x_BND: Tensor, masked_BN: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ModelFileError(f"this {self.config.model_type} has no mask token, so no patch can be hidden from it.")
        if masked_BN.shape != x_BND.shape[:2] or masked_BN.dtype != torch.bool:
            raise DataError(
                f"masked_BN of shape {tuple(masked_BN.shape)} {masked_BN.dtype} was given; truth values of shape "
                f"{tuple(x_BND.shape[:2])}, one per patch, are needed."
            )
        return torch.where(masked_BN[..., None], self.mask_token.to(x_BND.dtype), x_BND)


def patches_of(pixels_BCHW: Tensor, image: ImageShape) -> Tensor:
    """(B, N, C·P·P): patches in reading order, each flattened channel first, as a convolution's weight is.

    Others flatten (P, P, C), channels last; the two differ by a permutation of the projection's columns and no more.
    Raises DataError when the image does not divide into patches or has another number of channels.
    """
    P = image.patch_size
    if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != image.num_channels:
        raise DataError(
            f"pixels of shape {tuple(pixels_BCHW.shape)} were given; "
            f"(batch, {image.num_channels}, height, width) is needed."
        )
    B, C, H, W = pixels_BCHW.shape
    if H % P or W % P or not H or not W:
        raise DataError(
            f"an image of {H} x {W} pixels does not divide into patches of {P} x {P}; resize or crop it, for instance "
            f"to {max(P, round(H / P) * P)} x {max(P, round(W / P) * P)}."
        )
    patches = pixels_BCHW.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, -1, C * P * P)


class VisionTransformer(Model):
    """`model(pixels_BCHW) -> logits_BC` of its classes; `hidden` gives the states of class token and patches."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.model = PatchStack(config, self.taps)
        self.pooler = Pooler(config) if "pooler" in config.heads else None
        self.mean_too = "classify_mean" in config.heads
        classify = self.mean_too or "classify" in config.heads
        read = config.hidden_size * (2 if self.mean_too else 1)
        self.classifier = ClassificationHead(config, config.num_labels, size=read) if classify else None
        above = {"pooled": "B D"} if self.pooler is not None else {}
        above |= {"logits": "B C"} if classify else {}
        self.sites = {**stack_sites(config), **above, "embed": "B P D"}
        self.name_linears()

    @property
    def embedding(self) -> nn.Module:
        """What turns an image's patches into vectors."""
        return self.model.patch_embed

    def hidden(self, pixels_BCHW: Tensor, *, masked_BN: Tensor | None = None) -> Tensor:
        """The last states BLD: the class token's first, then registers, then the patches in reading order."""
        return self.model(pixels_BCHW, self.dtype, masked_BN)

    def patch_states(self, h_BLD: Tensor) -> Tensor:
        """Those of `hidden` that belong to patches, BND."""
        return h_BLD[:, 1 + self.model.image.registers :]

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.classify(self.hidden(pixels_BCHW))

    def pooled(self, h_BLD: Tensor) -> Tensor:
        """The image's vector BD: the class token's state, through the pooler where there is one."""
        return h_BLD[:, 0] if self.pooler is None else self.taps("pooled", self.pooler(h_BLD))

    def classify(self, h_BLD: Tensor) -> Tensor:
        """Logits BC from the class token's state; in DINOv2 from that and the mean of the patches', side by side."""
        if self.classifier is None:
            raise ModelFileError(
                f"this {self.config.model_type} has no classification head, only states; `bildung pretrain image` "
                f"gives it one and trains it."
            )
        h_BD = h_BLD[:, 0]
        if self.mean_too:
            h_BD = torch.cat((h_BD, self.patch_states(h_BLD).mean(dim=1)), dim=-1)
        return self.taps("logits", self.classifier(h_BD))
