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
Published after pre-training on 14M images: 58.46 % (val), 65.89 % (testA), 46.25 % (testB).
"""

from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.sources import JsonListsConfig, ReferringConfig, ShapesConfig
from vlm_jax.evals.grounding import GroundingConfig
from vlm_jax.schema import override

RETRIEVAL = config_module(Path(__file__).with_name("albef_retrieval_coco.py"))
PAIRS = 120_191  # expressions of RefCOCO+'s training images

SMOKE = {
    **RETRIEVAL.SMOKE,
    "evals": (
        GroundingConfig(
            "shapes", ShapesConfig(split="test", image_size=32, count=32, max_objects=2, named_objects=True), layer=1
        ),
    ),
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
    return variant(config, name, {"smoke": SMOKE})
