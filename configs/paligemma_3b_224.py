"""PaliGemma-3B at 224 pixels, tuned to VQAv2 (Beyer et al. 2024; big_vision, transfers/vqav2.py).

Needs questions with answers in LLaVA's layout, the prompt as published ("answer en {question}"),
--config.data.path=vqav2.json --config.data.source.image_root=images, and an import of the released model
(google/paligemma-3b-pt-224) at --config.init_from.path.
Published: batch 256, ten epochs of 647,871 questions, Adam at 1e-5 with a decay of 1e-6 on kernels that follows the
schedule, 5 % of warm-up and a cosine to zero, gradients clipped at 1; everything is trained, and image and prompt see
themselves as a whole. VQAv2 test-dev 83.2 % (448 pixels: 85.6 %). `configs/paligemma_3b_448.py` is the larger size.
"""

import dataclasses
from typing import Any

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.chat_config import PALIGEMMA
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import LlavaJsonConfig, ShapesConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.presets import DECODERS, SIGLIP, vision_tower
from vlm_jax.models.projector import LinearProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

QUESTIONS, EPOCHS, BATCH, TEXT = 647_871, 10, 256, 32
VOCABULARY, IMAGE_TOKEN = 257_216, 257_152
# Only the kernels of matrices decay.
NO_DECAY = r"(?!.*/kernel$).*"

SCENES = {"image_size": 32, "conversations": ("color", "shape")}
SMOKE: dict[str, Any] = {
    "objective.model.image": vision_tower(
        SIGLIP["SigLIP-So400m/14"], image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=64
    ),
    "objective.model.decoder": override(
        DECODERS["Gemma-2B"],
        {"width": 48, "depth": 2, "heads": 4, "kv_heads": 1, "head_dim": 16, "mlp_dim": 96, "vocab_size": 512},
    ),
    "objective.length": 64,
    "data.source": ShapesConfig(count=256, **SCENES),
    "data.tokenizer": SentencePieceConfig(vocab_size=512),
    "data.chat.row_length": 64,
    "data.batch_size": 8,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "init_from": InitFrom(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (VqaConfig("shapes", ShapesConfig(split="test", count=8, **SCENES), max_new_tokens=4),),
}


def recipe(name: str, side: int, weight_decay: float) -> Config:
    """The recipe at one size of the images."""
    steps = EPOCHS * QUESTIONS // BATCH
    image = vision_tower(SIGLIP["SigLIP-So400m/14"], image_size=side, remat="auto")
    decoder = override(DECODERS["Gemma-2B"], {"vocab_size": VOCABULARY, "remat": "auto"})
    model = VisionLanguageConfig(
        image=image, projector=LinearProjectorConfig(init="zeros"), image_token=IMAGE_TOKEN, decoder=decoder
    )
    chat = dataclasses.replace(PALIGEMMA, row_length=image.patches + TEXT)
    return Config(
        name=name,
        objective=VlmConfig(model=model, length=chat.row_length, tiles=chat.max_tiles, prefix=True),
        data=DataConfig(
            source=LlavaJsonConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            augment=None,
            chat=chat,
            tokenizer=SentencePieceConfig(bos=True, path="tokenizer.model"),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=1e-5,
            weight_decay=weight_decay,
            decay_by="schedule",
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=round(0.05 * steps)),
        ),
        parts=tuple(Part(part, f"{part}/.*", no_decay=NO_DECAY) for part in ("image", "projector", "decoder")),
        mesh=MeshConfig(data=1, fsdp=-1),
        train=TrainConfig(steps=steps, log_every=50),
        checkpoint=CheckpointConfig(every=1000),
        init_from=InitFrom(path=f"checkpoints/paligemma_3b_{side}", tokenizer=True),
    )


def get_config(name: str = "") -> Config:
    return variant(recipe("paligemma_3b_224", 224, 1e-6), name, {"smoke": SMOKE})
