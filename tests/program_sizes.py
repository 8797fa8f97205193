"""What a program holds, read from its jaxpr."""

from typing import Any

import jax.numpy as jnp

from vlm_jax.flops import inner_jaxprs


def float32_sizes(jaxpr: Any) -> list[int]:
    """Number of elements of every fp32 array that a program makes, in its loops and calls too."""
    found = [v.aval.size for e in jaxpr.eqns for v in e.outvars if v.aval.dtype == jnp.float32]
    return found + [size for e in jaxpr.eqns for inner in inner_jaxprs(e.params) for size in float32_sizes(inner)]
