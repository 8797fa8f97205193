"""Documents to rows of a fixed number of tokens: which documents share a row, and where in it each one lies.

Nothing is streamed. Lengths are known before training starts, so the rows are a table, and the row at a position of a
run is found in constant time (`order`); a checkpoint stores nothing of it. What a document holds (a conversation, a
plain text) is its maker's business, and reading it too.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from vlm_jax.data.order import record_index, subseed

Isolation = Literal["document", "none"]
Padding = Literal["right", "left"]
Fit = Literal["tight", "balanced"]
WINDOW = 4096
"""Documents that are packed together. Few rows are left unfilled at the end of a window of this size, and documents of
like length are not always paired with the same others."""


def pack(
    lengths: Sequence[int] | np.ndarray,
    row_length: int,
    *,
    tiles: Sequence[int] | np.ndarray | None = None,
    max_tiles: int | None = None,
    fit: Fit = "tight",
    spare_rows: int = 0,
) -> list[list[int]]:
    """Groups of documents that fit a row each: a greedy knapsack, the longest document first.

    It goes into one of the rows that have room for it, or into a new one if none has. Same input, same groups, in
    O(n (log n + max_tiles)) comparisons.

    Args:
        lengths: tokens of each document, what separates it from the next included; none exceeds `row_length`.
        row_length: tokens of a row.
        tiles: image tiles of each document; None: none has any.
        max_tiles: tiles of a row; None: any number.
        fit: "tight" takes the fullest row with room (best fit decreasing), for the fewest rows. "balanced" takes the
            emptiest of as many rows as the sum of the lengths needs and `spare_rows`; with 5 of them it is nanoVLM's.
        spare_rows: see `fit`.

    Returns:
        The documents' numbers by row, in the order in which they were put there; no row is empty.

    Raises:
        ValueError: a document that fits no row; names its number.
    """
    lengths_n = np.asarray(lengths, np.int64)
    tiles_n = np.zeros_like(lengths_n) if tiles is None or max_tiles is None else np.asarray(tiles, np.int64)
    most_tiles = 0 if max_tiles is None else max_tiles
    unfit = np.flatnonzero((lengths_n > row_length) | (lengths_n < 0) | (tiles_n > most_tiles))
    if len(unfit):
        first = int(unfit[0])
        raise ValueError(
            f"document {first} has {lengths_n[first]} tokens and {tiles_n[first]} tiles, and a row holds {row_length} "
            f"and {most_tiles}; cut it, or leave it out"
        )
    groups: list[list[int]] = [[] for _ in range(-(-int(lengths_n.sum()) // row_length) + spare_rows)]
    # (tokens, row) in order, by the number of tiles in use: a row without room for tiles is not looked at for each.
    open_rows: list[list[tuple[int, int]]] = [[] for _ in range(most_tiles + 1)]
    open_rows[0] = [(0, row) for row in range(len(groups))]
    for document in np.argsort(-lengths_n, kind="stable").tolist():
        length, wanted = int(lengths_n[document]), int(tiles_n[document])
        found = _row_for(open_rows[: most_tiles - wanted + 1], row_length - length, fit)
        if found is None:
            used, load, row = 0, 0, len(groups)
            groups.append([])
        else:
            used, place = found
            load, row = open_rows[used].pop(place)
        groups[row].append(document)
        bisect.insort(open_rows[used + wanted], (load + length, row))
    return [group for group in groups if group]


def _row_for(open_rows: list[list[tuple[int, int]]], most: int, fit: Fit) -> tuple[int, int] | None:
    """(tiles in use, place in their list) of the row to take, out of those with at most `most` tokens."""
    best: tuple[tuple[int, int], tuple[int, int]] | None = None
    for used, rows in enumerate(open_rows):
        room = bisect.bisect_left(rows, (most + 1, 0))  # number of rows with room
        if not room:
            continue
        load = rows[0 if fit == "balanced" else room - 1][0]
        place = bisect.bisect_left(rows, (load, 0))  # of rows equally full, that with the lowest number
        candidate = (load if fit == "balanced" else -load, rows[place][1]), (used, place)
        best = candidate if best is None else min(best, candidate)
    return None if best is None else best[1]


@dataclasses.dataclass(frozen=True)
class Packing:
    """The documents of each row; a sequence of int64 arrays.

    Attributes:
        documents: int64 [n], the documents of row 0, then those of row 1, and so on.
        ends: int64 [rows], where each row's documents end in it.
    """

    documents: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        """Numbers of the documents of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"there are {len(self)} rows, there is no row {row}")
        return self.documents[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]


