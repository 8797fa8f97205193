"""Hard negatives, queues, groups and hidden words against brute force and their own probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.losses.masked_words import WordMaskConfig, distillation_loss, hide_words
from vlm_jax.losses.momentum_contrast import enqueue, group_count, hard_negatives, in_chunks, take_rows


def test_hard_negatives_are_drawn_by_their_weights() -> None:
    """Frequencies of 40,000 draws of one row, its own place and another excluded, against the softmax of the rest."""
    logits = jnp.asarray([5.0, 1.0, 0.0, 2.0, -1.0])
    candidates = jnp.asarray([False, True, True, True, False])
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    index, found = jax.jit(hard_negatives)(jnp.tile(logits, (count, 1)), jnp.tile(candidates, (count, 1)), keys)
    assert bool(found.all())
    shares = np.bincount(np.asarray(index), minlength=5) / count
    expected = np.where(candidates, np.exp(logits), 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.01)


def test_weights_that_underflow_are_still_drawn() -> None:
    """A softmax in which the positive has all the mass leaves 0 / 0; the logits still decide."""
    logits = jnp.asarray([[1000.0, 0.0, 1.0], [1000.0, 0.0, -500.0]])
    candidates = jnp.asarray([[False, True, True], [False, True, True]])
    assert float(jnp.where(candidates, jax.nn.softmax(logits, axis=1), 0.0).sum()) == 0.0
    draws = np.asarray(
        [hard_negatives(logits, candidates, jax.random.split(jax.random.key(i), 2))[0] for i in range(200)]
    )
    assert set(draws[:, 0]) == {1, 2}
    assert set(draws[:, 1]) == {1}
    assert (draws[:, 0] == 2).mean() == pytest.approx(np.e / (1 + np.e), abs=0.1)


def test_a_row_without_a_candidate_is_told() -> None:
    candidates = jnp.asarray([[False, True], [False, False]])
    index, found = hard_negatives(jnp.zeros((2, 2)), candidates, jax.random.split(jax.random.key(0), 2))
    assert found.tolist() == [True, False]
    assert index.tolist() == [1, 0]


def test_no_gradient_goes_through_the_choice() -> None:
    keys = jax.random.split(jax.random.key(0), 2)

    def taken(logits: jax.Array) -> jax.Array:
        index, _ = hard_negatives(logits, jnp.ones((2, 2), bool), keys)
        return jnp.take(logits, index, axis=0).sum()

    assert float(jnp.abs(jax.grad(taken)(jnp.zeros((2, 2)))).sum()) == 4.0  # of what was taken alone


@pytest.mark.parametrize(("length", "rows", "start"), [(7, 3, 0), (7, 3, 5), (7, 7, 2), (4, 11, 3), (5, 1, 4)])
def test_the_queue_goes_around(length: int, rows: int, start: int) -> None:
    queue, new = np.zeros((length, 1), np.float32), np.arange(1, rows + 1, dtype=np.float32)[:, None]
    expected = queue.copy()
    for place, row in enumerate(new):
        expected[(start + place) % length] = row
    np.testing.assert_array_equal(enqueue(jnp.asarray(queue), jnp.asarray(new), jnp.int32(start)), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_are_taken_from_their_group(groups: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2, 3)).astype(np.float32)
    index = rng.integers(0, 8 // groups, 8) + np.arange(8) // (8 // groups) * (8 // groups)
    np.testing.assert_array_equal(take_rows(jnp.asarray(x), jnp.asarray(index), groups), x[index])


def test_chunks_change_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

    def value(x: jax.Array, chunks: int) -> jax.Array:
        out = in_chunks(lambda rows: jnp.sin(rows["x"]).cumsum(axis=1), {"x": x}, chunks)
        return (out * jnp.arange(18.0).reshape(6, 3)).sum()

    whole = jax.value_and_grad(value)(jnp.asarray(x), 1)
    for chunks in (2, 3, 6):
        for got, want in zip(jax.value_and_grad(value)(jnp.asarray(x), chunks), whole, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_groups_that_do_not_divide_are_an_error() -> None:
    assert group_count("global", 0, 10) == 1
    assert group_count("group", 5, 10) == 2
    with pytest.raises(ValueError, match="10 rows doesn't divide into groups of 4"):
        group_count("group", 4, 10)


def test_words_are_hidden_in_the_published_shares() -> None:
    """Of 200,000 tokens: 15 % chosen; of those 80 % the mask, 10 % random (one in V is itself), 10 % as they were."""
    config, vocabulary, rows = WordMaskConfig(), 500, 2000
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, 100)).astype(np.int32)
    keys = jax.random.split(jax.random.key(1), rows)
    hidden, chosen = (np.asarray(x) for x in jax.jit(lambda k: hide_words(config, vocabulary, ids, k))(keys))
    spared = np.isin(ids, config.spared_ids)
    assert spared.any()
    assert not chosen[spared].any()
    np.testing.assert_array_equal(hidden[~chosen], ids[~chosen])
    assert chosen[~spared].mean() == pytest.approx(0.15, abs=0.003)
    masked, same = (hidden == 103) & (ids != 103) & chosen, (hidden == ids) & chosen
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.01)
    assert same.sum() / chosen.sum() == pytest.approx(0.1 + 0.1 / vocabulary, abs=0.006)
    words = hidden[chosen & ~masked & ~same]
    assert len(words) / chosen.sum() == pytest.approx(0.1, abs=0.006)
    counts = np.bincount(words, minlength=vocabulary)
    assert counts.max() < 6 * counts.mean()  # evenly from the whole vocabulary
    assert (counts > 0).mean() > 0.95


def test_words_hidden_in_a_row_are_its_own_keys() -> None:
    ids = np.full((4, 50), 7, np.int32)
    keys = jax.random.split(jax.random.key(1), 4)
    whole = hide_words(WordMaskConfig(), 30, ids, keys)
    parts = hide_words(WordMaskConfig(), 30, ids[2:], keys[2:])
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a[2:], b)


def test_distillation_is_the_cross_entropy_of_the_teacher() -> None:
    rng = np.random.default_rng(0)
    logits, taught = rng.normal(size=(2, 2, 3, 5))
    chosen = np.asarray([[True, False, True], [False, False, False]])
    expected = np.zeros(2)
    for b, t in zip(*np.nonzero(chosen), strict=True):
        p = np.exp(taught[b, t]) / np.exp(taught[b, t]).sum()
        expected[b] -= (p * (logits[b, t] - np.log(np.exp(logits[b, t]).sum()))).sum()
    np.testing.assert_allclose(distillation_loss(jnp.asarray(logits), jnp.asarray(taught), chosen), expected, rtol=1e-5)
