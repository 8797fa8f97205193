"""Pre-norm transformer blocks and their stack. Embedding, position and pooling belong to the towers.

Parameter layout, the same for scanned and unrolled stacks: `blocks/...` holds each leaf once with a leading layer axis
(logical name "layers"). `unstack_layers` and `stack_layers` convert from and to one subtree per layer.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import constant

from vlm_jax.flops import cross_attention_flops, transformer_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.attention import Attention, AttentionImpl
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.mlp import MLP, ActivationName
from vlm_jax.models.norms import NORMS, NormName
from vlm_jax.models.relative_position import RelativeGrid, RelativePositionBias
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
    gated: bool = False  # whether the MLP has a gate; with "silu" it is SwiGLU
    norm: NormName = "layer"  # layer norm, root mean square norm, or that with a scale stored as its offset from 1
    norm_eps: float = 1e-5  # added to the variance in every norm
    qkv_bias: bool = True  # biases on query, key and value
    key_bias: bool = True  # with qkv_bias: whether the keys have one too (BEiT: no)
    out_bias: bool = True  # bias on the output projection of attention
    mlp_bias: bool = True  # biases in the MLP
    layer_scale_init: float | None = None  # start of the per-channel scale on each branch; None for none
    drop_path: float = 0.0  # stochastic depth of the last block
    drop_path_rates: Literal["linear", "uniform"] = "linear"  # rising from 0 at the first block, or the same in all
    dropout: float = 0.0  # on the output of attention and of the MLP
    scan: bool = True  # one compiled block in a loop; false unrolls it (the parameters are the same)
    remat: RematName = "none"  # what a block keeps for its backward pass
    attention_impl: AttentionImpl = "auto"  # attention kernel
    init: InitName = "vit"  # recipe of the initial weights

    @property
    def attention_width(self) -> int:
        """Channels of the queries of all heads together."""
        return self.width

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        for key, value in (("width", self.width), ("heads", self.heads), ("mlp_dim", self.mlp_dim)):
            if value < 1:
                yield key, f"= {value} must be at least 1"
        if self.depth < 0:
            yield "depth", f"= {self.depth} must not be negative; 0 leaves the embeddings as they are"
        if self.heads >= 1 and self.attention_width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0 and self.width // h >= 8]
            near = sorted(sorted(divisors, key=lambda h: abs(h - self.heads))[:3])
            yield "heads", f"= {self.heads} does not divide width {self.width}; use one of {near or [1]}"
        for key, value in (("drop_path", self.drop_path), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                yield key, f"= {value} is a probability; it must lie in [0, 1)"


@dataclasses.dataclass(frozen=True)
class CrossDecoderConfig(TransformerConfig):
    """A stack whose blocks look at themselves and then at a context, as the decoder of Vaswani et al. 2017."""

    causal: bool = True  # whether a token sees only those before it
    self_mlp_dim: int = 0  # hidden width of a second MLP, between the two attentions (CoCa of open_clip); 0 for none
    init: InitName = "clip_text"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.self_mlp_dim < 0:
            yield "self_mlp_dim", f"= {self.self_mlp_dim} must not be negative; 0 leaves that MLP out"

    def stack_flops(self, tokens: int, context_tokens: int, context_width: int) -> int:
        """Model FLOPs of the stack's forward pass for one sequence of `tokens` and its context."""
        cross = cross_attention_flops(self.width, tokens, context_tokens, context_width)
        own = transformer_flops(self.width, self.depth, self.self_mlp_dim + self.mlp_dim, tokens)
        return own + self.depth * cross


