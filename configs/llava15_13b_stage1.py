"""Stage 1 of LLaVA-1.5 with Vicuna-13B: the recipe of llava15_7b_stage1.py around the larger language model."""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant

RECIPE = config_module(Path(__file__).with_name("llava15_7b_stage1.py"))


def get_config(name: str = "") -> Config:
    config = RECIPE.first_stage("llava15_13b_stage1", "Vicuna-13B", "checkpoints/vicuna_13b")
    return variant(config, name, {"smoke": RECIPE.SMOKE})
