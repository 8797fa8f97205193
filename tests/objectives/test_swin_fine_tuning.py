"""Fine-tuning of SimMIM's Swins: the published recipe, its layer-wise decay, and the start from a pre-trained tower."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.assemble import build_program
from vlm_jax.checkpoint import save_params
from vlm_jax.config import load_config, to_json
from vlm_jax.mesh import tree_path
from vlm_jax.models.masked_image_model import MaskedImageModelConfig
from vlm_jax.models.relative_position import resize_relative
from vlm_jax.models.swin import SwinConfig
from vlm_jax.objectives.simmim import SimMimConfig
from vlm_jax.schema import override
from vlm_jax.warm_start import warm_start

CONFIG = str(Path(__file__).parents[2] / "configs" / "finetune_simmim_swin_b.py")
# Layer-wise decay, drop path, window, channels of the first stage.
PUBLISHED = {"": (0.8, 0.1, 7, 128), "100ep": (0.9, 0.1, 7, 128), "swin_l": (0.7, 0.2, 14, 192)}


def by_path(tree: Any) -> dict[str, Any]:
    return {tree_path(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def published_layer(path: str, depths: tuple[int, ...]) -> list[int]:
    """The layer of each row of a parameter, counted as the published code does from its names, block by block."""
    if path.startswith(("image/patch_embed", "image/patch_norm")):
        return [0]
    if match := re.match(r"image/merge(\d)/", path):
        return [sum(depths[: int(match[1])])]
    if match := re.match(r"image/stage(\d)/blocks/(regular|shifted)/", path):
        stage = int(match[1]) - 1
        blocks = range(match[2] == "shifted", depths[stage], 2)
        return [sum(depths[:stage]) + block + 1 for block in blocks]
    return [sum(depths) + 1]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_published_recipe(variant: str) -> None:
    config: Any = load_config(CONFIG + (f":{variant}" if variant else ""))
    layer_decay, drop_path, window, width = PUBLISHED[variant]
    tower, optimizer, depths = config.objective.model.image, config.optimizer, (2, 2, 18, 2)
    assert (tower.drop_path, tower.window, tower.width, tower.depths) == (drop_path, window, width, depths)
    assert (tower.image_size, config.objective.model.norm, config.data.batch_size) == (224, False, 2048)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (pytest.approx(5e-3), 0.05, 5.0)
    steps = 100 * 1_281_167 // 2048
    assert (config.train.steps, optimizer.schedule.warmup_steps) == (steps, 20 * 1_281_167 // 2048)
    assert optimizer.schedule.final * optimizer.learning_rate == pytest.approx(1e-6)

    setup = build_program(config).setup
    for path, factor in by_path(setup.parts.learning_rate_factors(setup.abstract.params)).items():
        layers = published_layer(path, depths)
        np.testing.assert_allclose(np.ravel(factor), [layer_decay ** (25 - n) for n in layers], rtol=1e-5, err_msg=path)
    decay = by_path(setup.parts.decay_factors(setup.abstract.params))
    assert {path.rpartition("/")[2] for path, factor in decay.items() if factor} == {"kernel"}
    assert all(factor for path, factor in decay.items() if path.endswith("/kernel"))


def test_a_pre_trained_swin_starts_it_with_larger_windows(tmp_path: Path) -> None:
    """The tables are resized to the new windows, those of the last stage too, which is one window; the rest is kept."""
    tower = SwinConfig(image_size=24, patch_size=2, width=8, depths=(4, 2), heads=(2, 4), window=6, mask_token=True)
    old = tiny.program(objective=SimMimConfig(model=MaskedImageModelConfig(tower, cell=4)), evals=())
    params = tiny.host(old.setup.init().params)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    save_params(tmp_path / "source", params, config=to_json(old.config), tokenizer=None, preprocess={})
    recipe = load_config(f"{CONFIG}:smoke")
    larger = {"objective.model.image": dataclasses.replace(tower, image_size=28, window=7, mask_token=False)}
    new = build_program(override(recipe, larger), tiny.mesh(2, 2))
    init_from = dataclasses.replace(load_config(CONFIG).init_from, path=str(tmp_path / "source"))
    before = new.setup.init().params
    found = by_path(tiny.host(warm_start(before, init_from, to_json(new.config))))
    expected = by_path(params)
    tables = [path for path in found if path.endswith("position_bias/table")]
    assert len(tables) == 4
    for path, value in found.items():
        if path in tables:
            assert (expected[path].shape[1], value.shape[1]) == (121, 169)
            want = np.stack([resize_relative(table, (6, 6), (7, 7)) for table in expected[path]])
            np.testing.assert_allclose(value, want, atol=1e-6, err_msg=path)
        elif path.startswith("image/"):
            np.testing.assert_array_equal(value, expected[path], err_msg=path)
        else:
            np.testing.assert_array_equal(value, by_path(tiny.host(before))[path], err_msg=path)
