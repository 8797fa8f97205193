"""Rows of like length and kind come together: LLaVA's grouping."""

import collections

import numpy as np
from conversations import golden

from vlm_jax.data.grouping import GroupedOrder, modality_groups


def test_groups_are_llavas():
    stored = golden("llava_modality_sampler")
    order = modality_groups(
        stored["lengths"], stored["batch_size"], stored["world_size"], lambda which, length: np.arange(length)
    )
    assert order == stored["indices"]


def test_a_grouped_epoch_holds_groups_of_one_kind_and_like_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 500) * np.where(rng.random(500) < 0.3, -1, 1)
    lengths[[7, 99]] = 0
    order = GroupedOrder(lengths, 16, seed=2)
    epochs = [[order.index(e * 498 + p) for p in range(498)] for e in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert all(sorted(epoch) == [i for i in range(500) if i not in (7, 99)] for epoch in epochs)
    whole = [epochs[0][start : start + 16] for start in range(0, 480, 16)]
    assert sum(len({lengths[i] > 0 for i in group}) == 1 for group in whole) >= len(whole) - 2
    assert all((np.diff(np.abs(lengths[group])) <= 0).all() for group in whole[:-2])
    kinds = collections.Counter(bool(lengths[group[0]] > 0) for group in whole)
    assert kinds[True] > 15 and kinds[False] > 5
    assert {order.substitute(p, 1) for p in range(2000)}.isdisjoint({7, 99})
