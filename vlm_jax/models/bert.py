"""The BERT family: post-norm encoders of text that may end early, start from hidden states, and attend to an image.

`TextEncoder` embeds tokens, `TextStack` goes on from hidden states (ALBEF's fusion encoder, a decoder of answers), and
`MaskedWordHead` says which word stood where. A text pass followed by a fusion pass is one pass of a BERT of both
depths. Not for pre-norm towers such as CLIP's, which `text` has.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import zeros

from vlm_jax.flops import cross_attention_flops, transformer_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import INITIALIZERS, Initializers
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ACTIVATIONS, ActivationName
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.stochastic import dropout, fold_in
from vlm_jax.models.transformer import Block, TransformerConfig, run_blocks
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class TextStackConfig(TransformerConfig):
    """A stack of post-norm layers; the defaults are those of BERT-base."""

    activation: ActivationName = "gelu"  # of the MLP
    norm_eps: float = 1e-12  # added to the variance in every norm
    dropout: float = 0.1  # on the embeddings and on the output of attention and of the MLP
    attention_dropout: float = 0.1  # on the weights of attention
    # every how many layers, from the first on, one also attends to a context: 1 in each (ALBEF), 0 in none
    cross_every: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if not 0 <= self.attention_dropout < 1:
            yield "attention_dropout", f"= {self.attention_dropout} is a probability; it must lie in [0, 1)"
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


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(TextStackConfig):
    """Embeddings and a stack; the defaults are BERT-base (Devlin et al. 2019)."""

    vocab_size: int = 30522  # number of token ids
    positions: int = 512  # rows of the table of positions, the most tokens that a text may have
    segments: int = 2  # rows of the table of segments; all tokens are of the first
    pad_id: int = 0  # padding id, which nothing attends to

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        for key in ("vocab_size", "positions", "segments"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1"
        if not 0 <= self.pad_id < self.vocab_size:
            yield "pad_id", f"= {self.pad_id} is no id of a vocabulary of {self.vocab_size}"


@dataclasses.dataclass(frozen=True)
class MaskedWordHeadConfig:
    """What predicts words."""

    # whether words are scored by the table that embeds them, as in BERT, or by one of the head's own
    tied: bool = True

    def head_flops(self, encoder: TextEncoderConfig, width: int, tokens: int) -> int:
        """Model FLOPs of the head on the states [tokens, width] of one sequence."""
        inner = encoder.width if self.tied else width
        return 2 * tokens * inner * (width + encoder.vocab_size)


class Context(NamedTuple):
    """What the layers of a stack attend to besides their own tokens."""

    tokens_BxSxC: jax.Array  # noqa: N815
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
    if config.cross_every > 1:
        return LayerGroup, config.depth // config.cross_every
    return PostNormBlock, config.depth


class TextEncoder(nn.Module):
    """Token ids to hidden states; with `causal` and a context a decoder of texts.

    Attributes:
        config: embeddings and stack.
        dtype: compute dtype; parameters are fp32.
        causal: whether a token sees only those before it.
    """

    config: TextEncoderConfig
    dtype: Dtype = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        ids_BxT: jax.Array,
        keys: jax.Array | None = None,
        context: Context | None = None,
        *,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Encodes token ids.

        Args:
            ids_BxT: int32, at most `config.positions` a row.
            keys: [B] typed keys, one a row, or None at evaluation.
            context: what is attended to besides, see `run_layers`.
            intermediates: whether to return every layer's output.

        Returns:
            "tokens" [B, T, D], the last layer's output; "table" [V, D], the embeddings, for `MaskedWordHead`; with
            intermediates "embed" [B, T, D], the first layer's input, and "blocks" [L, B, T, D], every layer's output.

        Raises:
            ValueError: the texts are longer than the table of positions.
        """
        config, length = self.config, ids_BxT.shape[1]
        if length > config.positions:
            raise ValueError(f"this encoder takes at most {config.positions} tokens, not {length}; cut the texts")
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        table = weight(self, "token_embed", init.token, ("vocab", "embed"), (config.vocab_size, config.width))
        # Not called `pos_embed`: these rows belong to no grid, and a warm start must not resize them.
        positions = weight(self, "position_embed", init.position, (None, "embed"), (config.positions, config.width))
        segments = weight(self, "segment_embed", init.position, (None, "embed"), (config.segments, config.width))
        # Whole before the lookup, for the reason given in `text`.
        table = constrain(table.astype(self.dtype), "vocab", "embed")
        places = constrain((positions[:length] + segments[:1]).astype(self.dtype), None, "embed")
        x = constrain(table[ids_BxT] + places[None], "batch", "length", "embed")
        x = LayerNorm(config.norm_eps, name="embed_norm")(x)
        x = embed = dropout(x, config.dropout, fold_in(keys, 0))
        x, blocks = run_layers(
            config,
            x,
            valid_tokens(config, ids_BxT),
            fold_in(keys, 1),
            context,
            causal=self.causal,
            intermediates=intermediates,
            dtype=self.dtype,
        )
        return {"tokens": x, "table": table} | ({} if blocks is None else {"embed": embed, "blocks": blocks})


