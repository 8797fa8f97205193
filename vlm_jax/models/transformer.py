"""Pre-norm transformer blocks and their stack. Embedding, position and pooling belong to the towers.

Parameter layout, the same for scanned and unrolled stacks: `blocks/...` holds each leaf once with a leading layer axis
(logical name "layers"). `unstack_layers` and `stack_layers` convert from and to one subtree per layer.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import constant

from vlm_jax.mesh import constrain
from vlm_jax.models.attention import Attention, AttentionImpl
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.mlp import MLP, ActivationName
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.remat import POLICIES, RematName
from vlm_jax.models.stochastic import drop_path, dropout, fold_in
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A stack of pre-norm blocks; the towers' configs extend it."""

    width: int = 768  # of the residual stream
    depth: int = 12  # number of blocks
    heads: int = 12  # attention heads; divides width
    mlp_dim: int = 3072  # hidden width of the MLP
    activation: ActivationName = "quick_gelu"  # of the MLP; "gelu" is the exact one
    norm_eps: float = 1e-5  # added to the variance in every layer norm
    qkv_bias: bool = True  # biases on query, key and value
    layer_scale_init: float | None = None  # start of the per-channel scale on each branch; None for none
    drop_path: float = 0.0  # stochastic depth of the last block, rising linearly from 0 at the first
    dropout: float = 0.0  # on the output of attention and of the MLP
    scan: bool = True  # one compiled block in a loop; false unrolls it (the parameters are the same)
    remat: RematName = "none"  # what a block keeps for its backward pass
    attention_impl: AttentionImpl = "auto"  # attention kernel
    init: InitName = "vit"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        for key, value in (("width", self.width), ("depth", self.depth), ("heads", self.heads)):
            if value < 1:
                yield key, f"= {value} must be at least 1"
        if self.mlp_dim < 1:
            yield "mlp_dim", f"= {self.mlp_dim} must be at least 1"
        if self.heads >= 1 and self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0 and self.width // h >= 8]
            near = sorted(sorted(divisors, key=lambda h: abs(h - self.heads))[:3])
            yield "heads", f"= {self.heads} does not divide width {self.width}; use one of {near or [1]}"
        for key, value in (("drop_path", self.drop_path), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                yield key, f"= {value} is a probability; it must lie in [0, 1)"


class Block(nn.Module):
    """x += attention(ln_1 x); x += mlp(ln_2 x), each branch with optional layer scale, dropout and drop path.

    Attributes:
        config: sizes and rates.
        initializers: those of the tower.
        causal: whether attention is causal.
        keep_output: whether to hand the output on beside the carry, for the loop to stack.
        dtype: compute dtype.
    """

    config: TransformerConfig
    initializers: Initializers
    causal: bool
    keep_output: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array],
        keys: jax.Array | None,
        mask: jax.Array | None,
        bias: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Carry and output are the same [B, T, D] (or no output); `layer` is (index, drop-path rate), scalars."""
        config, (index, rate) = self.config, layer
        keys = fold_in(keys, index)
        attention = Attention(
            config.heads, self.initializers, config.qkv_bias, config.attention_impl, dtype=self.dtype, name="attn"
        )
        branch = attention(LayerNorm(config.norm_eps, name="ln_1")(x_BxTxD), mask=mask, bias=bias, causal=self.causal)
        x_BxTxD = self._add(x_BxTxD, branch, "layer_scale_1", rate, fold_in(keys, 0))
        mlp = MLP(config.mlp_dim, config.activation, self.initializers, dtype=self.dtype, name="mlp")
        branch = mlp(LayerNorm(config.norm_eps, name="ln_2")(x_BxTxD))
        x_BxTxD = self._add(x_BxTxD, branch, "layer_scale_2", rate, fold_in(keys, 1))
        return x_BxTxD, x_BxTxD if self.keep_output else None

    def _add(self, x: jax.Array, branch: jax.Array, scale: str, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        config = self.config
        if config.layer_scale_init is not None:
            init = constant(config.layer_scale_init)
            factor = weight(self, scale, init, (None,), (config.width,)).astype(branch.dtype)
            branch = branch * jnp.broadcast_to(factor, branch.shape)
        branch = dropout(branch, config.dropout, fold_in(keys, 0))
        if config.drop_path > 0:
            branch = drop_path(branch, rate, fold_in(keys, 1))
        return constrain(x + branch, "batch", "length", "embed")


def run_blocks(
    config: TransformerConfig,
    x_BxTxD: jax.Array,
    keys: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    intermediates: bool = False,
    dtype: Dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the stack, as the submodule `blocks` of the compact module that calls this.

    Args:
        config: sizes and rates.
        x_BxTxD: tokens.
        keys: [B] keys of the rows, or None for no randomness.
        mask: bool, broadcasts to [B, H, T, T], True where attention is allowed; the same for all blocks.
        bias: added to the attention logits, broadcasts to [B, H, T, T]; the same for all blocks.
        causal: whether attention is causal.
        intermediates: whether to keep each block's output.
        dtype: compute dtype, also of the residual stream.

    Returns:
        The last block's output [B, T, D], and all outputs [L, B, T, D] or None.
    """
    block, policy = Block, POLICIES[config.remat]
    if policy is not None:
        # Inside a loop nothing can merge the recomputation with the forward pass; unrolled, XLA would.
        block = nn.remat(block, policy=policy, prevent_cse=not config.scan)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=config.depth,
        # lax.scan drops the loop altogether when the whole of it is unrolled.
        unroll=1 if config.scan else config.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
    # numpy, so that the rates are the same fp32 numbers on every platform
    rates = np.linspace(0.0, config.drop_path, config.depth, dtype=np.float32)
    layers = (jnp.arange(config.depth), jnp.asarray(rates))
    x_BxTxD = constrain(x_BxTxD.astype(dtype), "batch", "length", "embed")
    return stack(config, init, causal, intermediates, dtype, name="blocks")(x_BxTxD, layers, keys, mask, bias)


def unstack_layers(stacked: Mapping[str, Any]) -> list[Any]:
    """A stack's parameters, every leaf [L, ...], as a list of L trees, one a layer."""
    depth = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(depth) != 1:
        raise ValueError(f"the leaves of a stack must share their first axis, the layers; found sizes {sorted(depth)}")
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth.pop())]


def stack_layers(layers: list[Any]) -> Any:
    """The inverse of `unstack_layers`; numpy leaves stay numpy."""

    def stack(*leaves: Any) -> Any:
        return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)

    return jax.tree.map(stack, *layers)
