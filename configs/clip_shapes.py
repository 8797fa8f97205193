"""CLIP on drawn scenes of one to three objects: the vision tower of the small chain of vlm_shapes_stage1.py.

Captions name each object's size, colour, shape and place, so that a tower which tells captions apart knows what
questions will ask for. About three minutes on a CPU of two cores.
"""

import dataclasses

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine

WORDS, LENGTH = 320, 64
# A patch is a cell of the scenes' 3 x 3 grid. Its place, which questions ask for, is to be as plain in its features as
# what stands there: learned positions that start as sines do are eight times as large as CLIP's of this width.
TOWER = ViTConfig(image_size=48, patch_size=16, width=128, depth=5, heads=4, mlp_dim=512, pos_embed="sincos_learned")
SCENES = ShapesConfig(image_size=48, count=60_000)
GREY = PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

SMOKE = {
    "data.source.count": 512,
    "data.batch_size": 16,
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals.shapes.limit": 32,
}


def get_config(name: str = "") -> Config:
    text = TextConfig(
        vocab_size=WORDS, length=LENGTH, width=96, depth=2, heads=4, mlp_dim=384, pool="first_eos", eos_id=1
    )
    config = Config(
        name="clip_shapes",
        objective=ClipConfig(model=TwoTowerConfig(image=TOWER, text=text, embed_dim=128)),
        data=DataConfig(
            source=SCENES,
            batch_size=128,
            preprocess=GREY,
            augment=None,  # a crop would move the objects to other places than the caption tells
            tokenizer=SentencePieceConfig(length=LENGTH, vocab_size=WORDS),
            threads=2,
        ),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1, b2=0.98, eps=1e-6, schedule=Cosine(warmup_steps=40)),
        parts=(Part("image", "image/.*"), Part("text", "text/.*"), Part("scale", "logit_scale")),
        train=TrainConfig(steps=600, log_every=20),
        checkpoint=CheckpointConfig(every=200),
        evals=(RetrievalConfig("shapes", dataclasses.replace(SCENES, split="test", count=512)),),
    )
    return variant(config, name, {"smoke": SMOKE})
