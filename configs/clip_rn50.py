"""CLIP ResNet-50 at global batch 32768: the recipe of clip_l14.py with the modified ResNet and its Adam.

Radford et al. 2021, sections 2.4, 2.5 and tables 18 to 20: ResNets train with b2 = 0.999 and eps = 1e-8. Published
zero-shot top-1 on ImageNet: 59.6 %; for 15 M pairs of YFCC100M 31.3 %, and 32.7 % in open_clip.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import CLIP
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))
SMOKE = {
    **RECIPE.SMOKE,
    "objective.model.image": ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
}


def get_config(name: str = "") -> Config:
    changes = {
        "objective.model": CLIP["RN50"],
        "optimizer.learning_rate": 5e-4,
        "optimizer.b2": 0.999,
        "optimizer.eps": 1e-8,
    }
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_rn50"), changes)
    return variant(config, name, {"smoke": SMOKE})
