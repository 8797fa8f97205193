"""A causal language model of the Llama family: Llama 2 and Vicuna, SmolLM2, Qwen2, Gemma.

It reads token ids, or embeddings that a caller has put together from words and image features, and gives the states
after its last norm. The head is not applied here: training applies it chunk by chunk (`vlm_jax.losses.vocabulary`),
generation to one token at a time (`vlm_jax.models.generation`). Sizes by name are in `presets`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal

from vlm_jax.flops import decoder_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.attention import DecoderAttention, KeyValues
from vlm_jax.models.initializers import INITIALIZERS, InitName
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.norms import NORMS, NormName
from vlm_jax.models.rotary import PlainRope, RopeConfig, Rotary, rotary
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.transformer import ResidualBlock, TransformerConfig, scanned
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A decoder; the defaults are SmolLM2-135M."""

    width: int = 576  # of the residual stream
    depth: int = 30  # number of blocks
    heads: int = 9  # attention heads; divides width unless head_dim is given
    kv_heads: int = 3  # heads of keys and values, each for heads / kv_heads of the queries; 0: as many as heads
    head_dim: int = 0  # channels of a head; 0: width / heads
    mlp_dim: int = 1536  # hidden width of the MLP
    activation: ActivationName = "silu"  # of the MLP
    gated: bool = True  # whether the MLP has a gate; with "silu" it is SwiGLU, with "gelu_tanh" Gemma's GeGLU
    norm: NormName = "rms"  # root mean square norm, or Gemma's, whose scale is stored as its offset from 1
    qkv_bias: bool = False  # biases on query, key and value (Qwen2)
    out_bias: bool = False  # bias on the output projection of attention
    mlp_bias: bool = False  # biases in the MLP
    init: InitName = "llama"  # recipe of the initial weights
    vocab_size: int = 49_152  # number of token ids that the model was made with
    extra_tokens: int = 0  # ids added after those, with rows of their own in embeddings and head
    extra_spread: float = 0.02  # standard deviation of the added rows' start
    tied: bool = True  # whether the head is the table of embeddings
    scaled_embeddings: bool = False  # whether embeddings are multiplied by the root of the width (Gemma)
    rope: RopeConfig = PlainRope(theta=100_000.0)
    max_length: int = 8192  # tokens of the longest text that it is made for; a note for exports, nothing has this shape

    @property
    def table_size(self) -> int:
        """Number of token ids, the added ones included."""
        return self.vocab_size + self.extra_tokens

    @property
    def head_width(self) -> int:
        """Channels of a head of attention."""
        return self.head_dim or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """See the base."""
        return self.head_dim * self.heads or self.width

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.kv_heads > 0 and self.heads >= 1 and self.heads % self.kv_heads:
            yield "kv_heads", f"= {self.kv_heads} does not divide heads = {self.heads}; use 0 for as many as heads"
        for key, value, least in (
            ("kv_heads", self.kv_heads, 0),
            ("head_dim", self.head_dim, 0),
            ("vocab_size", self.vocab_size, 1),
            ("extra_tokens", self.extra_tokens, 0),
            ("max_length", self.max_length, 1),
        ):
            if value < least:
                yield key, f"= {value} must be at least {least}"
        if self.extra_spread < 0:
            yield "extra_spread", f"= {self.extra_spread} must not be negative"
        if self.heads >= 1 and self.head_width % 2:
            yield "head_dim", f"= {self.head_width} must be even: rotary positions turn channels in pairs"

    def forward_flops(self, tokens: int) -> int:
        """Model FLOPs of the forward pass of one row of `tokens`, head included; attention counts in full."""
        return decoder_flops(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_width,
            mlp_dim=self.mlp_dim,
            vocab_size=self.table_size,
            tokens=tokens,
            gated=self.gated,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What the tokens of a call see of each other and of a cache; all blocks share it.

    Attributes:
        angles: rotation of queries and keys by position.
        segments: int32 [B, T], or None; see `attention.attend`.
        mask: bool, broadcasts to [B, H, T, S], or None.
        slot: () int32, where in the cache the tokens stand; None without a cache.
    """

    angles: Rotary
    segments: jax.Array | None = None
    mask: jax.Array | None = None
    slot: jax.Array | None = None


class DecoderBlock(ResidualBlock):
    """x += attention(ln_1 x); x += mlp(ln_2 x), with rotary positions and a cache of keys and values."""

    config: DecoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array, KeyValues | None],
        keys: jax.Array | None,
        view: View,
    ) -> tuple[jax.Array, KeyValues | None]:
        """[B, T, D] and (index, drop-path rate, cache or None) -> [B, T, D] and the tokens' own keys and values."""
        index, rate, cache = layer
        keys, init = fold_in(keys, index), self.initializers.at_layer(index)
        shape: dict[str, Any] = {"kv_heads": self.config.kv_heads, "head_dim": self.config.head_dim}
        branch, own = self._attention(init, DecoderAttention, **shape)(
            self._norm("ln_1", x_BxTxD),
            view.angles,
            mask=view.mask,
            segments_BxT=view.segments,
            causal=self.causal,
            cache=cache,
            slot=view.slot,
        )
        x_BxTxD = self._add_attention(x_BxTxD, branch, rate, keys)
        x_BxTxD = self._add_mlp(x_BxTxD, init, rate, keys)
        return x_BxTxD, own if self.keep_output else None


class Decoder(nn.Module):
    """Parameters: `token_embed` [V, D], `blocks/...`, `norm/scale`, unless tied `head`; of added ids `extra_...`.

    Attributes:
        config: sizes.
        dtype: compute dtype; parameters are fp32.
    """

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tables and norm; the blocks are made where they run."""
        config = self.config
        start = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim).token
        extra = normal(config.extra_spread)
        self.token_embed = self._table("token_embed", start, config.vocab_size)
        self.extra_embed = self._table("extra_embed", extra, config.extra_tokens)
        self.own_head = None if config.tied else self._table("head", start, config.vocab_size)
        self.extra_head = None if config.tied else self._table("extra_head", extra, config.extra_tokens)
        self.norm = NORMS[config.norm](config.norm_eps)

    def _table(self, name: str, init: Any, rows: int) -> jax.Array | None:
        return weight(self, name, init, ("vocab", "embed"), (rows, self.config.width)) if rows else None

    def embed(self, ids_BxT: jax.Array) -> jax.Array:
        """int32 ids -> [B, T, D] as they enter the first block."""
        # Whole before the lookup, for the reason given in `text`.
        table = constrain(jnp.asarray(_joined(self.token_embed, self.extra_embed), self.dtype), "vocab", "embed")
        x = table[ids_BxT]
        if self.config.scaled_embeddings:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        return constrain(x, "batch", "length", "embed")

    def head_rows(self) -> jax.Array:
        """[V, D] fp32: the logits of a state are its products with these rows."""
        if self.config.tied:
            return _joined(self.token_embed, self.extra_embed)
        return _joined(self.own_head, self.extra_head)

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """States -> fp32 [B, T, V]; for few tokens."""
        head = constrain(self.head_rows().astype(self.dtype), "vocab", "embed")
        logits = jnp.einsum("BTD,VD->BTV", hidden_BxTxD, head, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "length", "vocab")

    def __call__(
        self,
        tokens: jax.Array,
        keys: jax.Array | None = None,
        *,
        segments_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        prefix_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Rows of text -> the states from which the next token is predicted.

        Args:
            tokens: int32 ids [B, T], or embeddings [B, T, D] as `embed` makes them.
            keys: [B] typed keys, or None for no randomness.
            segments_BxT: int32, number of the document that a token belongs to; documents don't see each other. What
                fills a row up has a number of its own, such as 0. None: a row is one document.
            positions_BxT: int32, counted in the document; None: counted in the row.
            prefix_BxT: bool, tokens of stretches that are seen as a whole (PaliGemma's prefix-LM); see `prefix_mask`.
                None: every token sees only those before it.

        Returns:
            [B, T, D] after the last norm, in the compute dtype.
        """
        return self.with_keys(tokens, keys, segments_BxT, positions_BxT, prefix_BxT, keep=False)[0]

    def with_keys(
        self,
        tokens: jax.Array,
        keys: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        prefix_BxT: jax.Array | None = None,
        keep: bool = True,
    ) -> tuple[jax.Array, KeyValues | None]:
        """As the call, and with `keep` every layer's keys and values [L, B, T, K, D], with which a cache begins."""
        rows, length = tokens.shape[:2]
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
        angles = rotary(self.config.rope, self.config.head_width, positions_BxT)
        if prefix_BxT is None:
            return self._run(tokens, keys, View(angles, segments_BxT), causal=True, keep=keep)
        if segments_BxT is None:
            segments_BxT = jnp.zeros((rows, length), jnp.int32)
        view = View(angles, mask=prefix_mask(prefix_BxT, segments_BxT))
        return self._run(tokens, keys, view, causal=False, keep=keep)

    def step(
        self, ids_Bx1: jax.Array, position_B: jax.Array, cache: KeyValues, slot: jax.Array, seen_BxS: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """One more token of every row.

        Args:
            ids_Bx1: int32, the tokens.
            position_B: int32, counted in the document.
            cache: [L, B, S, K, D].
            slot: () int32, where in the cache the token will stand.
            seen_BxS: bool, which places of the cache it sees, its own among them.

        Returns:
            The state [B, 1, D], and the token's own keys and values [L, B, 1, K, D].
        """
        angles = rotary(self.config.rope, self.config.head_width, position_B[:, None])
        view = View(angles, mask=seen_BxS[:, None, None, :], slot=slot)
        hidden, own = self._run(ids_Bx1, None, view, causal=False, keep=True, cache=cache)
        assert own is not None
        return hidden, own

    @nn.compact
    def _run(
        self,
        tokens: jax.Array,
        keys: jax.Array | None,
        view: View,
        *,
        causal: bool,
        keep: bool,
        cache: KeyValues | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        config = self.config
        x = self.embed(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(self.dtype)
        x, own = constrain(x, "batch", "length", "embed"), None
        if config.depth:
            init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
            rates = np.linspace(0.0, config.drop_path, config.depth, dtype=np.float32)
            stack = scanned(DecoderBlock, config.depth, config.remat, config.scan, broadcast=2)
            blocks = stack(config, init, causal, keep, self.dtype, name="blocks")
            x, own = blocks(x, (jnp.arange(config.depth), jnp.asarray(rates), cache), keys, view)
        return self.norm(x), own


def prefix_mask(prefix_BxT: jax.Array, segments_BxT: jax.Array) -> jax.Array:
    """Who sees whom where stretches of a text are seen as a whole, bool [B, 1, T, T].

    A token sees those before it in its document and, if it belongs to a prefix, that whole stretch of neighbouring
    prefix tokens; another stretch further on is not seen, for what stands between may be what is learnt.

    Args:
        prefix_BxT: bool.
        segments_BxT: int32 number of the document.
    """
    before = (prefix_BxT & (segments_BxT == jnp.roll(segments_BxT, 1, axis=1)))[:, 1:]
    joins = jnp.pad(before & prefix_BxT[:, :-1], ((0, 0), (1, 0)))  # a token of the stretch that its left one is of
    stretch_BxT = jnp.cumsum(~joins, axis=1)
    earlier = stretch_BxT[:, None, :, None] >= stretch_BxT[:, None, None, :]
    return earlier & (segments_BxT[:, None, :, None] == segments_BxT[:, None, None, :])


def _joined(table: jax.Array | None, extra: jax.Array | None) -> jax.Array:
    assert table is not None
    return table if extra is None else jnp.concatenate([table, extra])


__all__ = ["Decoder", "DecoderBlock", "DecoderConfig", "View", "prefix_mask"]
