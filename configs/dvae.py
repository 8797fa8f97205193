"""The discrete autoencoder of DALL-E at 256 pixels with 8192 codes (Ramesh et al. 2021, section 2.1, appendix A).

Needs images alone: --config.data.path=... Its encoder is a visual tokenizer for configs/beit_b16.py:
--config.init_from.path=RUN there, with --config.init_from.ignore='("decoder/.*",)', or with
--config.objective.model.tokenizer.decoder=true to see what is predicted.
Published in appendix A.2: AdamW with betas 0.9 and 0.999, decay 1e-4, batch 512, 3,000,000 updates; along cosines, the
learning rate 1e-4 to 1.25e-6 over 1,200,000, temperature 1 to 1/16 over 150,000, weight of the divergence 0 to 6.6 over
5000 (where it stays, say the authors in openai/DALL-E issue 8); parameters averaged with 0.999; the loss divided by the
number of values of an image. Published in listing 1: a random square, shrunk so that 256 pixels are 2/3 to 8/9 of its
side, cut at random and flipped; here a square of that share of the area, the same for square images.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, ShapesConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.dvae import DvaeModelConfig
from vlm_jax.objectives.dvae import Annealed, DvaeConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Constant, Cosine, Phase, Phases

STEPS, ANNEALED_STEPS = 3_000_000, 1_200_000
LEARNING_RATE, LAST_LEARNING_RATE = 1e-4, 1.25e-6

# The same recipe on drawn scenes with a small vocabulary; everything that is annealed is so in a few steps.
SMOKE = {
    "objective": DvaeConfig(
        model=DvaeModelConfig(image_size=32, vocab_size=64, width=16, blocks=1, decoder_width=16),
        # So few codes for so few values of an image need a larger weight than published to be used, and warmth.
        temperature=Annealed(1.0, 0.5, 6),
        kl_weight=Annealed(0.0, 10.0, 6),
    ),
    "data.source": ShapesConfig(image_size=32, count=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": Cosine(final=0.0125),
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (
        KnnConfig(
            "shapes",
            ShapesConfig(split="test", image_size=32, count=64, max_objects=1),
            train_source=ShapesConfig(image_size=32, count=128, max_objects=1),
        ),
    ),
}


def get_config(name: str = "") -> Config:
    config = Config(
        name="dvae",
        objective=DvaeConfig(model=DvaeModelConfig(remat="full")),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=512,
            preprocess=PreprocessConfig(interpolation="lanczos", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            augment=AugmentConfig(scale=((2 / 3) ** 2, (8 / 9) ** 2), ratio=(1.0, 1.0), flip=0.5, interpolation="area"),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=LEARNING_RATE,
            weight_decay=1e-4,
            schedule=Phases(
                phases=(
                    Phase("annealed", Cosine(final=LAST_LEARNING_RATE / LEARNING_RATE)),
                    Phase("last", Constant(), steps=STEPS - ANNEALED_STEPS, peak=LAST_LEARNING_RATE / LEARNING_RATE),
                )
            ),
        ),
        parts=(Part("encoder", "encoder/.*"), Part("decoder", "decoder/.*")),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=STEPS, log_every=100, ema_decay=0.999),
        checkpoint=CheckpointConfig(every=5000, keep=3, keep_every=100_000),
    )
    return variant(config, name, {"smoke": SMOKE})
