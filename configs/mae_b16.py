"""MAE ViT-B/16 on ImageNet-1k for 800 epochs (He et al. 2022, appendix A.1 and table 8).

Needs images alone: --config.data.path=IMAGENET/train (a folder per class), or tar shards, a table, ...
Published: AdamW with betas 0.9 and 0.95, decay 0.05 on all but biases and norms, learning rate 1.5e-4 for every 256
images of the batch of 4096, warm-up of 40 epochs, crops of 20 to 100 % and flips, nothing clipped; three quarters of
the patches removed, and normalised pixels predicted. After 1600 epochs, ImageNet top-1 83.6 % fine-tuned and 68.0 % by
a linear probe.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, ShapesConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.masked_autoencoder import MAE, MaskedAutoencoderConfig, PixelDecoderConfig, mae_encoder
from vlm_jax.objectives.mae import MaeConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

IMAGES, EPOCHS, WARMUP_EPOCHS, BATCH = 1_281_167, 800, 40, 4096
LEARNING_RATE = 1.5e-4 * BATCH / 256
# The published code spares what has one axis; class token and mask token have more there and decay.
NO_DECAY = r"(.*/)?(bias|scale)"

# The same recipe on drawn scenes, with an encoder and a decoder that a CPU trains in seconds.
SMOKE = {
    "objective.model": MaskedAutoencoderConfig(
        mae_encoder(64, 2, 2, 8, image_size=32), PixelDecoderConfig(width=32, depth=1, heads=2, mlp_dim=64)
    ),
    "data.source": ShapesConfig(image_size=32, count=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.schedule.warmup_steps": 2,
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
    model = override(MAE["MAE-B/16"], {"image.remat": "full", "decoder.remat": "full"})
    config = Config(
        name="mae_b16",
        objective=MaeConfig(model=model),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=AugmentConfig(scale=(0.2, 1.0), flip=0.5),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=LEARNING_RATE,
            weight_decay=0.05,
            b1=0.9,
            b2=0.95,
            schedule=Cosine(warmup_steps=WARMUP_EPOCHS * IMAGES // BATCH),
        ),
        parts=(Part("image", "image/.*", no_decay=NO_DECAY), Part("decoder", "decoder/.*", no_decay=NO_DECAY)),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=EPOCHS * IMAGES // BATCH, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
