"""What can be known to be wrong before anything compiles: slices, mesh sizes, axes that split nothing, batch sizes."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.extend import core as jax_core

from vlm_jax.assemble import Program
from vlm_jax.config import Config
from vlm_jax.flops import inner_jaxprs
from vlm_jax.mesh import BATCH_AXES, WEIGHT_AXES, MeshConfig
from vlm_jax.plan.topologies import Topology
from vlm_jax.schema import ConfigError, override


def config_on(config: Config, topology: Topology) -> Config:
    """The config with its slices laid along `data`, if it does not say how they lie.

    Raises:
        ConfigError: slices, mesh or batch don't fit the topology; names the nearest that do.
    """
    declared = config.mesh.dcn_data * config.mesh.dcn_fsdp
    if declared == 1 and topology.slices > 1:
        config = override(config, {"mesh.dcn_data": topology.slices})
    elif declared != topology.slices:
        raise ConfigError(
            f"config.mesh.dcn_data x dcn_fsdp = {config.mesh.dcn_data} x {config.mesh.dcn_fsdp} asks for {declared} "
            f"slices and there are {topology.slices}; give --slices={declared}, or --config.mesh.dcn_data="
            f"{topology.slices} --config.mesh.dcn_fsdp=1"
        )
    _check_mesh(config.mesh, topology)
    config.check_devices(topology.device_count)
    return config


def _check_mesh(mesh: MeshConfig, topology: Topology) -> None:
    try:
        mesh.sizes(topology.device_count)
    except ConfigError as error:
        per_slice = topology.device_count // topology.slices
        sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor", "sequence")}
        fixed = [axis for axis, size in sizes.items() if size > 1]
        known = math.prod(sizes[axis] for axis in fixed)
        hints = []
        for axis in fixed if list(sizes.values()).count(-1) < 2 else ():
            room, rest = divmod(per_slice, known // sizes[axis])
            near = [] if rest else nearest_divisors(sizes[axis], room)
            if -1 not in sizes.values():
                near = near[:0] if rest else [room]
            hints += [f"--config.mesh.{axis}={size}" for size in near]
        text = f"; the nearest that fit {topology}: {' or '.join(hints)}" if hints else ""
        raise ConfigError(f"{error}{text}") from error


def nearest_divisors(size: int, number: int) -> list[int]:
    """The divisors of `number` next to `size`, the smaller one first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d <= size], [d for d in divisors if d > size]
    return (below[-1:] if below[-1:] == [size] else below[-1:] + above[:1]) or above[:1]


def check_axes(program: Program, jaxpr: jax_core.Jaxpr) -> None:
    """Raises `ConfigError` when a mesh axis splits neither a weight nor an activation.

    Args:
        program: on its mesh.
        jaxpr: of the step.
    """
    used = {axis for leaf in jax.tree.leaves(program.setup.abstract) for axis in _axes(leaf.sharding.spec)}
    used |= {*BATCH_AXES, *_pinned_axes(jaxpr)}
    for axis in (axis for axis, size in program.mesh.shape.items() if size > 1 and axis not in used):
        size = program.mesh.shape[axis]
        sizes = sorted(sizes_over(program, axis))
        near = sorted({d for whole in sizes for d in nearest_divisors(size, math.gcd(whole, program.mesh.size))})
        hint = f"use {' or '.join(map(str, near))}" if sizes else "leave it at 1"
        what = f"the sizes it could split are {', '.join(map(str, sizes))}" if sizes else "nothing is laid along it"
        raise ConfigError(f"config.mesh.{axis} = {size} divides no array of this model: {what}; {hint}")


def _axes(spec: Iterable[Any]) -> Iterable[str]:
    for entry in spec:
        yield from (entry if isinstance(entry, tuple) else () if entry is None else (entry,))


def sizes_over(program: Program, axis: str) -> set[int]:
    """Sizes of the weights' axes that the table of `mesh.py` lays along a mesh axis."""
    parts = program.setup.parts
    return {
        size
        for path, names in parts.names.items()
        for name, size in zip(names, parts.shapes[path], strict=True)
        if WEIGHT_AXES[name] == axis
    }


def _pinned_axes(jaxpr: jax_core.Jaxpr) -> Iterable[str]:
    """Mesh axes that the step's constraints on activations name."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield from _axes(equation.params["sharding"].spec)
        for inner in inner_jaxprs(equation.params):
            yield from _pinned_axes(inner)
