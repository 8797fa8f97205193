"""nanoVLM with SigLIP-B/16 at 224 pixels and SmolLM2-135M: its first release (huggingface/nanoVLM, README).

Needs what nanovlm_460m.py needs, with imports of the smaller models. As published: each image is one tile of 49
tokens in a row of 128, the projector learns at 2e-3, tower and language model at 1e-4, batch 256, five epochs of 1.7 M
samples of the Cauldron; MMStar 35.3 %, six hours on an H100. The conversations are written in the template of the later
release.
"""

import dataclasses
from pathlib import Path

from vlm_jax.config import Config, config_module, variant
from vlm_jax.data.chat_config import NANOVLM
from vlm_jax.data.tiles import SquareTiling
from vlm_jax.schema import override

RECIPE = config_module(Path(__file__).with_name("nanovlm_460m.py"))
SAMPLES, EPOCHS, BATCH = 1_700_000, 5, 256
SQUARE = SquareTiling(fit="squash")
SMOKE = {key: value for key, value in RECIPE.SMOKE.items() if not key.startswith("data.chat.tiling")} | {
    "objective.length": 96,
    "objective.tiles": 2,
    "data.chat.row_length": 96,
    "data.chat.max_tiles": 2,
}


def get_config(name: str = "") -> Config:
    chat = dataclasses.replace(NANOVLM, tiling=SQUARE, row_length=128, max_tiles=1, packing="none")
    model = RECIPE.parts_of("SigLIP-B/16", 2, "SmolLM2-135M")
    steps = EPOCHS * SAMPLES // BATCH
    config = RECIPE.recipe("nanovlm_222m", model, chat, batch=BATCH, steps=steps, backbones=1e-4, projector=2e-3)
    sources = RECIPE.sources("checkpoints/smollm2_135m", "checkpoints/siglip_b16")
    return variant(override(config, {"init_from": sources}), name, {"smoke": SMOKE})
