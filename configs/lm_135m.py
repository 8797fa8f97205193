"""SmolLM2-135M on 2 T tokens (Ben Allal et al. 2025, section 6; the published config of this size).

Needs text: --config.data.path='text/*.parquet' (or .jsonl, .txt), and the tokenizer of the released model or another of
49,152 ids at most: --config.data.tokenizer.path=tokenizer.json. Global batch 512 rows of 2048 tokens, a million tokens;
2000 steps of warm-up, then constant, then linear to zero over the last fifth. Differences: documents are cut and packed
so that those of a row don't see each other (theirs do; --config.objective.isolate=false), and matrices alone decay.
Published, zero-shot (model card): HellaSwag 42.1, ARC 43.9, PIQA 68.4 %.
"""

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, variant
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig, TextFilesConfig
from vlm_jax.data.text import HfTokenizerConfig, SentencePieceConfig
from vlm_jax.evals.held_out_loss import HeldOutLossConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.models.presets import DECODERS
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Constant
from vlm_jax.schema import override

LENGTH = 2048

# The same recipe on captions of drawn scenes, with a model and a vocabulary that a CPU trains in seconds.
SMOKE = {
    "objective.model.decoder": override(DECODERS["tiny"], {"vocab_size": 320, "init": "smollm"}),
    "objective.length": 64,
    "data.source": ShapesConfig(count=512),
    "data.tokenizer": SentencePieceConfig(length=64, vocab_size=320, sticky_eos=False),
    "data.batch_size": 8,
    "data.workers": 0,
    "mesh": MeshConfig(),
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": Constant(warmup_steps=2, cooldown_steps=2),
    "train.steps": 6,
    "train.log_every": 2,
    "checkpoint.every": 3,
    "evals": (HeldOutLossConfig("held_out", ShapesConfig(split="test", count=64)),),
}


def recipe(name: str, size: str, *, batch: int, steps: int, learning_rate: float, cooldown: int) -> Config:
    """SmolLM2's recipe around one of its sizes."""
    decoder = override(DECODERS[size], {"remat": "auto"})
    return Config(
        name=name,
        objective=LmConfig(model=LanguageModelConfig(decoder), length=LENGTH),
        data=DataConfig(
            source=TextFilesConfig(),
            batch_size=batch,
            augment=None,
            tokenizer=HfTokenizerConfig(length=LENGTH, bos=False, sticky_eos=False),
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=learning_rate,
            weight_decay=0.01,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            clip_norm=1.0,
            schedule=Constant(warmup_steps=2000, cooldown_steps=cooldown),
        ),
        parts=(Part("decoder", "decoder/.*"),),
        mesh=MeshConfig(data=1, fsdp=-1, fsdp_most=16),
        train=TrainConfig(steps=steps, log_every=100),
        checkpoint=CheckpointConfig(every=2000, keep=3, keep_every=100_000),
    )


def get_config(name: str = "") -> Config:
    config = recipe("lm_135m", "SmolLM2-135M", batch=512, steps=2_000_000, learning_rate=3e-3, cooldown=400_000)
    return variant(config, name, {"smoke": SMOKE})
