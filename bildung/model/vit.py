"""The Vision Transformer: an image is a sequence of patches (Dosovitskiy et al. 2021, arXiv 2010.11929).

    image B C H W -> patches of P x P -> linear -> [CLS] p1 p2 ... pN + positions -> blocks -> norm -> head(CLS)

The patch projection is a strided convolution, and its weight is stored as one [D, C, P, P]; here it is the matrix
[D, C·P·P] it amounts to, so that it is a Linear like every other.
"""

# B batch, C channels, P patch size, N = (H/P)(W/P) patches, L = 1 + N tokens, D hidden_size

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
        patch = self.image.patch_size
        rows, columns = (side // patch for side in self.image.image_size)
        self.grid = (rows, columns)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.embed_positions = nn.Parameter(torch.empty(1, 1 + rows * columns, config.hidden_size))
        self.patch_embed = dense_linear(self.image.num_channels * patch**2, config.hidden_size, bias=True)
        self.add_blocks(config, taps, prefix)
        self.embed_site, self.pos_site = f"{prefix}embed", f"{prefix}pos_embed"

    def forward(self, pixels_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """States BLD after the final norm. For an image of another size than the model's, positions are stretched."""
        patches = patches_of(pixels_BCHW.to(dtype), self.image)
        rows, columns = (side // self.image.patch_size for side in pixels_BCHW.shape[-2:])
        x_BND = self.taps(self.embed_site, self.patch_embed(patches))
        x_BLD = torch.cat((self.cls_token.to(dtype).expand(len(x_BND), -1, -1), x_BND), dim=1)
        x_BLD = x_BLD + self.taps(self.pos_site, self.positions(rows, columns).to(dtype))
        return self.run(x_BLD, Reading(torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position vectors 1LD for a grid of patches. The class token's stays; the others are an image of vectors,
        resized to the new grid in float32 by `size=` (a scale factor is off by one for some sizes: DINOv2 PR 378)."""
        if (rows, columns) == self.grid:
            return self.embed_positions
        own, grid = self.embed_positions[:, :1], self.embed_positions[:, 1:]
        image_1DRC = grid.float().reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        image_1DRC = F.interpolate(image_1DRC, size=(rows, columns), mode=self.image.interpolation, align_corners=False)
        return torch.cat((own, image_1DRC.flatten(2).transpose(1, 2).to(own.dtype)), dim=1)


def patches_of(pixels_BCHW: Tensor, image: ImageShape) -> Tensor:
    """(B, N, C·P·P): patches in reading order, each flattened channel first, as a convolution's weight is.

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
        raise DataError(f"an image of {H} x {W} pixels does not divide into patches of {P} x {P}; resize or crop it.")
    return pixels_BCHW.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)


class VisionTransformer(Model):
    """`model(pixels_BCHW) -> logits_BC` of its classes; `hidden` gives the states of class token and patches."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.model = PatchStack(config, self.taps)
        self.pooler = Pooler(config) if "pooler" in config.heads else None
        classify = "classify" in config.heads
        self.classifier = ClassificationHead(config, config.num_labels) if classify else None
        self.sites = {**stack_sites(config), **({"logits": "B C"} if classify else {})}
        self.sites = {"embed": "B P D", "pos_embed": "B L D", **{k: v for k, v in self.sites.items() if k != "embed"}}
        self.name_linears()

    def hidden(self, pixels_BCHW: Tensor) -> Tensor:
        """The last states BLD: the class token's first, then those of the patches in reading order."""
        return self.model(pixels_BCHW, self.dtype)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.classify(self.hidden(pixels_BCHW))

    def classify(self, h_BLD: Tensor) -> Tensor:
        """Logits BC from the class token's state."""
        if self.classifier is None:
            raise ModelFileError(f"this {self.config.model_type} has no classification head; train one on it first.")
        return self.taps("logits", self.classifier(h_BLD[:, 0]))
