"""PaliGemma-3B at 448 pixels, tuned to VQAv2: the recipe of paligemma_3b_224.py with 1024 tokens an image, no decay."""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant

RECIPE = config_module(Path(__file__).with_name("paligemma_3b_224.py"))


def get_config(name: str = "") -> Config:
    smoke = {**RECIPE.SMOKE, "optimizer.weight_decay": 1e-6}
    return variant(RECIPE.recipe("paligemma_3b_448", 448, 0.0), name, {"smoke": smoke})
