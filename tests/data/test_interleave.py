import random

import numpy as np
import pytest

from vlm_jax.data.interleave import MAX_PERIOD, Interleaved, schedule, shares
from vlm_jax.data.order import Epochs, record_index, subseed, substitute


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((1, 1), [1, 1]),
        ((1.0, 2.5), [2, 5]),
        ((0.2, 0.3, 0.5), [2, 3, 5]),
        ((300, 100), [3, 1]),
        ((7,), [1]),
        ((1e-3, 1), [1, 1000]),
    ],
)
def test_shares_are_the_smallest_whole_numbers(weights, turns):
    assert shares(weights) == turns


def test_shares_that_have_no_short_period_are_rounded():
    turns = shares((0.123456789, 0.333333333, 1.0))
    assert abs(sum(turns) - MAX_PERIOD) <= 2
    wanted = np.divide((0.123456789, 0.333333333, 1), 1.456790122)
    np.testing.assert_allclose(np.divide(turns, sum(turns)), wanted, atol=1e-5)
    assert len(schedule(turns)) == sum(turns)


def test_every_prefix_keeps_the_proportions_within_one():
    """Tijdeman's bound, 1 - 1/(2k - 2), by counting, for many sets of weights."""
    draw = random.Random(0)
    cases = [[1, 1], [1], [100] + [1] * 9, [1] * 40] + [
        [draw.randint(1, 50) for _ in range(draw.randint(2, 8))] for _ in range(150)
    ]
    for turns in cases:
        order, period = schedule(turns), sum(turns)
        bound = 1 - 1 / max(1, 2 * len(turns) - 2)
        for part, count in enumerate(turns):
            taken = np.cumsum(order == part)
            assert taken[-1] == count
            assert np.abs(taken - np.arange(1, period + 1) * count / period).max() <= bound + 1e-9


def test_each_part_walks_its_own_epochs_whatever_the_others_do():
    lengths, weights, seed = (5, 40, 7), (1, 2, 0.5), 11
    orders = [Epochs(length, subseed(seed, part)) for part, length in enumerate(lengths)]
    order = Interleaved(orders, lengths, weights)
    starts, streams = (0, 5, 45), ([], [], [])
    for position in range(700):
        index = order.index(position)
        part = int(np.searchsorted(starts, index, side="right")) - 1
        assert order.locate(position) == (part, len(streams[part]))
        streams[part].append(index - starts[part])
        stand_in = substitute(len(streams[part]) - 1, 1, lengths[part], subseed(seed, part))
        assert order.substitute(position, 1) == starts[part] + stand_in
    assert list(map(len, streams)) == [200, 400, 100]
    for part, length in enumerate(lengths):
        assert streams[part] == [record_index(p, length, subseed(seed, part)) for p in range(len(streams[part]))]
        for epoch in range(len(streams[part]) // length):
            assert sorted(streams[part][epoch * length : (epoch + 1) * length]) == list(range(length))
    far = 10**15  # constant time, and no drift
    first = order.locate(0)[0]
    assert order.locate(7 * far) == (first, (2, 4, 1)[first] * far)


def test_parts_of_equal_length_are_in_different_order():
    order = Interleaved([Epochs(50, subseed(3, 0)), Epochs(50, subseed(3, 1))], (50, 50), (1, 1))
    first, second = ([order.index(p) % 50 for p in range(start, 100, 2)] for start in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8
