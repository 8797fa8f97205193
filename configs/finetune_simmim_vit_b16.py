"""Fine-tuning of SimMIM's ViT-B/16 on ImageNet's labels (Xie et al. 2022, the authors' code).

Needs labelled images as finetune_mae_b16.py, and --config.init_from.path=WORKDIR of configs/simmim_vit_b16.py.
Published, the recipe of finetune_simmim_swin_b.py but for the tower: layer-wise decay 0.65, drop path 0.1, the mean of
the patches and a norm of its own, every block with a table of relative positions of its own, which starts from the one
that all share in pre-training and does decay, and a head of spread 2e-5. Top-1 83.8 %.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.parts import Part
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("finetune_simmim_swin_b.py"))
PRETRAINING = config_module(Path(__file__).with_name("simmim_vit_b16.py"))
BEIT = config_module(Path(__file__).with_name("finetune_beit_b16.py"))
TOWER = override(PRETRAINING.TOWER, BEIT.TOWER)
SMOKE = {
    **BEIT.RECIPE.SMOKE_RUN,
    **{f"objective.model.image.{key}": value for key, value in BEIT.RECIPE.SMOKE_TOWER.items()},
}


def get_config(name: str = "") -> Config:
    changes = {
        "name": "finetune_simmim_vit_b16",
        "objective.model": ClassifierConfig(image=TOWER, classes=1000, norm=True, head_init=2e-5),
        "parts": (Part("image", "image/.*", no_decay=PRETRAINING.NO_DECAY, layer_decay=0.65), Part("head", "head/.*")),
        "init_from": InitFrom(
            path="runs/simmim_vit_b16",
            map=BEIT.OWN_TABLES,
            skip=("head/.*",),
            ignore=("decoder/.*", "image/mask_token", "image/ln_post/.*"),
        ),
    }
    return variant(override(RECIPE.get_config(), changes), name, {"smoke": SMOKE})
