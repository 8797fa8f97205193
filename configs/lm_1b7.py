"""SmolLM2-1.7B on 11 T tokens (Ben Allal et al. 2025, section 4.1): lm_135m.py with a larger decoder.

Two million tokens a batch, peak 5e-4, 2000 steps of warm-up, constant, linear to zero over the last tenth. The paper
changes the mixture of data in four stages; here it is one. Published, zero-shot (model card): HellaSwag 68.7, ARC 60.5,
PIQA 77.6 %.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant

RECIPE = config_module(Path(__file__).with_name("lm_135m.py"))
STEPS = 11_000_000_000_000 // (1024 * 2048)


def get_config(name: str = "") -> Config:
    config = RECIPE.recipe("lm_1b7", "SmolLM2-1.7B", batch=1024, steps=STEPS, learning_rate=5e-4, cooldown=STEPS // 10)
    return variant(config, name, {"smoke": RECIPE.SMOKE})
