"""A small chain of its own, stage 1: a projector joins a CLIP and a language model that both know drawn scenes alone.

    python -m vlm_jax.main --config=configs/lm_tiny.py:shapes
    python -m vlm_jax.main --config=configs/clip_shapes.py
    python -m vlm_jax.main --config=configs/vlm_shapes_stage1.py
    python -m vlm_jax.main --config=configs/vlm_shapes_stage2.py

takes less than half an hour on a CPU of two cores, and needs no file. This stage is LLaVA's first: images and captions
without a question, and the projector alone learns. It shows that the loss falls where the images are seen and not where
they are blank.
"""

import dataclasses
from pathlib import Path

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.evals.generate import GenerateConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.models.projector import MlpProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom, InitPart

CLIP = config_module(Path(__file__).with_name("clip_shapes.py"))
WORDS = config_module(Path(__file__).with_name("lm_tiny.py"))
LENGTH = 96
TOWER = InitPart("tower", "image/.*", path="runs/clip_shapes")
SMOKE = {
    "data.source.count": 256,
    "data.batch_size": 8,
    "data.tokenizer": WORDS.SHAPES["data.tokenizer"],
    "init_from": InitFrom(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals.shapes.limit": 8,
}


def recipe(name: str, chat: ChatConfig, source: ShapesConfig, *, batch: int, steps: int, rate: float) -> Config:
    """The chain's model on one kind of conversations about scenes."""
    model = VisionLanguageConfig(
        image=override(CLIP.TOWER, {"pool": "none"}), layer=-2, projector=MlpProjectorConfig(), decoder=WORDS.DECODER
    )
    held_out = dataclasses.replace(source, split="test", count=500, max_rounds=1)
    return Config(
        name=name,
        objective=VlmConfig(model=model, length=chat.row_length),
        data=DataConfig(
            source=source,
            batch_size=batch,
            preprocess=CLIP.GREY,
            augment=None,
            chat=chat,
            tokenizer=WORDS.SHAPES["data.tokenizer"],
            threads=2,
        ),
        optimizer=AdamW(learning_rate=rate, b2=0.98, clip_norm=1.0, schedule=Cosine(warmup_steps=30)),
        parts=(
            # What is above the features learns nothing.
            Part("above", "image/ln_post/.*", frozen=True),
            Part("image", "image/.*"),
            Part("projector", "projector/.*"),
            Part("decoder", "decoder/.*"),
        ),
        train=TrainConfig(steps=steps, log_every=20),
        checkpoint=CheckpointConfig(every=100),
        evals=(
            VqaConfig("shapes", held_out, max_new_tokens=8),
            GenerateConfig("shapes", held_out, max_new_tokens=8),
        ),
    )


def get_config(name: str = "") -> Config:
    chat = ChatConfig(template="plain_eos", tiling=SquareTiling(fit="crop"), row_length=LENGTH)
    source = ShapesConfig(image_size=48, count=30_000, seed=1, conversations=("caption",))
    config = recipe("vlm_shapes_stage1", chat, source, batch=64, steps=200, rate=3e-3)
    init_from = InitFrom(path="runs/lm_tiny_shapes", skip=("projector/.*",), parts=(TOWER,), tokenizer=True)
    frozen = {"parts.image.frozen": True, "parts.decoder.frozen": True, "init_from": init_from}
    # A whole caption, word for word, is not what this stage is judged by.
    config = override(config, {**frozen, "evals.shapes.max_new_tokens": 48})
    return variant(config, name, {"smoke": SMOKE})
