"""FLIP ViT-L/16 at global batch 65536: half of the patches dropped, then a short tuning on whole images.

Li et al. 2023. Needs captioned images: --config.data.path='shards/{00000..99999}.tar' (or .jsonl, .csv).
Published, in the authors' code: towers, batch, 10,000 + 100 epochs of the size of ImageNet (32 of LAION-400M), AdamW,
learning rates 4e-6 and 4e-8 per 256 pairs, warm-ups of 40 and 20 such epochs, scale from 100, crops of half the area
and more, flips, texts of 32 tokens. Ours: CLIP's vocabulary for BERT's, its start token for [CLS], and one run for both
phases, so that Adam's moments live on where theirs start anew. Published zero-shot top-1 on ImageNet: 74.3 %.
To change the length of the tuning, set config.objective.unmasked_steps and
config.optimizer.schedule.phases.unmasked.steps alike.
"""

import dataclasses
import math
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.images import AugmentConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import GAINS_AND_BIASES, Part
from vlm_jax.schedule import Cosine, Phase, Phases

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))
BATCH = 65_536
NO_DECAY = rf"(.*/)?pos_embed|{GAINS_AND_BIASES}"

SMOKE = {
    **{key: value for key, value in RECIPE.SMOKE.items() if not key.startswith("optimizer.")},
    "objective.model.image.patch_dropout": 0.5,
    "objective.model.image.pool": "mean",
    "objective.model.image.pos_embed": "sincos",
    "objective.unmasked_steps": 2,
    "optimizer.schedule.phases.masked.schedule.warmup_steps": 2,
    "optimizer.schedule.phases.unmasked.schedule.warmup_steps": 1,
    "optimizer.schedule.phases.unmasked.steps": 2,
}


def steps(epochs: int) -> int:
    """Steps in so many times the images of ImageNet, which is how the authors count."""
    return epochs * 1_281_167 // BATCH


def model() -> TwoTowerConfig:
    """The towers; the text tower is that of a B model."""
    image = ViTConfig(
        image_size=224,
        patch_size=16,
        width=1024,
        depth=24,
        heads=16,
        mlp_dim=4096,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="mean",
        pos_embed="sincos",
        pre_norm=False,
        patch_bias=True,
        patch_dropout=0.5,
        remat="full",
        init="mae",
    )
    text = TextConfig(
        width=768,
        depth=12,
        heads=12,
        mlp_dim=3072,
        length=32,
        activation="gelu_tanh",
        norm_eps=1e-6,
        causal=False,
        pool="first",
        remat="full",
        init="mae",
    )
    return TwoTowerConfig(image, text, embed_dim=768, logit_scale_init=math.log(100))


def get_config(name: str = "") -> Config:
    masked, unmasked = steps(10_000), steps(100)
    clip = RECIPE.get_config()
    config = dataclasses.replace(
        clip,
        name="flip_l16",
        objective=ClipConfig(model=model(), unmasked_steps=unmasked),
        data=dataclasses.replace(
            clip.data,
            batch_size=BATCH,
            augment=AugmentConfig(scale=(0.5, 1.0), flip=0.5),
            tokenizer=dataclasses.replace(clip.data.tokenizer, length=32),
        ),
        optimizer=AdamW(
            learning_rate=4e-6 * BATCH / 256,
            weight_decay=0.2,
            b2=0.95,
            schedule=Phases(
                phases=(
                    Phase("masked", Cosine(warmup_steps=steps(40))),
                    Phase("unmasked", Cosine(warmup_steps=steps(20)), steps=unmasked, peak=0.01),
                )
            ),
        ),
        parts=(
            Part("image", "image/.*", no_decay=NO_DECAY),
            Part("text", "text/.*", no_decay=NO_DECAY),
            Part("scale", "logit_scale"),
        ),
        train=dataclasses.replace(clip.train, steps=masked + unmasked),
    )
    return variant(config, name, {"smoke": SMOKE})
