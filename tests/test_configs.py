"""Every shipped config: it resolves, has the published numbers, lowers at full size, and its smoke form trains."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from vlm_jax import schema
from vlm_jax.assemble import build_program
from vlm_jax.config import Config, check_same_run, from_json, load_config, to_json
from vlm_jax.evals.generate import GenerateConfig
from vlm_jax.evals.grounding import GroundingConfig
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.mesh import batch_sharding
from vlm_jax.metrics import read_json
from vlm_jax.objectives.dual_encoder import DualEncoder
from vlm_jax.schema import ConfigError
from vlm_jax.train import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.py"))
# One config of each method and kind of tower; FLIP has two phases.
LOWERED = ("clip_l14", "clip_rn50", "siglip_b16", "lit_b16", "flip_l16", "coca_l14", "aim_600m", "aimv2_l14", "lm_1b7")
PAPER = {  # image width, depth, patch, size; embed; learning rate; steps: Radford et al. 2021, tables 18 to 20
    "clip_b32": (768, 12, 32, 224, 512, 5e-4, 390_625),
    "clip_b16": (768, 12, 16, 224, 512, 5e-4, 390_625),
    "clip_l14": (1024, 24, 14, 224, 768, 4e-4, 390_625),
    "clip_l14_336": (1024, 24, 14, 336, 768, 2e-5, 12_207),
}


def test_auto_remat_is_what_the_recipe_plans_for_the_chip() -> None:
    config = load_config("configs/clip_l14.py")
    assert config.objective.model.image.remat == "auto"  # pyright: ignore[reportAttributeAccessIssue]
    for chip, policy in (("v5e", "save_qkv_mid"), ("v6e", "dots"), ("gpu", "full"), ("cpu", "none")):
        model = config.on_chip(chip).objective.model  # pyright: ignore[reportAttributeAccessIssue]
        assert (model.image.remat, model.text.remat) == (policy, policy)
    chosen = load_config("configs/clip_l14.py", {"objective.model.image.remat": "full"}).on_chip("v5e")
    model = chosen.objective.model  # pyright: ignore[reportAttributeAccessIssue]
    assert (model.image.remat, model.text.remat) == ("full", "save_qkv_mid")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_resolves_and_survives_being_saved(path: Path) -> None:
    for variant in ("", ":smoke"):
        config = load_config(f"{path}{variant}")
        assert from_json(to_json(config)) == config
        assert dict(schema.leaves(config))["config.name"] == path.stem + variant.replace(":", "_")


def test_a_key_that_came_after_a_run_was_begun_counts_as_its_default() -> None:
    def saved_without(config: Config) -> dict[str, Any]:
        """As a version wrote it that knew neither `dropout` of towers nor `train.max_nonfinite`."""
        saved = to_json(config)
        del saved["objective"]["model"]["image"]["dropout"], saved["train"]["max_nonfinite"]
        return saved

    config = load_config("configs/clip_digits.py")
    check_same_run(saved_without(config), config, "runs/old")
    changed = load_config("configs/clip_digits.py", {"objective.model.image.dropout": "0.1"})
    with pytest.raises(ConfigError, match=r"(?s)runs/old .*config.objective.model.image.dropout: 0.0 -> 0.1$"):
        check_same_run(saved_without(config), changed, "runs/old")


@pytest.mark.parametrize("name", PAPER)
def test_the_published_numbers(name: str) -> None:
    config = load_config(f"{ROOT}/configs/{name}.py")
    model, optimizer = config.objective.model, config.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    image = model.image
    sizes = (image.width, image.depth, image.patch_size, image.image_size, model.embed_dim)
    assert (*sizes, optimizer.learning_rate, config.train.steps) == PAPER[name]
    assert (optimizer.weight_decay, optimizer.b1, optimizer.b2, optimizer.eps) == (0.2, 0.9, 0.98, 1e-6)
    assert (config.data.batch_size, config.data.tokenizer.length) == (32_768, 77)
    assert config.objective.max_scale == 100.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", LOWERED)
def test_the_step_lowers_at_full_size(name: str) -> None:
    """The whole step at the published batch from shapes alone: tracing, shardings and the loss's collectives."""
    program = build_program(load_config(f"{ROOT}/configs/{name}.py"))
    sharding = batch_sharding(program.mesh)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for key, x in program.config.objective.batch_shapes(program.config.data.batch_size).items()
    }
    for _, step in program.steps:
        with jax.set_mesh(program.mesh):
            lowered = step.lower(program.setup.abstract, batch)  # pyright: ignore[reportFunctionMemberAccess]
        assert ("all_gather" in lowered.as_text()) == isinstance(program.objective, DualEncoder)
        state, metrics = lowered.out_info
        shapes, expected = (jax.tree.map(lambda x: x.shape, s.params) for s in (state, program.setup.abstract))
        assert shapes == expected
        assert metrics["loss"][0].shape == ()


def smoke_forms() -> list[Path]:
    """Configs whose smoke forms differ in more than their names: two that are one run are trained once."""
    distinct = {}
    for path in CONFIGS:
        key = json.dumps(to_json(load_config(f"{path}:smoke")) | {"name": ""}, sort_keys=True)
        distinct.setdefault(key, path)
    return list(distinct.values())


# Other sizes or data of methods whose smoke forms train beside these: with the long loops.
SIBLINGS = {
    "albef_14m", "albef_retrieval_flickr", "clip_b16", "clip_l14_336", "datacomp_xl_l14", "efficiency_rn50",
    "efficiency_shapes", "finetune_simmim_vit_b16", "lm_135m", "nanovlm_222m", "siglip_b16",
}  # fmt: skip


def smoke_parameters() -> list[Any]:
    """The paths, those of siblings marked."""
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SIBLINGS)) for path in smoke_forms()
    ]


@pytest.mark.parametrize("path", smoke_parameters())
def test_its_smoke_form_trains(path: Path, tmp_path: Path) -> None:
    config = load_config(f"{path}:smoke")
    assert train(config, str(tmp_path)) == 0
    assert read_json(tmp_path / "eval.json")["step"] == config.train.steps
    pictured = any(isinstance(entry, RetrievalConfig | GenerateConfig | GroundingConfig) for entry in config.evals)
    assert bool(list((tmp_path / "pictures").glob("*.png"))) == pictured
