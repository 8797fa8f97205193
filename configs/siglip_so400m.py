"""SigLIP So400m/14 at 224 pixels and global batch 32768: the recipe of siglip_b16.py with the shape-optimised towers.

Towers of 27 layers, 1152 wide with an MLP of 4304 (Alabdulmohsin et al. 2023), and texts of 16 tokens as in the
released model of this resolution. What is published and what is ours is said in siglip_b16.py.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import SIGLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("siglip_b16.py"))


def get_config(name: str = "") -> Config:
    model = override(SIGLIP["SigLIP-So400m/14"], {"image.remat": "full", "text.remat": "full"})
    changes = {"objective.model": model, "data.tokenizer.length": model.text.length}
    config = override(dataclasses.replace(RECIPE.get_config(), name="siglip_so400m"), changes)
    return variant(config, name, {"smoke": RECIPE.SMOKE})
