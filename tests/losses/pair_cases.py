"""Batches, masks and meshes on which the losses over pairs are tried, and one way to differentiate them all."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.losses.forms import Form

BATCH, WIDTH = 32, 24
MESHES = {
    "1": ((1,), ("data",)),
    "2": ((2,), ("data",)),
    "4": ((4,), ("data",)),
    "8": ((8,), ("data",)),
    "fsdp": ((2, 4), ("data", "fsdp")),
    "2x2x2": ((2, 2, 2), ("data", "fsdp", "tensor")),
}
SHARDED: tuple[Form, ...] = ("gather", "ring")
FORMS: tuple[Form, ...] = ("global", *SHARDED)
MASKS = {  # groups, valid
    "plain": (np.arange(BATCH), np.ones(BATCH, bool)),
    "groups": (np.arange(BATCH) // 3, np.ones(BATCH, bool)),
    "padded": (np.arange(BATCH), np.arange(BATCH) < BATCH - 5),
    "both": (np.arange(BATCH) % 7, np.arange(BATCH) % 4 != 1),
}


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes, axes = MESHES[name]
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def features(kind: str, batch: int = BATCH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random towers; aligned towers (trained: own pairs near cosine 1); identical towers (cosine exactly 1)."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, WIDTH))
    noise = {"random": rng.normal(size=image.shape) * 1e3, "aligned": rng.normal(size=image.shape) * 0.3, "same": 0.0}
    text = image + noise[kind]
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))  # type: ignore


@functools.cache
def _compiled(loss: Callable, impl: Form, mesh_name: str, scalars: int):
    """One compilation per form and mesh serves every data set and mask."""

    def total_loss(groups, valid, *arguments):
        return loss(*arguments, impl=impl, positives=groups, valid=valid)

    return jax.jit(jax.value_and_grad(total_loss, argnums=tuple(range(2, 4 + scalars)), has_aux=True))


def value_and_gradients(loss: Callable, impl: Form, mesh_name: str, image, text, scalars, masks="plain"):
    """((sum, count), gradients with respect to image, text and each scalar); `masks` is a name or (groups, valid)."""
    groups, valid = MASKS[masks] if isinstance(masks, str) else masks
    mesh = mesh_of(mesh_name)
    batch = NamedSharding(mesh, P(tuple(a for a in mesh.axis_names if a != "tensor")))
    image, text, groups, valid = jax.device_put((image, text, groups, valid), batch)
    with jax.set_mesh(mesh):
        function = _compiled(loss, impl, mesh_name, len(scalars))
        return function(groups, valid, image, text, *(jnp.float32(x) for x in scalars))


def relative_error(actual, expected) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
