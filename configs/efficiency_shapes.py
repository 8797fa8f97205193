"""The methods of efficiency_digits.py on drawn scenes of one object: 48 classes, a colour and a shape each.

The captions also tell size and place, which the classes don't ask for.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("efficiency_digits.py"))
SMOKE = {key: value for key, value in RECIPE.SMOKE.items() if not key.startswith("evals.")}


def get_config(name: str = "") -> Config:
    scenes = ShapesConfig(image_size=48, count=8000, max_objects=1)
    test = dataclasses.replace(scenes, split="test", count=240)
    image = ViTConfig(
        image_size=48, patch_size=8, width=64, depth=3, heads=4, mlp_dim=256, pool="mean", class_token=False
    )
    by_name = RECIPE.methods(image, RECIPE.LENGTH)
    templates = ("a small {} in the centre", "a large {} in the centre")
    zero_shot = ZeroShotConfig("shapes", test, templates=templates, empty_classes="skip")
    changes = {
        "objective": by_name["contrastive"],
        "data": DataConfig(
            source=scenes,
            batch_size=128,
            preprocess=RECIPE.get_config().data.preprocess,
            augment=None,  # a crop would move the object to another place than the caption tells
            tokenizer=RECIPE.get_config().data.tokenizer,
        ),
        "evals": (zero_shot, RetrievalConfig("shapes", test)),
    }
    config = override(dataclasses.replace(RECIPE.get_config(), name="efficiency_shapes"), changes)
    joint = {key: {"objective": objective} for key, objective in by_name.items() if isinstance(objective, ClipConfig)}
    others = {key: {"objective": by_name[key], "evals": (zero_shot,)} for key in by_name if key not in joint}
    return variant(config, name, {**joint, **others, "smoke": SMOKE})
