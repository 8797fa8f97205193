"""Linear probes trained step by step, by the protocols of MAE, DINOv2 and BEiT.

The protocols differ in what the classifier sees and in the optimiser; `PROTOCOLS` has their published numbers. A linear
probe that is solved to its optimum is `linear_probe`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm_jax.evals.base import Encoder, Vectors
from vlm_jax.evals.probe_training import Features, Head, Probe, ProbeTraining, linear_head
from vlm_jax.evals.trained_probe import TrainedProbeConfig, TrainedProbeEvaluator
from vlm_jax.schema import ConfigError

Inputs = Literal["vector", "last_blocks", "layers"]
BATCH_NORM_EPS = 1e-6
_LAST = 4  # blocks of DINOv2's longer input

PROTOCOLS: dict[str, ProbeTraining] = {
    # He et al. 2022, appendix A.2; 50 epochs for ViT-L and ViT-H
    "mae": ProbeTraining(
        "lars", (0.1,), scale_by_batch=True, epochs=90, warmup_epochs=10, batch_size=16384, momentum=0.9
    ),
    # Oquab et al. 2024, appendix B.3: 12,500 steps of 1,024 images
    "dinov2": ProbeTraining(
        "sgd",
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
        scale_by_batch=True,
        epochs=10,
        batch_size=1024,
    ),
    # Bao et al. 2022, the published code's linear evaluation
    "beit": ProbeTraining("adamw", (4e-3,), weight_decays=(1e-4,), epochs=100, batch_size=1024),
}


@dataclasses.dataclass(frozen=True)
class SgdProbeConfig(TrainedProbeConfig):
    """Linear classifiers trained by gradient descent; the defaults are MAE's.

    Without `augment` the features are computed once and kept on every host: images x width x 4 bytes for `vector`,
    2 x depth times that for the others.

    Metrics, under `sgd_probe/<name>/`: `top1`, `top5` (where there are more than five classes), `mean_per_class` and
    `examples` of the best classifier; its `learning_rate`, `weight_decay` and `validation`, the top-1 by which it was
    chosen; `train_examples`; and with several inputs `<input>_top1`, the best of each: `blocks1`, `blocks1_mean`,
    `blocks4`, `blocks4_mean` of `last_blocks`, `layer0`, `layer1`, ... of `layers`.
    """

    # As published for MAE.
    training: ProbeTraining = PROTOCOLS["mae"]
    # vector: `features`. last_blocks: class tokens of the last 1 and of the last 4 blocks, normalised by the tower's
    # last norm, one after the other, with and without the mean of the last one's patches (DINOv2). layers: class token
    # and mean of the patches of each block, not normalised, a classifier a block (BEiT).
    inputs: Inputs = "vector"
    # With inputs = "vector": which one.
    features: Vectors = "pooled"
    # Whether a batch norm without affine part stands before the classifier (MAE).
    batch_norm: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if self.inputs != "vector" and self.features != "pooled":
            yield "features", f"= {self.features!r} has no effect with inputs = {self.inputs!r}; set inputs = 'vector'"

    def build(self, encoder: Encoder, cache_dir: str) -> TrainedProbeEvaluator:
        """Opens both sources.

        Raises:
            ConfigError: one can't be opened, holds no records or names no classes, or the model gives no such features.
        """
        if self.inputs != "vector" and not encoder.block_count:
            raise ConfigError(
                f"Evaluation {self.name!r} (sgd_probe): inputs = {self.inputs!r} needs the class tokens of a tower's "
                "blocks, which this model doesn't have; use inputs = 'vector'."
            )
        if self.inputs == "last_blocks" and encoder.block_count < _LAST:
            raise ConfigError(
                f"Evaluation {self.name!r} (sgd_probe): inputs = 'last_blocks' takes {_LAST} blocks, and this model "
                f"has {encoder.block_count}; use inputs = 'layers' or 'vector'."
            )

        def features(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            if self.inputs == "vector":
                return {"vector": encoder.image_vectors(params, images, self.features)}
            return {"layers": encoder.layer_vectors(params, images, self.inputs == "last_blocks")}

        head = _head(self.batch_norm)
        probes = {name: Probe(select, head) for name, select in _inputs(self.inputs, encoder.block_count).items()}
        return TrainedProbeEvaluator(self, encoder, self.open_named_sources(cache_dir), features, probes)


@functools.cache
def _head(batch_norm: bool) -> Head:
    return linear_head(eps=BATCH_NORM_EPS if batch_norm else None)


def _inputs(inputs: Inputs, blocks: int) -> dict[str, Callable[[Features], jax.Array]]:
    """What each classifier sees, by name: [B, D]."""
    if inputs == "vector":
        return {"vector": lambda features: features["vector"]}
    if inputs == "layers":
        return {f"layer{i}": functools.partial(_both, block=i) for i in range(blocks)}
    return {
        f"blocks{count}{'_mean' * mean}": functools.partial(_class_tokens, count=count, mean=mean)
        for count in (1, _LAST)
        for mean in (False, True)
    }


def _both(features: Features, block: int) -> jax.Array:
    """Class token and mean of the patches of one block: [B, L, 2, D] -> [B, 2 D]."""
    chosen = features["layers"][:, block]
    return chosen.reshape(chosen.shape[0], -1)


def _class_tokens(features: Features, count: int, mean: bool) -> jax.Array:
    """Class tokens of the last blocks in their order, and perhaps the last one's mean: [B, L, 2, D] -> [B, ...]."""
    layers = features["layers"]
    parts = [layers[:, -count:, 0].reshape(layers.shape[0], -1)]
    return jnp.concatenate([*parts, layers[:, -1, 1]] if mean else parts, axis=1)


__all__ = ["PROTOCOLS", "SgdProbeConfig"]
