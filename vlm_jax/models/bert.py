"""The BERT family: post-norm encoders of text that may end early, start from hidden states, and attend to an image.

`TextEncoder` embeds tokens, `TextStack` goes on from hidden states (ALBEF's fusion encoder, a decoder of answers), and
`MaskedWordHead` says which word stood where. A text pass followed by a fusion pass is one pass of a BERT of both
depths. Not for pre-norm towers such as CLIP's, which `text` has.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import zeros

from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import INITIALIZERS
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ACTIVATIONS
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.post_norm import Context, TextStackConfig, run_layers
from vlm_jax.models.stochastic import dropout, fold_in
from vlm_jax.models.weights import weight


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
            context_BxSxC: what is attended to besides, see `run_layers`; of several contexts [B, contexts, S, C].
            keys: [B] typed keys, one a row, or None at evaluation.
            context_valid_BxS: bool, what of the context may be attended to; None: all. Of several [B, contexts, S].
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
    "MaskedWordHead",
    "MaskedWordHeadConfig",
    "TextEncoder",
    "TextEncoderConfig",
    "TextStack",
    "TextStackConfig",
    "valid_tokens",
]
