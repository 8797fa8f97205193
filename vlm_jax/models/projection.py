"""Heads from a tower's pooled vector to the joint space, and the unit length that vectors are compared at."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import zeros

from vlm_jax.models.initializers import Initializer
from vlm_jax.models.linear import Linear


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """Which head stands on a tower."""

    kind: Literal["linear", "mlp"] = "linear"  # one matrix (CLIP), or two with an exact GELU between (SimCLR's form)
    features: int = 512  # dimension of the joint space
    bias: bool = False  # bias on the last matrix

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.features < 1:
            yield "features", f"= {self.features} must be at least 1"


def project(
    config: ProjectionConfig, init: Initializer, x: jax.Array, dtype: Dtype, bias_init: Initializer = zeros
) -> jax.Array:
    """[B, D] -> [B, E], as the submodule `projection` of the compact module that calls this."""
    if config.kind == "linear":
        names = ("embed", "joint")
        head = Linear((config.features,), names, init, bias_init, use_bias=config.bias, dtype=dtype, name="projection")
        return head(x)
    return MLPHead(config, init, bias_init, dtype, name="projection")(x)


def unit_length(vectors_BxD: jax.Array) -> jax.Array:
    """[B, D] -> [B, D] of L2 norm 1."""
    # rsqrt of a clamped square, not a division by a norm: the gradient of a norm at zero is NaN.
    square = jnp.square(vectors_BxD).sum(axis=-1, keepdims=True)
    return vectors_BxD * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class MLPHead(nn.Module):
    """Linear, exact GELU, linear; the hidden width is that of the input.

    Attributes:
        config: sizes of the head.
        initializer: that of its kernels.
        bias_init: that of the last bias, where there is one.
        dtype: compute dtype.
    """

    config: ProjectionConfig
    initializer: Initializer
    bias_init: Initializer = zeros
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D] -> [B, E]."""
        hidden = Linear((x.shape[-1],), ("embed", "mlp"), self.initializer, dtype=self.dtype, name="hidden")(x)
        head = Linear(
            (self.config.features,),
            ("mlp", "joint"),
            self.initializer,
            self.bias_init,
            use_bias=self.config.bias,
            dtype=self.dtype,
            name="out",
        )
        return head(jax.nn.gelu(hidden, approximate=False))


__all__ = ["MLPHead", "ProjectionConfig", "project", "unit_length"]
