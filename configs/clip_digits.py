"""CLIP on the 1,797 scans of handwritten digits that scikit-learn ships: real data, no download, minutes on a CPU.

Shows that everything works, from captions to zero-shot accuracy on held-out scans; it reproduces no paper.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine

SMOKE = {"train.steps": 6, "train.log_every": 2, "data.batch_size": 32, "checkpoint.every": 3, "evals.digits.limit": 60}


def get_config(name: str = "") -> Config:
    length, vocabulary = 24, 512
    model = TwoTowerConfig(
        image=ViTConfig(image_size=16, patch_size=4, width=96, depth=4, heads=4, mlp_dim=384),
        text=TextConfig(
            vocab_size=vocabulary, length=length, width=64, depth=2, heads=2, mlp_dim=256, pool="first_eos", eos_id=1
        ),
        embed_dim=64,
    )
    grey = PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config = Config(
        name="clip_digits",
        objective=ClipConfig(model=model),
        data=DataConfig(
            source=DigitsConfig(split="train"),
            batch_size=128,
            preprocess=grey,
            augment=AugmentConfig(scale=(0.6, 1.0), ratio=(0.8, 1.25)),
            tokenizer=SentencePieceConfig(length=length, vocab_size=vocabulary),
        ),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1, b2=0.98, eps=1e-6, schedule=Cosine(warmup_steps=50)),
        parts=(Part("image", "image/.*"), Part("text", "text/.*"), Part("scale", "logit_scale")),
        train=TrainConfig(steps=500, log_every=20, eval_every=250),
        checkpoint=CheckpointConfig(every=100),
        evals=(
            ZeroShotConfig("digits", DigitsConfig(split="test"), templates=("digits",)),
            RetrievalConfig("digits", DigitsConfig(split="test"), captions_per_image=1, shared_captions=True),
        ),
    )
    return variant(config, name, {"smoke": SMOKE})
