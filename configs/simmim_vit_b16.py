"""SimMIM with ViT-B/16 at 224 pixels on ImageNet-1k for 800 epochs: the recipe of simmim_swin_b.py.

The tower is BEiT's: relative positions that all blocks share and no others, no bias on keys, layer scale from 0.1, drop
path of 0.1, and BEiT's initial weights. Besides biases and norms, layer scales and the class token don't decay; the
mask token does, unlike Swin's. ImageNet top-1 fine-tuned: 83.8 % (Xie et al. 2022, published models).
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.parts import Part
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("simmim_swin_b.py"))
NO_DECAY = r"(.*/)?(bias|scale|layer_scale_[12]|class_token)"
TOWER = ViTConfig(
    width=768,
    depth=12,
    heads=12,
    mlp_dim=3072,
    patch_size=16,
    image_size=224,
    activation="gelu",
    norm_eps=1e-6,
    key_bias=False,
    layer_scale_init=0.1,
    drop_path=0.1,
    pool="mean",
    pos_embed="none",
    relative_position="shared",
    mask_token=True,
    pre_norm=False,
    patch_bias=True,
    init="beit",
)
TINY = {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128, "patch_size": 4, "image_size": 32}
SMOKE = {**RECIPE.SMOKE_RUN, "objective.model": MaskedImageModelConfig(override(TOWER, TINY), cell=8)}


def get_config(name: str = "") -> Config:
    config = override(
        RECIPE.get_config(),
        {
            "name": "simmim_vit_b16",
            "objective.model": MaskedImageModelConfig(override(TOWER, {"remat": "full"})),
            "parts": tuple(Part(part, f"{part}/.*", no_decay=NO_DECAY) for part in ("image", "decoder")),
        },
    )
    return variant(config, name, {"smoke": SMOKE})
