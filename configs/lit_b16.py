"""LiT: a text tower learns to read a frozen, pre-trained ViT-B/16 (Zhai et al. 2022, section 3).

Needs captioned images, --config.data.path=..., and the image tower, --config.init_from.path=CHECKPOINT: a workdir or an
import whose image tower has these sizes; from one with a text tower also
--config.init_from.ignore="('text/.*','logit_.*')".
Published, as the authors' public run on COCO's captions: batch 4096, 5000 steps, Adam with learning rate 1e-3 and decay
1e-2, warm-up of 3 %, clipped gradients, scale from 10, texts of 16 tokens, flips and RandAugment; it gives 20.7 % zero-
shot top-1 on ImageNet and, on COCO, recall at 1 of 47.2 % (image to text) and 32.1 % (text to image). Their text tower
starts from BERT; ours starts at random with CLIP's vocabulary, reads in both directions and pools the start token.
"""

import dataclasses
import math
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.augment import RandAugment
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))
STEPS, BATCH = 5000, 4096
# Only the kernels of matrices decay.
NO_DECAY = r"(?!.*/kernel$).*"

SMOKE = {
    **RECIPE.SMOKE,
    "objective.model.embed_dim": 64,
    "objective.model.projection": "text",
    "init_from": InitFrom(),
}


def get_config(name: str = "") -> Config:
    image = ViTConfig(
        image_size=224,
        patch_size=16,
        width=768,
        depth=12,
        heads=12,
        mlp_dim=3072,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        init="vit",
    )
    text = TextConfig(
        width=768,
        depth=12,
        heads=12,
        mlp_dim=3072,
        length=16,
        activation="gelu_tanh",
        norm_eps=1e-6,
        causal=False,
        pool="first",
        init="siglip",
    )
    # The image tower's own vector is the joint space; only the text tower has a head.
    model = TwoTowerConfig(image, text, embed_dim=768, projection="text", logit_scale_init=math.log(10))
    clip = RECIPE.get_config()
    config = dataclasses.replace(
        clip,
        name="lit_b16",
        objective=ClipConfig(model=model),
        data=dataclasses.replace(
            clip.data,
            batch_size=BATCH,
            preprocess=PreprocessConfig(resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            augment=AugmentConfig(scale=(0.9, 1.0), flip=0.5, rand_augment=RandAugment(layers=2, magnitude=10.0)),
            tokenizer=dataclasses.replace(clip.data.tokenizer, length=16),
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=1e-2,
            decay_by="schedule",
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=round(0.03 * STEPS)),
        ),
        parts=(
            Part("image", "image/.*", frozen=True),
            Part("text", "text/.*", no_decay=NO_DECAY),
            Part("scale", "logit_scale"),
        ),
        train=dataclasses.replace(clip.train, steps=STEPS),
        checkpoint=dataclasses.replace(clip.checkpoint, every=1000, keep_every=0),
        init_from=InitFrom(path="runs/image_tower", skip=("text/.*", "logit_scale")),
    )
    return variant(config, name, {"smoke": SMOKE})
