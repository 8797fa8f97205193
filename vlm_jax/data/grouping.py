"""Records of like length and kind one after the other: LLaVA's `group_by_modality_length`.

Lengths are positive for records with images and negative for those of text alone.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.data.order import record_index, subseed, substitute

Permutation = Callable[[int, int], np.ndarray]
"""(which permutation, length) -> the permutation, int64 [length]."""


def length_groups(
    lengths: np.ndarray, group: int, parts: int, permutation: Permutation, which: int = 0
) -> list[list[int]]:
    """Random groups of `group * parts` items, in each the longest first and dealt evenly to `parts`, one after another.

    Args:
        lengths: int [n].
        group: items of a part in a group.
        parts: parts of a group (LLaVA's devices), which get a like sum of lengths.
        permutation: gives the random order.
        which: which permutation to ask for.
    """
    shuffled = permutation(which, len(lengths))
    groups = []
    for start in range(0, len(shuffled), group * parts):
        members = shuffled[start : start + group * parts]
        by_length = members[np.argsort(-lengths[members], kind="stable")].tolist()
        groups.append([item for part in _dealt(by_length, lengths, parts) for item in part])
    return groups


def _dealt(items: Sequence[int], lengths: np.ndarray, parts: int) -> list[Sequence[int]]:
    """Items to parts of equal number, each item to the part that has the smallest sum so far."""
    if parts == 1:
        return [items]
    if len(items) % parts:
        return [items[part::parts] for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for item in items:
        part = sums.index(min(sums))
        dealt[part].append(item)
        full = len(dealt[part]) == len(items) // parts
        sums[part] = float("inf") if full else sums[part] + float(lengths[item])
    return list(dealt)


def modality_groups(lengths: Sequence[int] | np.ndarray, group: int, parts: int, permutation: Permutation) -> list[int]:
    """The order of an epoch: groups that hold records with images or without, in random order.

    What fills no whole group of either kind comes last, in one group and in the order of the records.

    Args:
        lengths: int [n], positive with images, negative without.
        group: items of a part in a group.
        parts: parts of a group.
        permutation: 0 and 1 are those of the records of the two kinds, 2 that of the groups.
    """
    lengths_n = np.asarray(lengths, np.int64)
    kinds = [np.flatnonzero(lengths_n > 0), np.flatnonzero(lengths_n < 0)]
    if not all(map(len, kinds)):
        return [item for part in length_groups(np.abs(lengths_n), group, parts, permutation) for item in part]
    whole: list[list[int]] = []
    rest: list[int] = []
    for which, members in enumerate(kinds):
        groups = length_groups(np.abs(lengths_n[members]), group, parts, permutation, which)
        named = [members[items].tolist() for items in groups]
        whole += named[:-1]
        rest += named[-1]
    shuffled = [whole[i] for i in permutation(2, len(whole)).tolist()] if whole else []
    return [item for part in [*shuffled, sorted(rest)] for item in part]


class GroupedOrder:
    """The walk of a run through records of known lengths, each epoch grouped anew.

    Args:
        lengths: int [n], positive with images, negative without; 0 leaves a record out.
        group: records of a group, such as those of a global batch.
        seed: of the run.
    """

    def __init__(self, lengths: np.ndarray, group: int, seed: int):
        self.records = np.flatnonzero(lengths)
        self.lengths, self.group, self.seed = lengths[self.records], group, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def index(self, position: int) -> int:
        """Index of the record at a position; the first one of an epoch takes the time to sort it."""
        epoch, place = divmod(int(position), len(self.records))
        order = self._epochs.get(epoch)
        if order is None:
            order = self._order(epoch)
            # Threads work on both sides of the border between two epochs, so that two are kept.
            self._epochs = {number: kept for number, kept in self._epochs.items() if abs(number - epoch) == 1}
            self._epochs[epoch] = order
        return int(self.records[order[place]])

    def substitute(self, position: int, attempt: int) -> int:
        """See `order.substitute`."""
        return int(self.records[substitute(position, attempt, len(self.records), self.seed)])

    def _order(self, epoch: int) -> np.ndarray:
        def permutation(which: int, length: int) -> np.ndarray:
            return record_index(np.arange(length), length, subseed(subseed(self.seed, epoch), which))

        return np.asarray(modality_groups(self.lengths, self.group, 1, permutation), np.int64)
