"""The text tower of dual encoders. Decoders that generate are other modules."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.flops import text_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.pooling import TEXT_POOLS, MapHead, mean_tokens, select_token
from vlm_jax.models.projection import ProjectionConfig, project
from vlm_jax.models.transformer import TransformerConfig, run_blocks
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class TextConfig(TransformerConfig):
    """A text tower; the defaults are those of CLIP's B models."""

    width: int = 512  # of the residual stream
    heads: int = 8  # attention heads; divides width
    mlp_dim: int = 2048  # hidden width of the MLP
    vocab_size: int = 49408  # number of token ids
    length: int = 77  # tokens per text
    causal: bool = True  # whether a token sees only those before it
    # which token(s) stand for the text; "cls" is a learned one that is appended to it (CoCa)
    pool: Literal["eot_argmax", "first_eos", "last", "first", "mean", "map", "cls"] = "eot_argmax"
    eos_id: int = 49407  # end-of-text id, for pool "first_eos"
    pad_id: int = 0  # padding id
    mask_padding: bool = False  # hide padding from attention and from pools "mean", "map" and "cls"
    # positions by which that mask comes late: 1 with pool "cls" in open_clip's CoCa, whose weights were trained so
    mask_shift: int = 0
    # positions of the tokens; with "none", depth 0, pool "mean" and mask_padding the tower is a bag of words
    pos_embed: Literal["learned", "none"] = "learned"
    init: InitName = "clip_text"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        for key, value in (("vocab_size", self.vocab_size), ("length", self.length)):
            if value < 1:
                yield key, f"= {value} must be at least 1"
        for key, value in (("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if not 0 <= value < self.vocab_size:
                yield key, f"= {value} is no id of a vocabulary of {self.vocab_size}"
        if self.mask_shift and not (self.mask_shift == 1 and self.mask_padding and self.pool == "cls"):
            yield "mask_shift", f"= {self.mask_shift} must be 0, or 1 with mask_padding = true and pool = 'cls'"
        if self.causal and self.pool == "first":
            yield "pool", "= 'first' under causal attention sees one token only; set causal = false or pool by another"

    @property
    def positions(self) -> int:
        """Positions of the tower: the tokens, and the one that is appended if there is one."""
        return self.length + (self.pool == "cls")

    def forward_flops(self, embed_dim: int) -> int:
        """Model FLOPs of one text's forward pass, with a projection to `embed_dim` (0: none)."""
        return text_flops(
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            tokens=self.positions,
            embed_dim=embed_dim,
            map_head=self.pool == "map",
        )


class TextTower(nn.Module):
    """Token ids to a vector: CLIP's causal tower, SigLIP's and FLIP's bidirectional ones by config.

    Attributes:
        config: the tower.
        projection: the head on the pooled vector, or None.
        dtype: compute dtype; parameters are fp32.
    """

    config: TextConfig
    projection: ProjectionConfig | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, ids_BxL: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Encodes token ids.

        Args:
            ids_BxL: int32; at most the config's length.
            keys: [B] typed keys, one a row, or None at evaluation.
            intermediates: whether to return what stands between the layers.

        Returns:
            As `ViT`: "tokens" [B, L, D], "pooled" [B, D], "embedding", and with intermediates "embed" and "blocks".
            With pool "cls" also "stream" [B, L, D], the tokens before the last norm, for a decoder that goes on there.

        Raises:
            ValueError: the texts are longer than the config's length.
        """
        config, length = self.config, ids_BxL.shape[1]
        if length > config.length:
            raise ValueError(f"this tower takes at most {config.length} tokens, not {length}; cut them, or set length")
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        embed, valid_BxL = self._embed(ids_BxL, init)
        mask = None if valid_BxL is None else valid_BxL[:, None, None, :]
        x, blocks = run_blocks(
            config, embed, keys, mask=mask, causal=config.causal, intermediates=intermediates, dtype=self.dtype
        )
        outputs = self._pool(x, ids_BxL, valid_BxL, init)
        if self.projection is not None:
            outputs["embedding"] = project(self.projection, init.projection, outputs["pooled"], self.dtype)
        if blocks is not None:
            outputs |= {"embed": embed, "blocks": blocks}
        return outputs

    def _embed(self, ids_BxL: jax.Array, init: Initializers) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings with their positions, and which of them may be seen if not all; both with the class token."""
        config = self.config
        table = weight(self, "token_embed", init.token, ("vocab", "embed"), (config.vocab_size, config.width))
        # Whole on every chip of the batch axes before the lookup: from a table split along its width the compiler would
        # look up the rows of the whole batch everywhere.
        table = constrain(table.astype(self.dtype), "vocab", "embed")
        x = table[ids_BxL]
        valid_BxL = ids_BxL != config.pad_id if config.mask_padding else None
        if config.pool == "cls":
            token = weight(self, "class_token", init.class_token, ("embed",), (config.width,)).astype(self.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(token, (x.shape[0], 1, config.width))], axis=1)
            if valid_BxL is not None:
                sides = (config.mask_shift, 1 - config.mask_shift)
                valid_BxL = jnp.pad(valid_BxL, ((0, 0), sides), constant_values=True)
        if config.pos_embed == "learned":
            positions = weight(self, "pos_embed", init.position, (None, "embed"), (config.positions, config.width))
            x = x + constrain(positions.astype(self.dtype), None, "embed")[None, : x.shape[1]]
        return constrain(x, "batch", "length", "embed"), valid_BxL

    def _pool(
        self, x: jax.Array, ids_BxL: jax.Array, valid_BxL: jax.Array | None, init: Initializers
    ) -> dict[str, jax.Array]:
        config, norm = self.config, LayerNorm(self.config.norm_eps, name="ln_final")
        if config.pool == "cls":
            stream = x[:, :-1]
            return {"tokens": norm(stream), "stream": stream, "pooled": norm(x[:, -1])}
        tokens = norm(x)
        if config.pool == "mean":
            return {"tokens": tokens, "pooled": mean_tokens(tokens, valid_BxL)}
        if config.pool == "map":
            mask = None if valid_BxL is None else valid_BxL[:, None, None, :]
            return {"tokens": tokens, "pooled": MapHead(config, init, dtype=self.dtype, name="map_head")(tokens, mask)}
        return {"tokens": tokens, "pooled": norm(select_token(x, TEXT_POOLS[config.pool](ids_BxL, config.eos_id)))}


__all__ = ["TextConfig", "TextTower"]
