"""Fine-tuning of SimMIM's encoders on ImageNet's labels (Xie et al. 2022, section 4.1, and the published code).

`configs/finetune_simmim_swin_b.py` is Swin-B after 800 epochs, `:100ep` after the short schedule, `:swin_l` Swin-L.
Needs labelled images as finetune_mae_b16.py, and --config.init_from.path=WORKDIR of a SimMIM run or an import.
Published: 224 pixels with windows of 7 (L: 14), to which the tables of relative positions are resized; batch 2048,
AdamW, decay 0.05 on all but biases, norms and those tables, learning rate 1.25e-3 for every 512 images, layer-wise
decay 0.8 (short schedule 0.9, L 0.7), drop path 0.1 (L: 0.2), gradients clipped at 5, 100 epochs, 20 of warm-up, to
1e-6; RandAugment, mixup 0.8, CutMix 1.0, label smoothing 0.1, random erasing 0.25; the mean of the last tokens after
their norm. Top-1 84.0 %, after the short schedule 83.5 %, L 85.4 %.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.swin import SWIN, SwinConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("finetune_mae_b16.py"))
IMAGES, EPOCHS, WARMUP_EPOCHS, BATCH = 1_281_167, 100, 20, 2048
LEARNING_RATE, LAST_LEARNING_RATE = 1.25e-3 * BATCH / 512, 2.5e-7 * BATCH / 512
NO_DECAY = r"(.*/)?(bias|scale|position_bias/table)"


def finetuning(size: str, window: int, drop_path: float, layer_decay: float) -> dict:
    """The overrides of one size."""
    tower = {"image_size": 224, "window": window, "drop_path": drop_path, "remat": "full"}
    return {"objective.model.image": override(SWIN[size], tower), "parts.image.layer_decay": layer_decay}


BASE = finetuning("Swin-B", window=7, drop_path=0.1, layer_decay=0.8)
VARIANTS = {
    "100ep": {"parts.image.layer_decay": 0.9},
    "swin_l": finetuning("Swin-L", window=14, drop_path=0.2, layer_decay=0.7),
}
SMOKE = {
    **RECIPE.SMOKE_RUN,
    "objective.model.image": SwinConfig(
        image_size=16, patch_size=2, width=16, depths=(2, 2), heads=(2, 4), window=4, drop_path=0.1
    ),
}


def get_config(name: str = "") -> Config:
    changes = {
        "name": "finetune_simmim_swin_b",
        "objective.model": ClassifierConfig(),
        "data.batch_size": BATCH,
        "optimizer": AdamW(
            learning_rate=LEARNING_RATE,
            weight_decay=0.05,
            clip_norm=5.0,
            schedule=Cosine(warmup_steps=WARMUP_EPOCHS * IMAGES // BATCH, final=LAST_LEARNING_RATE / LEARNING_RATE),
        ),
        "parts": (Part("image", "image/.*", no_decay=NO_DECAY), Part("head", "head/.*")),
        "train.steps": EPOCHS * IMAGES // BATCH,
        "train.eval_every": 5 * IMAGES // BATCH,
        "init_from": InitFrom(path="runs/simmim_swin_b", skip=("head/.*",), ignore=("decoder/.*", "image/mask_token")),
    }
    return variant(override(RECIPE.get_config(), changes | BASE), name, VARIANTS | {"smoke": SMOKE})
