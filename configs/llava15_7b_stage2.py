"""LLaVA-1.5 with Vicuna-7B, stage 2: projector and language model learn to answer (Liu et al. 2024, scripts/v1_5).

Needs --config.data.path=llava_v1_5_mix665k.json, --config.data.source.image_root=images, and a run of
configs/llava15_7b_stage1.py, or an import of the released model, at --config.init_from.path.
Published: global batch 128, one epoch of 665,298 conversations, AdamW without decay at 2e-5, cosine to zero after 3 %
of warm-up, gradients clipped at 1; images padded to squares, rows of 2048 tokens grouped by length and kind. Results:
VQAv2 78.5, GQA 62.0, TextVQA 58.2, POPE 85.9, MME 1510.7, MMBench 64.3 (13B: 80.0, 63.3, 61.3, 85.9, 1531.3, 67.7).
`:evals` asks the questions of those benchmarks that can be scored here, from files laid out in playground/data/eval as
LLaVA's docs/Evaluation.md says (docs/vlm_evaluation.md); `:pope` and so on ask one of them.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.chat_config import LLAVA_STAGE_2
from vlm_jax.data.sources import BenchmarkConfig
from vlm_jax.data.sources.benchmark_files import Layout
from vlm_jax.evals.generate import GenerateConfig
from vlm_jax.evals.scoring import Score
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.optim import AdamW
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RECIPE = config_module(Path(__file__).with_name("llava15_7b_stage1.py"))
CONVERSATIONS, BATCH = 665_298, 128
FOLDER = "playground/data/eval"


def benchmark(name: str, score: Score, layout: Layout, path: str, images: str = "", answers: str = "") -> VqaConfig:
    """A benchmark of LLaVA's folder; each answer has at most 128 tokens."""
    annotations, image_root = (f"{FOLDER}/{key}" if key else "" for key in (answers, images))
    source = BenchmarkConfig(layout, f"{FOLDER}/{path}", annotations=annotations, image_root=image_root)
    return VqaConfig(name, source, score=score, max_new_tokens=128, blank=False, predictions=True)


BENCHMARKS = (
    # Its answers are kept secret: the predictions are to be submitted.
    benchmark("vqav2", "vqa", "llava", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2/test2015"),
    benchmark("gqa", "gqa", "gqa", "gqa/data/testdev_balanced_questions.json", "gqa/data/images"),
    benchmark("scienceqa", "scienceqa", "scienceqa", "scienceqa"),
    # With the words that were read in the images, as published.
    benchmark(
        *("textvqa", "textvqa", "llava", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images"),
        answers="textvqa/TextVQA_0.5.1_val.json",
    ),
    benchmark("pope", "pope", "pope", "pope/coco", "pope/val2014"),
    benchmark("mme", "mme", "mme", "MME/MME_Benchmark_release_version"),
    GenerateConfig(
        "samples",
        BenchmarkConfig(
            *("llava", f"{FOLDER}/llava-bench-in-the-wild/questions.jsonl"),
            image_root=f"{FOLDER}/llava-bench-in-the-wild/images",
        ),
        max_new_tokens=256,
    ),
)
ASKED = {"evals": {"evals": BENCHMARKS}, **{entry.name: {"evals": (entry,)} for entry in BENCHMARKS}}
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
    return variant(config, name, {"smoke": SMOKE, **ASKED})