def valid_tokens(config: TextEncoderConfig, ids_BxT: jax.Array) -> jax.Array:
    """bool [B, T], the tokens that are no padding."""
    return ids_BxT != config.pad_id


def over_keys(valid_BxS: jax.Array | None) -> jax.Array | None:
    """bool [B, S], what may be attended to -> a mask of attention [B, 1, 1, S]; None stays None."""
    return None if valid_BxS is None else valid_BxS[:, None, None, :]


class TextStack(nn.Module):
    """Layers that start from hidden states: the fusion encoder of ALBEF, or with `causal` a decoder of answers.

    Attributes:
        config: the stack.
        dtype: compute dtype; parameters are fp32.
        causal: whether a token sees only those before it.
    """

    config: TextStackConfig
    dtype: Dtype = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        states_BxTxD: jax.Array,
        valid_BxT: jax.Array | None,
        context_BxSxC: jax.Array | None = None,
        keys: jax.Array | None = None,
        *,
        context_valid_BxS: jax.Array | None = None,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Goes on from hidden states.

        Args:
            states_BxTxD: of another width than the stack's, they go through a projection first.
            valid_BxT: bool, the tokens that may be attended to; None: all.
            context_BxSxC: what is attended to besides, see `run_layers`.
            keys: [B] typed keys, one a row, or None at evaluation.
            context_valid_BxS: bool, what of the context may be attended to; None: all.
            intermediates: whether to return every layer's output.

        Returns:
            As `TextEncoder`, without "table".
        """
        config, x = self.config, states_BxTxD
        if x.shape[-1] != config.width:
            init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim).projection
            x = Linear((config.width,), ("embed", None), init, dtype=self.dtype, name="project")(x)
            x = constrain(x, "batch", "length", "embed")
        embed, context = x, None if context_BxSxC is None else Context(context_BxSxC, context_valid_BxS)
        x, blocks = run_layers(
            config, x, valid_BxT, keys, context, causal=self.causal, intermediates=intermediates, dtype=self.dtype
        )
        return {"tokens": x} | ({} if blocks is None else {"embed": embed, "blocks": blocks})


class MaskedWordHead(nn.Module):
    """Linear, activation, norm, and a score for every word, by the encoder's own table where it is tied.

    Attributes:
        config: of the head.
        encoder: whose vocabulary and, where it is tied, whose table it has; its activation and eps are those here.
        dtype: compute dtype; parameters are fp32.
    """

    config: MaskedWordHeadConfig
    encoder: TextEncoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, states_BxTxD: jax.Array, table_VxE: jax.Array) -> jax.Array:
        """Hidden states, of any width, and the embeddings of words -> logits [B, T, V] in the compute dtype."""
        encoder = self.encoder
        init = INITIALIZERS[encoder.init](encoder.width, encoder.depth, encoder.mlp_dim)
        width = encoder.width if self.config.tied else states_BxTxD.shape[-1]
        x = Linear((width,), ("embed", None), init.projection, dtype=self.dtype, name="transform")(states_BxTxD)
        x = LayerNorm(encoder.norm_eps, name="norm")(ACTIVATIONS[encoder.activation](x))
        x = constrain(x, "batch", "length", "embed")
        if not self.config.tied:
            table_VxE = weight(self, "table", init.token, ("vocab", "embed"), (encoder.vocab_size, width))
            table_VxE = table_VxE.astype(self.dtype)
        logits = constrain(jnp.einsum("BTE,VE->BTV", x, table_VxE), "batch", "length", "vocab")
        bias = weight(self, "bias", zeros, ("vocab",), (encoder.vocab_size,)).astype(self.dtype)
        return logits + jnp.broadcast_to(bias, logits.shape)


__all__ = [
    "Context",
    "MaskedWordHead",
    "MaskedWordHeadConfig",
    "PostNormBlock",
    "TextEncoder",
    "TextEncoderConfig",
    "TextStack",
    "TextStackConfig",
    "layer_kind",
    "over_keys",
    "valid_tokens",
]
