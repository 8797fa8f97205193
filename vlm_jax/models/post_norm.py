"""Post-norm layers of the BERT family and their stack, which may look at a context: at an image, or several in turn.

Embeddings and heads are in `bert`. Not for pre-norm towers, which `transformer` has.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.flops import cross_attention_flops, transformer_flops
from vlm_jax.models.attention import Attention, KeyValues
from vlm_jax.models.initializers import Initializers
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.transformer import Block, ResidualBlock, TransformerConfig, run_blocks


@dataclasses.dataclass(frozen=True)
class TextStackConfig(TransformerConfig):
    """A stack of post-norm layers; the defaults are those of BERT-base."""

    activation: ActivationName = "gelu"  # of the MLP
    norm_eps: float = 1e-12  # added to the variance in every norm
    dropout: float = 0.1  # on the embeddings and on the output of attention and of the MLP
    attention_dropout: float = 0.1  # on the weights of attention
    # every how many layers, from the first on, one also attends to a context: 1 in each (ALBEF), 0 in none
    cross_every: int = 0
    # images (or other contexts) that are looked at in turn: of each so many layers the first looks at the first, the
    # second at the second, by the same keys and values (ALBEF on pairs of images, NLVR2)
    contexts: int = 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if not 0 <= self.attention_dropout < 1:
            yield "attention_dropout", f"= {self.attention_dropout} is a probability; it must lie in [0, 1)"
        if self.contexts < 1:
            yield "contexts", f"= {self.contexts} must be at least 1"
        elif self.contexts > 1 and (self.cross_every != 1 or self.depth % self.contexts):
            yield "contexts", f"= {self.contexts} asks for cross_every = 1 and must divide depth = {self.depth}"
        if self.cross_every < 0:
            yield "cross_every", f"= {self.cross_every} must not be negative; 0 attends to no context"
        elif self.cross_every and self.depth % self.cross_every:
            yield "cross_every", f"= {self.cross_every} must divide depth = {self.depth}"

    def stack_flops(self, tokens: int, context_tokens: int = 0, context_width: int = 0) -> int:
        """Model FLOPs of the stack's forward pass for one sequence of `tokens` and its context."""
        own = transformer_flops(self.width, self.depth, self.mlp_dim, tokens, self.gated)
        if not self.cross_every:
            return own
        cross = cross_attention_flops(self.width, tokens, context_tokens, context_width)
        return own + self.depth // self.cross_every * cross


_KV = ("key", "value")


class Context(NamedTuple):
    """What the layers of a stack attend to besides their own tokens."""

    tokens_BxSxC: jax.Array | KeyValues  # noqa: N815 - or the keys and values of all heads that were made of them
    valid_BxS: jax.Array | None = None  # noqa: N815 - bool, those that may be attended to; None: all
    perturbation_BxHxTxS: jax.Array | None = None  # noqa: N815 - as of `Attention`


class PostNormBlock(Block):
    """x = ln_1(x + attention x); with a context x = ln_cross(x + attention from x to it); x = ln_2(x + mlp x).

    Attributes and arguments are those of `Block`, except that a context is attended to besides x, as it is.
    """

    config: TextStackConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array],
        keys: jax.Array | None,
        mask: jax.Array | None,
        bias: jax.Array | None,
        context: Context | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `Block`; `mask` and `bias` are those of the attention over x."""
        config, (index, rate) = self.config, layer
        keys, init = fold_in(keys, index), self.initializers.at_layer(index)
        branch = self._attention(init, dropout=config.attention_dropout)(
            x_BxTxD, mask=mask, bias=bias, causal=self.causal, keys=fold_in(keys, 3)
        )
        x_BxTxD = self._norm("ln_1", self._add(x_BxTxD, branch, "layer_scale_1", rate, fold_in(keys, 0)))
        if context is not None:
            branch = self._attention(init, name="cross", dropout=config.attention_dropout)(
                x_BxTxD,
                context.tokens_BxSxC,
                mask=over_keys(context.valid_BxS),
                keys=fold_in(keys, 4),
                perturbation_BxHxTxS=context.perturbation_BxHxTxS,
            )
            x_BxTxD = self._norm("ln_cross", self._add(x_BxTxD, branch, "layer_scale_cross", rate, fold_in(keys, 2)))
        x_BxTxD = checkpoint_name(x_BxTxD, "middle")
        x_BxTxD = self._add(x_BxTxD, self._mlp(init)(x_BxTxD), "layer_scale_2", rate, fold_in(keys, 1))
        x_BxTxD = self._norm("ln_2", x_BxTxD)
        return x_BxTxD, x_BxTxD if self.keep_output else None


class LayerGroup(nn.Module):
    """`cross_every` layers, of which the first attends to the context; as one layer of a stack. As `Block`."""

    config: TextStackConfig
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
        context: Context | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `Block`."""
        (index, rate), size = layer, self.config.cross_every
        for place in range(size):
            block = PostNormBlock(self.config, self.initializers, self.causal, False, self.dtype, name=f"layer_{place}")
            own = context if place == 0 else None
            x_BxTxD, _ = block(x_BxTxD, (size * index + place, rate), keys, mask, bias, own)
        return x_BxTxD, x_BxTxD if self.keep_output else None


