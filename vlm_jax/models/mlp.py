"""The one MLP of every tower, and the table of activations. Gated variants are other modules."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import Initializers
from vlm_jax.models.linear import Linear

ActivationName = Literal["gelu", "quick_gelu", "gelu_tanh", "relu", "silu"]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x): what every released OpenAI CLIP weight was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # jax's default is the tanh form; the papers mean erf
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """Linear, activation, linear back to the width.

    Attributes:
        hidden: width of the middle.
        activation: a name in `ACTIVATIONS`.
        initializers: those of the tower.
        dtype: compute dtype.
    """

    hidden: int
    activation: str
    initializers: Initializers
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        init, width = self.initializers, x.shape[-1]
        x = Linear((self.hidden,), ("embed", "mlp"), init.fc1_kernel, init.fc1_bias, dtype=self.dtype, name="fc1")(x)
        x = ACTIVATIONS[self.activation](constrain(x, "batch", "length", "mlp"))
        return Linear((width,), ("mlp", "embed"), init.fc2_kernel, init.fc2_bias, dtype=self.dtype, name="fc2")(x)
