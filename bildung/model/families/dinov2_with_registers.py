"""DINOv2 with registers: tokens without content, into which large ViTs otherwise make some background patches.

Without them a few patches of even background carry huge norms and what the model computes about the whole image, and
maps of attention are speckled (Darcet et al. 2023, arXiv 2309.16588). They have no positions and are never read. Here
positions are stretched with antialiasing, in plain DINOv2 without: the two differ wherever an image is not 518 px.
"""

from __future__ import annotations

from bildung.model.config import ModelConfig
from bildung.model.config_keys import ConfigKeys
from bildung.model.families import dinov2, vit

names, MODULES = dinov2.names, dinov2.MODULES


def config(keys: ConfigKeys) -> ModelConfig:
    """Dinov2WithRegistersConfig's keys: the mask token is always there."""
    keys.require("interpolate_antialias", True)  # said by the published files; transformers does so whatever they say
    keys.require("interpolate_offset", 0.0)
    registers = keys.size("num_register_tokens", 4)
    image = vit.image_of(keys, 224, 16, "bicubic-antialias", registers=registers, mask_token=True)
    return dinov2.of(keys, "dinov2_with_registers", "Dinov2WithRegisters", image)


def ARCHITECTURE(config: ModelConfig) -> str:
    """transformers' class for these heads."""
    return dinov2.ARCHITECTURE(config).replace("Dinov2", "Dinov2WithRegisters")
