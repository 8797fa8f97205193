"""Mesh sizes, the table of logical axes, and that activation pins act."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from vlm_jax.mesh import MeshConfig, constrain, make_mesh, shardings, weight_spec
from vlm_jax.schema import ConfigError


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (MeshConfig(fsdp=2, dcn_data=2), (4, 2, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, dcn_fsdp=2), (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, fsdp_most=4), (2, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, fsdp_most=3), (4, 2, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, fsdp_most=16), (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, fsdp_most=2, dcn_data=2), (4, 2, 1, 1)),
    ],
)
def test_sizes(config: MeshConfig, sizes: tuple[int, ...]) -> None:
    assert config.sizes(8) == sizes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(fsdp=3), ["config.mesh.data = -1", "8 devices", "3"]),
        (MeshConfig(data=-1, fsdp=-1), ["config.mesh.fsdp", "only one axis"]),
        (MeshConfig(data=4), ["data=4", "8 devices", "-1"]),
        (MeshConfig(tensor=0), ["config.mesh.tensor = 0"]),
        (MeshConfig(fsdp_most=-2), ["config.mesh.fsdp_most = -2"]),
    ],
)
def test_impossible_sizes(config: MeshConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_weights_by_their_logical_names() -> None:
    mesh = tiny.mesh(2, 2, 2)
    assert weight_spec(("layers", "embed", "heads", "kv"), (3, 8, 4, 2), mesh) == P(None, "fsdp", "tensor", None)
    assert weight_spec(("embed", None), (7, 2), mesh) == P(None, None)  # 7 doesn't split in 2: kept whole
    with pytest.raises(ValueError, match=r"weight a/b: .* twice"):
        weight_spec(("embed", "embed"), (8, 8), mesh, "a/b")
    with pytest.raises(ValueError, match="'colour' is not in WEIGHT_AXES"):
        weight_spec(("colour",), (8,), mesh)


def test_slots_inherit_the_sharding_of_their_weight() -> None:
    mesh = tiny.mesh(1, 4, 1)
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8, 2), jnp.float32), ("embed", None))  # pyright: ignore
    slot = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    other = jax.ShapeDtypeStruct((8,), jnp.float32)
    tree = {"params": {"a": {"w": box}}, "opt": {"mu": {"a": {"w": slot}}, "row": {"a": {"w": other}}}}
    placed = shardings(tree, mesh)
    assert placed["params"]["a"]["w"].spec == P("fsdp", None)
    assert placed["opt"]["mu"]["a"]["w"].spec == P("fsdp", None)
    assert placed["opt"]["row"]["a"]["w"].spec == P()


def test_pins_act_under_a_mesh_and_vanish_without() -> None:
    mesh = tiny.mesh(2, 2, 2)
    x = jnp.ones((8, 4, 6))

    def pinned(x: jax.Array) -> jax.Array:
        return constrain(x * 2, "batch", "length", "heads")

    with jax.set_mesh(mesh):
        assert jax.jit(pinned)(x).sharding.shard_shape(x.shape) == (2, 4, 3)
        odd = jax.jit(lambda x: constrain(x * 2, "batch", None, "heads"))(jnp.ones((3, 4, 5)))
        assert odd.shape == (3, 4, 5)
    assert jax.jit(pinned)(x).sharding.is_fully_replicated
