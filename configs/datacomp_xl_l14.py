"""CLIP ViT-L/14 at DataComp's scale `xlarge`: 12.8 billion pairs at global batch 90112 (Gadre et al. 2023, table 2).

The recipe of clip_l14.py with DataComp's learning rate 1e-3, warm-up of 10,000 steps and b2 = 0.95, and with the exact
GELU of open_clip. Data: DataComp's pool after filtering, --config.data.path='shards/{00000..99999}.tar'. Published
zero-shot top-1 on ImageNet: 79.2 % (DataComp-1B).
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.presets import CLIP
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))
PAIRS, BATCH = 12_800_000_000, 90_112


def get_config(name: str = "") -> Config:
    details = {"activation": "gelu", "remat": "full"}
    changes = {f"{tower}.{key}": value for tower in ("image", "text") for key, value in details.items()}
    config = override(
        dataclasses.replace(RECIPE.get_config(), name="datacomp_xl_l14"),
        {
            "objective.model": override(CLIP["ViT-L/14"], changes),
            "data.batch_size": BATCH,
            "optimizer.learning_rate": 1e-3,
            "optimizer.b2": 0.95,
            "optimizer.schedule.warmup_steps": 10_000,
            "train.steps": PAIRS // BATCH,
        },
    )
    return variant(config, name, {"smoke": RECIPE.SMOKE})
