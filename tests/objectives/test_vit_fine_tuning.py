"""Fine-tuning of BEiT's and SimMIM's ViTs: the published numbers, and the start from a pre-trained tower.

A table of relative positions that all blocks share in pre-training becomes one for each block; nothing else changes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.assemble import build_program
from vlm_jax.checkpoint import save_params
from vlm_jax.config import load_config, to_json
from vlm_jax.mesh import tree_path
from vlm_jax.schema import override
from vlm_jax.warm_start import warm_start

CONFIGS = Path(__file__).parents[2] / "configs"
# Batch, peak of the learning rate, epochs, of them warm-up; layer-wise decay, drop path, clipping.
PUBLISHED = {
    "finetune_beit_b16": (1024, 4e-3, 100, 20, 0.65, 0.1, None),
    "finetune_beit_b16:l16": (1024, 1e-3, 50, 5, 0.75, 0.2, None),
    "finetune_simmim_vit_b16": (2048, 5e-3, 100, 20, 0.65, 0.1, 5.0),
}
PRETRAINING = {"finetune_beit_b16": "beit_b16", "finetune_simmim_vit_b16": "simmim_vit_b16"}
TABLE = "image/blocks/relative_position/table"


def load(name: str) -> Any:
    file, _, variant = name.partition(":")
    return load_config(f"{CONFIGS / file}.py" + (f":{variant}" if variant else ""))


def by_path(tree: Any) -> dict[str, Any]:
    return {tree_path(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipe(name: str) -> None:
    config = load(name)
    batch, peak, epochs, warmup, layer_decay, drop_path, clip_norm = PUBLISHED[name]
    model, optimizer = config.objective.model, config.optimizer
    assert (config.data.batch_size, optimizer.learning_rate, optimizer.clip_norm) == (
        batch,
        pytest.approx(peak),
        clip_norm,
    )
    steps, rise = epochs * 1_281_167 // batch, warmup * 1_281_167 // batch
    assert (config.train.steps, optimizer.schedule.warmup_steps) == (steps, rise)
    assert optimizer.schedule.final * optimizer.learning_rate == pytest.approx(1e-6)
    assert (model.image.pool, model.image.drop_path, model.norm, model.head_init) == ("mean", drop_path, True, 2e-5)

    setup = build_program(config).setup
    live = setup.abstract.params
    rates, depth = by_path(setup.parts.learning_rate_factors(live)), model.image.depth
    by_block = [layer_decay ** (depth - block) for block in range(depth)]
    for path in (TABLE, "image/blocks/mlp/fc1/kernel"):
        np.testing.assert_allclose(np.ravel(rates[path]), by_block, rtol=1e-5, err_msg=path)
    assert rates["image/patch_embed/kernel"] == pytest.approx(layer_decay ** (depth + 1))
    decay = by_path(setup.parts.decay_factors(live))
    assert {path.rpartition("/")[2] for path, factor in decay.items() if factor} == {"kernel", "table"}


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_block_starts_from_the_shared_table(name: str, tmp_path: Path) -> None:
    """The blocks then give the very numbers that they gave before."""
    old = load(f"{PRETRAINING[name]}:smoke")
    objective = old.objective.build(old.data.preprocess, jnp.float32)
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(objective.init, jax.random.key(0))[0])
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    save_params(tmp_path / "source", params, config=to_json(old), tokenizer=None, preprocess={})

    recipe, tower = load(name), old.objective.model.image
    sizes = {key: getattr(tower, key) for key in ("image_size", "patch_size", "width", "depth", "heads", "mlp_dim")}
    new = override(load(f"{name}:smoke"), {f"objective.model.image.{key}": value for key, value in sizes.items()})
    tuned = new.objective.build(new.data.preprocess, jnp.float32)
    started = jax.tree.map(
        lambda x: jnp.full(x.shape, 7, x.dtype), nn.meta.unbox(jax.eval_shape(tuned.init, jax.random.key(0))[0])
    )
    init_from = dataclasses.replace(recipe.init_from, path=str(tmp_path / "source"))
    found = warm_start(started, init_from, to_json(new))
    shared = params["image"]["relative_position"]["table"]
    np.testing.assert_array_equal(by_path(found)[TABLE], np.stack([shared] * tower.depth))
    assert all((value == 7).all() for path, value in by_path(found).items() if path.startswith("head/"))
    images = jnp.asarray(rng.normal(size=(2, *tower.image_shape, 3)), jnp.float32)
    before, after = (
        one.encode(weights, images, intermediates=True)["blocks"]
        for one, weights in ((objective, params), (tuned, found))
    )
    np.testing.assert_allclose(after, before, atol=2e-5)
    assert np.abs(np.asarray(before)).max() > 1
