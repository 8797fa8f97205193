"""How several sources take turns in one stream: in exact proportion to their weights, over any stretch of it.

Position p -> (part, how many of that part came before p) is a table over one period, so that hosts and workers agree
on it without talking. The records of each part are then found by the part's own `order`.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from vlm_jax.data.order import Order

MAX_PERIOD = 1 << 16


def shares(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers, the turns of each part in a period.

    They are exact where the sum comes to at most `MAX_PERIOD` (1 and 2.5 give 2 and 5); other weights are rounded to
    parts of `MAX_PERIOD`, none to less than one turn.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    turns = [int(weight * common) for weight in exact]
    turns = [count // gcd(*turns) for count in turns]
    if sum(turns) <= MAX_PERIOD:
        return turns
    total = sum(exact)
    rounded = [max(1, round(weight / total * MAX_PERIOD)) for weight in exact]
    return [count // gcd(*rounded) for count in rounded]


def schedule(turns: Sequence[int]) -> np.ndarray:
    """The part whose turn it is at each position of a period, int32 [sum(turns)].

    After any number n of positions, a part with a share w has had more than n w - 1 and fewer than n w + 1 turns
    (Tijdeman, "The chairman assignment problem", 1980): turn j of a part may not come before n w > j + 1/(2k - 2) and
    not after n w = j + 1 - 1/(2k - 2), for k parts, and the earliest deadline goes first.
    """
    period, slack = sum(turns), max(1, 2 * len(turns) - 2)
    releases: list[list[tuple[float, int]]] = [[] for _ in range(period + 1)]
    for part, count in enumerate(turns):
        turn = np.arange(count, dtype=np.int64)
        earliest = -(-(turn * slack + 1) * period // (slack * count))  # rounded up; positions count from 1
        latest = ((turn + 1) * slack - 1) * (period / count)  # in units of 1/slack
        for first, last in zip(earliest.tolist(), latest.tolist(), strict=True):
            releases[first].append((last, part))
    waiting: list[tuple[float, int]] = []
    order = np.empty(period, np.int32)
    for position in range(1, period + 1):
        for release in releases[position]:
            heapq.heappush(waiting, release)
        order[position - 1] = heapq.heappop(waiting)[1]
    return order


class Interleaved:
    """The order of a source that joins parts end to end: each part walks on by itself when its turn comes.

    Args:
        orders: the order of each part.
        lengths: records of each part; part c begins at the sum of the lengths before it.
        weights: share of the stream that each part makes, in any unit.
    """

    def __init__(self, orders: Sequence[Order], lengths: Sequence[int], weights: Sequence[float]):
        self.orders, self.turns = tuple(orders), shares(weights)
        self.offsets = [sum(lengths[:part]) for part in range(len(lengths))]
        self.parts = schedule(self.turns)
        self.before = np.empty_like(self.parts)  # turns that the same part had earlier in the period
        for part, count in enumerate(self.turns):
            self.before[self.parts == part] = np.arange(count)

    def locate(self, position: int) -> tuple[int, int]:
        """(part, position within the part's own stream)."""
        period, place = divmod(int(position), len(self.parts))
        part = int(self.parts[place])
        return part, period * self.turns[part] + int(self.before[place])

    def index(self, position: int) -> int:
        """Index of the record at a position."""
        part, own = self.locate(position)
        return self.offsets[part] + self.orders[part].index(own)

    def substitute(self, position: int, attempt: int) -> int:
        """A record of the same part."""
        part, own = self.locate(position)
        return self.offsets[part] + self.orders[part].substitute(own, attempt)
