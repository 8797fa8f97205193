"""What is random inside a tower, keyed per example. Not for data augmentation or for masks that an objective owns.

`keys` is one typed key per row of the global batch, [B], or None at evaluation. Since a row's masks come from its own
key alone, they are the same however the batch is split into microbatches or laid over a mesh.
"""

import jax
import jax.numpy as jnp


def fold_in(keys: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """An independent stream per row for the use numbered `data`; None stays None."""
    return None if keys is None else row_keys(keys, data)


def row_keys(keys: jax.Array, data: int | jax.Array) -> jax.Array:
    """`fold_in` of keys that are there."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Srivastava et al. 2014: elements [B, ...] set to zero with probability `rate`, the others scaled up."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def drop_path(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): a residual branch [B, ...] dropped for whole rows, else scaled up."""
    if keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.uniform(key, ()) >= rate)(keys)
    factor = jnp.where(keep, 1 / (1 - rate), 0.0).astype(x.dtype)
    return x * factor.reshape(-1, *[1] * (x.ndim - 1))


def drop_patches(x_BxTxD: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Keeps a random max(1, floor(T (1 - rate))) patches of each row, in their order (FLIP, Li et al. 2023, 3).

    Args:
        x_BxTxD: patches with their positions added; no class token among them.
        rate: share of patches that is dropped.
        keys: [B] keys, or None to keep everything.

    Returns:
        [B, kept, D].
    """
    if keys is None or rate == 0.0:
        return x_BxTxD
    count = x_BxTxD.shape[1]
    kept = kept_patches(count, rate)
    noise_BxT = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    index_BxK = jnp.sort(jnp.argsort(noise_BxT, axis=1)[:, :kept], axis=1)
    return jnp.take_along_axis(x_BxTxD, index_BxK[:, :, None], axis=1)


def kept_patches(count: int, rate: float) -> int:
    """How many of `count` patches stay at a dropped share of `rate`."""
    return max(1, int(count * (1 - rate)))
