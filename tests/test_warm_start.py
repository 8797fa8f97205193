"""Warm starts: renamed, resized, partial, onto a mesh; and the list of all that doesn't fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.assemble import build_run_tokenizer
from vlm_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, save_params
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.schema import ConfigError
from vlm_jax.warm_start import InitFrom, InitPart, warm_start


def config_of(image_size, length: int = 6):
    model = {"image": {"image_size": image_size, "patch_size": 4}, "text": {"length": length, "vocab_size": 9}}
    return {"objective": {"kind": "clip", "model": model}, "data": {"length": 3}}


def rows_table(rows: int, columns: int, width: int = 2) -> np.ndarray:
    """A class token of 100 and patches that hold the relative height of their centre: equal within a row."""
    heights = np.repeat((np.arange(rows) + 0.5) / rows, columns)
    return np.concatenate([np.full((1, width), 100.0), np.tile(heights[:, None], (1, width))]).astype(np.float32)


def source_params(rows: int = 4, columns: int = 9, length: int = 6):
    rng = np.random.default_rng(0)
    return {
        "image": {"kernel": rng.normal(size=(8, 2)).astype(np.float32), "pos_embed": rows_table(rows, columns)},
        "text": {"pos_embed": np.linspace(0, 1, length, dtype=np.float32)[:, None] * np.ones(2, np.float32)},
        "logit_scale": np.float32(3.5),
    }


@pytest.fixture
def source(tmp_path) -> str:
    save_params(tmp_path / "source", source_params(), config=config_of([16, 36]), tokenizer=None, preprocess={})
    return str(tmp_path / "source")


def blank(params, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.full(x.shape, -7, dtype), params)


def test_equal_models_take_every_value(source):
    new = warm_start(blank(source_params()), InitFrom(path=source), config_of([16, 36]))
    jax.tree.map(np.testing.assert_array_equal, new, source_params())


def test_no_path_changes_nothing():
    params = blank(source_params())
    assert warm_start(params, InitFrom(), {}) is params


def test_dtype_and_sharding_stay_ours(source):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params = blank(source_params(2, 9), jnp.bfloat16)
    params["image"]["kernel"] = jax.device_put(params["image"]["kernel"], NamedSharding(mesh, P("data")))
    params = {**params, "logit_scale": jax.device_put(params["logit_scale"], NamedSharding(mesh, P()))}
    for tower in ("image", "text"):
        table = params[tower]["pos_embed"]
        params[tower]["pos_embed"] = jax.device_put(table, NamedSharding(mesh, P()))
    new = warm_start(params, InitFrom(path=source), config_of([8, 36]))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        assert (a.dtype, a.sharding, a.shape) == (b.dtype, b.sharding, b.shape)
    np.testing.assert_array_equal(new["image"]["kernel"], source_params()["image"]["kernel"].astype(jnp.bfloat16))


def test_map_skip_and_ignore(source):
    ours = {"vision": {"kernel": np.zeros((8, 2), np.float32)}, "head": {"bias": np.zeros(3, np.float32)}}
    unused = ("text/.*", "logit_scale", ".*pos_embed")
    rules = InitFrom(path=source, map=((r"vision/(.*)", r"image/\1"),), skip=("head/.*",), ignore=unused)
    new = warm_start(blank(ours), rules, config_of(16))
    np.testing.assert_array_equal(new["vision"]["kernel"], source_params()["image"]["kernel"])
    np.testing.assert_array_equal(new["head"]["bias"], -7)


@pytest.mark.parametrize("grid", [(8, 9), (2, 9), (6, 6), (4, 3)])
def test_position_embeddings_are_resized_by_the_stored_grid(source, grid):
    """36 patches are 4 x 9 in the source: read as 6 x 6, heights would no longer be equal within a row."""
    rows, columns = grid
    params = blank(source_params(rows, columns, length=12))
    new = warm_start(params, InitFrom(path=source), config_of([rows * 4, columns * 4], length=12))
    table = np.asarray(new["image"]["pos_embed"])
    np.testing.assert_array_equal(table[0], 100.0)
    heights = table[1:].reshape(rows, columns, 2)
    np.testing.assert_allclose(heights, np.broadcast_to(heights[:, :1, :1], heights.shape), atol=1e-6)
    np.testing.assert_allclose(heights[:, 0, 0], (np.arange(rows) + 0.5) / rows, atol=0.05)
    text = np.asarray(new["text"]["pos_embed"])[:, 0]
    np.testing.assert_allclose(
        text[2:-2], np.interp((np.arange(12) - 0.5) / 2, np.arange(6), np.linspace(0, 1, 6))[2:-2]
    )


def test_every_misfit_is_listed(source):
    ours = {
        "image": {"kernel": np.zeros((8, 3)), "bias": np.zeros(3), "pos_embed": np.zeros((11, 3))},
        "vision": {"scale": np.zeros(3)},
        "text": {"pos_embed": np.zeros((9, 2))},
    }
    rules = InitFrom(path=source, map=(("vision/(.*)", r"img/\1"), ("y", "z")), skip=("head/.*",), ignore=("nothing",))
    with pytest.raises(ConfigError) as error:
        warm_start(blank(ours), rules, {"model": {}})
    lines = str(error.value).splitlines()
    assert "init_from.ignore" in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "image/bias: not in the source",
        "vision/scale: not in the source as img/scale",
        "logit_scale: in the source, but used by no parameter of this model",
        "init_from.map: 'y' matches nothing",
        "init_from.skip: 'head/.*' matches nothing",
        "init_from.ignore: 'nothing' matches nothing",
        "image/kernel: [8, 3] in this model, [8, 2] in the source",
        "image/pos_embed: [11, 3] in this model, [37, 2] in the source; only the number of positions can be resized",
        "text/pos_embed: [9, 2] in this model, [6, 2] in the source; the new config has no single tower with "
        "image_size and patch_size, or length, for it",
    }


def test_class_tokens_must_agree(source):
    params = blank(source_params(2, 9))
    params["image"]["pos_embed"] = params["image"]["pos_embed"][1:]
    with pytest.raises(ConfigError, match="different class tokens"):
        warm_start(params, InitFrom(path=source), config_of([8, 36]))


def test_a_runs_average_is_preferred_and_its_step_left(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointConfig(every=1))
    params = {"w": jnp.ones(3)}
    state = {"step": jnp.int32(5), "params": params, "opt_state": {"mu": params}, "ema": {"w": jnp.full(3, 2.0)}}
    checkpointer.save(5, state, data_position=160, config={}, tokenizer=None, preprocess={})
    checkpointer.close()
    path = str(tmp_path)
    for rules, value in ((InitFrom(path=path), 2.0), (InitFrom(path=path, weights="params"), 1.0)):
        new = warm_start({"w": jnp.zeros(3)}, rules, {})
        assert list(new) == ["w"]
        np.testing.assert_array_equal(new["w"], value)
    with pytest.raises(CheckpointError, match="doesn't exist"):
        warm_start(params, InitFrom(path=str(tmp_path / "missing")), {})


def test_rules_are_checked_before_anything_is_read():
    assert [key for key, _ in InitFrom(path="x", map=(("(", ""),), skip=("[",)).problems()] == ["map", "skip"]
    assert [key for key, _ in InitFrom(tokenizer=True).problems()] == ["tokenizer"]
    assert not list(InitFrom().problems())


def test_a_random_start_that_was_not_meant_is_told():
    part, other = InitPart("image", "image/.*"), InitPart("text", "text/.*", path="runs/bert")
    assert InitFrom().random_start == InitFrom(path="x", parts=(part,)).random_start == ""
    assert InitFrom(parts=(other,)).random_start == ""
    assert "image without a path" in InitFrom(parts=(part, other)).random_start
    for rules in (InitFrom(extra=True), InitFrom(skip=("a",)), InitFrom(parts=(part,))):
        assert rules.random_start.startswith("config.init_from names no path: all parameters start at random")


def test_the_tokenizer_comes_along_where_it_is_asked_for(tmp_path: Path) -> None:
    """A text tower or a decoder reads the ids that it was trained with."""
    tokenizer = build_tokenizer(SentencePieceConfig(length=16, vocab_size=300), ["quite other words"] * 9)
    for name, state in (("with", tokenizer.state()), ("without", None)):
        params = {"x": np.zeros(1, np.float32)}
        save_params(tmp_path / name, params, config={}, tokenizer=state, preprocess={})

    def found(source: str, wanted: bool) -> Any:
        config = tiny.config(init_from__path=str(tmp_path / source), init_from__tokenizer=wanted)
        return build_run_tokenizer(config, config.data.build_source(""), None)

    assert found("with", True).state() == tokenizer.state()
    assert found("with", False).state() != tokenizer.state()
    with pytest.raises(ConfigError, match=r"init_from.tokenizer = true, but .*without holds no tokenizer"):
        found("without", True)


def test_parameters_of_one_source_have_buffers_of_their_own(source: str) -> None:
    """The step gives each of them away, which it can do with a buffer but once."""
    kernel = source_params()["image"]["kernel"]
    rules = InitFrom(path=source, map=(("layer_./kernel", "image/kernel"),), ignore=("(image|text)/.*", "logit_scale"))
    new = warm_start(blank({f"layer_{i}": {"kernel": kernel} for i in range(2)}), rules, config_of(16))
    arrays = [jnp.asarray(layer["kernel"]) for layer in new.values()]
    for array in arrays:
        np.testing.assert_array_equal(array, kernel)
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == 2
