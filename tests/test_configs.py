"""Every shipped config: it resolves, has the published numbers, lowers at full size, and its smoke form trains."""

from pathlib import Path

import jax
import pytest

from vlm_jax import schema
from vlm_jax.assemble import build_program
from vlm_jax.config import from_json, load_config, to_json
from vlm_jax.mesh import batch_sharding
from vlm_jax.train import train

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.py"))
PAPER = {  # image width, depth, patch, size; embed; learning rate; steps: Radford et al. 2021, tables 18 to 20
    "clip_b32": (768, 12, 32, 224, 512, 5e-4, 390_625),
    "clip_b16": (768, 12, 16, 224, 512, 5e-4, 390_625),
    "clip_l14": (1024, 24, 14, 224, 768, 4e-4, 390_625),
    "clip_l14_336": (1024, 24, 14, 336, 768, 2e-5, 12_207),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_resolves_and_survives_being_saved(path: Path) -> None:
    for variant in ("", ":smoke"):
        config = load_config(f"{path}{variant}")
        assert from_json(to_json(config)) == config
        assert dict(schema.leaves(config))["config.name"] == path.stem + variant.replace(":", "_")


@pytest.mark.parametrize("name", PAPER)
def test_the_published_numbers(name: str) -> None:
    config = load_config(f"{Path(__file__).parent.parent}/configs/{name}.py")
    model, optimizer = config.objective.model, config.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    image = model.image
    sizes = (image.width, image.depth, image.patch_size, image.image_size, model.embed_dim)
    assert (*sizes, optimizer.learning_rate, config.train.steps) == PAPER[name]
    assert (optimizer.weight_decay, optimizer.b1, optimizer.b2, optimizer.eps) == (0.2, 0.9, 0.98, 1e-6)
    assert (config.data.batch_size, config.data.tokenizer.length) == (32_768, 77)
    assert config.objective.max_scale == 100.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", PAPER)
def test_the_step_lowers_at_full_size(name: str) -> None:
    """The whole step at batch 32768 from shapes alone: tracing, shardings and the loss's collectives."""
    program = build_program(load_config(f"{Path(__file__).parent.parent}/configs/{name}.py"))
    sharding = batch_sharding(program.mesh)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for key, x in program.config.objective.batch_shapes(program.config.data.batch_size).items()
    }
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.setup.abstract, batch)  # pyright: ignore[reportFunctionMemberAccess]
    assert "all_gather" in lowered.as_text()
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(
        lambda x: x.shape, program.setup.abstract.params
    )
    assert metrics["loss"][0].shape == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_smoke_form_trains(path: Path, tmp_path: Path) -> None:
    assert train(load_config(f"{path}:smoke"), str(tmp_path)) == 0
    assert (tmp_path / "eval.json").exists()
    assert list((tmp_path / "pictures").glob("*.png"))
