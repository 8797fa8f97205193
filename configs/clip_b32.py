"""CLIP ViT-B/32 at global batch 32768: the recipe of clip_l14.py with another image tower and learning rate.

Radford et al. 2021, tables 19 and 20. Published zero-shot top-1 on ImageNet: 63.2 %.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.models.presets import CLIP
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))

# 17.7 M parameters: the size at which `benchmarks/step.py` compares CPUs.
TINY = {
    **RECIPE.SMOKE,
    "objective.model": TwoTowerConfig(
        image=ViTConfig(image_size=112, patch_size=16, width=192, depth=12, heads=3, mlp_dim=768),
        text=TextConfig(width=192, depth=6, heads=3, mlp_dim=768, length=32, pool="first_eos", eos_id=1),
        embed_dim=192,
    ),
    "data.source": ShapesConfig(image_size=112, count=512),
    "data.batch_size": 64,
    "evals": (),
}


def get_config(name: str = "") -> Config:
    model = override(CLIP["ViT-B/32"], {"image.remat": "auto", "text.remat": "auto"})
    changes = {"objective.model": model, "optimizer.learning_rate": 5e-4}
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_b32"), changes)
    return variant(config, name, {"smoke": RECIPE.SMOKE, "tiny": TINY})
