"""A language model of a fifth of a million parameters on the captions of drawn scenes: shows that everything works.

Captions are a small language of known entropy: number, places, sizes, colours and shapes of the objects are chance, the
rest is grammar. That is 13.5 nats a caption for the 500 held out; after 300 steps, two minutes on a CPU of two cores,
the model gives them 13.7 (`python -m vlm_jax.main --config=configs/lm_tiny.py`: 0.375 nats a token).

`:shapes` is a model of 0.8 million on captions and scenes told in words, with questions and answers: that of the small
chain in vlm_shapes_stage1.py.
"""

import dataclasses

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import MixtureConfig, MixturePart, ShapesConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.held_out_loss import HeldOutLossConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.models.presets import DECODERS
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine

LENGTH, WORDS = 128, 320

DECODER = dataclasses.replace(DECODERS["tiny"], width=128, depth=4, mlp_dim=352, vocab_size=512)
SHAPES = {
    "objective.model.decoder": DECODER,
    "data.source": MixtureConfig(
        sources=(
            MixturePart("captions", ShapesConfig(count=10_000)),
            MixturePart(
                "questions", ShapesConfig(count=30_000, seed=3, conversations=("described",), max_rounds=4), 3.0
            ),
        )
    ),
    "data.tokenizer": SentencePieceConfig(length=LENGTH, vocab_size=512, sticky_eos=False),
    "optimizer.learning_rate": 3e-3,
    "train.steps": 800,
}

SMOKE = {
    "data.source.count": 512,
    "data.batch_size": 8,
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
}


def get_config(name: str = "") -> Config:
    decoder = dataclasses.replace(DECODERS["tiny"], vocab_size=WORDS)
    config = Config(
        name="lm_tiny",
        objective=LmConfig(model=LanguageModelConfig(decoder), length=LENGTH),
        data=DataConfig(
            source=ShapesConfig(count=20_000),
            batch_size=32,
            augment=None,
            tokenizer=SentencePieceConfig(length=LENGTH, vocab_size=WORDS, sticky_eos=False),
        ),
        optimizer=AdamW(
            learning_rate=3e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0, schedule=Cosine(warmup_steps=20, final=0.1)
        ),
        parts=(Part("decoder", "decoder/.*"),),
        train=TrainConfig(steps=300, log_every=50),
        checkpoint=CheckpointConfig(every=100),
        evals=(HeldOutLossConfig("held_out", ShapesConfig(split="test", count=500)),),
    )
    small = {key: value for key, value in SMOKE.items() if key != "data.source.count"}
    return variant(config, name, {"smoke": SMOKE, "shapes": SHAPES, "shapes_smoke": SHAPES | small})
