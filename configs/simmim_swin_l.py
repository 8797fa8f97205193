"""SimMIM with Swin-L at 192 pixels and windows of 12 on ImageNet-1k: the recipe of simmim_swin_b.py, 800 epochs.

ImageNet top-1 fine-tuned at 224 pixels with windows of 14: 85.4 % (Xie et al. 2022, published models).
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.swin import SWIN
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("simmim_swin_b.py"))


def get_config(name: str = "") -> Config:
    image = override(SWIN["Swin-L"], {"image_size": 192, "window": 12, "mask_token": True, "remat": "full"})
    model = MaskedImageModelConfig(image)
    config = override(RECIPE.get_config(), {"name": "simmim_swin_l", "objective.model": model})
    return variant(config, name, {"smoke": RECIPE.SMOKE})
