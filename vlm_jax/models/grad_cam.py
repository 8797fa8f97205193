"""Grad-CAM on attention to a context: on which of its tokens a score rests (Selvaraju et al. 2017; Li et al. 2021).

The gradient of a score by weights of attention is not what kernels give, and no training step pays for it: the stack is
cut at one layer, which runs by itself with a perturbation of zeros added to its weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.mesh import constrain
from vlm_jax.models.bert import TextStack
from vlm_jax.models.initializers import INITIALIZERS
from vlm_jax.models.post_norm import Context, TextStackConfig, layer_kind, over_keys


def attention_cam(
    config: TextStackConfig,
    params: Any,
    states_BxTxD: jax.Array,
    valid_BxT: jax.Array,
    context_BxSxC: jax.Array,
    layer: int,
    score: Callable[[jax.Array], jax.Array],
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """relu(d score / d weight) * weight of every weight of a layer's attention to the context, fp32 [B, H, T, S].

    Args:
        config: the stack.
        params: its parameters, those of a `TextStack`.
        states_BxTxD: what it starts from.
        valid_BxT: bool, the tokens that are no padding.
        context_BxSxC: what is attended to besides.
        layer: among those that attend to the context, counted from 0.
        score: the stack's output [B, T, D] -> a score a row [B].
        dtype: compute dtype.
    """
    kind, groups = layer_kind(config)
    initializers = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
    block: Any = kind(config, initializers, False, False, dtype)  # pyright: ignore[reportCallIssue]

    def run(first: int, last: int, x_BxTxD: jax.Array) -> jax.Array:
        size = config.depth // groups
        stack = TextStack(dataclasses.replace(config, depth=(last - first) * size), dtype)
        # What stands before the layers, a projection, belongs to the first of them.
        own = {} if first else {name: part for name, part in params.items() if name != "blocks"}
        own["blocks"] = jax.tree.map(lambda leaf: leaf[first:last], params["blocks"])
        found: Any = stack.apply({"params": own}, x_BxTxD, valid_BxT, context_BxSxC)
        return found["tokens"]

    below_BxTxD = run(0, layer, states_BxTxD)
    own = {"params": jax.tree.map(lambda leaf: leaf[layer], params["blocks"])}

    def total(perturbation_BxHxTxS: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = Context(context_BxSxC, None, perturbation_BxHxTxS)
        (x_BxTxD, _), seen = block.apply(
            own, below_BxTxD, (0, 0.0), None, over_keys(valid_BxT), None, context, mutable=["intermediates"]
        )
        (weights_BxHxTxS,) = jax.tree.leaves(seen)
        return score(run(layer + 1, groups, x_BxTxD)).sum(), weights_BxHxTxS

    shape = (states_BxTxD.shape[0], config.heads, states_BxTxD.shape[1], context_BxSxC.shape[1])
    zeros = constrain(jnp.zeros(shape), "batch", "heads", "length", None)
    gradient_BxHxTxS, weights_BxHxTxS = jax.grad(total, has_aux=True)(zeros)
    return jax.nn.relu(gradient_BxHxTxS) * weights_BxHxTxS


def token_cam(cam_BxHxTxS: jax.Array, valid_BxT: jax.Array) -> jax.Array:
    """The mean over heads and over the text's tokens, its class token included -> [B, S]."""
    text_BxT = valid_BxT.astype(cam_BxHxTxS.dtype)
    return jnp.einsum("BTS,BT->BS", cam_BxHxTxS.mean(axis=1), text_BxT) / jnp.maximum(text_BxT.sum(axis=1), 1)[:, None]


__all__ = ["attention_cam", "token_cam"]
