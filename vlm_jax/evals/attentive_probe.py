"""Attentive probe: one learned query pools the tokens of a frozen tower, and a linear classifier reads the result.

The protocol of AIM and AIMv2 (El-Nouby et al. 2024, appendix; Fini et al. 2024, table A2) for models that are trained
without a vector of the whole image. A batch norm without affine part over the tokens, keys and values without biases,
no projection of the query or of the output, a classifier without a bias.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.evals.base import Encoder
from vlm_jax.evals.probe_training import Head, Probe, ProbeTraining
from vlm_jax.evals.trained_probe import TrainedProbeConfig, TrainedProbeEvaluator
from vlm_jax.models.initializers import torch_linear
from vlm_jax.schema import ConfigError

BATCH_NORM_EPS = 1e-6

# AIMv2, table A2.
PUBLISHED = ProbeTraining(
    optimizer="adamw",
    learning_rates=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
    weight_decays=(0.05, 0.1),
    min_learning_rate=1e-5,
    epochs=100,
    warmup_epochs=5,
    batch_size=1024,
    clip_norm=3.0,
)


@dataclasses.dataclass(frozen=True)
class AttentiveProbeConfig(TrainedProbeConfig):
    """Attentive probing.

    Without `augment` the tokens are computed once and kept on every host: images x tokens x width x 4 bytes, so 0.4 MB
    an image for 256 tokens of width 384, and 2 TB for ImageNet and AIM-0.6B, which needs `augment` (the published
    protocol has random crops, flips, jitter and RandAugment anyway).

    Metrics, under `attentive_probe/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class`
    and `examples` of the best member of the grid; its `learning_rate`, `weight_decay` and `validation`, the top-1 by
    which it was chosen; `train_examples`.
    """

    # As published.
    training: ProbeTraining = PUBLISHED
    # Blocks, counted from 0 (-1: the last), whose outputs, not normalised, are averaged; empty: the tokens after the
    # tower's last norm. AIM takes the last six, or for its best numbers 14 to 19 (0.6B, 7B) or 12 to 17 (1B, 3B).
    layers: tuple[int, ...] = ()
    # Heads of the pooling; divides the tower's width. AIM's are those of its trunk, 128 wide.
    heads: int = 12

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if self.heads < 1:
            yield "heads", f"= {self.heads} must be at least 1"
        if len(set(self.layers)) < len(self.layers):
            yield "layers", f"= {self.layers} names a block twice"

    def build(self, encoder: Encoder, cache_dir: str) -> TrainedProbeEvaluator:
        """Opens both sources.

        Raises:
            ConfigError: one can't be opened, holds no records or names no classes, or the model gives no tokens.
        """
        if not encoder.offers("image_tokens"):
            raise ConfigError(
                f"Evaluation {self.name!r} (attentive_probe) needs the tokens of an image tower, and this model gives "
                "vectors alone; use linear_probe, knn or few_shot."
            )

        def features(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            return {"tokens": encoder.image_tokens(params, images, self.layers)}

        sources = self.open_named_sources(cache_dir)
        probes = {"attentive": Probe(lambda features: features["tokens"], attentive_head(self.heads))}
        return TrainedProbeEvaluator(self, encoder, sources, features, probes)


@functools.cache
def attentive_head(heads: int) -> Head:
    """The probe: parameters `query` [D], `key` and `value` [D, D], `classifier` [D, C]."""

    def init(key: jax.Array, x_BxNxD: jax.Array, classes: int) -> dict[str, jax.Array]:
        width = x_BxNxD.shape[-1]
        if width % heads:
            raise ConfigError(f"an attentive probe of {heads} heads needs a width that they divide, not {width}")
        keys, uniform = jax.random.split(key, 4), torch_linear(width)
        return {
            "query": 0.02 * jax.random.normal(keys[0], (width,)),
            "key": uniform(keys[1], (width, width)),
            "value": uniform(keys[2], (width, width)),
            "classifier": uniform(keys[3], (width, classes)),
        }

    return Head(init, functools.partial(attentive_logits, heads=heads), BATCH_NORM_EPS)


def attentive_logits(params: dict[str, jax.Array], x_BxNxD: jax.Array, heads: int) -> jax.Array:
    """[B, N, D] normalised tokens -> [B, C].

    One query makes keys and values of single tokens needless: the query goes through the keys' matrix once, and the
    values' matrix is applied to the pooled tokens. The same numbers for D / H times less work and memory.
    """
    width = x_BxNxD.shape[-1]
    depth = width // heads
    query_HxK = params["query"].reshape(heads, depth)
    asked_DxH = jnp.einsum("dhk,hk->dh", params["key"].reshape(width, heads, depth), query_HxK)
    weight_BxNxH = jax.nn.softmax(jnp.einsum("bnd,dh->bnh", x_BxNxD, asked_DxH) * depth**-0.5, axis=1)
    pooled_BxHxD = jnp.einsum("bnh,bnd->bhd", weight_BxNxH, x_BxNxD)
    values = jnp.einsum("bhd,dhk->bhk", pooled_BxHxD, params["value"].reshape(width, heads, depth))
    return values.reshape(-1, width) @ params["classifier"]


__all__ = ["PUBLISHED", "AttentiveProbeConfig", "attentive_head", "attentive_logits"]
