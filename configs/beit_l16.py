"""BEiT ViT-L/16: the recipe of beit_b16.py with layer scales that start at 1e-5.

Fine-tuned ImageNet top-1: 85.2 % from ImageNet-1k, 86.0 % from 22k (`:in22k`).
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.beit import BEIT
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("beit_b16.py"))


def get_config(name: str = "") -> Config:
    config = override(RECIPE.get_config(), {"objective.model": override(BEIT["BEiT-L/16"], {"image.remat": "full"})})
    config = dataclasses.replace(config, name="beit_l16")
    return variant(config, name, {"smoke": RECIPE.SMOKE, "in22k": RECIPE.IN22K})
