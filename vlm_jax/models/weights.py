"""How a module declares a weight: fp32, with a logical name per axis for the sharding table of `vlm_jax.mesh`."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.models.initializers import Initializer


def weight(
    module: nn.Module, name: str, init: Initializer, names: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
    """The parameter `name` of a module that is being called.

    Args:
        module: the module, inside its compact method.
        name: of the leaf.
        init: (key, shape, dtype) -> array.
        names: logical name of each axis, None for one that is never sharded.
        shape: of the leaf.
    """
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32))