class ResidualBlock(nn.Module):
    """What every block of a stack has: its attention, its MLP, and how a branch joins the residual stream.

    Attributes:
        config: sizes and rates; an `mlp_dim` of 0 leaves the second branch out.
        initializers: those of the tower.
        causal: whether attention is causal.
        keep_output: whether to hand an output on beside the carry, for the loop to stack.
        dtype: compute dtype.
    """

    config: TransformerConfig
    initializers: Initializers
    causal: bool
    keep_output: bool
    dtype: Dtype = jnp.float32

    def _attention(self, init: Initializers, kind: type[Attention] = Attention, name: str = "attn", **more: Any) -> Any:
        config = self.config
        return kind(
            config.heads,
            init,
            config.qkv_bias,
            config.attention_impl,
            config.key_bias,
            config.out_bias,
            dtype=self.dtype,
            name=name,
            **more,
        )

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return NORMS[self.config.norm](self.config.norm_eps, name=name)(x)

    def _add_attention(self, x: jax.Array, branch: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        return checkpoint_name(self._add(x, branch, "layer_scale_1", rate, fold_in(keys, 0)), "middle")

    def _add_mlp(self, x: jax.Array, init: Initializers, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        if not self.config.mlp_dim:
            return x
        mlp = self._mlp(init)
        return self._add(x, mlp(self._norm("ln_2", x)), "layer_scale_2", rate, fold_in(keys, 1))

    def _mlp(self, init: Initializers) -> MLP:
        config = self.config
        return MLP(
            config.mlp_dim,
            config.activation,
            init,
            config.mlp_bias,
            config.gated,
            dtype=self.dtype,
            name="mlp",
        )

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


class Block(ResidualBlock):
    """x += attention(ln_1 x); x += mlp(ln_2 x), each branch with optional layer scale, dropout and drop path.

    With a context, attention is from ln_1 x to ln_context(context) instead.

    Attributes:
        relative: the tokens between which the block learns a bias of its own, or None.
    """

    relative: RelativeGrid | None = None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array],
        keys: jax.Array | None,
        mask: jax.Array | None,
        bias: jax.Array | None,
        context_BxSxC: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Carry and output are the same [B, T, D] (or no output); `layer` is (index, drop-path rate), scalars."""
        index, rate = layer
        keys, init = fold_in(keys, index), self.initializers.at_layer(index)
        if self.relative is not None:
            own = RelativePositionBias(self.relative, self.config.heads, name="relative_position")()
            bias = own if bias is None else bias + own
        attention = self._attention(init)
        if context_BxSxC is not None:
            context_BxSxC = self._norm("ln_context", context_BxSxC)
        branch = attention(self._norm("ln_1", x_BxTxD), context_BxSxC, mask=mask, bias=bias, causal=self.causal)
        x_BxTxD = self._add_attention(x_BxTxD, branch, rate, keys)
        x_BxTxD = self._add_mlp(x_BxTxD, init, rate, keys)
        return x_BxTxD, x_BxTxD if self.keep_output else None


class CrossBlock(nn.Module):
    """Two blocks: `self` over x, and `cross` from x to the context. Attributes and arguments as those of `Block`."""

    config: CrossDecoderConfig
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
        context_BxSxC: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `Block`; `mask` and `bias` are those of the attention over x."""
        index, rate = layer
        own = dataclasses.replace(self.config, mlp_dim=self.config.self_mlp_dim)
        block = Block(own, self.initializers, self.causal, False, self.dtype, name="self")
        x_BxTxD, _ = block(x_BxTxD, (2 * index, rate), keys, mask, bias, None)
        cross = Block(self.config, self.initializers, False, self.keep_output, self.dtype, name="cross")
        return cross(x_BxTxD, (2 * index + 1, rate), keys, None, None, context_BxSxC)


def scanned(block: Any, length: int, remat: RematName, scan: bool, broadcast: int) -> Any:
    """A module class as the loop over `length` of its layers, each rematerialised by the policy.

    Args:
        block: called with a carry, an input of its own layer, and `broadcast` inputs that all layers share; returns
            the new carry and an output to stack or None. Its parameters get a leading axis, "layers".
        length: number of layers.
        remat: what a layer keeps for its backward pass.
        scan: false unrolls the loop; the parameters are the same.
        broadcast: number of shared inputs.
    """
    policy = POLICIES[remat]
    if policy is not None:
        # Inside a loop nothing can merge the recomputation with the forward pass; unrolled, XLA would.
        block = nn.remat(block, policy=policy, prevent_cse=not scan)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, *[nn.broadcast] * broadcast),  # pyright: ignore[reportArgumentType]
        length=length,
        # lax.scan drops the loop altogether when the whole of it is unrolled.
        unroll=1 if scan else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def run_blocks(
    config: TransformerConfig,
    x_BxTxD: jax.Array,
    keys: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    context: Any = None,
    causal: bool = False,
    relative: RelativeGrid | None = None,
    intermediates: bool = False,
    dtype: Dtype = jnp.float32,
    block: type[nn.Module] | None = None,
    first: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the stack, as the submodule `blocks` of the compact module that calls this.

    Args:
        config: sizes and rates.
        x_BxTxD: tokens.
        keys: [B] keys of the rows, or None for no randomness.
        mask: bool, broadcasts to [B, H, T, T], True where attention is allowed; the same for all blocks.
        bias: added to the attention logits, broadcasts to [B, H, T, T]; the same for all blocks.
        context: what every block attends to as well, in the form that `block` takes: for `CrossBlock`, which needs a
            `CrossDecoderConfig`, tokens [B, S, C].
        causal: whether attention is causal.
        relative: the tokens between which each block learns a bias of its own; None: none does. Not with a context.
        intermediates: whether to keep each block's output.
        dtype: compute dtype, also of the residual stream.
        block: another kind of block with the attributes and arguments of `Block`; None: that, or with a context
            `CrossBlock`.
        first: only the first so many blocks are run, though there are parameters of all; not at initialisation.

    Returns:
        The last block's output [B, T, D], and all outputs [L, B, T, D] or None (also for a stack of no blocks).
    """
    x_BxTxD = constrain(x_BxTxD.astype(dtype), "batch", "length", "embed")
    depth = config.depth if first is None else first
    if depth == 0:
        return x_BxTxD, None
    kind: Any = block or (Block if context is None else CrossBlock)
    stack = scanned(kind, depth, config.remat, config.scan, broadcast=4)
    if depth < config.depth:
        stack = nn.map_variables(stack, "params", lambda tree: jax.tree.map(lambda leaf: leaf[:depth], tree))
    init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
    # numpy, so that the rates are the same fp32 numbers on every platform
    lowest = config.drop_path if config.drop_path_rates == "uniform" else 0.0
    rates = np.linspace(lowest, config.drop_path, config.depth, dtype=np.float32)
    layers = (jnp.arange(depth), jnp.asarray(rates[:depth]))
    more = {} if relative is None else {"relative": relative}
    blocks = stack(config, init, causal, intermediates, dtype, **more, name="blocks")
    return blocks(x_BxTxD, layers, keys, mask, bias, context)


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
