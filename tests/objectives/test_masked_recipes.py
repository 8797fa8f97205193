"""The recipes of MAE and SimMIM: published numbers, what decays, and a step that lowers at full size; runs of them."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import vlm_jax
from vlm_jax.assemble import build_program
from vlm_jax.checkpoint import save_params
from vlm_jax.config import load_config, to_json
from vlm_jax.mesh import batch_sharding, tree_path
from vlm_jax.models.masked_autoencoder import MaskedAutoencoderConfig, PixelDecoderConfig, mae_encoder
from vlm_jax.objectives.mae import MaeConfig
from vlm_jax.schema import to_dict
from vlm_jax.train import train

CONFIGS = Path(__file__).parents[2] / "configs"
# Batch, peak of the learning rate, warm-up and length in epochs, betas; what decays among what could go either way.
RECIPES = {
    "mae_b16": (4096, 2.4e-3, 40, 800, (0.9, 0.95), {"image/class_token", "decoder/mask_token"}),
    "mae_h14": (4096, 2.4e-3, 40, 800, (0.9, 0.95), {"image/class_token", "decoder/mask_token"}),
    "simmim_swin_b": (2048, 4e-4, 10, 800, (0.9, 0.999), set()),
    "simmim_swin_b:100ep": (2048, 8e-4, 10, 100, (0.9, 0.999), set()),
    "simmim_vit_b16": (2048, 4e-4, 10, 800, (0.9, 0.999), {"image/mask_token"}),
}
# Parameters of everything that is trained: of transformers' ViTMAEForPreTraining (without its fixed positions) and
# SwinForMaskedImageModeling, built on the meta device in these sizes.
PARAMETERS = {"mae_b16": 111_655_680, "mae_h14": 656_613_964, "simmim_swin_b": 89_874_104}


def reference(name: str, variant: str) -> str:
    return str(CONFIGS / f"{name}.py") + (f":{variant}" if variant else "")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_published_numbers_and_what_decays(recipe: str) -> None:
    batch, peak, warmup, epochs, betas, also_decays = RECIPES[recipe]
    config: Any = load_config(reference(*recipe.partition(":")[::2]))
    optimizer, steps = config.optimizer, epochs * 1_281_167 // batch
    assert (config.data.batch_size, optimizer.learning_rate) == (batch, pytest.approx(peak))
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, config.train.steps) == (*betas, 0.05, steps)
    factors = jax.vmap(lambda step: optimizer.schedule.factor(step, steps))
    rise = warmup * 1_281_167 // batch
    half, top, end = np.asarray(factors(np.asarray([rise // 2 - 1, rise, steps - 1])))
    assert half == pytest.approx(0.5, rel=0.01)
    assert top == pytest.approx(1.0, rel=1e-3)
    last = {"mae": 0.0, "simmim": 0.05 if "100ep" in recipe else 0.1}[recipe.partition("_")[0]]
    assert end == pytest.approx(last, abs=1e-6)

    program = build_program(config)
    live = program.setup.abstract.params
    decay = {tree_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(program.setup.parts.decay_factors(live))}
    names = {path for path, factor in decay.items() if factor}
    assert {path for path in names if not path.endswith(("kernel", "table"))} == also_decays
    assert all(factor for path, factor in decay.items() if path.endswith(("kernel", "table")))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(live))
    assert count == PARAMETERS.get(recipe, count)


@pytest.mark.parametrize("name", ["mae_l16", "simmim_swin_l", "simmim_vit_b16"])
def test_the_step_lowers_at_full_size(name: str) -> None:
    program = build_program(load_config(reference(name, "")))
    sharding = batch_sharding(program.mesh)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for key, x in program.config.objective.batch_shapes(program.config.data.batch_size).items()
    }
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.setup.abstract, batch)  # pyright: ignore[reportFunctionMemberAccess]
    state, metrics = lowered.out_info
    shapes, expected = (jax.tree.map(lambda x: x.shape, s.params) for s in (state, program.setup.abstract))
    assert shapes == expected
    assert metrics["loss"][0].shape == ()


def test_an_imported_model_trains_on_and_the_run_gives_features(tmp_path: Path) -> None:
    objective = MaeConfig(
        model=MaskedAutoencoderConfig(
            mae_encoder(16, 2, 2, 2, image_size=8), PixelDecoderConfig(width=16, depth=1, heads=2, mlp_dim=24)
        )
    )
    settings = {"objective": objective, "evals": (), "train__steps": 2, "optimizer__learning_rate": 1e-4}
    config = tiny.config(**settings)
    start = tiny.host(tiny.program(**settings, seed=5).setup.init().params)
    imported = str(tmp_path / "imported")
    save_params(
        tmp_path / "imported", start, config=to_json(config), tokenizer=None, preprocess=to_dict(config.data.preprocess)
    )
    workdir = tmp_path / "run"
    assert train(tiny.config(**settings, init_from__path=imported), str(workdir)) == 0
    model = vlm_jax.load(workdir)
    assert model.step == 2
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tiny.host(model.params), start)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3  # two steps of Adam from the imported weights, not from others
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    features = model.encode_image(images)
    assert features.shape == (3, 16)
    outputs = model.apply(model.params, {"image": images})
    pooled = np.asarray(outputs["image/tokens"])[:, 0]
    np.testing.assert_allclose(features, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-5)
