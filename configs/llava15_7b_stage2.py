"""LLaVA-1.5 with Vicuna-7B, stage 2: projector and language model learn to answer (Liu et al. 2024, scripts/v1_5).

Needs --config.data.path=llava_v1_5_mix665k.json, --config.data.source.image_root=images, and a run of
configs/llava15_7b_stage1.py, or an import of the released model, at --config.init_from.path.
Published: global batch 128, one epoch of 665,298 conversations, AdamW without decay at 2e-5, cosine to zero after 3 %
of warm-up, gradients clipped at 1; images padded to squares, rows of 2048 tokens grouped by length and kind. Results:
VQAv2 78.5, GQA 62.0, TextVQA 58.2, POPE 85.9, MME 1510.7, MMBench 64.3 (13B: 80.0, 63.3, 61.3, 85.9, 1531.3, 67.7).
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.chat_config import LLAVA_STAGE_2
from vlm_jax.optim import AdamW
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("llava15_7b_stage1.py"))
CONVERSATIONS, BATCH = 665_298, 128
# The template's system message is long in a vocabulary of few words.
SMOKE = {
    **RECIPE.SMOKE_MODEL,
    **RECIPE.SMOKE_RUN,
    "data.chat.group": 8,
    "data.chat.system": "A chat.",
    "objective.length": 128,
    "data.chat.row_length": 128,
}


def second_stage(name: str, decoder: str, checkpoint: str) -> Config:
    """Stage 2 from a run of stage 1."""
    config = RECIPE.recipe(name, decoder, LLAVA_STAGE_2, AdamW(learning_rate=2e-5), BATCH, CONVERSATIONS)
    return override(config, {"init_from": InitFrom(path=checkpoint, tokenizer=True)})


def get_config(name: str = "") -> Config:
    config = second_stage("llava15_7b_stage2", "Vicuna-7B", "runs/llava15_7b_stage1")
    return variant(config, name, {"smoke": SMOKE})
