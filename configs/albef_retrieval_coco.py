"""ALBEF fine-tuned for retrieval on COCO, judged in two stages (Li et al. 2021, section 4, published code).

Needs a pre-trained ALBEF, from configs/albef_4m.py or an import of the authors' file, the lists of Karpathy's split as
the authors publish them (their training images, one caption an object), and BERT's vocabulary:
    python -m vlm_jax.interop import --from=ALBEF.pth --to=checkpoints/albef
    python -m vlm_jax.main --config=configs/albef_retrieval_coco.py --config.init_from.path=checkpoints/albef \\
        --config.data.path=coco_train.json --config.data.source.image_root=IMAGES \\
        --config.data.tokenizer.path=bert-base-uncased/vocab.txt \\
        --config.evals.coco.path=coco_test.json --config.evals.coco.source.image_root=IMAGES
Published: 5 epochs, batch 256, images of 384 pixels with positions interpolated, AdamW at 1e-5 with 0.02 of decay, a
cosine once an epoch to 1e-6 without warm-up, contrast and matching alone; pairs of one image are no negatives of each
other. Copies and queues go on from those of pre-training (init_from.extra). 30 tokens a caption;
RandAugment and crops of at least half. Test: of the 256 nearest by contrast the order is that of matching.
Published: 73.1 % text and 56.8 % image retrieval at 1 after pre-training on 4M images, 77.6 % and 60.7 % after 14M.
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.sources import JsonListsConfig, ShapesConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.parts import Part
from vlm_jax.schedule import EpochCosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

PRETRAINED = config_module(Path(__file__).with_name("albef_4m.py"))
BATCH, LENGTH = 256, 30
LOSSES = {"mlm_weight": 0.0, "positives": "image"}

# The same recipe on drawn scenes, from nothing.
SMOKE = {
    **PRETRAINED.SMOKE,
    "objective": override(PRETRAINED.SMOKE["objective"], LOSSES),
    "evals": (
        RetrievalConfig("shapes", ShapesConfig(split="test", image_size=32, count=64), captions_per_image=1, rerank=16),
    ),
}


def get_config(
    name: str = "", recipe: str = "albef_retrieval_coco", pairs: int = 566_747, epochs: int = 5, rerank: int = 256
) -> Config:
    epoch, data, pretrained = pairs // BATCH, recipe.rpartition("_")[2], PRETRAINED.get_config()
    config = override(
        pretrained,
        {
            "name": recipe,
            **{f"objective.{key}": value for key, value in LOSSES.items()},
            "objective.model.image.image_size": 384,
            "objective.text_length": LENGTH,
            "objective.distillation_steps": epoch,
            "data.tokenizer.length": LENGTH,
            "data.batch_size": BATCH,
            "data.augment.scale": (0.5, 1.0),
            "optimizer.learning_rate": 1e-5,
            "optimizer.schedule": EpochCosine(warmup_steps=0, epoch_steps=epoch),
            # Hidden words are not asked for; decay alone would wear out what predicts them.
            "parts": (Part("words", "words/.*", frozen=True), *pretrained.parts),
            "parts.heads.pattern": "matching_head/.*",
            "init_from": InitFrom(extra=True),
            "train.steps": epochs * epoch,
            "train.eval_every": epoch,
            "checkpoint.every": min(epoch, 500),
            "checkpoint.keep_every": epoch,
            "evals": (RetrievalConfig(data, JsonListsConfig(), captions_per_image=5, rerank=rerank),),
        },
    )
    return variant(config, name, {"smoke": SMOKE})
