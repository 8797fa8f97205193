"""From tokens to one vector a row. Norms and projections are the towers' business."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.models.attention import Attention, AttentionImpl, attend
from vlm_jax.models.initializers import Initializers, torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import MLP
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.transformer import TransformerConfig
from vlm_jax.models.weights import weight

# Index of the token that stands for the text, [B], from the ids [B, L] and the id of the end token.
TEXT_POOLS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    # CLIP's end token is the largest id; the first of several is taken, so padding with it changes nothing.
    "eot_argmax": lambda ids, eos_id: ids.argmax(axis=-1),
    "first_eos": lambda ids, eos_id: (ids == eos_id).argmax(axis=-1),
    "last": lambda ids, eos_id: jnp.full(ids.shape[:1], ids.shape[1] - 1),
    "first": lambda ids, eos_id: jnp.zeros(ids.shape[:1], jnp.int32),
}


def select_token(x_BxTxD: jax.Array, index_B: jax.Array) -> jax.Array:
    """The token at each row's index: [B, T, D], [B] -> [B, D]."""
    return jnp.take_along_axis(x_BxTxD, index_B[:, None, None], axis=1)[:, 0]


def mean_tokens(x_BxTxD: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
    """The mean over tokens in fp32, over the valid ones where a mask is given: [B, T, D] -> [B, D]."""
    x32 = x_BxTxD.astype(jnp.float32)
    if valid_BxT is None:
        return x32.mean(axis=1).astype(x_BxTxD.dtype)
    weight = valid_BxT.astype(jnp.float32)[:, :, None]
    return ((x32 * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)).astype(x_BxTxD.dtype)


class MapHead(nn.Module):
    """Multi-head attention pooling by one learned query (Zhai et al. 2022, 3.4; the head of SigLIP).

    Attributes:
        config: the tower's; width, heads, MLP and eps are taken from it.
        initializers: those of the tower.
        dtype: compute dtype.
    """

    config: TransformerConfig
    initializers: Initializers
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D] -> [B, D]; `mask` as in `attend`."""
        config, (batch, _, width) = self.config, x_BxTxD.shape
        probe = weight(self, "probe", self.initializers.probe, (None, "embed"), (1, width)).astype(self.dtype)
        query = jnp.broadcast_to(probe, (batch, 1, width))
        attention = Attention(
            config.heads, self.initializers, config.qkv_bias, config.attention_impl, dtype=self.dtype, name="attn"
        )
        x = attention(query, x_BxTxD, mask=mask)
        mlp = MLP(config.mlp_dim, config.activation, self.initializers, dtype=self.dtype, name="mlp")
        return (x + mlp(LayerNorm(config.norm_eps, name="ln")(x)))[:, 0]


class MeanQueryPool(nn.Module):
    """Multi-head attention pooling whose query is the mean of the tokens (CLIP's ResNets, paper section 2.4).

    The output projection of the published module is the tower's projection, so there is none here.

    Attributes:
        heads: number of heads; divides the width.
        initializers: those of the tower.
        impl: attention kernel.
        dtype: compute dtype.
    """

    heads: int
    initializers: Initializers
    impl: AttentionImpl = "auto"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, D]; positions are learned for T tokens and their mean."""
        batch, tokens, width = x_BxTxD.shape
        x = jnp.concatenate([mean_tokens(x_BxTxD)[:, None], x_BxTxD], axis=1)
        positions = weight(self, "pos_embed", self.initializers.position, (None, "embed"), (tokens + 1, width))
        x = x + positions.astype(self.dtype)[None]
        q, k, v = (self._split_heads(name, y) for name, y in (("query", x[:, :1]), ("key", x), ("value", x)))
        return attend(q, k, v, impl=self.impl).reshape(batch, width)

    def _split_heads(self, name: str, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        linear = Linear(
            (self.heads, width // self.heads),
            ("embed", "heads", "kv"),
            self.initializers.qkv_kernel,
            torch_linear(width),
            dtype=self.dtype,
            name=name,
        )
        return linear(x)


__all__ = ["TEXT_POOLS", "MapHead", "MeanQueryPool", "mean_tokens", "select_token"]
