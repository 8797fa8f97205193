"""Regression of pixels, patch by patch: targets, and errors over the patches that a method hides or predicts.

Per-row sums and counts, so that any split of a batch adds up to the same loss. What is predicted is the objectives'.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain
from vlm_jax.models.patches import patchify, unpatchify

_EPS = 1e-6  # inside the root, in MAE and AIM alike


def patch_targets(images_BxHxWxC: jax.Array, patch_size: int, normalise: bool) -> jax.Array:
    """What a model of pixels predicts: patches in raster order, fp32 [B, N, p p C]; see `patchify`.

    Args:
        images_BxHxWxC: float, normalised as for the model.
        patch_size: side of a patch in pixels.
        normalise: whether each patch is brought to mean 0 and variance 1 over its pixels and channels (He et al.
            2022, section 3). The variance is the unbiased one, as in the published code of MAE and AIM.

    Raises:
        ValueError: the patch does not divide the image.
    """
    patches_BxNxP = patchify(images_BxHxWxC.astype(jnp.float32), patch_size)
    if normalise:
        mean, inverse = _statistics(patches_BxNxP)
        patches_BxNxP = (patches_BxNxP - mean) * inverse
    return constrain(patches_BxNxP, "batch", "length", None)


def predicted_images(
    predicted_BxNxP: jax.Array, images_BxHxWxC: jax.Array, patch_size: int, normalise: bool
) -> jax.Array:
    """The inverse of `patch_targets`: predicted patches as fp32 [B, H, W, C] in the values of the images.

    With `normalise`, each patch gets mean and deviation of the true one, which only the images tell.
    """
    patches_BxNxP = predicted_BxNxP.astype(jnp.float32)
    if normalise:
        mean, inverse = _statistics(patchify(images_BxHxWxC.astype(jnp.float32), patch_size))
        patches_BxNxP = patches_BxNxP / inverse + mean
    height, width = images_BxHxWxC.shape[1:3]
    return unpatchify(patches_BxNxP, (height // patch_size, width // patch_size), patch_size)


def _statistics(patches_BxNxP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse deviation of each patch, [B, N, 1]."""
    mean = patches_BxNxP.mean(axis=-1, keepdims=True)
    variance = jnp.square(patches_BxNxP - mean).sum(axis=-1, keepdims=True) / (patches_BxNxP.shape[-1] - 1)
    return mean, jax.lax.rsqrt(variance + _EPS)


def patch_square_error(predicted_BxNxP: jax.Array, targets_BxNxP: jax.Array) -> jax.Array:
    """Mean over the pixels of a patch of the squared error, fp32 [B, N]; predictions of any float dtype."""
    return _patch_error(jnp.square, predicted_BxNxP, targets_BxNxP)


def patch_absolute_error(predicted_BxNxP: jax.Array, targets_BxNxP: jax.Array) -> jax.Array:
    """As `patch_square_error`, of the absolute error."""
    return _patch_error(jnp.abs, predicted_BxNxP, targets_BxNxP)


def masked_square_error(
    predicted_BxNxP: jax.Array, targets_BxNxP: jax.Array, mask_BxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`patch_square_error` summed over the patches of each row that the mask names.

    Args:
        predicted_BxNxP: any float dtype.
        targets_BxNxP: of `patch_targets`.
        mask_BxN: bool, True for the patches that count; predictions of the others may be anything finite.

    Returns:
        (sums [B], counts [B]), fp32; a count is the number of patches.
    """
    return _masked(patch_square_error(predicted_BxNxP, targets_BxNxP), mask_BxN)


def masked_absolute_error(
    predicted_BxNxP: jax.Array, targets_BxNxP: jax.Array, mask_BxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `masked_square_error`, of the absolute error."""
    return _masked(patch_absolute_error(predicted_BxNxP, targets_BxNxP), mask_BxN)


def _patch_error(function: Callable[[jax.Array], jax.Array], predicted: jax.Array, targets: jax.Array) -> jax.Array:
    return function(predicted.astype(jnp.float32) - targets).mean(axis=-1)


def _masked(errors_BxN: jax.Array, mask_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(mask_BxN, errors_BxN, 0.0).sum(axis=1), mask_BxN.sum(axis=1, dtype=jnp.float32)


__all__ = [
    "masked_absolute_error",
    "masked_square_error",
    "patch_absolute_error",
    "patch_square_error",
    "patch_targets",
    "predicted_images",
]
