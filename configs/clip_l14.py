"""CLIP ViT-L/14 at global batch 32768 (Radford et al. 2021, section 2.5 and tables 18 to 20).

Needs captioned images: --config.data.path='shards/{00000..99999}.tar' (or .jsonl, .csv); for CLIP's own vocabulary,
the merges file of an installed open_clip_torch or --config.data.tokenizer.path=FILE.
Published zero-shot top-1 on ImageNet: 75.3 % (400 M pairs of WIT, 12 days on 256 V100); 72.8 % on LAION-400M and
79.2 % on DataComp-1B in open_clip's reproductions.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import ChipPlan, Config, TrainConfig, variant
from vlm_jax.data.images import AugmentConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig, TarConfig
from vlm_jax.data.text import ClipBpeConfig, SentencePieceConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.presets import CLIP
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

PAIRS, EPOCHS, BATCH = 400_000_000, 32, 32_768

# The same recipe on drawn scenes, with towers and a vocabulary that a CPU trains in seconds.
SMOKE = {
    "objective.model": TwoTowerConfig(
        image=ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2, mlp_dim=128),
        text=TextConfig(vocab_size=512, length=32, width=64, depth=2, heads=2, mlp_dim=128, pool="first_eos", eos_id=1),
        embed_dim=32,
    ),
    "data.source": ShapesConfig(image_size=32, count=512),
    "data.tokenizer": SentencePieceConfig(length=32, vocab_size=512),
    "data.batch_size": 32,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.schedule.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (RetrievalConfig("held_out", ShapesConfig(split="test", image_size=32, count=64)),),
}


def get_config(name: str = "") -> Config:
    model = override(CLIP["ViT-L/14"], {"image.remat": "auto", "text.remat": "auto"})
    config = Config(
        name="clip_l14",
        objective=ClipConfig(model=model, loss="gather", max_scale=100.0),
        data=DataConfig(
            source=TarConfig(),
            batch_size=BATCH,
            augment=AugmentConfig(scale=(0.9, 1.0)),
            tokenizer=ClipBpeConfig(length=77),
            workers=8,
        ),
        # Half-precision Adam moments, as in the paper; here the first one, the second stays fp32.
        optimizer=AdamW(
            learning_rate=4e-4,
            weight_decay=0.2,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            mu_dtype="bfloat16",
            schedule=Cosine(warmup_steps=2000),
        ),
        parts=(Part("image", "image/.*"), Part("text", "text/.*"), Part("scale", "logit_scale")),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        # By the planner, 128 images a chip: the fastest that fits with room (docs/planning.md).
        chips=(
            ChipPlan("v4", "dots"),
            ChipPlan("v5e", "save_qkv_mid"),
            ChipPlan("v5p", "dots"),
            ChipPlan("v6e", "dots"),
            ChipPlan("tpu7x", "dots"),
        ),
        train=TrainConfig(steps=PAIRS * EPOCHS // BATCH, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=50_000),
    )
    return variant(config, name, {"smoke": SMOKE})
