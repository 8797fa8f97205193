"""The device mesh and the one table that says which axis of a weight or an activation lies on which mesh axis.

Models name their axes (`embed`, `mlp`, `heads`, ...) and never see the mesh; whoever wants another layout changes the
table here. Batches lie on `data` x `fsdp`, weights are split over `fsdp` and `tensor`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.schema import ConfigError

PyTree = Any
AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

# logical axis of a weight -> mesh axis. A map whose input lies on `tensor` must name its input axis so too: ("mlp",
# "embed") after ("embed", "mlp"). With two ("embed", "mlp") in a row XLA's partitioner (jaxlib 0.10.2, under Shardy and
# under GSPMD) gives the first one a wrong gradient where data, fsdp and tensor are all above 1, and says nothing.
WEIGHT_AXES: Mapping[str | None, str | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "kv": None,
    "joint": None,
    "layers": None,
    None: None,
}
# logical axis of an activation -> mesh axes
ACTIVATION_AXES: Mapping[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": "sequence",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": None,
    "kv": None,
    "joint": None,
    None: None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1  # copies of the model that share the batch (their weights are replicated)
    fsdp: int = 1  # shares the batch too, and splits weights, gradients and optimiser
    tensor: int = 1  # splits heads and hidden units
    sequence: int = 1  # splits the tokens of an example
    # with fsdp = -1: at most this many devices split a weight, what is left makes copies along `data`; 0: all of them.
    # Shards of few rows are gathered at twice the bytes (docs/planning.md)
    fsdp_most: int = 0
    dcn_data: int = 1  # slices (pods joined by the data-centre network) along `data`
    dcn_fsdp: int = 1  # slices along `fsdp`

    def sizes(self, devices: int) -> tuple[int, int, int, int]:
        """(data, fsdp, tensor, sequence) on `devices` devices, slices included; raises `ConfigError`."""
        sizes = {axis: int(getattr(self, axis)) for axis in AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise ConfigError(f"config.mesh.{axis} = {size} must be a positive number, or -1 for what is left")
        if self.fsdp_most < 0:
            raise ConfigError(f"config.mesh.fsdp_most = {self.fsdp_most} must not be negative; 0 is no limit")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(f"config.mesh.{free[1]} = -1 as well as {free[0]}; only one axis can take what is left")
        slices = self.dcn_data * self.dcn_fsdp
        known = math.prod(size for size in sizes.values() if size != -1) * slices
        if free:
            if devices % known:
                raise ConfigError(
                    f"config.mesh.{free[0]} = -1 can't be resolved: {devices} devices don't divide by {known}, the "
                    "product of the other axes"
                )
            sizes[free[0]] = devices // known
            if free == ["fsdp"] and self.fsdp_most:
                left = sizes["fsdp"]
                sizes["fsdp"] = max(size for size in range(1, self.fsdp_most + 1) if left % size == 0)
                sizes["data"] *= left // sizes["fsdp"]
        elif known != devices:
            text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
            raise ConfigError(
                f"config.mesh.data: the mesh {text} has {known} places and there are {devices} devices; "
                "set one axis to -1"
            )
        sizes["data"] *= self.dcn_data
        sizes["fsdp"] *= self.dcn_fsdp
        return sizes["data"], sizes["fsdp"], sizes["tensor"], sizes["sequence"]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all); raises `ConfigError` when the sizes don't multiply to them."""
    devices = jax.devices() if devices is None else devices
    shape = config.sizes(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if config.dcn_data * config.dcn_fsdp == 1:
        try:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        except NotImplementedError:
            # 16 x 16 on a torus of 4 x 8 x 8: an axis of the mesh takes part of one of the torus.
            split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(split, AXES, axis_types=types)
    dcn = (config.dcn_data, config.dcn_fsdp, 1, 1)
    inner = tuple(size // slices for size, slices in zip(shape, dcn, strict=True))
    # Without slices to tell apart (GPU, CPU) a process is what the slow network joins.
    by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    array = mesh_utils.create_hybrid_device_mesh(inner, dcn, devices, process_is_granule=by_process)
    return Mesh(array, AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the batch axes that the mesh has, the other axes whole."""
    return NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the mesh of `jax.set_mesh` by the logical names of its axes; without a mesh, `x` as it is.

    Without the pins the compiler may replicate a whole tower's activations. An axis that its mesh axes don't divide
    is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = []
    for name, size in zip(names, x.shape, strict=True):
        target = ACTIVATION_AXES[name]
        axes = (target,) if isinstance(target, str) else target or ()
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        spec.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def weight_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, path: str = "") -> P:
    """The partition of one weight by the logical names of its axes.

    An axis whose size its mesh axis doesn't divide stays whole (a class token on an odd mesh); two axes of one weight
    on the same mesh axis, or a name that the table lacks, are errors.
    """
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        if name not in WEIGHT_AXES:
            raise ValueError(f"weight {path}: the logical axis {name!r} is not in WEIGHT_AXES of mesh.py; add it")
        axis = WEIGHT_AXES[name]
        if axis is not None and axis in spec:
            raise ValueError(
                f"weight {path}: axes {tuple(names)} put mesh axis {axis!r} on it twice; rename one of them"
            )
        divides = axis is not None and axis in mesh.shape and size % mesh.shape[axis] == 0
        spec.append(axis if divides else None)
    return P(*spec)


def tree_path(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as `image/blocks/attn/query/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def shardings(abstract: PyTree, mesh: Mesh) -> PyTree:
    """A `NamedSharding` for every leaf of a train state or part of one.

    Args:
        abstract: tree of shapes as `jax.eval_shape` gives it; weights still in the boxes that carry their names.
        mesh: where the arrays shall lie.

    Returns:
        The tree without boxes. A leaf without a box inherits the sharding of the weight whose path ends its own path,
        if their shapes agree (optimiser slots, EMA copies, teachers); any other leaf is replicated.
    """
    boxed = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_box)[0]
    named = {tree_path(path): leaf for path, leaf in boxed if _is_box(leaf)}
    weights: dict[str, tuple[tuple[int, ...], P]] = {}
    for path, box in named.items():
        spec = weight_spec(box.names, box.value.shape, mesh, path)
        # "params/image/..." and "image/..." must both be found as the end of a slot's path
        for suffix in {path, path.partition("/")[2] or path}:
            weights[suffix] = (box.value.shape, spec)

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        shape = leaf.value.shape if _is_box(leaf) else leaf.shape
        parts = tree_path(path).split("/")
        for start in range(len(parts)):
            found = weights.get("/".join(parts[start:]))
            if found is not None and found[0] == shape:
                return NamedSharding(mesh, found[1])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract, is_leaf=_is_box)


def logical_names(abstract: PyTree) -> dict[str, tuple[str | None, ...]]:
    """path -> logical names of every boxed weight of a tree; (None, ...) for a weight without a box."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_box)[0]
    return {tree_path(path): tuple(leaf.names) if _is_box(leaf) else (None,) * leaf.ndim for path, leaf in leaves}


def unbox(tree: PyTree) -> PyTree:
    """The tree with its weights out of their boxes: plain nested dicts of arrays."""
    return nn.unbox(tree)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def host_values(tree: PyTree) -> PyTree:
    """Replicated global arrays as numpy, on every process, without a collective."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)
