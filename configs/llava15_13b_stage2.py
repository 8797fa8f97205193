"""Stage 2 of LLaVA-1.5 with Vicuna-13B: the recipe of llava15_7b_stage2.py around the larger language model."""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant

RECIPE = config_module(Path(__file__).with_name("llava15_7b_stage2.py"))


def get_config(name: str = "") -> Config:
    config = RECIPE.second_stage("llava15_13b_stage2", "Vicuna-13B", "runs/llava15_13b_stage1")
    return variant(config, name, {"smoke": RECIPE.SMOKE, **RECIPE.ASKED})
