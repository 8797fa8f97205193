"""Fine-tuning of MAE's encoders on ImageNet's labels (He et al. 2022, appendix A.1, table 9; FINETUNE.md).

`configs/finetune_mae_b16.py` is ViT-B/16, `:l16` ViT-L/16, `:h14` ViT-H/14. Needs labelled images,
--config.data.path=imagenet/train and --config.evals.val.path=imagenet/val (a folder per class), and the pre-trained
encoder, --config.init_from.path=WORKDIR of configs/mae_b16.py or an import.
Published: batch 1024, AdamW with betas 0.9 and 0.999, decay 0.05, learning rate 5e-4 (L, H: 1e-3) for every 256 images,
layer-wise decay 0.65 (0.75), drop path 0.1 (0.2, 0.3), 100 epochs (50), 5 of warm-up, to 1e-6; RandAugment, mixup 0.8,
CutMix 1.0, label smoothing 0.1, random erasing 0.25; the mean of the patches and a norm of its own. Top-1 83.6 % (B),
85.9 % (L), 86.9 % (H). The positions are learned from the sine-cosine table on, which needs no loading.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.augment import Erasing, RandAugment
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, DigitsConfig
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.masked_autoencoder import MAE
from vlm_jax.objectives.classify import ClassifyConfig
from vlm_jax.objectives.mixing import MixingConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import GAINS_AND_BIASES, Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

IMAGES, WARMUP_EPOCHS, BATCH = 1_281_167, 5, 1024
# Class token, positions, biases and norms.
NO_DECAY = rf"{GAINS_AND_BIASES}|(.*/)?pos_embed"


def steps(epochs: int) -> int:
    return epochs * IMAGES // BATCH


def finetuning(size: str, drop_path: float, rate: float, layer_decay: float, epochs: int) -> dict:
    """The overrides of one size."""
    tower = {"pool": "mean", "post_norm": False, "pos_embed": "sincos_learned", "remat": "full"}
    rate *= BATCH / 256
    return {
        "objective.model.image": override(MAE[size].image, tower | {"drop_path": drop_path}),
        "optimizer.learning_rate": rate,
        "optimizer.schedule": Cosine(warmup_steps=steps(WARMUP_EPOCHS), final=1e-6 / rate),
        "parts.image.layer_decay": layer_decay,
        "train.steps": steps(epochs),
    }


BASE = finetuning("MAE-B/16", drop_path=0.1, rate=5e-4, layer_decay=0.65, epochs=100)
VARIANTS = {
    "l16": finetuning("MAE-L/16", drop_path=0.2, rate=1e-3, layer_decay=0.75, epochs=50),
    "h14": finetuning("MAE-H/14", drop_path=0.3, rate=1e-3, layer_decay=0.75, epochs=50),
}
# The same recipe on the scanned digits; without a checkpoint it is a start from nothing.
SMOKE_RUN = {
    "objective.model.classes": 10,
    "data.source": DigitsConfig(),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "init_from": InitFrom(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (AccuracyConfig("val", DigitsConfig(split="test"), limit=60),),
}
SMOKE_TOWER = {"image_size": 16, "patch_size": 4, "width": 48, "depth": 2, "heads": 4, "mlp_dim": 96, "remat": "none"}
SMOKE = {**SMOKE_RUN, **{f"objective.model.image.{key}": value for key, value in SMOKE_TOWER.items()}}


def get_config(name: str = "") -> Config:
    config = Config(
        name="finetune_mae_b16",
        objective=ClassifyConfig(
            model=ClassifierConfig(classes=1000, norm=True, head_init=2e-5),
            mixing=MixingConfig(mixup=0.8, cutmix=1.0),
            label_smoothing=0.1,
        ),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(crop=0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=AugmentConfig(
                scale=(0.08, 1.0), flip=0.5, rand_augment=RandAugment(layers=2), erasing=Erasing(probability=0.25)
            ),
            workers=8,
        ),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.05),
        parts=(Part("image", "image/.*", no_decay=NO_DECAY), Part("head", "head/.*")),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=1, log_every=50, eval_every=steps(5)),
        checkpoint=CheckpointConfig(every=1000),
        # The decoder and the encoder's last norm stay behind; head and positions have their own start.
        init_from=InitFrom(
            path="runs/mae_b16",
            skip=("head/.*", "image/pos_embed"),
            ignore=("decoder/.*", "image/ln_post/.*"),
        ),
        evals=(AccuracyConfig("val", ClassFoldersConfig()),),
    )
    return variant(override(config, BASE), name, VARIANTS | {"smoke": SMOKE})
