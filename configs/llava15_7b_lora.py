"""LLaVA-1.5 with Vicuna-7B, stage 2 by low-rank adaptation (Liu et al. 2024, scripts/v1_5/finetune_lora.sh).

Needs what llava15_7b_stage2.py needs. As published: rank 128 and alpha 256 on all linear maps of the language model,
dropout 0.05, 2e-4 for the small matrices and 2e-5 for the projector, all else as in stage 2. An export adds what was
learned to the matrices of Vicuna. VQAv2 79.1, GQA 63.0, TextVQA 58.2, POPE 86.4, MME 1476.9, MMBench 66.1.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.models.lora import LoraConfig
from vlm_jax.parts import Part
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("llava15_7b_stage2.py"))
SMALL = r"decoder/.*/lora_[ab]"
SMOKE = {**RECIPE.SMOKE, "objective.model.lora": LoraConfig(rank=4, alpha=8.0)}


def get_config(name: str = "") -> Config:
    config = RECIPE.second_stage("llava15_7b_lora", "Vicuna-7B", "runs/llava15_7b_stage1")
    changes = {
        "objective.model.lora": LoraConfig(),
        "optimizer.learning_rate": 2e-4,
        "parts": (
            Part("image", "image/.*", frozen=True),
            Part("projector", "projector/.*", lr=0.1),
            Part("lora", SMALL),
            Part("decoder", "decoder/.*", frozen=True),
        ),
        "init_from": InitFrom(path="runs/llava15_7b_stage1", skip=(SMALL,), tokenizer=True),
    }
    return variant(override(config, changes), name, {"smoke": SMOKE, **RECIPE.ASKED})
