"""Relative positions: the index by brute force, towers with one table and with many, and the resize of tables."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.checkpoint import save_params
from vlm_jax.mesh import logical_names, unbox
from vlm_jax.models.beit import beit_encoder
from vlm_jax.models.relative_position import RelativeGrid, RelativePositionBias, resize_relative
from vlm_jax.schema import ConfigError, override, validate
from vlm_jax.warm_start import InitFrom, warm_start

TOWER = beit_encoder(16, 2, 2, 4, image_size=12)


def test_the_index_counts_offsets_and_the_pairs_of_the_class_token() -> None:
    rows, columns = 2, 3
    index = RelativeGrid((rows, columns), True).index()
    places = [(y, x) for y in range(rows) for x in range(columns)]
    offsets = [(y, x) for y in range(1 - rows, rows) for x in range(1 - columns, columns)]
    for query, (y, x) in enumerate(places):
        for key, (other_y, other_x) in enumerate(places):
            assert offsets[index[query + 1, key + 1]] == (y - other_y, x - other_x)
    assert set(index[0, 1:]) == {15}
    assert set(index[1:, 0]) == {16}
    assert index[0, 0] == 17
    assert RelativeGrid((rows, columns), True).rows == 18
    np.testing.assert_array_equal(RelativeGrid((rows, columns), False).index(), index[1:, 1:])
    assert RelativeGrid((14, 14), True).rows == 732


def init(config: Any) -> Any:
    return unbox(config.build(None, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3))))["params"]


def test_one_table_for_each_block_and_one_for_all_compute_the_same() -> None:
    shared = init(TOWER)
    table = np.random.default_rng(0).normal(size=(28, 2)).astype(np.float32)
    assert not shared["relative_position"]["table"].any()
    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    apply = TOWER.build(None, jnp.float32).apply
    before = apply({"params": shared}, images)["tokens"]  # pyright: ignore[reportIndexIssue]
    shared["relative_position"]["table"] = table
    expected = apply({"params": shared}, images)["tokens"]  # pyright: ignore[reportIndexIssue]
    assert np.abs(expected - before).max() > 1e-3
    per_block = {name: value for name, value in shared.items() if name != "relative_position"}
    per_block["blocks"] = shared["blocks"] | {"relative_position": {"table": np.stack([table, table])}}
    other = dataclasses.replace(TOWER, relative_position="per_block")
    assert jax.tree.structure(init(other)) == jax.tree.structure(per_block)
    found = other.build(None, jnp.float32).apply({"params": per_block}, images)["tokens"]  # pyright: ignore
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tables_lie_on_the_mesh_by_heads() -> None:
    module = RelativePositionBias(RelativeGrid((2, 2), True), 4)
    names = logical_names(jax.eval_shape(module.init, jax.random.key(0)))
    assert names == {"params/table": (None, "heads")}


def test_what_leaves_tokens_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="knows the whole grid"):
        validate(override(TOWER, {"registers": 1}), "tower")
    kept = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="sees all patches"):
        TOWER.build(None, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)), kept_BxK=kept)


def stretched(old: int, new: int) -> list[float]:
    """Distances 1, 1 + q, 1 + q + q^2, ... that end at new - 1, by a root of the polynomial."""
    roots = np.roots([*[1.0] * (old - 1 - 1), 1.0 - (new - 1)])
    q = next(float(root.real) for root in roots if abs(root.imag) < 1e-9 and root.real > 0)
    return [sum(q**k for k in range(n)) for n in range(old)]


def test_the_resize_takes_old_offsets_at_geometric_distances() -> None:
    """A bias that is a cubic of the stretched places is found again at whole ones; so are the class token's rows."""
    old, new = (5, 4), (7, 6)
    down, right = (
        np.asarray([-d for d in stretched(o, n)[:0:-1]] + stretched(o, n)) for o, n in zip(old, new, strict=True)
    )

    def bias(y: Any, x: Any) -> np.ndarray:
        y, x = np.asarray(y)[:, None], np.asarray(x)[None]
        return np.stack([0.1 * y**3 - y + 0.2 * x**2, 1.0 - 0.05 * x**3 + 0 * y], axis=-1).reshape(-1, 2)

    table = np.concatenate([bias(down, right), [[7.0, 8.0]] * 3])
    resized = resize_relative(table, old, new)
    expected = bias(np.arange(-6, 7), np.arange(-5, 6))
    np.testing.assert_allclose(resized[:-3], expected, atol=1e-5)
    np.testing.assert_array_equal(resized[-3:], table[-3:])
    assert resize_relative(table, old, old) is table
    with pytest.raises(ValueError, match="a grid of 4x4 has 49, or 52 with a class token"):
        resize_relative(table, (4, 4), new)


