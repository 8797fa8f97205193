"""Attentional pooling on top of an image tower (CoCa, Yu et al. 2022, section 3.2): one vector, and a few tokens.

A tower around a tower: what it pools is any image tower that hands out tokens. The head of one query with an MLP
(SigLIP's) is `pooling.MapHead`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.flops import attention_pool_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.attention import Attention
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.projection import ProjectionConfig, project
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class AttentionalPoolConfig(ImageTowerConfig):
    """A tower whose tokens are pooled by learned queries; the defaults are CoCa's."""

    # the tower below, which itself pools nothing
    tower: ImageTowerConfig = dataclasses.field(default_factory=lambda: ViTConfig(pool="none"))
    # "cascade": `queries` queries make the tokens, one query on those the vector; "parallel": the one query looks at
    # the tower too; "open_clip": one pooler, whose first query is the vector and whose others are the tokens
    form: Literal["cascade", "parallel", "open_clip"] = "cascade"
    queries: int = 256  # of the pooler that makes the tokens
    width: int = 768  # of the queries, and so of tokens and vector
    heads: int = 8  # attention heads; divides width
    norm_eps: float = 1e-5  # added to the variance in every layer norm
    init: InitName = "clip_image"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        for key, value in (("queries", self.queries), ("width", self.width), ("heads", self.heads)):
            least = 2 if key == "queries" and self.form == "open_clip" else 1
            if value < least:
                yield key, f"= {value} must be at least {least}"
        if self.heads >= 1 and self.width % self.heads:
            yield "heads", f"= {self.heads} does not divide width {self.width}"
        if self.tower.pools:
            yield "tower", "pools its tokens itself, and the result would be thrown away; set tower.pool = 'none'"

    @property
    def image_shape(self) -> tuple[int, int]:
        """See the base."""
        return self.tower.image_shape

    @property
    def pooled_width(self) -> int:
        """See the base."""
        return self.width

    @property
    def token_width(self) -> int:
        """See the base."""
        return self.width

    @property
    def token_count(self) -> int:
        """See the base."""
        return self.queries - (self.form == "open_clip")

    def build(self, projection: ProjectionConfig | None, dtype: Dtype) -> "AttentionalPool":
        """See the base."""
        return AttentionalPool(self, projection, dtype)

    def forward_flops(self, embed_dim: int) -> int:
        """See the base."""
        pooling = self._pooler_flops(self.tower.token_count, self.tower.token_width, self.queries)
        if self.form == "cascade":
            pooling += self._pooler_flops(self.queries, self.width, 1)
        elif self.form == "parallel":
            pooling += self._pooler_flops(self.tower.token_count, self.tower.token_width, 1)
        return self.tower.forward_flops(0) + pooling + 2 * self.width * embed_dim

    def _pooler_flops(self, tokens: int, token_width: int, queries: int) -> int:
        # The closed form knows one width; here keys and values are projected from another.
        wider = 2 * 2 * tokens * (token_width - self.width) * self.width
        return attention_pool_flops(self.width, tokens, queries) + wider

    def without_dropped_patches(self) -> "AttentionalPoolConfig":
        """See the base."""
        return dataclasses.replace(self, tower=self.tower.without_dropped_patches())

    def updated(self, params: Any, statistics: Any) -> Any:
        """See the base."""
        return params | {"tower": self.tower.updated(params["tower"], statistics)}


class AttentionalPool(nn.Module):
    """The tower, the poolers, a norm after each, and the projection of the vector.

    Parameters: `tower`, `pooler`, `ln_post`, and in two of the forms `contrastive` and `ln_contrastive`.

    Attributes:
        config: the tower and the poolers.
        projection: the head on the pooled vector, or None.
        dtype: compute dtype; parameters are fp32.
    """

    config: AttentionalPoolConfig
    projection: ProjectionConfig | None = None
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the tower below, of whatever kind."""
        self.tower = self.config.tower.build(None, self.dtype)

    @nn.compact
    def __call__(
        self, images_BxHxWxC: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Normalised images -> "tokens" [B, Q, D], "pooled" [B, D], "embedding", and what else the tower gives."""
        config = self.config
        init = INITIALIZERS[config.init](config.width, 1, 4 * config.width)
        outputs: dict[str, jax.Array] = self.tower(images_BxHxWxC, keys, intermediates=intermediates)
        tokens = self._pool(outputs["tokens"], config.queries, init, "pooler", "ln_post")
        if config.form == "open_clip":
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        else:
            source = tokens if config.form == "cascade" else outputs["tokens"]
            pooled = self._pool(source, 1, init, "contrastive", "ln_contrastive")[:, 0]
        outputs = outputs | {"tokens": tokens, "pooled": pooled}
        if self.projection is not None:
            outputs["embedding"] = project(self.projection, init.projection, pooled, self.dtype)
        return outputs

    def _pool(self, x: jax.Array, queries: int, init: Initializers, name: str, norm: str) -> jax.Array:
        pooled = Pooler(self.config, queries, init, self.dtype, name=name)(x)
        return LayerNorm(self.config.norm_eps, name=norm)(pooled)


class Pooler(nn.Module):
    """One attention from learned queries to tokens, both normalised; no residual and no MLP.

    Attributes:
        config: width, heads and eps.
        queries: how many.
        initializers: recipe of the weights.
        dtype: compute dtype.
    """

    config: AttentionalPoolConfig
    queries: int
    initializers: Initializers
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxSxC: jax.Array) -> jax.Array:
        """[B, S, C] -> [B, Q, D]."""
        config, shape = self.config, (self.queries, self.config.width)
        query_QxD = weight(self, "query", self.initializers.probe, (None, "embed"), shape).astype(self.dtype)
        query_QxD = LayerNorm(config.norm_eps, name="ln_query")(query_QxD)
        query_BxQxD = jnp.broadcast_to(query_QxD, (x_BxSxC.shape[0], *shape))
        attention = Attention(config.heads, self.initializers, dtype=self.dtype, name="attn")
        pooled = attention(query_BxQxD, LayerNorm(config.norm_eps, name="ln_context")(x_BxSxC))
        return constrain(pooled, "batch", "length", "embed")


__all__ = ["AttentionalPool", "AttentionalPoolConfig"]
