"""Published vision-language recipes: sizes of the whole models and the numbers of their training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.config import load_config
from vlm_jax.data.images import PreprocessConfig

CONFIGS = Path(__file__).parents[2] / "configs"
# Parameters (LLaVA: with CLIP's last block and norm), tokens of a tile, batch, steps, peak rate: the released models
# and scripts/v1_5 of LLaVA, nanoVLM's models/config.py, big_vision's transfers/vqav2.py.
PUBLISHED = {
    "llava15_7b_stage1": (7_062_902_784, 576, 256, 2180, 1e-3),
    "llava15_7b_stage2": (7_062_902_784, 576, 128, 5197, 2e-5),
    "llava15_13b_stage2": (13_350_839_296, 576, 128, 5197, 2e-5),
    "nanovlm_222m": (222_119_616, 49, 256, 33_203, 1e-4),
    "nanovlm_460m": (460_113_984, 64, 128, 40_000, 5e-5),
    "paligemma_3b_224": (2_923_466_480, 256, 256, 25_307, 1e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_numbers(name: str) -> None:
    config = load_config(f"{CONFIGS}/{name}.py")
    objective = config.objective.build(PreprocessConfig(), jnp.float32)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    tokens = config.objective.model.tile_tokens  # pyright: ignore[reportAttributeAccessIssue]
    found = (count, tokens, config.data.batch_size, config.train.steps, config.optimizer.learning_rate)
    assert found == PUBLISHED[name]


def test_which_parts_learn() -> None:
    frozen = {}
    for name in ("llava15_7b_stage1", "llava15_7b_stage2", "llava15_7b_lora", "nanovlm_460m", "paligemma_3b_224"):
        config = load_config(f"{CONFIGS}/{name}.py")
        frozen[name] = {part.name for part in config.parts if part.frozen}
        if name == "nanovlm_460m":
            rates = {part.name: part.lr * config.optimizer.learning_rate for part in config.parts}
            assert rates == pytest.approx({"image": 5e-5, "projector": 5.12e-3, "decoder": 5e-5})
    assert frozen == {
        "llava15_7b_stage1": {"image", "decoder"},
        "llava15_7b_stage2": {"image"},
        "llava15_7b_lora": {"image", "decoder"},
        "nanovlm_460m": set(),
        "paligemma_3b_224": set(),
    }
