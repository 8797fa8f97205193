"""ViT-S/16 on ImageNet's labels from scratch (Beyer et al. 2022, Better plain ViT baselines for ImageNet-1k).

Needs labelled images: --config.data.path=imagenet/train and --config.evals.val.path=imagenet/val (a folder per class),
or tar shards with *.cls members and class names.
Published top-1 after 90 epochs of 1024 images: 76.5 % (`--config.train.steps` for 300 epochs, 375,342: 80.0 %). Adam
with decoupled decay of 1e-4 a step at the peak, 10,000 steps of warm-up, clipped gradients, RandAugment (2, 10), mixup
0.2, fixed sine-cosine positions and the mean of the patches. The authors' code has a hidden tanh layer before the
classifier; here the classifier is linear.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.augment import RandAugment
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, DigitsConfig
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.classify import ClassifyConfig
from vlm_jax.objectives.mixing import MixingConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine

IMAGES, EPOCHS, BATCH = 1_281_167, 90, 1024
# Only the kernels of matrices decay.
NO_DECAY = r"(?!.*/kernel$).*"

# The same recipe on the scanned digits, with a tower that a CPU trains in seconds.
SMOKE_TOWER = {"image_size": 16, "patch_size": 4, "width": 48, "depth": 2, "heads": 4, "mlp_dim": 96, "remat": "none"}
SMOKE = {
    **{f"objective.model.image.{key}": value for key, value in SMOKE_TOWER.items()},
    "objective.model.classes": 10,
    "data.source": DigitsConfig(),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (AccuracyConfig("val", DigitsConfig(split="test"), limit=60),),
}


def get_config(name: str = "") -> Config:
    image = ViTConfig(
        image_size=224,
        patch_size=16,
        width=384,
        depth=12,
        heads=6,
        mlp_dim=1536,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="mean",
        class_token=False,
        pos_embed="sincos",
        pre_norm=False,
        patch_bias=True,
        remat="full",
        init="siglip",
    )
    config = Config(
        name="vit_s16_supervised",
        objective=ClassifyConfig(
            model=ClassifierConfig(image=image, classes=1000, head_init=0.0), mixing=MixingConfig(mixup=0.2)
        ),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(crop=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            augment=AugmentConfig(scale=(0.05, 1.0), flip=0.5, rand_augment=RandAugment(layers=2, magnitude=10.0)),
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=1e-4,
            decay_by="schedule",
            mu_dtype="bfloat16",
            clip_norm=1.0,
            schedule=Cosine(warmup_steps=10_000),
        ),
        parts=(Part("image", "image/.*", no_decay=NO_DECAY), Part("head", "head/.*", no_decay=NO_DECAY)),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=IMAGES * EPOCHS // BATCH, log_every=50, eval_every=2500),
        checkpoint=CheckpointConfig(every=1000),
        evals=(AccuracyConfig("val", ClassFoldersConfig()),),
    )
    return variant(config, name, {"smoke": SMOKE})
