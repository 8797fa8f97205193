"""AIM-7B at global batch 4096 (El-Nouby et al. 2024, table 1 and appendix): aim_600m.py with a larger trunk.

From the paper: 1.2 T patches, which are 5 G images, at the same batch and learning rate as the smallest. Unconfirmed:
the exact number of iterations, 1,250,000; with its 2.5 % of warm-up it is that of the appendix as we remember it.
Published top-1 on ImageNet by an attentive probe: 82.4 % on the last layers, 84.0 % on the best (blocks 14 to 19).
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant

RECIPE = config_module(Path(__file__).with_name("aim_600m.py"))


def get_config(name: str = "") -> Config:
    return variant(RECIPE.recipe("aim_7b", "AIM-7B", 1_250_000, fsdp_most=0), name, {"smoke": RECIPE.SMOKE})
