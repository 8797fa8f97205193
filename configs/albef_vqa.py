"""ALBEF fine-tuned to answer questions on VQAv2 and Visual Genome (Li et al. 2021, section 4, published code).

Needs a pre-trained ALBEF, from configs/albef_4m.py or an import of the authors' file; the authors' lists of questions,
their list of all answers, and BERT's vocabulary:
    python -m vlm_jax.interop import --from=ALBEF.pth --to=checkpoints/albef
    python -m vlm_jax.main --config=configs/albef_vqa.py --config.init_from.path=checkpoints/albef \\
        --config.data.path=vqa_train.json,vqa_val.json,vg_qa.json --config.data.source.image_root=COCO \\
        --config.data.source.vg_root=VISUAL_GENOME --config.data.tokenizer.path=bert-base-uncased/vocab.txt \\
        --config.evals.vqa.path=vqa_test.json --config.evals.vqa.source.image_root=COCO \\
        --config.evals.vqa.answers=answer_list.json
The question is fused with the image, and a decoder of six layers, which starts as the fusion encoder, writes
`[CLS] answer [SEP]`. Model and averaged model begin as pre-training left them.
Published: 8 epochs, batch 256, images of 384 pixels with positions interpolated, AdamW at 2e-5 with 0.02 of decay,
400 steps of warm-up in stairs from 1e-5, a cosine once an epoch to 1e-6; an answer weighs the share of the people who
gave it, those of Visual Genome a half; RandAugment and crops of at least half. Test: of the 128 answers whose first
token is the likeliest the likeliest as a whole. The steps of an epoch are those of all questions of both sets
(QUESTIONS); set train.steps and its like where the lists hold others.
Ours: answers are cut at 12 tokens, and questions at 25 in the test too.
Published: 74.5 % on VQAv2 test-dev after pre-training on 4M images, 75.8 % after 14M.
`:shapes` is the same for the small model of albef_shapes.py, on questions about drawn scenes.
"""

import dataclasses
from pathlib import Path
from typing import Any

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.sources import QuestionListsConfig, ShapesConfig
from vlm_jax.evals.answer_ranking import AnswerRankingConfig
from vlm_jax.evals.vqa import VqaConfig
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.objectives.albef_vqa import AlbefVqaConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine, EpochCosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

HERE = Path(__file__)
PRETRAINED, SHAPES = (config_module(HERE.with_name(name)) for name in ("albef_4m.py", "albef_shapes.py"))
BATCH, EPOCHS, WARMUP = 256, 8, 400
QUESTIONS = 658_111 + 1_445_322  # of VQAv2's train and val, and of Visual Genome
STEPS = 1500  # of the small model

INIT = InitFrom(
    path="checkpoints/albef",
    map=(
        (r"(averaged/)?decoder/blocks/(.*)", r"\1fusion/blocks/\2"),
        (r"(averaged/)?decoder/(.*)", r"\1text/\2"),
    ),
    ignore=("(image|text)_projection/.*", "matching_head/.*", "temperature"),
    extra=True,
)
SCENES = ShapesConfig(
    image_size=48, count=20000, max_objects=2, conversations=("color", "shape", "count", "position"), seed=2
)
TEST_SCENES = dataclasses.replace(SCENES, split="test", count=512)


def small_model(size: int, sizes: dict[str, Any], vocab_size: int, positions: int) -> AlbefVqaModelConfig:
    """That of albef_shapes.py, or with other sizes, and a decoder of its fusion encoder's."""
    pretrained = SHAPES.get_config().objective.model
    image = override(pretrained.image, {**sizes, "image_size": size})
    text = override(pretrained.text, {**sizes, "vocab_size": vocab_size, "positions": positions})
    layers = {field.name for field in dataclasses.fields(TextStackConfig)}
    fusion = override(pretrained.fusion, sizes)
    decoder = TextEncoderConfig(
        **{key: getattr(fusion, key) for key in layers}, vocab_size=vocab_size, positions=positions
    )
    return AlbefVqaModelConfig(image, text, fusion, decoder)