def source_of(tmp_path: Any) -> tuple[InitFrom, np.ndarray]:
    table = np.random.default_rng(0).normal(size=(28, 2)).astype(np.float32)
    params = {"image": {"relative_position": {"table": table}}}
    model = {"image": {"image_size": 12, "patch_size": 4}}
    config = {"objective": {"model": model}, "data": {"tokenizer": {"length": 3, "vocab_size": 9}}}
    save_params(tmp_path / "source", params, config=config, tokenizer=None, preprocess={})
    return InitFrom(path=str(tmp_path / "source")), table


def larger_config() -> dict[str, Any]:
    model = {"image": {"image_size": 20, "patch_size": 4}}
    return {"objective": {"model": model}, "data": {"tokenizer": {"length": 3, "vocab_size": 9}}}


def test_a_warm_start_resizes_the_table_and_gives_every_block_its_copy(tmp_path: Any) -> None:
    init_from, table = source_of(tmp_path)
    expected = resize_relative(table, (3, 3), (5, 5))
    ours = {"image": {"relative_position": {"table": jnp.zeros((84, 2))}}}
    found = warm_start(ours, init_from, larger_config())
    np.testing.assert_array_equal(found["image"]["relative_position"]["table"], expected)
    blocks = {"image": {"blocks": {"relative_position": {"table": jnp.zeros((4, 84, 2))}}}}
    rule = (r"(.*)/blocks/relative_position/table", r"\1/relative_position/table")
    found = warm_start(blocks, dataclasses.replace(init_from, map=(rule,)), larger_config())
    np.testing.assert_array_equal(found["image"]["blocks"]["relative_position"]["table"], np.stack([expected] * 4))
    heads = {"image": {"relative_position": {"table": jnp.zeros((84, 3))}}}
    with pytest.raises(ConfigError, match="only the number of offsets can be resized"):
        warm_start(heads, init_from, larger_config())


def test_a_warm_start_resizes_the_tables_of_windows_each_by_itself(tmp_path: Any) -> None:
    """Swin's: the window and not the image decides. A cubic of the stretched places is found again at whole ones."""
    places = np.asarray([-d for d in stretched(6, 7)[:0:-1]] + stretched(6, 7))

    def tables(places: np.ndarray) -> np.ndarray:
        y, x = places[:, None], places[None]
        one = np.stack([0.1 * y**3 - x, x**2 + 0.5 * y], axis=-1).reshape(-1, 2)
        return np.stack([one, -2 * one, one + 1]).astype(np.float32)

    def params(table: Any, kept: Any) -> Any:
        names = ("regular", "shifted")
        blocks = {name: {"position_bias": {"table": x}} for name, x in zip(names, (table, kept), strict=True)}
        return {"image": {"stage1": {"blocks": blocks}}}

    kept = np.random.default_rng(0).normal(size=(3, 9, 2)).astype(np.float32)
    model = {"image": {"image_size": 192, "patch_size": 4, "window": 6}}
    config = {"objective": {"model": model}}
    save_params(tmp_path / "s", params(tables(places), kept), config=config, tokenizer=None, preprocess={})
    ours = params(jnp.zeros((3, 169, 2)), jnp.zeros((3, 9, 2)))
    new_config = {"objective": {"model": {"image": {"image_size": 224, "patch_size": 4, "window": 7}}}}
    found = warm_start(ours, InitFrom(path=str(tmp_path / "s")), new_config)["image"]["stage1"]["blocks"]
    table = found["regular"]["position_bias"]["table"]
    np.testing.assert_allclose(table, tables(np.arange(-6.0, 7.0)), atol=2e-5)
    np.testing.assert_array_equal(found["shifted"]["position_bias"]["table"], kept)
    heads = params(jnp.zeros((3, 169, 4)), jnp.zeros((3, 9, 2)))
    with pytest.raises(ConfigError, match="only the number of offsets can be resized"):
        warm_start(heads, InitFrom(path=str(tmp_path / "s")), new_config)
