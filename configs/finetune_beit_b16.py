"""Fine-tuning of BEiT's encoders on ImageNet's labels (Bao et al. 2022, appendix; published code's README).

`configs/finetune_beit_b16.py` is ViT-B/16, `:l16` ViT-L/16. Needs labelled images as finetune_mae_b16.py, and
--config.init_from.path=WORKDIR of a BEiT run or an import.
Published, after pre-training on ImageNet-22k: batch 1024, AdamW, decay 0.05, learning rate 4e-3 (L: 1e-3), layer-wise
decay 0.65 (0.75), drop path 0.1 (0.2), 100 epochs (50), 20 (5) of warm-up, to 1e-6; RandAugment, mixup 0.8, CutMix 1.0,
label smoothing 0.1, random erasing 0.25; the mean of the patches and a norm of its own. Top-1 83.7 % (B), 86.0 % (L).
Every block has a table of relative positions of its own, which starts from the one that all share in pre-training.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.models.beit import BEIT
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("finetune_mae_b16.py"))
TOWER = {
    "pool": "mean",
    "post_norm": False,
    "mask_token": False,
    "relative_position": "per_block",
    "remat": "full",
    "drop_path": 0.1,
}
# What `init_from` copies into every block.
OWN_TABLES = ((r"(.*)/blocks/relative_position/table", r"\1/relative_position/table"),)
SMOKE = {**RECIPE.SMOKE_RUN, **{f"objective.model.image.{key}": value for key, value in RECIPE.SMOKE_TOWER.items()}}


def finetuning(size: str, drop_path: float, rate: float, layer_decay: float, epochs: int, warmup_epochs: int) -> dict:
    """The overrides of one size."""
    return {
        "objective.model.image": override(BEIT[size].image, TOWER | {"drop_path": drop_path}),
        "optimizer.learning_rate": rate,
        "optimizer.schedule": Cosine(warmup_steps=RECIPE.steps(warmup_epochs), final=1e-6 / rate),
        "parts.image.layer_decay": layer_decay,
        "train.steps": RECIPE.steps(epochs),
    }


BASE = finetuning("BEiT-B/16", drop_path=0.1, rate=4e-3, layer_decay=0.65, epochs=100, warmup_epochs=20)
LARGE = finetuning("BEiT-L/16", drop_path=0.2, rate=1e-3, layer_decay=0.75, epochs=50, warmup_epochs=5)


def get_config(name: str = "") -> Config:
    changes = BASE | {
        "name": "finetune_beit_b16",
        "data.preprocess": PreprocessConfig(crop=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "init_from": InitFrom(
            path="runs/beit_b16",
            map=OWN_TABLES,
            skip=("head/.*",),
            ignore=("head/.*", "tokenizer/.*", "image/mask_token", "image/ln_post/.*"),
        ),
    }
    return variant(override(RECIPE.get_config(), changes), name, {"l16": LARGE, "smoke": SMOKE})
