"""ALBEF fine-tuned for visual entailment on SNLI-VE (Li et al. 2021, section 5, published code).

Needs a pre-trained ALBEF, the authors' lists (ve_train.json, ...), Flickr30k's images and BERT's vocabulary:
    python -m vlm_jax.interop import --from=ALBEF.pth --to=checkpoints/albef
    python -m vlm_jax.main --config=configs/albef_snli_ve.py --config.init_from.path=checkpoints/albef \\
        --config.data.path=ve_train.json --config.data.source.image_root=IMAGES \\
        --config.data.tokenizer.path=bert-base-uncased/vocab.txt \\
        --config.evals.test.path=ve_test.json --config.evals.test.source.image_root=IMAGES
Published: 5 epochs, batch 256, images of 384 pixels, AdamW at 2e-5 with 0.02 of decay, a cosine once an epoch to 1e-6
after 100 steps at 1e-5; a classifier of two layers on the fused class token; 40 % of the targets are an averaged
model's from the first step on. That model goes on from pre-training's (init_from.extra).
Ours: texts end after 40 tokens, where theirs ended after 30 words.
Published: 80.14 / 80.30 % (dev, test) after pre-training on 4M images, 80.80 / 80.91 % after 14M.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.sources import JsonListsConfig, ShapesStatementsConfig
from vlm_jax.data.sources.shapes_statements import ENTAILMENT
from vlm_jax.evals.accuracy import AccuracyConfig
from vlm_jax.models.pair_classifier import PairClassifierConfig
from vlm_jax.objectives.pair_classify import PairClassifyConfig
from vlm_jax.parts import Part
from vlm_jax.schedule import EpochCosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

PRETRAINED = config_module(Path(__file__).with_name("albef_4m.py"))
BATCH, EPOCHS, LENGTH = 256, 5, 40
PAIRS = 529_527  # statements of the training split
# The classifier and its copy begin at random; what pre-training had for its own losses isn't needed.
SKIP = ("(averaged/)?classifier/.*",)
IGNORE = ("(image|text)_projection/.*", "words/.*", "matching_head/.*", "temperature")
STATEMENTS = JsonListsConfig(text_key=("sentence",), label_key="label", class_names=ENTAILMENT, image_suffix=".jpg")
PARTS = tuple(
    Part(part, f"{part}/.*", no_decay=PRETRAINED.NO_DECAY) for part in ("image", "text", "fusion", "classifier")
)

# The same recipe on statements about drawn scenes, from nothing.
SMALL = PRETRAINED.SMOKE["objective"].model
SMOKE = {
    **PRETRAINED.SMOKE,
    "objective": PairClassifyConfig(
        model=PairClassifierConfig(image=SMALL.image, text=SMALL.text, fusion=SMALL.fusion), text_length=32
    ),
    "data.source": ShapesStatementsConfig(image_size=32, count=512),
    "evals": (AccuracyConfig("shapes", ShapesStatementsConfig(split="test", image_size=32, count=64)),),
}


def get_config(name: str = "") -> Config:
    epoch = PAIRS // BATCH
    remat = {f"{part}.remat": "auto" for part in ("image", "text", "fusion")}
    model = override(PairClassifierConfig(), {**remat, "image.image_size": 384})
    config = override(
        PRETRAINED.get_config(),
        {
            "name": "albef_snli_ve",
            "objective": PairClassifyConfig(model=model, text_length=LENGTH),
            "data.source": STATEMENTS,
            "data.tokenizer.length": LENGTH,
            "data.batch_size": BATCH,
            "data.augment.scale": (0.5, 1.0),
            "optimizer.learning_rate": 2e-5,
            "optimizer.schedule": EpochCosine(warmup_steps=100, epoch_steps=epoch, final=0.05, warmup_start=0.5),
            "parts": PARTS,
            "init_from": InitFrom(skip=SKIP, ignore=IGNORE, extra=True),
            "train.steps": EPOCHS * epoch,
            "train.eval_every": epoch,
            "checkpoint.keep_every": epoch,
            "evals": (AccuracyConfig("test", STATEMENTS),),
        },
    )
    return variant(config, name, {"smoke": SMOKE})
