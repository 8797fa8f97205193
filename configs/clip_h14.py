"""CLIP ViT-H/14 on 32 billion pairs at global batch 79104: open_clip's run on LAION-2B.

The recipe of clip_l14.py with open_clip's larger towers and the exact GELU. Published (Cherti et al. 2023): sizes,
batch, pairs, learning rate 5e-4; the warm-up of 10,000 steps is that of their other runs of this length. Published
zero-shot top-1 on ImageNet: 78.0 %.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import OPEN_CLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))
PAIRS, BATCH = 32_000_000_000, 79_104


def get_config(name: str = "") -> Config:
    changes = {
        "objective.model": override(OPEN_CLIP["ViT-H/14"], {"image.remat": "full", "text.remat": "full"}),
        "data.batch_size": BATCH,
        "optimizer.learning_rate": 5e-4,
        "optimizer.schedule.warmup_steps": 10_000,
        "train.steps": PAIRS // BATCH,
    }
    config = override(dataclasses.replace(RECIPE.get_config(), name="clip_h14"), changes)
    return variant(config, name, {"smoke": RECIPE.SMOKE})
