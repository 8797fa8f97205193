"""The one MLP of every tower, plain or gated, and the table of activations."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

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
    """Linear, activation, linear back to the width: fc2(act(fc1 x)), or gated fc2(act(gate x) * fc1 x).

    Attributes:
        hidden: width of the middle.
        activation: a name in `ACTIVATIONS`.
        initializers: those of the tower.
        use_bias: whether the linear maps have biases.
        gated: whether there is a gate (Shazeer 2020; with silu SwiGLU, with gelu GeGLU).
        dtype: compute dtype.
    """

    hidden: int
    activation: str
    initializers: Initializers
    use_bias: bool = True
    gated: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        init, act = self.initializers, ACTIVATIONS[self.activation]
        hidden = self._up("fc1", x)
        hidden = act(self._up("gate", x)) * hidden if self.gated else act(hidden)
        out = Linear(
            (x.shape[-1],),
            ("mlp", "embed"),
            init.fc2_kernel,
            init.fc2_bias,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="fc2",
        )
        return out(hidden)

    def _up(self, name: str, x: jax.Array) -> jax.Array:
        init = self.initializers
        linear = Linear(
            (self.hidden,),
            ("embed", "mlp"),
            init.fc1_kernel,
            init.fc1_bias,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name=name,
        )
        return checkpoint_name(constrain(linear(x), "batch", "length", "mlp"), "hidden")
