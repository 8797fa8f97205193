"""CLIP ViT-L/14 at 336 pixels: one more epoch from the finished weights of clip_l14.py (Radford et al. 2021, 2.5).

Starts from runs/clip_l14, or --config.init_from.path=CHECKPOINT; position embeddings are resized from 16 x 16 to
24 x 24. Published zero-shot top-1 on ImageNet: 76.2 %. The paper gives the epoch and the learning rate 2e-5; the
warm-up is ours.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import CLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))


def get_config(name: str = "") -> Config:
    model = override(CLIP["ViT-L/14-336"], {"image.remat": "full", "text.remat": "full"})
    changes = {
        "objective.model": model,
        "optimizer.learning_rate": 2e-5,
        "optimizer.schedule.warmup_steps": 500,
        "train.steps": RECIPE.PAIRS // RECIPE.BATCH,
        "init_from.path": "runs/clip_l14",
    }
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_l14_336"), changes)
    return variant(config, name, {"smoke": {**RECIPE.SMOKE, "init_from.path": ""}})
