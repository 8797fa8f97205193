"""64-bit digests of arrays, computed where the arrays live and equal on every mesh.

They guard saved arrays against flipped bits and swapped pieces, which the storage layer restores without a word. Not
for adversaries: a digest is easily forged on purpose.

A digest is the sum, modulo 2^32 and for two salts, of mix(word, position, salt) over the 32-bit words of an array.
- For a given position the mix is a bijection of the word, so changing any one word changes the sum for certain; other
  damage goes unseen with a chance of 2^-64.
- The position is the element's place in the global array, so swapped elements, rows or chunks change the sum.
- The sum of an array is the sum over its chunks, however it is cut. One number per array therefore covers every saved
  chunk, and verifies on any mesh and any number of hosts without knowing how the array was cut when it was saved.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_SALTS = (0x243F6A88, 0x85A308D3)  # leading fractional bits of pi


def flatten_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, as in `params/image/patch_embed/kernel`; nodes without leaves don't appear.

    Raises:
        ValueError: two leaves have the same path, because a dict's key holds a slash.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(f"two leaves of the tree have the path {path!r}; rename the key that holds a slash")
        flat[path] = leaf
    return flat


def tree_digest(tree: Any) -> dict[str, str]:
    """Digest of every array in a tree.

    Args:
        tree: numpy or (possibly sharded, possibly multi-process) jax arrays of any real, complex, boolean or key
            dtype. In a multi-process run every process must call this with the same tree.

    Returns:
        path as in `flatten_paths` -> 16 hexadecimal digits. Equal bits, shape order and dtype width give equal digests,
        whatever the sharding.
    """
    flat = flatten_paths(tree)
    sums = np.asarray(_compiled(_replicated(flat))(flat)) if flat else np.zeros((0, 2), np.uint32)
    # jit sorts the keys of a dict, so the rows follow the sorted paths.
    return {path: f"{high:08x}{low:08x}" for path, (high, low) in zip(sorted(flat), sums.tolist(), strict=True)}


def _replicated(flat: dict[str, Any]) -> NamedSharding | None:
    """Where the sums must lie so that every process can read them."""
    for leaf in flat.values():
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, P())
    return None


@functools.cache
def _compiled(out_sharding: NamedSharding | None) -> Any:
    def digests(flat: dict[str, jax.Array]) -> jax.Array:
        return jnp.stack([_digest(_words(flat[path])) for path in sorted(flat)])

    return jax.jit(digests, out_shardings=out_sharding)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32, one word per element, or several along a new last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x).astype(jnp.uint32)
    if jnp.iscomplexobj(x):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    if x.dtype == jnp.bool_ or x.dtype in (jnp.int4, jnp.uint4):
        return x.astype(jnp.uint8).astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _digest(words: jax.Array) -> jax.Array:
    """uint32 [2]: the sums over all words."""
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # dtype: without it, numpy's promotion rules would widen the sum where 64-bit types are on.
    return jnp.stack([jnp.sum(_mix(words ^ _mix(position ^ np.uint32(s))), dtype=jnp.uint32) for s in _SALTS])


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011), a bijection of 32-bit words."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


__all__ = ["flatten_paths", "tree_digest"]
