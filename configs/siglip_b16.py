"""SigLIP ViT-B/16 at global batch 32768 (Zhai et al. 2023).

Needs captioned images, --config.data.path='shards/{00000..99999}.tar' (or .jsonl, .csv), and the SentencePiece model
of 32,000 pieces trained on C4: --config.data.tokenizer.path=FILE; without one, a vocabulary of that size is trained
from the captions.
Published: towers, batch, Adafactor as for Scaling ViT with b2 = 0.95, learning rate 1e-3, weight decay 1e-4, the start
of scale and bias, lower-cased texts of 64 tokens without punctuation. The cosine with 20,000 steps of warm-up, the 40
billion pairs and the clipped gradients are what SigLIP 2 states (Tschannen et al. 2025, section 2); the crop is ours.
Published zero-shot top-1 on ImageNet: 76.7 % (WebLI, not public).
"""

from pathlib import Path

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import TarConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.presets import SIGLIP, SIGLIP_VOCABULARY, siglip
from vlm_jax.objectives.siglip import SiglipConfig
from vlm_jax.optim import Adafactor
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

PAIRS, BATCH = 40_000_000_000, 32_768
# Only the kernels of matrices decay.
NO_DECAY = r"(?!.*/kernel$).*"

RECIPE = config_module(Path(__file__).with_name("clip_l14.py"))

# The same recipe on drawn scenes, with towers and a vocabulary that a CPU trains in seconds.
SMOKE = {
    **{key: value for key, value in RECIPE.SMOKE.items() if key != "data.tokenizer"},
    "objective.model": siglip((64, 2, 2, 128), 8, 32, length=32, vocab_size=512),
    "data.tokenizer.length": 32,
    "data.tokenizer.vocab_size": 512,
}


def get_config(name: str = "") -> Config:
    model = override(SIGLIP["SigLIP-B/16"], {"image.remat": "auto", "text.remat": "auto"})
    config = Config(
        name="siglip_b16",
        objective=SiglipConfig(model=model, loss="gather"),
        data=DataConfig(
            source=TarConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            augment=AugmentConfig(scale=(0.9, 1.0)),
            tokenizer=SentencePieceConfig(
                length=64, vocab_size=SIGLIP_VOCABULARY, pad="eos", lower=True, canonicalize=True
            ),
            workers=8,
        ),
        optimizer=Adafactor(
            learning_rate=1e-3,
            weight_decay=1e-4,
            decay_by="schedule",
            b2=0.95,
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=20_000),
        ),
        parts=(
            Part("image", "image/.*", no_decay=NO_DECAY),
            Part("text", "text/.*", no_decay=NO_DECAY),
            Part("scale", "logit_(scale|bias)"),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=PAIRS // BATCH, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
