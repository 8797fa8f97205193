"""LLaVA-1.5 with Vicuna-7B, stage 1: the projector learns to describe images (Liu et al. 2024, scripts/v1_5).

Needs LLaVA's captions, --config.data.path=blip_laion_cc_sbu_558k.json and --config.data.source.image_root=images, and
imports of CLIP ViT-L/14 at 336 pixels and of Vicuna-7B v1.5 (docs/interop.md) at the paths of `init_from`.
Published: global batch 256, one epoch of 558,128 pairs, AdamW without decay at 1e-3, cosine to zero after 3 % of
warm-up, gradients clipped at 1; image and caption alone, without a question. Differences: the mean is taken over all
tokens of the batch, not over those of each device first (--config.objective.mean_rows=32 does that), and rows have 768
tokens, where 2048 is the limit.
"""

import dataclasses
from typing import Any

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.chat_config import LLAVA_STAGE_1, ChatConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import LlavaJsonConfig, ShapesConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.presets import CLIP, DECODERS, vision_tower
from vlm_jax.models.projector import MlpProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom, InitPart

PAIRS, BATCH = 558_128, 256
TOWER = InitPart("tower", "image/.*", path="checkpoints/clip_l14_336")
# Questions on drawn scenes, a model and a vocabulary that a CPU trains in seconds.
QUESTIONS = ShapesConfig(count=256, image_size=32, conversations=("caption", "color"))
SMOKE_MODEL = {
    "objective.model.image": vision_tower(
        CLIP["ViT-L/14-336"], image_size=32, patch_size=16, width=32, depth=2, heads=2, mlp_dim=64
    ),
    "objective.model.decoder": override(DECODERS["tiny"], {"vocab_size": 512, "tied": False}),
}
SMOKE_RUN = {
    "data.source": QUESTIONS,
    "data.tokenizer": SentencePieceConfig(vocab_size=512),
    "data.batch_size": 8,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "init_from": InitFrom(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (VqaConfig("shapes", dataclasses.replace(QUESTIONS, split="test"), limit=8, max_new_tokens=4),),
}
SMOKE = {**SMOKE_MODEL, **SMOKE_RUN, "objective.length": 64, "data.chat.row_length": 64}


def recipe(name: str, decoder: str, chat: ChatConfig, optimizer: AdamW, batch: int, examples: int) -> Config:
    """LLaVA-1.5 around one of Vicuna's sizes."""
    steps = examples // batch
    model = VisionLanguageConfig(
        image=vision_tower(CLIP["ViT-L/14-336"], remat="auto"),
        layer=-2,
        projector=MlpProjectorConfig(),
        decoder=override(DECODERS[decoder], {"remat": "auto"}),
    )
    schedule = Cosine(warmup_steps=-(-3 * steps // 100))
    return Config(
        name=name,
        objective=VlmConfig(model=model, length=chat.row_length, tiles=chat.max_tiles),
        data=DataConfig(
            source=LlavaJsonConfig(),
            batch_size=batch,
            augment=None,
            chat=chat,
            tokenizer=SentencePieceConfig(bos=True, path="tokenizer.model"),
            workers=8,
        ),
        optimizer=dataclasses.replace(optimizer, clip_norm=1.0, schedule=schedule),
        parts=(
            Part("image", "image/.*", frozen=True),
            Part("projector", "projector/.*"),
            Part("decoder", "decoder/.*"),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        train=TrainConfig(steps=steps, log_every=20),
        checkpoint=CheckpointConfig(every=500),
    )


def first_stage(name: str, decoder: str, checkpoint: str) -> Config:
    """Stage 1 from a checkpoint of the decoder and one of CLIP."""
    config = recipe(name, decoder, LLAVA_STAGE_1, AdamW(learning_rate=1e-3), BATCH, PAIRS)
    init_from = InitFrom(path=checkpoint, skip=("projector/.*",), parts=(TOWER,), tokenizer=True)
    frozen: dict[str, Any] = {"parts.decoder.frozen": True, "init_from": init_from}
    return override(config, frozen)


def get_config(name: str = "") -> Config:
    config = first_stage("llava15_7b_stage1", "Vicuna-7B", "checkpoints/vicuna_7b")
    return variant(config, name, {"smoke": SMOKE})