def pack_windows(
    lengths: Sequence[int] | np.ndarray,
    row_length: int,
    seed: int,
    *,
    tiles: Sequence[int] | np.ndarray | None = None,
    max_tiles: int | None = None,
    window: int = WINDOW,
    fit: Fit = "tight",
    spare_rows: int = 0,
) -> Packing:
    """Every document once, in rows: a permutation by `seed`, cut into windows of documents that are packed together.

    The table stays the same in every epoch; the order of its rows is the run's.

    Args:
        lengths: tokens of each document; one with a negative length is left out (it can't be used).
        row_length: tokens of a row.
        seed: of the permutation; not the seed of the order, although one number may serve for both.
        tiles: image tiles of each document; None: none has any.
        max_tiles: tiles of a row; None: any number.
        window: documents packed together.
        fit: see `pack`.
        spare_rows: see `pack`.

    Raises:
        ValueError: a document that fits no row.
    """
    lengths_n = np.asarray(lengths, np.int64)
    usable = np.flatnonzero(lengths_n >= 0)
    if not len(usable):
        return Packing(np.zeros(0, np.int64), np.zeros(0, np.int64))
    order = usable[record_index(np.arange(len(usable)), len(usable), subseed(seed, 0))]
    tiles_n = None if tiles is None else np.asarray(tiles, np.int64)
    rows: list[np.ndarray] = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        own_tiles = None if tiles_n is None else tiles_n[members]
        groups = pack(
            lengths_n[members], row_length, tiles=own_tiles, max_tiles=max_tiles, fit=fit, spare_rows=spare_rows
        )
        rows += [members[group] for group in groups]
    return Packing(np.concatenate(rows), np.cumsum([len(row) for row in rows]))


def pieces(lengths: Sequence[int] | np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut where a row is full, for plain text: (document, first token, past the last), int64 [pieces] each.

    Documents without a token give no piece. The pieces' lengths are what `pack_windows` takes.
    """
    lengths_n = np.asarray(lengths, np.int64)
    counts = -(-lengths_n // row_length)
    document = np.repeat(np.arange(len(lengths_n)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * row_length
    return document, first, np.minimum(first + row_length, lengths_n[document])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the documents of a row lie.

    Attributes:
        starts: first token of each document in the row.
        segments: int32 [row_length]: 1, 2, ... for the tokens of the documents, 0 for what nothing may attend to.
        positions: int32 [row_length]: place of each token as the position embedding sees it.
    """

    starts: list[int]
    segments: np.ndarray
    positions: np.ndarray


def lay_out(
    lengths: Sequence[int], row_length: int, isolation: Isolation = "document", padding: Padding = "right"
) -> Layout:
    """Documents side by side in a row.

    Args:
        lengths: tokens of each document.
        row_length: tokens of the row; at least their sum, and one more for each document with `isolation` "none".
        isolation: "document" gives each its own segment and positions that begin at 0. "none" is nanoVLM's row: one
            segment, positions that run through, and after each document one token of padding, which nothing sees.
        padding: the side where the row is filled up.

    Raises:
        ValueError: the documents are longer than the row.
    """
    gap = int(isolation == "none")
    total = sum(lengths) + gap * len(lengths)
    if total > row_length:
        raise ValueError(f"{len(lengths)} documents of {total} tokens don't fit a row of {row_length}")
    place = row_length - total if padding == "left" else 0
    segments = np.zeros(row_length, np.int32)
    positions = np.arange(row_length, dtype=np.int32) if gap else np.zeros(row_length, np.int32)
    starts = []
    for number, length in enumerate(lengths):
        starts.append(place)
        segments[place : place + length] = 1 if gap else number + 1
        if not gap:
            positions[place : place + length] = np.arange(length)
        place += length + gap
    return Layout(starts, segments, positions)