class ContextAttention(Attention):
    """The keys and values of a context, for layers that share them; called with the context alone."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context_BxSxC: jax.Array, width: int
    ) -> KeyValues:
        """[B, S, C] -> keys and values [B, S, H, width / H]."""
        return KeyValues(*(self._split_heads(name, context_BxSxC, self.heads, width // self.heads) for name in _KV))


class TurnGroup(ResidualBlock):
    """As many layers as there are contexts, each looking at its own, as one layer of a stack. As `Block`.

    Parameters: `cross/{key,value}`, shared, and `layer_0/...`, whose cross-attention has a query and an output alone.
    """

    config: TextStackConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array],
        keys: jax.Array | None,
        mask: jax.Array | None,
        bias: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `Block`; the context's tokens are [B, contexts, S, C] and what is valid of them [B, contexts, S]."""
        (index, rate), size = layer, self.config.contexts
        shared = self._attention(self.initializers.at_layer(size * index), ContextAttention, name="cross")
        for place in range(size):
            block = PostNormBlock(self.config, self.initializers, self.causal, False, self.dtype, name=f"layer_{place}")
            tokens: Any = context.tokens_BxSxC
            valid = None if context.valid_BxS is None else context.valid_BxS[:, place]
            own = Context(shared(tokens[:, place], x_BxTxD.shape[-1]), valid)
            x_BxTxD, _ = block(x_BxTxD, (size * index + place, rate), keys, mask, bias, own)
        return x_BxTxD, x_BxTxD if self.keep_output else None


def run_layers(
    config: TextStackConfig,
    x_BxTxD: jax.Array,
    valid_BxT: jax.Array | None,
    keys: jax.Array | None,
    context: Context | None = None,
    *,
    causal: bool = False,
    intermediates: bool = False,
    dtype: Dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the stack as the submodule `blocks` of the compact module that calls this.

    Args:
        config: sizes and rates.
        x_BxTxD: embeddings, or hidden states of another stack of the same width.
        valid_BxT: bool, the tokens that may be attended to; None: all.
        keys: [B] keys of the rows, or None for no randomness.
        context: what every `cross_every`-th layer attends to as well; given if and only if there are such layers.
        causal: whether a token sees only those before it.
        intermediates: whether to keep each layer's output, or that of each group of `cross_every` layers.
        dtype: compute dtype.

    Returns:
        The last layer's output [B, T, D], and all outputs [L, B, T, D] or None.

    Raises:
        ValueError: a context without layers for it, or the other way round.
    """
    if (context is None) != (config.cross_every == 0):
        raise ValueError(f"cross_every = {config.cross_every}: a context is needed if and only if it is not 0")
    block, groups = layer_kind(config)
    return run_blocks(
        dataclasses.replace(config, depth=groups),
        x_BxTxD,
        keys,
        mask=over_keys(valid_BxT),
        context=context,
        causal=causal,
        intermediates=intermediates,
        dtype=dtype,
        block=block,
    )


def layer_kind(config: TextStackConfig) -> tuple[type[nn.Module], int]:
    """What a stack repeats, a layer or a group of layers, and how often."""
    if config.contexts > 1:
        return TurnGroup, config.depth // config.contexts
    if config.cross_every > 1:
        return LayerGroup, config.depth // config.cross_every
    return PostNormBlock, config.depth


def over_keys(valid_BxS: jax.Array | None) -> jax.Array | None:
    """bool [B, S], what may be attended to -> a mask of attention [B, 1, 1, S]; None stays None."""
    return None if valid_BxS is None else valid_BxS[:, None, None, :]


__all__ = ["Context", "PostNormBlock", "TextStackConfig", "layer_kind", "over_keys", "run_layers"]
