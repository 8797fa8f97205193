"""AIMv2-L/14 at 224 pixels and global batch 8192 (Fini et al. 2024, section 3 and appendix).

From the authors' code (ml-l3m, aimv2/001_aimv2_hfdata): decoder, weights of the losses, optimiser with a decay by the
schedule alone, clipping, crops and flips, texts of 77 tokens of SigLIP's vocabulary, 12,500 steps of warm-up, and the
fall of the cosine to 1e-5. From the paper: batch, 12 G pairs, 1.5 M iterations (the code's run has 1.25 M). Larger
encoders are in vlm_jax/models/aimv2.py; their learning rates are 8e-4 (H and 1B) and 4e-4 (3B).
Needs captioned images, --config.data.path='shards/{00000..99999}.tar' (or .jsonl, .csv), and the SentencePiece model
of 32,000 pieces trained on C4: --config.data.tokenizer.path=FILE; without one, a vocabulary of that size is trained
from the captions.
Published top-1 on ImageNet by an attentive probe: 86.6 % (87.5 % H, 88.1 % 1B, 88.5 % 3B).
"""

from pathlib import Path

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import DigitsConfig, TarConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.aimv2 import AIMV2, Aimv2ModelConfig, MultimodalDecoderConfig, aimv2_encoder
from vlm_jax.objectives.aimv2 import Aimv2Config
from vlm_jax.optim import AdamW
from vlm_jax.parts import GAINS_AND_BIASES, Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

STEPS, BATCH = 1_500_000, 8192
PEAK, LEAST = 1e-3, 1e-5  # learning rate
NO_DECAY = rf"{GAINS_AND_BIASES}|(.*/)?(pos_embed|start_token)"

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))

# The same recipe on drawn scenes, with an encoder and a vocabulary that a CPU trains in seconds.
SMOKE = {
    **{key: value for key, value in RECIPE.SMOKE.items() if key != "data.tokenizer"},
    "objective.model": Aimv2ModelConfig(
        image=override(aimv2_encoder(64, 2, 2, 128, image_size=32), {"patch_size": 8, "remat": "full"}),
        decoder=MultimodalDecoderConfig(
            width=64, depth=2, heads=2, mlp_dim=128, vocab_size=512, length=32, remat="full"
        ),
    ),
    "data.tokenizer.length": 32,
    "data.tokenizer.vocab_size": 512,
    "evals": (ZeroShotConfig("digits", DigitsConfig(split="test"), templates=("digits",), limit=60),),
}


def get_config(name: str = "") -> Config:
    config = Config(
        name="aimv2_l14",
        objective=Aimv2Config(
            model=override(AIMV2["AIMv2-L/14"], {"image.remat": "full", "decoder.remat": "full"}),
            text_weight=1.0,
            pixel_weight=0.4,
        ),
        data=DataConfig(
            source=TarConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=AugmentConfig(scale=(0.4, 1.0), flip=0.5),
            tokenizer=SentencePieceConfig(length=77, vocab_size=32_000, pad="eos", lower=True, canonicalize=True),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=PEAK,
            weight_decay=1e-4,
            decay_by="schedule",
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=12_500, final=LEAST / PEAK),
        ),
        parts=(Part("image", "image/.*", no_decay=NO_DECAY), Part("decoder", "decoder/.*", no_decay=NO_DECAY)),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=STEPS, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
