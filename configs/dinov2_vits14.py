"""DINOv2 ViT-S/14 from scratch: the tower that was released, by the recipe of dinov2_vitl14.py.

No recipe from scratch was published for this size; the released one (79.0 % k-NN and 81.1 % linear top-1 on ImageNet)
was distilled from ViT-g. Ours: a drop path of 0.1, for a tower that does not overfit so soon, and a plain MLP as
released.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import dinov2
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("dinov2_vitl14.py"))


def get_config(name: str = "") -> Config:
    large = RECIPE.get_config()
    tower = override(dinov2(384, 12, image_size=224), {"drop_path": 0.1, "drop_path_rates": "uniform", "remat": "auto"})
    config = override(dataclasses.replace(large, name="dinov2_vits14"), {"objective.model.image": tower})
    return variant(config, name, {"smoke": RECIPE.SMOKE})
