"""nanoVLM with SigLIP 2 B/16 at 512 pixels and SmolLM2-360M (huggingface/nanoVLM, models/config.py).

Needs conversations in the Cauldron's or FineVision's columns, --config.data.path='finevision/*.parquet', and imports of
SigLIP 2 and of SmolLM2-360M-Instruct at the paths of `init_from`, whose tokenizer must have nanoVLM's 66 tokens added
(--config.data.tokenizer.path=tokenizer.json).
Published defaults: everything is trained, the projector at 5.12e-3, tower and language model at 5e-5; AdamW with decay
0.01 on all parameters, 3 % of warm-up and a cosine to a tenth over 40,000 steps, gradients clipped at 1; images in
tiles of 512 pixels and a tile of the whole, 64 tokens each, in packed rows of 4096. The published batch is 16 rows a
GPU; here it is 128, of 8 of them. Differences: conversations of a row don't see each other (theirs do:
--config.data.chat.packing=balanced --config.data.chat.isolation=none), and the added rows of the vocabulary are
parameters of their own.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.chat_config import NANOVLM, ChatConfig
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ParquetConfig, ShapesConfig
from vlm_jax.data.text import HfTokenizerConfig, SentencePieceConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.presets import DECODERS, SIGLIP, SIGLIP2, vision_tower
from vlm_jax.models.projector import PixelShuffleConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom, InitPart

EXTRA_TOKENS = 66
# Nothing is exempt from decay there.
NO_DECAY = r"(?!)"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|image|>", "<|global_image|>")
GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9))

QUESTIONS = {"image_size": 32, "conversations": ("caption", "color", "compare")}
SMOKE = {
    "objective.model.image": vision_tower(
        SIGLIP["SigLIP-B/16"], image_size=16, patch_size=4, width=32, depth=2, heads=2, mlp_dim=64
    ),
    "objective.model.projector.factor": 2,
    "objective.model.decoder": override(DECODERS["tiny"], {"vocab_size": 640, "init": "smollm"}),
    "objective.length": 192,
    "objective.tiles": 12,
    "data.source": ShapesConfig(count=256, **QUESTIONS),
    "data.tokenizer": SentencePieceConfig(vocab_size=640, user_symbols=(*MARKERS, *GRID)),
    "data.chat.tiling.max_side": 32,
    "data.chat.row_length": 192,
    "data.chat.max_tiles": 12,
    "data.batch_size": 8,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "init_from": InitFrom(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (VqaConfig("shapes", ShapesConfig(split="test", count=8, **QUESTIONS), max_new_tokens=4),),
}


def recipe(
    name: str, model: VisionLanguageConfig, chat: ChatConfig, *, batch: int, steps: int, **rates: float
) -> Config:
    """nanoVLM's recipe; `rates` are those of "backbones" and of the "projector"."""
    return Config(
        name=name,
        objective=VlmConfig(model=model, length=chat.row_length, tiles=chat.max_tiles),
        data=DataConfig(
            source=ParquetConfig(),
            batch_size=batch,
            preprocess=PreprocessConfig(resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            augment=None,
            chat=chat,
            tokenizer=HfTokenizerConfig(bos=False, eos=False, sticky_eos=False, pad_token="<|im_end|>"),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=rates["backbones"],
            weight_decay=0.01,
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=round(0.03 * steps), final=0.1),
        ),
        parts=(
            Part("image", "image/.*", no_decay=NO_DECAY),
            Part("projector", "projector/.*", lr=rates["projector"] / rates["backbones"], no_decay=NO_DECAY),
            Part("decoder", "decoder/.*", no_decay=NO_DECAY),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=steps, log_every=50),
        checkpoint=CheckpointConfig(every=1000),
    )


def sources(decoder: str, tower: str) -> InitFrom:
    """Imports of a language model and of a SigLIP, whose text tower and pooling stay behind."""
    image = InitPart("tower", "image/.*", path=tower)
    return InitFrom(path=decoder, skip=("projector/.*", "decoder/extra_.*"), parts=(image,))


def parts_of(siglip: str, factor: int, decoder: str) -> VisionLanguageConfig:
    """The model around a SigLIP and a SmolLM2."""
    return VisionLanguageConfig(
        image=vision_tower((SIGLIP | SIGLIP2)[siglip], remat="auto"),
        projector=PixelShuffleConfig(factor=factor),
        decoder=override(DECODERS[decoder], {"extra_tokens": EXTRA_TOKENS, "remat": "auto"}),
    )


def get_config(name: str = "") -> Config:
    model = parts_of("SigLIP2-B/16-512", 4, "SmolLM2-360M")
    config = recipe("nanovlm_460m", model, NANOVLM, batch=128, steps=40_000, backbones=5e-5, projector=5.12e-3)
    config = override(config, {"init_from": sources("checkpoints/smollm2_360m", "checkpoints/siglip2_b16_512")})
    return variant(config, name, {"smoke": SMOKE})
