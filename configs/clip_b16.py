"""CLIP ViT-B/16 at global batch 32768: the recipe of clip_l14.py with another image tower and learning rate.

Radford et al. 2021, tables 19 and 20. Published zero-shot top-1 on ImageNet: 68.6 %.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import CLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))


def get_config(name: str = "") -> Config:
    model = override(CLIP["ViT-B/16"], {"image.remat": "auto", "text.remat": "auto"})
    changes = {"objective.model": model, "optimizer.learning_rate": 5e-4}
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_b16"), changes)
    return variant(config, name, {"smoke": RECIPE.SMOKE})
