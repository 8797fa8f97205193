"""SigLIP on scikit-learn's scans of handwritten digits: the recipe of clip_digits.py with the sigmoid loss.

A batch holds each of the ten digits a dozen times, so a tenth of its negatives are matches in truth; it trains all the
same. Zero-shot top-1 on the 355 held-out scans: 98.6 % with seeds 0 and 1 on CPU (`python -m vlm_jax.main
--config=configs/siglip_digits.py --config.seed=N`); with logit_bias_init = -ln 128 instead, 96.9 and 97.7 %.
"""

import dataclasses
import math
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.objectives.siglip import SiglipConfig
from vlm_jax.parts import Part

RECIPE = config_module(Path(__file__).with_name("clip_digits.py"))


def get_config(name: str = "") -> Config:
    clip = RECIPE.get_config()
    model = dataclasses.replace(clip.objective.model, logit_scale_init=math.log(10), logit_bias_init=-10.0)
    config = dataclasses.replace(
        clip,
        name="siglip_digits",
        objective=SiglipConfig(model=model),
        parts=(Part("image", "image/.*"), Part("text", "text/.*"), Part("scale", "logit_(scale|bias)")),
    )
    return variant(config, name, {"smoke": RECIPE.SMOKE})
