import math

import numpy as np
import pytest

from vlm_jax.data.order import Epochs, example_rng, record_index, substitute

GOLDEN_ORDER = [6, 5, 4, 0, 2, 8, 1, 3, 7, 9]
GOLDEN_FAR = [38, 1288, 44, 730, 945]
GOLDEN_SUBSTITUTES = [1, 19, 25, 2]
GOLDEN_DRAWS = [455, 993, 363]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 100, 257, 1442])
def test_every_epoch_visits_every_record_once(length):
    for seed in (0, 7, -3, 2**70):
        for epoch in (0, 1, 5):
            indices = [record_index(epoch * length + i, length, seed) for i in range(length)]
            assert sorted(indices) == list(range(length))


def test_array_form_equals_the_scalar_form():
    positions = np.arange(1000).reshape(20, 50) * 37
    expected = [[record_index(int(p), 913, 5) for p in row] for row in positions]
    indices = record_index(positions, 913, 5)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, expected)


def test_far_positions_and_long_sources_take_no_memory_or_time():
    length = 5_000_000_003
    found = {record_index(10**15 + i, length, 1) for i in range(1000)}
    assert len(found) == 1000
    assert max(found) < length
    assert max(found) > 0.9 * length


def test_epochs_and_seeds_are_different_orders():
    length = 1000
    orders = [record_index(np.arange(e * length, (e + 1) * length), length, s) for s in (0, 1) for e in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.sum(a == b) < 10  # two random permutations agree in one place on average


def test_order_is_shuffled_like_a_random_permutation():
    """Rank correlation with the file's order, and neighbours that stay neighbours, as chance has them."""
    length = 20_000
    order = record_index(np.arange(length), length, 3)
    assert abs(np.corrcoef(np.arange(length), order)[0, 1]) < 4 / math.sqrt(length)
    assert np.sum(np.abs(np.diff(order)) == 1) < 12  # expected: 2
    halves = np.sum(order[: length // 2] < length // 2)
    assert abs(halves - length / 4) < 5 * math.sqrt(length) / 4


@pytest.mark.parametrize(("length", "block"), [(12, 3), (1001, 4), (7, 7), (5, 8), (30, 1)])
def test_blocks_of_neighbours_stay_together_and_are_shuffled(length: int, block: int):
    order, seen = Epochs(length, 3, block), set()
    for epoch in range(3):
        indices = [order.index(epoch * length + place) for place in range(length)]
        assert sorted(indices) == list(range(length))
        whole = length // block * block
        blocks = np.reshape(indices[:whole], (-1, block))
        assert (blocks == blocks[:, :1] + np.arange(block)).all() and (blocks[:, 0] % block == 0).all()
        assert indices[whole:] == list(range(whole, length))
        seen.add(tuple(indices))
    assert len(seen) == (3 if length > 2 * block else 1)
    if block == 1:
        assert indices == [record_index(2 * length + place, length, 3) for place in range(length)]


def test_an_empty_source_is_an_error():
    with pytest.raises(ValueError, match="no record"):
        record_index(0, 0, 1)


def test_substitutes_are_fixed_spread_out_and_differ_by_attempt():
    first = [substitute(p, 1, 50, 0) for p in range(5000)]
    assert first == [substitute(p, 1, 50, 0) for p in range(5000)]
    counts = np.bincount(first, minlength=50)
    assert counts.min() > 50
    assert counts.max() < 160  # 100 expected, standard deviation 10
    second = [substitute(p, 2, 50, 0) for p in range(5000)]
    assert 40 < np.sum(np.equal(first, second)) < 180
    assert first != [substitute(p, 1, 50, 1) for p in range(5000)]


def test_randomness_of_an_example_depends_on_seed_and_position_alone():
    draws = {(s, p): tuple(example_rng(s, p).random(4)) for s in (0, 1, -1) for p in range(50)}
    assert len(set(draws.values())) == len(draws)
    assert draws[0, 7] == tuple(example_rng(0, 7).random(4))
    assert abs(np.mean([value[0] for value in draws.values()]) - 0.5) < 0.1


def test_golden_values_keep_the_order_of_old_runs():
    """A run that resumes under a later version must go on in the same order."""
    assert [record_index(p, 10, 0) for p in range(10)] == GOLDEN_ORDER
    assert [record_index(p, 1442, 42) for p in (0, 1, 1441, 1442, 10**9)] == GOLDEN_FAR
    assert [substitute(p, 1, 100, 0) for p in range(4)] == GOLDEN_SUBSTITUTES
    assert [int(v) for v in example_rng(0, 3).integers(0, 1000, 3)] == GOLDEN_DRAWS
