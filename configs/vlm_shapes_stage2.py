"""The small chain of vlm_shapes_stage1.py, stage 2: conversations about drawn scenes, judged on held-out questions.

Captions, colours, shapes, places and counts of objects, two scenes compared, scenes told in words, and sums, three or
four to a packed row; the best guess without the image is right in a fifth of the cases. Projector and decoder learn,
the tower is frozen, as in LLaVA-1.5.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.sources.shapes_chat import KINDS, QUESTIONS, Kind
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.schema import override
from vlm_jax.warm_start import InitFrom

STAGE_1 = config_module(Path(__file__).with_name("vlm_shapes_stage1.py"))
# What is slow to learn, twice as often: which of the objects is meant.
LEARNED: tuple[Kind, ...] = (*KINDS, "shape", "position", "compare")


def get_config(name: str = "") -> Config:
    chat = ChatConfig(
        template="paligemma", tiling=SquareTiling(fit="crop"), row_length=224, max_tiles=7, packing="tight"
    )
    source = ShapesConfig(image_size=48, count=100_000, seed=2, conversations=LEARNED, max_rounds=8)
    config = STAGE_1.recipe("vlm_shapes_stage2", chat, source, QUESTIONS, batch=12, steps=3600, rate=2e-3)
    # A projector as fast as the decoder forgets what this can't use yet, first of all the places of the objects.
    slow = {"parts.projector.lr": 0.1}
    config = override(config, {**slow, "init_from": InitFrom(path="runs/vlm_shapes_stage1", tokenizer=True)})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=800))
    return variant(config, name, {"smoke": STAGE_1.SMOKE})
