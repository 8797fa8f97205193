"""Cross-entropies over words against loops in float64."""

import jax.numpy as jnp
import numpy as np

from vlm_jax.losses.tokens import (
    correct_tokens,
    token_cross_entropy,
    word_set_cross_entropy,
    word_set_sigmoid,
    word_sets,
)

RNG = np.random.default_rng(0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum())


def test_token_cross_entropy_is_a_loop_over_the_valid_tokens() -> None:
    logits = (3 * RNG.normal(size=(3, 5, 7))).astype(np.float32)
    targets = RNG.integers(0, 7, (3, 5)).astype(np.int32)
    targets[0] = logits[0].argmax(axis=-1)
    valid = np.arange(5)[None] < np.array([5, 2, 0])[:, None]
    sums, counts = token_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(valid))
    wanted = [
        -sum(log_softmax(logits[b, t].astype(np.float64))[targets[b, t]] for t in range(5) if valid[b, t])
        for b in range(3)
    ]
    np.testing.assert_allclose(sums, wanted, rtol=1e-6)
    np.testing.assert_array_equal(counts, [5, 2, 0])
    hits = correct_tokens(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(valid))
    np.testing.assert_array_equal(hits, ((logits.argmax(-1) == targets) & valid).sum(1))
    assert hits[0] == 5


def test_word_sets_forget_order_number_and_special_ids() -> None:
    ids = jnp.asarray([[9, 3, 3, 5, 1, 0, 0], [9, 5, 3, 1, 0, 0, 0], [9, 1, 0, 0, 0, 0, 0]], jnp.int32)
    words = np.asarray(word_sets(ids, 10, (0, 1, 9)))
    assert [np.flatnonzero(row).tolist() for row in words] == [[3, 5], [3, 5], []]
    assert set(np.unique(words)) == {0.0, 1.0}


def test_losses_over_word_sets_are_loops_over_the_vocabulary() -> None:
    logits = (3 * RNG.normal(size=(3, 6))).astype(np.float32)
    words = np.array([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6], np.float32)
    softmax = [
        -np.mean([log_softmax(z.astype(np.float64))[v] for v in np.flatnonzero(w)] or [0])
        for z, w in zip(logits, words, strict=True)
    ]
    np.testing.assert_allclose(word_set_cross_entropy(jnp.asarray(logits), jnp.asarray(words)), softmax, rtol=1e-6)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    sigmoid = [-sum(np.log(p[b, v] if words[b, v] else 1 - p[b, v]) for v in range(6)) for b in range(3)]
    np.testing.assert_allclose(word_set_sigmoid(jnp.asarray(logits), jnp.asarray(words)), sigmoid, rtol=1e-5)
