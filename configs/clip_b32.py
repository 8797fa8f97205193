"""CLIP ViT-B/32 at global batch 32768: the recipe of clip_l14.py with another image tower and learning rate.

Radford et al. 2021, tables 19 and 20. Published zero-shot top-1 on ImageNet: 63.2 %.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import CLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))


def get_config(name: str = "") -> Config:
    changes = {"objective.model": CLIP["ViT-B/32"], "optimizer.learning_rate": 5e-4}
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_b32"), changes)
    return variant(config, name, {"smoke": RECIPE.SMOKE})
