"""BEiT ViT-B/16 on ImageNet for 800 epochs (Bao et al. 2022, section 2.5 and the published code).

Needs images alone, --config.data.path=IMAGENET/train (a folder per class), or tar shards, a table, ..., and a visual
tokenizer at --config.init_from.path: DALL-E's encoder, imported, or one that configs/dvae.py has trained.
Published: AdamW with betas 0.9 and 0.999, decay 0.05 on all but biases, norms, layer scales and the class token,
learning rate 1.5e-3 for a batch of 2048 down to 1e-5, gradients clipped at 3; crops of 8 to 100 %, flips and colours.
`:in22k` are the 150 epochs on ImageNet-22k. Fine-tuned ImageNet top-1: 83.2 % from ImageNet-1k, 83.7 % from 22k.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.augment import ColorJitter
from vlm_jax.data.block_masks import BlockMasks
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, ShapesConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.beit import BEIT, BeitModelConfig, beit_encoder
from vlm_jax.models.dvae import DvaeModelConfig
from vlm_jax.objectives.beit import BeitConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

IMAGES, EPOCHS, WARMUP_EPOCHS, BATCH = 1_281_167, 800, 10, 2048
LEARNING_RATE, LAST_LEARNING_RATE = 1.5e-3, 1e-5

IMAGES_22K, EPOCHS_22K, WARMUP_STEPS_22K = 14_197_122, 150, 10_000
IN22K = {
    "data.preprocess": PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "optimizer.schedule.warmup_steps": WARMUP_STEPS_22K,
    "train.steps": EPOCHS_22K * IMAGES_22K // BATCH,
}

# The same recipe on drawn scenes, with a tower that a CPU trains in seconds and a tokenizer that nobody has trained.
SMOKE = {
    "objective.model": BeitModelConfig(
        beit_encoder(64, 2, 2, 8, image_size=32),
        vocab_size=64,
        tokenizer=DvaeModelConfig(image_size=32, vocab_size=64, width=8, blocks=1, decoder=False),
        masks=BlockMasks(count=6, least=2),
    ),
    "data.source": ShapesConfig(image_size=32, count=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "init_from": InitFrom(),
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
    config = Config(
        name="beit_b16",
        objective=BeitConfig(model=override(BEIT["BEiT-B/16"], {"image.remat": "full"})),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=AugmentConfig(
                scale=(0.08, 1.0), flip=0.5, color_jitter=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
            ),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=LEARNING_RATE,
            weight_decay=0.05,
            clip_norm=3.0,
            schedule=Cosine(warmup_steps=WARMUP_EPOCHS * IMAGES // BATCH, final=LAST_LEARNING_RATE / LEARNING_RATE),
        ),
        # Mask token and table of relative positions do decay, as in the published code.
        parts=(
            Part("image", "image/.*"),
            Part("head", "head/.*"),
            Part("tokenizer", "tokenizer/.*", frozen=True),
        ),
        # Of a whole autoencoder the decoder is left out.
        init_from=InitFrom(
            path="checkpoints/dalle_encoder",
            map=((r"tokenizer/(.*)", r"\1"),),
            skip=("image/.*", "head/.*"),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=EPOCHS * IMAGES // BATCH, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE, "in22k": IN22K})
