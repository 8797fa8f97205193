"""DINOv2 ViT-L/14 from scratch at batch 3072 (Oquab et al. 2024; train/vitl14.yaml of the published code).

Needs images alone: --config.data.path=IMAGENET22K (a folder per class), or tar shards, a table, ...
Published: 500 "epochs" of 1,250 steps with 80 of warm-up, AdamW at 2e-4 times the root of batch / 1024, a fifth of that
for the patch embedding, decay rising from 0.04 to 0.2, gradients of tower and of each head cut to norm 3, drop path 0.4
in every block, SwiGLU, 131,072 prototypes for either head, last layers still for one epoch, teacher momentum 0.994 to
1. Two views of 224 and eight of 98 pixels; a half of the large ones masked by 10 to 50 %.
Ours: drop path drops each row by its own draw, where theirs runs a branch on a random 60 % of the rows; KoLeo looks
for neighbours in the whole batch, not in one device's share; 131,072 prototypes see masked patches in 128 places per
image, filled or not.
Published with this recipe on ImageNet-22k: 82.0 % k-NN and 84.5 % linear top-1 on ImageNet. The released ViT-L was
distilled from ViT-g on LVD-142M: 83.5 and 86.3 %.
"""

import math

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, PreprocessConfig
from vlm_jax.data.multi_crop import MultiCropConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ClassFoldersConfig, ShapesConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.dino import DinoModelConfig, PrototypeHeadConfig
from vlm_jax.models.presets import dinov2
from vlm_jax.objectives.dino import DinoConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

EPOCH, EPOCHS, WARMUP_EPOCHS, BATCH = 1250, 500, 80, 3072
LEARNING_RATE = 2e-4 * math.sqrt(BATCH / 1024)
PROTOTYPES = 131_072
# The published code spares biases, norms and layer scales; tokens, positions and magnitudes of prototypes decay.
NO_DECAY = r"(.*/)?(bias|scale|layer_scale\w*)"

_HEAD = PrototypeHeadConfig(hidden=64, bottleneck=32, prototypes=128)
# The same recipe on drawn scenes, with a tower and heads that a CPU trains in seconds.
SMOKE = {
    "objective.model": DinoModelConfig(
        override(
            dinov2(64, 2, image_size=32),
            # with the published 1e-5 the tower would still be nearly the identity after its few steps
            {"patch_size": 8, "drop_path": 0.1, "drop_path_rates": "uniform", "layer_scale_init": 1.0},
        ),
        dino_head=_HEAD,
        ibot_head=_HEAD,
    ),
    "objective.views": MultiCropConfig(local_views=3, local_size=16),
    "objective.teacher_temperature_steps": 3,
    "data.source": ShapesConfig(image_size=32, count=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.schedule.warmup_steps": 2,
    "parts.last_layers.start_step": 2,
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
    tower = override(
        dinov2(1024, 24, swiglu=True, image_size=224),
        {"drop_path": 0.4, "drop_path_rates": "uniform", "remat": "auto"},
    )
    model = DinoModelConfig(
        tower,
        dino_head=PrototypeHeadConfig(bottleneck=384, prototypes=PROTOTYPES),
        ibot_head=PrototypeHeadConfig(bottleneck=256, prototypes=PROTOTYPES),
    )
    config = Config(
        name="dinov2_vitl14",
        objective=DinoConfig(model=model, teacher_temperature_steps=30 * EPOCH),
        data=DataConfig(
            source=ClassFoldersConfig(),
            batch_size=BATCH,
            preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=None,
            workers=8,
        ),
        optimizer=AdamW(
            learning_rate=LEARNING_RATE,
            weight_decay=0.04,
            clip_norm=3.0,
            clip_by="module",
            schedule=Cosine(warmup_steps=WARMUP_EPOCHS * EPOCH, final=1e-6 / LEARNING_RATE),
            decay_schedule=Cosine(final=0.2 / 0.04),
        ),
        parts=(
            Part("last_layers", "(dino|ibot)_head/last/.*", no_decay=NO_DECAY, start_step=EPOCH),
            Part("heads", "(dino|ibot)_head/.*", no_decay=NO_DECAY),
            Part("patch_embed", "image/patch_embed/.*", no_decay=NO_DECAY, lr=0.2),
            Part("image", "image/.*", no_decay=NO_DECAY),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=EPOCHS * EPOCH, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
