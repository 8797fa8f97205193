"""The small chain of vlm_shapes_stage1.py, stage 2: questions about drawn scenes, judged on held-out ones.

Colours, shapes, places and counts of the objects of scenes that were not trained on; the best guess without the image
is right in a fifth of the cases. Everything learns, the tower at a third of the rate, as in nanoVLM: LLaVA's frozen
tower would do for colours and places, and not for the shapes of objects of seven pixels.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

STAGE_1 = config_module(Path(__file__).with_name("vlm_shapes_stage1.py"))


def get_config(name: str = "") -> Config:
    chat = ChatConfig(template="paligemma", tiling=SquareTiling(fit="crop"), row_length=128)
    source = ShapesConfig(
        image_size=48, count=100_000, seed=2, conversations=("color", "shape", "count", "position"), max_rounds=4
    )
    config = STAGE_1.recipe("vlm_shapes_stage2", chat, source, batch=48, steps=900, rate=1.5e-3)
    config = override(
        config, {"parts.image.lr": 0.33, "init_from": InitFrom(path="runs/vlm_shapes_stage1", tokenizer=True)}
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=300))
    return variant(config, name, {"smoke": STAGE_1.SMOKE})
