"""Batch normalisation over the global batch, with running statistics that the caller moves. Not for transformers.

Nothing is mutable here: a layer in training returns its statistics beside its output, row by row, so that they travel
like any other output of a batch; `moved` turns them into the next running statistics after the step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import ones, zeros

from vlm_jax.models.initializers import Initializer
from vlm_jax.models.weights import weight

EPS = 1e-5  # added to the variance
MOMENTUM = 0.1  # share of a step's statistics in the running ones (PyTorch's convention)

# Of one layer and one batch: "mean" and "variance" [B, C] over the pixels of a row, "pixels" [B], their number.
Statistics = dict[str, jax.Array]


class BatchNorm(nn.Module):
    """Ioffe and Szegedy 2015, over batch, rows and columns.

    The mean over the batch axis is the global batch's whatever the mesh (synchronised, as `jit` gives it), and that of
    a microbatch where the step is split: its normalisation is then a smaller batch's, as everywhere in the literature.

    Attributes:
        scale_init: initialiser of the scale (zeros for the last one of a residual branch).
    """

    scale_init: Initializer = ones

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, batch_statistics: bool) -> tuple[jax.Array, Statistics | None]:
        """Normalises.

        Args:
            x_BxHxWxC: activations, any float dtype; statistics and affine part are fp32.
            batch_statistics: whether to use the batch's own statistics (training), or the running ones.

        Returns:
            The normalised activations in x's dtype, and the statistics, without gradient; None if the running ones
            were used.
        """
        shape = (x_BxHxWxC.shape[-1],)
        scale, bias, running_mean, running_variance = (
            weight(self, name, init, (None,), shape)
            for name, init in (
                ("scale", self.scale_init),
                ("bias", zeros),
                ("running_mean", zeros),
                ("running_variance", ones),
            )
        )
        x32 = x_BxHxWxC.astype(jnp.float32)
        statistics = None
        if batch_statistics:
            mean_BxC, variance_BxC, pixels_B = _row_statistics(x32)
            mean, variance = _pooled(mean_BxC, variance_BxC)
            statistics = {"mean": mean_BxC, "variance": variance_BxC, "pixels": pixels_B}
        else:
            mean, variance = jax.lax.stop_gradient((running_mean, running_variance))
        factor = jax.lax.rsqrt(variance + EPS) * scale
        normed = (x32 - _as_pixels(mean)) * _as_pixels(factor) + _as_pixels(bias)
        return normed.astype(x_BxHxWxC.dtype), jax.lax.stop_gradient(statistics)


def _row_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance [B, C] over each row's pixels, and their number [B]."""
    mean = x.mean(axis=(1, 2))
    # About the row's own mean: E[x^2] - E[x]^2 cancels where the mean is large against the spread.
    variance = jnp.square(x - mean[:, None, None]).mean(axis=(1, 2))
    return mean, variance, jnp.full(x.shape[:1], x.shape[1] * x.shape[2], jnp.float32)


def _pooled(mean_BxC: jax.Array, variance_BxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [C] of the batch from those of rows of equal size: the law of total variance."""
    mean = mean_BxC.mean(axis=0)
    return mean, variance_BxC.mean(axis=0) + jnp.square(mean_BxC - mean[None]).mean(axis=0)


def _as_pixels(x_C: jax.Array) -> jax.Array:
    return x_C[None, None, None]


def moved(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with running statistics moved towards those of a step.

    Args:
        params: a tree of modules; those with statistics hold `running_mean` and `running_variance`.
        statistics: the same tree, of the modules that gave statistics alone.

    Returns:
        A tree like `params`; the variance moves towards the unbiased estimate, as in PyTorch.
    """
    result = dict(params)
    for name, value in statistics.items():
        result[name] = _moved_layer(params[name], value) if "pixels" in value else moved(params[name], value)
    return result


def _moved_layer(params: Mapping[str, jax.Array], statistics: Statistics) -> dict[str, jax.Array]:
    mean, variance = _pooled(statistics["mean"], statistics["variance"])
    count = statistics["pixels"].sum()
    # One value has no unbiased variance; its biased one, 0, stays then.
    unbiased = variance * (count / jnp.maximum(count - 1, 1))
    step = {"running_mean": mean, "running_variance": unbiased}
    return dict(params) | {name: params[name] + MOMENTUM * (value - params[name]) for name, value in step.items()}


__all__ = ["EPS", "MOMENTUM", "BatchNorm", "Statistics", "moved"]
