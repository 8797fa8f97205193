"""What is wrong before anything compiles: one sentence with the nearest that is right."""

from typing import Any

import jax
import pytest
import tiny

from vlm_jax.mesh import batch_sharding
from vlm_jax.plan.checks import check_axes, config_on, nearest_divisors
from vlm_jax.plan.topologies import Topology
from vlm_jax.schema import ConfigError

SMALL = Topology("v5e", "2x4")


@pytest.mark.parametrize(
    ("changes", "topology", "words"),
    [
        ({"mesh__fsdp": 3}, SMALL, ["8 devices don't divide by 3", "--config.mesh.fsdp=2 or --config.mesh.fsdp=4"]),
        ({"mesh__data": 16}, SMALL, ["data=16", "8 devices", "--config.mesh.data=8"]),
        ({"mesh__data": 2, "mesh__fsdp": 2}, SMALL, ["--config.mesh.data=4 or --config.mesh.fsdp=4"]),
        ({"data__batch_size": 20}, SMALL, ["config.data.batch_size = 20", "16, 24"]),
        ({"data__batch_size": 20, "train__accum_steps": 5}, SMALL, ["accum_steps = 5", "40"]),
        ({"mesh__dcn_data": 4}, Topology("v5e", "2x2", 2), ["asks for 4 slices and there are 2", "--slices=4"]),
        ({"data__batch_size": 24}, Topology("v5e", "2x4", 2), ["config.data.batch_size = 24", "16, 32"]),
    ],
)
def test_what_does_not_fit_a_topology(changes: dict[str, Any], topology: Topology, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_on(tiny.config(**changes), topology)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_slices_lie_along_data() -> None:
    config = config_on(tiny.config(mesh__data=1, mesh__fsdp=-1), Topology("v5e", "2x2", 2))
    assert config.mesh.sizes(8) == (2, 4, 1, 1)


def test_nearest_divisors() -> None:
    assert nearest_divisors(3, 16) == [2, 4]
    assert nearest_divisors(4, 16) == [4]
    assert nearest_divisors(99, 16) == [16]


def test_an_axis_that_divides_nothing() -> None:
    """Four heads and widths of 32 and 64 don't split in three; nothing here has an axis to lay along `sequence`."""
    mesh = jax.make_mesh(
        (1, 1, 3, 1),
        ("data", "fsdp", "tensor", "sequence"),
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
        devices=jax.devices()[:3],
    )
    program = tiny.program(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in program.config.objective.batch_shapes(16).items()
    }
    with jax.set_mesh(mesh):
        jaxpr = program.step.trace(program.setup.abstract, batch).jaxpr.jaxpr  # pyright: ignore
    with pytest.raises(ConfigError, match=r"config\.mesh\.tensor = 3 divides no array .* 4, 64, 320; use 1$"):
        check_axes(program, jaxpr)
