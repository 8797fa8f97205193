"""ALBEF fine-tuned on RefCOCO+ without its boxes, judged by where it sees what a phrase names (Li et al. 2021, 6.4).

Needs a pre-trained ALBEF, the authors' lists (refcoco+_train.json and those of val and test, with the detector's
dets.json), RefCOCO+'s own refs(unc).p and instances.json, and BERT's vocabulary:
    python -m vlm_jax.interop import --from=ALBEF.pth --to=checkpoints/albef
    python -m vlm_jax.main --config=configs/albef_grounding.py --config.init_from.path=checkpoints/albef \\
        --config.data.path=refcoco+_train.json --config.data.source.image_root=IMAGES \\
        --config.data.tokenizer.path=bert-base-uncased/vocab.txt \\
        --config.evals.refcoco_plus.path=refcoco+_val.json,refcoco+_test.json \\
        --config.evals.refcoco_plus.source.image_root=IMAGES --config.evals.refcoco_plus.source.refs="refs(unc).p" \\
        --config.evals.refcoco_plus.source.instances=instances.json \\
        --config.evals.refcoco_plus.source.detections=dets.json
Training is that of retrieval (albef_retrieval_coco.py) on whole images, squashed, flipped and with RandAugment, in 5
epochs of batch 256. Test: Grad-CAM of matching on the third fusion layer ranks the detector's boxes.
`:shapes` is the same for the model of albef_shapes.py: captions that name one object of a scene.
Published after pre-training on 14M images: 58.46 % (val), 65.89 % (testA), 46.25 % (testB).
"""

import dataclasses
from pathlib import Path
from typing import Any

from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig, config_module, variant
from vlm_jax.data.sources import JsonListsConfig, ReferringConfig, ShapesConfig
from vlm_jax.evals.grounding import GroundingConfig
from vlm_jax.optim import AdamW
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

RETRIEVAL = config_module(Path(__file__).with_name("albef_retrieval_coco.py"))
SHAPES = config_module(Path(__file__).with_name("albef_shapes.py"))
PAIRS = 120_191  # expressions of RefCOCO+'s training images

SMOKE = {
    **RETRIEVAL.SMOKE,
    "evals": (
        GroundingConfig(
            "shapes", ShapesConfig(split="test", image_size=32, count=32, max_objects=2, named_objects=True), layer=1
        ),
    ),
}


def shapes() -> dict[str, Any]:
    """What the small model has of its own; it starts from a run of its pre-training."""
    pretrained, steps = SHAPES.get_config(), 300
    phrases = dataclasses.replace(SHAPES.SCENES, variants=1, captions="object", seed=3)
    return {
        "objective": override(pretrained.objective, RETRIEVAL.LOSSES | {"distillation_steps": 0}),
        "data": dataclasses.replace(pretrained.data, source=phrases, shuffle_block=1),
        "optimizer": AdamW(learning_rate=3e-4, weight_decay=0.02, schedule=Cosine(warmup_steps=steps // 20)),
        "init_from": InitFrom(path="runs/albef_shapes", extra=True, tokenizer=True),
        "train": TrainConfig(steps=steps, log_every=50),
        "checkpoint": CheckpointConfig(every=200, keep=1),
        "evals": (GroundingConfig("objects", SHAPES.NAMED, layer=2),),
    }


def get_config(name: str = "") -> Config:
    config = override(
        RETRIEVAL.get_config("", "albef_grounding", pairs=PAIRS),
        {
            "data.source": JsonListsConfig(text_key=("text",)),
            "data.augment.scale": (1.0, 1.0),
            "data.augment.ratio": (0.01, 100.0),  # with all of the area: no crop, whatever the image's shape
            "evals": (GroundingConfig("refcoco_plus", ReferringConfig(), layer=3),),
        },
    )
    return variant(config, name, {"smoke": SMOKE, "shapes": shapes()})
