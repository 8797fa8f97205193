"""AIM v1 in both of its authors' spellings, there and back bit for bit, and the attentive head of its releases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_vectors import GoldenVectors
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.interop.__main__ import main
from vlm_jax.interop.aim import AimBackbone, L3mAim, read_attentive_head, write_attentive_head
from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import ConversionError, from_params
from vlm_jax.models.aim import AIM, AimModelConfig, aim_trunk
from vlm_jax.models.pixel_head import PixelHeadConfig
from vlm_jax.schema import override

BACKBONE = GoldenVectors("aim_v1_backbone")
TRUNK = override(aim_trunk(256, 2, 2, image_size=8), {"patch_size": 4})
MLPS = AimModelConfig(TRUNK, PixelHeadConfig(width=16, depth=2, heads=1, mlp_dim=24))
BLOCKS = AimModelConfig(TRUNK, PixelHeadConfig(form="transformer", width=128, depth=1, heads=1, mlp_dim=24))


def random_weights(model: AimModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A file of ml-l3m's, by its own names."""
    rng, form = np.random.default_rng(seed), L3mAim()
    params: dict[str, Any] = {}
    for path, shape in form.shapes(model).items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = rng.normal(size=shape).astype(np.float32)
    return from_params(params, form.rows(model), form.title) | form.constants(model)


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.parametrize("model", [MLPS, BLOCKS], ids=["mlp", "transformer"])
def test_pretraining_files_go_there_and_back(model: AimModelConfig, tmp_path: Path) -> None:
    weights = random_weights(model)
    save_file(weights, tmp_path / "model.safetensors")
    assert main(["import", f"--from={tmp_path / 'model.safetensors'}", f"--to={tmp_path / 'ours'}"]) == 0
    loaded = vlm_jax.load(tmp_path / "ours")
    assert loaded.config.objective.model == model  # pyright: ignore[reportAttributeAccessIssue]
    assert main(["export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}", "--family=ml_l3m"]) == 0
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights)


def test_a_trunk_leaves_pretraining_as_a_released_backbone(tmp_path: Path) -> None:
    weights = random_weights(MLPS)
    save_file(weights, tmp_path / "model.safetensors")
    assert main(["import", f"--from={tmp_path / 'model.safetensors'}", f"--to={tmp_path / 'ours'}"]) == 0
    assert main(["export", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'released'}", "--family=official"]) == 0
    released = load_file(tmp_path / "released" / "model.safetensors")
    apart = [weights[f"trunk.blocks.1.attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(released["trunk.blocks.1.attn.qkv.weight"], np.concatenate(apart))
    assert not any(name.startswith("head.") for name in released)
    assert main(["import", f"--from={tmp_path / 'released'}", f"--to={tmp_path / 'tower'}"]) == 0
    tower = vlm_jax.load(tmp_path / "tower")
    assert tower.config.objective.kind() == "encoder"
    assert tower.config.objective.image_tower.norm_eps == 1e-6  # pyright: ignore[reportAttributeAccessIssue]
    assert main(["export", f"--from={tmp_path / 'tower'}", f"--to={tmp_path / 'again'}", "--family=official"]) == 0
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), released)


def test_the_names_are_the_released_ones() -> None:
    """Those of the golden vectors, which the authors' code wrote."""
    trunk = {name for name in BACKBONE.weights if not name.startswith("head.")}
    rows = AimBackbone().rows(TRUNK)
    assert {row.theirs.partition("#")[0].format(layer=i) for row in rows for i in range(3)} == trunk
    form, _ = recognise({name: BACKBONE.weights[name] for name in trunk})
    assert isinstance(form, AimBackbone)
    form, _ = recognise(GoldenVectors("aim_v1_pretrain").weights)
    assert isinstance(form, L3mAim)


def test_released_sizes_are_read_from_shapes() -> None:
    for name, model in AIM.items():
        image = model.image
        shapes = {
            "trunk.blocks.0.norm_1.weight": (image.width,),
            "trunk.blocks.0.mlp.fc1.weight": (image.mlp_dim, image.width),
            "preprocessor.patchifier.proj.weight": (image.width, 3, 14, 14),
        }
        shapes |= {f"trunk.blocks.{layer}.norm_1.weight": (image.width,) for layer in range(image.depth)}
        weights = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
        assert AimBackbone().read_config(weights, None, None) == override(image, {"norm_eps": 1e-6}), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.identity_residual": False}, r"head\.identity_residual = False"),
        ({"head.form": "none"}, r"head\.form = 'none'"),
        ({"image.heads": 4}, r"image\.heads = 4 \(only \(2,\)\)"),
        ({"image.mask_token": True}, r"image\.mask_token = True"),
    ],
)
def test_what_the_files_can_not_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        L3mAim().write_config(override(MLPS, changes))


def test_other_positions_are_refused(tmp_path: Path) -> None:
    weights = random_weights(MLPS)
    weights["head.decoder_pos_embed"] += 0.1
    save_file(weights, tmp_path / "model.safetensors")
    assert main(["import", f"--from={tmp_path / 'model.safetensors'}", f"--to={tmp_path / 'ours'}"]) != 0


def test_the_attentive_head_gives_the_authors_logits_and_goes_back() -> None:
    weights = {name: value for name, value in BACKBONE.weights.items() if name.startswith("head.")}
    head = read_attentive_head(weights)
    tokens = BACKBONE.outputs["bidir.average_layers_0_2"]
    normed = (tokens - head["mean"]) / np.sqrt(head["variance"] + 1e-6)
    query = head["query"].reshape(4, 8)
    keys, values = ((normed @ head[name]).reshape(*normed.shape[:2], 4, 8) for name in ("key", "value"))
    scores = np.exp(np.einsum("hk,bnhk->bnh", query, keys) / np.sqrt(8))
    pooled = np.einsum("bnh,bnhk->bhk", scores / scores.sum(axis=1, keepdims=True), values).reshape(-1, 32)
    np.testing.assert_allclose(pooled @ head["classifier"], BACKBONE.outputs["probe_logits_eval"], atol=2e-5)
    assert_equal(write_attentive_head(head, int(weights["head.bn.num_batches_tracked"])), weights)
    with pytest.raises(ConversionError, match=r"missing names: head\.k\.weight"):
        read_attentive_head({name: value for name, value in weights.items() if name != "head.k.weight"})
