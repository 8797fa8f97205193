"""Cross-entropy over tokens: of the next one in a caption, and of the set of words that it holds.

Per-row sums and counts, so that any split of a batch adds up to the same loss. Losses between images and texts are in
`contrastive`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def token_cross_entropy(
    logits_BxTxV: jax.Array, targets_BxT: jax.Array, valid_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats, summed over the valid tokens of each row.

    Args:
        logits_BxTxV: any float dtype; the softmax is fp32.
        targets_BxT: int32 ids.
        valid_BxT: bool; other tokens don't count, and their logits may be anything finite.

    Returns:
        (sums [B], counts [B]), fp32.
    """
    own_BxT = jnp.take_along_axis(logits_BxTxV, targets_BxT[:, :, None], axis=-1)[:, :, 0].astype(jnp.float32)
    losses_BxT = jax.nn.logsumexp(logits_BxTxV.astype(jnp.float32), axis=-1) - own_BxT
    return jnp.where(valid_BxT, losses_BxT, 0.0).sum(axis=1), valid_BxT.sum(axis=1, dtype=jnp.float32)


def correct_tokens(logits_BxTxV: jax.Array, targets_BxT: jax.Array, valid_BxT: jax.Array) -> jax.Array:
    """How many of the valid tokens the largest logit names, [B] fp32."""
    hits_BxT = (jnp.argmax(logits_BxTxV, axis=-1) == targets_BxT) & valid_BxT
    return hits_BxT.sum(axis=1, dtype=jnp.float32)


def word_sets(ids_BxL: jax.Array, vocab_size: int, special_ids: Sequence[int]) -> jax.Array:
    """Which words each text holds, whatever their order and number: fp32 [B, V] of 0 and 1, special ids always 0."""
    batch = ids_BxL.shape[0]
    held = jnp.zeros((batch, vocab_size), jnp.float32).at[jnp.arange(batch)[:, None], ids_BxL].set(1.0)
    return held.at[:, jnp.asarray(special_ids, jnp.int32)].set(0.0) if special_ids else held


def word_set_cross_entropy(logits_BxV: jax.Array, words_BxV: jax.Array) -> jax.Array:
    """Softmax against the uniform distribution over a text's words (Joulin et al. 2016, section 3.2), [B] fp32.

    A text without words has the loss 0.
    """
    share_BxV = words_BxV / jnp.maximum(words_BxV.sum(axis=1, keepdims=True), 1.0)
    return -(share_BxV * jax.nn.log_softmax(logits_BxV.astype(jnp.float32))).sum(axis=1)


def word_set_sigmoid(logits_BxV: jax.Array, words_BxV: jax.Array) -> jax.Array:
    """Binary cross-entropy of every word of the vocabulary, summed over it, [B] fp32."""
    logits_BxV = logits_BxV.astype(jnp.float32)
    return (jax.nn.softplus(logits_BxV) - words_BxV * logits_BxV).sum(axis=1)


__all__ = ["correct_tokens", "token_cross_entropy", "word_set_cross_entropy", "word_set_sigmoid", "word_sets"]
