"""What an image tower learns from a given number of captioned images, by method (Radford et al. 2021, figure 2).

Variants with one image tower, one data order and one optimiser: `:caption` predicts the caption, `:bag_of_words` its
set of words, `:contrastive_bag` tells it from other captions by its words alone, `:contrastive` (the default) by a
transformer, `:contrastive_mlp` the same through a non-linear projection. `benchmarks/clip_efficiency.py` compares them.
A method of the paper at the size of a CPU, on the scans of digits that scikit-learn ships; it reproduces no number.
"""

import dataclasses
from typing import Any

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.models.captioner import CaptionerModelConfig, TextDecoderConfig
from vlm_jax.models.captions import CaptionStart
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.word_predictor import WordPredictorConfig
from vlm_jax.objectives.bag_of_words import BagOfWordsConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.caption import CaptionConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.schedule import Constant

VOCABULARY, LENGTH, PAD, EOS = 512, 16, 0, 1
SMOKE = {"train.steps": 6, "train.log_every": 2, "data.batch_size": 32, "checkpoint.every": 3, "evals.digits.limit": 60}


def methods(image: ViTConfig, length: int) -> dict[str, ObjectiveConfig]:
    """The five methods by name, around one image tower; the text side is as deep and wide as the image tower."""
    sizes: dict[str, Any] = {"width": image.width, "depth": image.depth, "heads": image.heads, "mlp_dim": image.mlp_dim}
    text = TextConfig(vocab_size=VOCABULARY, length=length, pool="first_eos", eos_id=EOS, pad_id=PAD, **sizes)
    bag = dataclasses.replace(text, depth=0, pool="mean", mask_padding=True, pos_embed="none")
    decoder = TextDecoderConfig(
        vocab_size=VOCABULARY, length=length, start=CaptionStart("model", EOS), eos_id=EOS, pad_id=PAD, **sizes
    )
    towers = TwoTowerConfig(image, text, embed_dim=image.width)
    return {
        "contrastive": ClipConfig(model=towers),
        "contrastive_mlp": ClipConfig(model=dataclasses.replace(towers, projection="mlp")),
        "contrastive_bag": ClipConfig(model=dataclasses.replace(towers, text=bag)),
        "bag_of_words": BagOfWordsConfig(model=WordPredictorConfig(image, VOCABULARY, length), special_ids=(PAD, EOS)),
        "caption": CaptionConfig(model=CaptionerModelConfig(image, decoder)),
    }


def get_config(name: str = "") -> Config:
    image = ViTConfig(
        image_size=16, patch_size=4, width=64, depth=3, heads=4, mlp_dim=256, pool="mean", class_token=False
    )
    by_name = methods(image, LENGTH)
    zero_shot = ZeroShotConfig("digits", DigitsConfig(split="test"), templates=("digits",))
    retrieval = RetrievalConfig("digits", DigitsConfig(split="test"), captions_per_image=1, shared_captions=True)
    config = Config(
        name="efficiency_digits",
        objective=by_name["contrastive"],
        data=DataConfig(
            source=DigitsConfig(split="train"),
            batch_size=128,
            preprocess=PreprocessConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            augment=AugmentConfig(scale=(0.6, 1.0), ratio=(0.8, 1.25)),
            tokenizer=SentencePieceConfig(length=LENGTH, vocab_size=VOCABULARY),
        ),
        # Constant, so that one run gives the accuracy at every number of images.
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1, b2=0.98, eps=1e-6, schedule=Constant(warmup_steps=20)),
        train=TrainConfig(steps=256, log_every=16, dtype="float32"),
        checkpoint=CheckpointConfig(every=256),
        evals=(zero_shot, retrieval),
    )
    # Only methods with a joint space can retrieve.
    joint = {key: {"objective": objective} for key, objective in by_name.items() if isinstance(objective, ClipConfig)}
    others = {key: {"objective": by_name[key], "evals": (zero_shot,)} for key in by_name if key not in joint}
    return variant(config, name, {**joint, **others, "smoke": SMOKE})
