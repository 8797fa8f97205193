"""The one linear map of every tower: it contracts trailing axes and names each axis of its kernel.

Not for convolutions or embeddings. Parameters are fp32; the product runs in `dtype`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import zeros

from vlm_jax.models.initializers import Initializer
from vlm_jax.models.weights import weight


class Linear(nn.Module):
    """y = x . kernel (+ bias), over the last `contracted` axes of x.

    Attributes:
        features: the output axes, e.g. (heads, head_dim).
        names: logical names of the kernel's axes, inputs first, as the sharding table of `vlm_jax.mesh` knows them.
        kernel_init: initialiser of the kernel.
        bias_init: initialiser of the bias.
        use_bias: whether there is a bias.
        contracted: how many trailing axes of x are summed over.
        dtype: compute dtype.
    """

    features: tuple[int, ...]
    names: tuple[str | None, ...]
    kernel_init: Initializer
    bias_init: Initializer = zeros
    use_bias: bool = True
    contracted: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] -> [..., *features] in `dtype`."""
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = weight(self, "kernel", self.kernel_init, self.names, shape)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=self.contracted)
        if self.use_bias:
            bias = weight(self, "bias", self.bias_init, self.names[self.contracted :], self.features)
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y
