"""Which record stands at a position of a run: a pure function of (seed, position), in constant time.

A run walks positions 0, 1, 2, ...; hosts, workers and batch sizes only decide who computes which position. Every
epoch is its own permutation, by a Feistel network over the smallest even number of bits that holds the length, with
cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3.2). Nothing is stored.
How several sources take turns is `interleave`'s business.
"""

from typing import Any, Protocol, overload

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 8


@overload
def record_index(position: int, length: int, seed: int) -> int: ...
@overload
def record_index(position: np.ndarray, length: int, seed: int) -> np.ndarray: ...
def record_index(position: Any, length: int, seed: int) -> Any:
    """Index of the record at a position: each epoch of `length` positions visits every record once.

    Args:
        position: int >= 0, or an int64/uint64 array of any shape; the result has the same form (int64).
        length: number of records, > 0.
        seed: any integer.
    """
    if length <= 0:
        raise ValueError("the source holds no record, so no position has one; check its path")
    if isinstance(position, np.ndarray):
        walked = position.astype(np.uint64)
        epoch, walked = walked // np.uint64(length), walked % np.uint64(length)
        walked = _permute(walked, length, _mix(epoch ^ _mix(seed & _MASK)))
        while (outside := walked >= length).any():
            keys = _mix(epoch[outside] ^ _mix(seed & _MASK))
            walked[outside] = _permute(walked[outside], length, keys)
        return walked.astype(np.int64)
    epoch, walked = divmod(int(position), length)
    key = _mix(epoch ^ _mix(seed & _MASK))
    walked = _permute(walked, length, key)
    while walked >= length:
        walked = _permute(walked, length, key)
    return walked


def substitute(position: int, attempt: int, length: int, seed: int) -> int:
    """Index of the record that stands in for an unusable one: uniform, and fixed by its arguments.

    Args:
        position: position of the run whose own record can't be used.
        attempt: 1 for the first replacement, 2 when that one can't be used either, and so on.
        length: number of records.
        seed: the run's seed.
    """
    return _mix(_mix(_mix(seed & _MASK) ^ position) ^ (attempt << 32)) % length


def example_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness (crop, flip, choice of caption) of the example at a position of a run."""
    return np.random.Generator(np.random.Philox(key=[_mix(seed & _MASK), position]))


class Order(Protocol):
    """The walk of a run through a source."""

    def index(self, position: int) -> int:
        """Index of the record at a position."""
        ...

    def substitute(self, position: int, attempt: int) -> int:
        """Index of the record that stands in at a position whose own can't be used; `attempt` counts from 1."""
        ...


class Epochs:
    """One source time after time, each epoch in an order of its own: of its records, or of blocks of neighbours.

    Args:
        length: number of records.
        seed: any integer.
        block: records that stay together and in their order; those that fill no block end the epoch.
    """

    def __init__(self, length: int, seed: int, block: int = 1):
        self.length, self.seed, self.block = length, seed, block

    def index(self, position: int) -> int:
        """See `record_index`."""
        if self.block == 1 or self.length == 0:  # which is an error
            return record_index(position, self.length, self.seed)
        blocks = self.length // self.block
        epoch, place = divmod(position, self.length)
        if place >= blocks * self.block:
            return place
        number, offset = divmod(place, self.block)
        return self.block * record_index(epoch * blocks + number, blocks, self.seed) + offset

    def substitute(self, position: int, attempt: int) -> int:
        """See `substitute`."""
        return substitute(position, attempt, self.length, self.seed)


def subseed(seed: int, number: int) -> int:
    """The seed of part `number` of a run: parts of equal length walk through different permutations."""
    return _mix(_mix(seed & _MASK) ^ _mix(number))


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on Python ints or uint64 arrays."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _permute(x: Any, length: int, key: Any) -> Any:
    """One pass of the Feistel network over [0, 4^h), the smallest such range that holds `length`."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    left, right = x >> half, x & low
    for step in range(_ROUNDS):
        left, right = right, left ^ (_mix(key ^ (right + (step << 40))) & low)
    return (left << half) | right
