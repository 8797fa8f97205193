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
from vlm_jax.models.initializers import INITIALIZERS, InitName
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
    pool: Literal["eot_argmax", "first_eos", "last", "first", "mean", "map"] = (
        "eot_argmax"  # which token(s) stand for it
    )
    eos_id: int = 49407  # end-of-text id, for pool "first_eos"
    pad_id: int = 0  # padding id
    mask_padding: bool = False  # hide padding from attention and from pools "mean" and "map"
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
        if self.causal and self.pool == "first":
            yield "pool", "= 'first' under causal attention sees one token only; set causal = false or pool by another"

    def forward_flops(self, embed_dim: int) -> int:
        """Model FLOPs of one text's forward pass, with a projection to `embed_dim` (0: none)."""
        return text_flops(
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            tokens=self.length,
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

        Raises:
            ValueError: the texts are longer than the config's length.
        """
        config, length = self.config, ids_BxL.shape[1]
        if length > config.length:
            raise ValueError(f"this tower takes at most {config.length} tokens, not {length}; cut them, or set length")
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        table = weight(self, "token_embed", init.token, ("vocab", "embed"), (config.vocab_size, config.width))
        positions = weight(self, "pos_embed", init.position, (None, "embed"), (config.length, config.width))
        # Whole on every chip of the batch axes before the lookup: from a table split along its width the compiler would
        # look up the rows of the whole batch everywhere.
        table = constrain(table.astype(self.dtype), "vocab", "embed")
        positions = constrain(positions.astype(self.dtype), None, "embed")
        x = table[ids_BxL] + positions[None, :length]
        embed = x = constrain(x, "batch", "length", "embed")
        valid_BxL = ids_BxL != config.pad_id if config.mask_padding else None
        mask = None if valid_BxL is None else valid_BxL[:, None, None, :]
        x, blocks = run_blocks(
            config, x, keys, mask=mask, causal=config.causal, intermediates=intermediates, dtype=self.dtype
        )
        norm = LayerNorm(config.norm_eps, name="ln_final")
        outputs = {"tokens": norm(x)}
        if config.pool == "mean":
            outputs["pooled"] = mean_tokens(outputs["tokens"], valid_BxL)
        elif config.pool == "map":
            outputs["pooled"] = MapHead(config, init, dtype=self.dtype, name="map_head")(outputs["tokens"], mask)
        else:
            outputs["pooled"] = norm(select_token(x, TEXT_POOLS[config.pool](ids_BxL, config.eos_id)))
        if self.projection is not None:
            outputs["embedding"] = project(self.projection, init.projection, outputs["pooled"], self.dtype)
        if blocks is not None:
            outputs |= {"embed": embed, "blocks": blocks}
        return outputs


__all__ = ["TextConfig", "TextTower"]