def shapes() -> dict[str, Any]:
    """What the small model has of its own: its sizes are those of the run that it starts from."""
    return {
        "objective": AlbefVqaConfig(
            model=small_model(48, SHAPES.SIZES, SHAPES.VOCABULARY, SHAPES.LENGTH),
            text_length=SHAPES.LENGTH,
            distillation_steps=STEPS // 5,
            answer_length=8,
            max_answers=1,
        ),
        "data.source": SCENES,
        "data.batch_size": 64,
        "data.workers": 0,
        "data.augment": None,  # a flip or a crop would move objects to other places than the answer tells
        "data.tokenizer.length": SHAPES.LENGTH,
        "data.tokenizer.vocab_size": SHAPES.VOCABULARY,
        "optimizer": AdamW(learning_rate=5e-4, weight_decay=0.02, schedule=Cosine(warmup_steps=100)),
        "init_from": dataclasses.replace(INIT, path="runs/albef_shapes", tokenizer=True),
        "train": TrainConfig(steps=STEPS, log_every=50),
        "checkpoint": CheckpointConfig(every=500, keep=1),
        "evals": (
            AnswerRankingConfig("shapes", TEST_SCENES),
            VqaConfig("shapes_written", TEST_SCENES, max_new_tokens=8, blank=False),
        ),
    }


def smoke() -> dict[str, Any]:
    """The same from nothing, with a model that a CPU trains in seconds."""
    scenes = dataclasses.replace(SCENES, image_size=32, count=512)
    test = dataclasses.replace(TEST_SCENES, image_size=32, count=48)
    return shapes() | {
        "objective": AlbefVqaConfig(
            model=small_model(32, SHAPES.SMALL, 128, 32),
            text_length=32,
            distillation_steps=3,
            answer_length=8,
            max_answers=2,
        ),
        "data.source": scenes,
        "data.batch_size": 32,
        "data.tokenizer.length": 32,
        "data.tokenizer.vocab_size": 128,
        "optimizer": AdamW(learning_rate=1e-3, weight_decay=0.02, schedule=Cosine(warmup_steps=2)),
        "init_from": InitFrom(),
        "train": TrainConfig(steps=6, log_every=2),
        "checkpoint": CheckpointConfig(every=3),
        "evals": (
            AnswerRankingConfig("shapes", test, k=8, blank=False),
            VqaConfig("shapes_written", test, max_new_tokens=8, blank=False),
        ),
    }


def get_config(name: str = "") -> Config:
    epoch, pretrained = QUESTIONS // BATCH, PRETRAINED.get_config()
    remat = {f"{part}.remat": "auto" for part in ("image", "text", "fusion", "decoder")}
    model = override(AlbefVqaModelConfig(), {"image.image_size": 384, **remat})
    config = override(
        pretrained,
        {
            "name": "albef_vqa",
            "objective": AlbefVqaConfig(model=model, distillation_steps=epoch),
            "data.source": QuestionListsConfig(),
            "data.batch_size": BATCH,
            "data.augment.scale": (0.5, 1.0),
            "optimizer.learning_rate": 2e-5,
            "optimizer.schedule": EpochCosine(warmup_steps=WARMUP, epoch_steps=epoch, final=1 / 20, warmup_start=1 / 2),
            "parts": (
                Part("image", "image/.*", no_decay=PRETRAINED.NO_DECAY),
                Part("encoder", "(text|fusion)/.*", no_decay=PRETRAINED.NO_DECAY),
                Part("decoder", "(decoder|words)/.*", no_decay=PRETRAINED.NO_DECAY),
            ),
            "init_from": INIT,
            "train.steps": EPOCHS * epoch,
            "train.eval_every": epoch,
            "checkpoint.every": 500,
            "checkpoint.keep_every": epoch,
            "evals": (AnswerRankingConfig("vqa", QuestionListsConfig(), blank=False, score="vqa", predictions=True),),
        },
    )
    return variant(config, name, {"smoke": smoke(), "shapes": shapes()})
