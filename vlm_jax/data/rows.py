"""Positions of a run to rows, and rows to this process's part of a batch, on threads or worker processes (grain).

Which rows those are, and what becomes of them on the chips, is `pipeline`'s business; nothing here needs JAX.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from vlm_jax.data.bad_records import Failure, none_usable
from vlm_jax.data.examples import Example, MakeExample
from vlm_jax.data.interleave import Interleaved
from vlm_jax.data.order import Epochs, Order, example_rng, subseed
from vlm_jax.data.sources.base import BadRecord, Source
from vlm_jax.data.sources.mixture import MixtureSource

Row = tuple[Example, list[Failure]]
HostBatch = tuple[Example, list[Failure]]
MAX_ATTEMPTS = 64  # with half of all records unusable, that many failures in a row never happen
_ENDLESS = 1 << 56
_CHUNKS_PER_THREAD = 4


def order_of(source: Source, seed: int, block: int = 1) -> Order:
    """The walk of training through a source: epochs, or those of its parts taking turns; `block` as in `Epochs`."""
    if not isinstance(source, MixtureSource):
        return Epochs(len(source), seed, block)
    orders = [order_of(part, subseed(seed, number), block) for number, part in enumerate(source.sources)]
    return Interleaved(orders, [len(part) for part in source.sources], source.weights)


class MakeRow(Protocol):
    """The row at a position of a run: a pure function of the position. Picklable and safe in threads."""

    known_failures: tuple[Failure, ...]
    """Records that can't be used and are known before the first row is made; no row tries them again."""
    table: str
    """A digest of what was found out beforehand and decides the rows; empty where nothing was."""

    def __call__(self, position: int) -> Row:
        """The example, and the records that had to be replaced or left out to get it."""
        ...


@runtime_checkable
class MakesRows(Protocol):
    """A `MakeExample` that knows better than one record to a row, or than a random order."""

    def rows(self, source: Source, seed: int, threads: int, cache_dir: str) -> MakeRow:
        """The rows of a training run.

        Args:
            source: the records.
            seed: of the run.
            threads: threads to look at the records beforehand, if that is needed.
            cache_dir: folder where what was found out is kept; empty: nowhere.
        """
        ...


class TrainRows:
    """The row at a position of a training run: a pure function of (seed, position).

    Args:
        source: the records.
        make_example: record -> row.
        seed: of the run.
        order: the walk through the source; None: `order_of`.
        known_failures: records that can't be used, which this walk leaves out.
        table: digest of what the order was made from, if of more than its seed.
    """

    def __init__(
        self,
        source: Source,
        make_example: MakeExample,
        seed: int,
        order: Order | None = None,
        known_failures: tuple[Failure, ...] = (),
        table: str = "",
    ):
        self.source, self.make_example, self.seed = source, make_example, seed
        self.order = order_of(source, seed) if order is None else order
        self.known_failures, self.table = known_failures, table

    def __call__(self, position: int) -> Row:
        """The example, and the records that had to be replaced to get it."""
        failures = []
        index = self.order.index(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self.make_example(self.source[index], example_rng(self.seed, position)), failures
            except BadRecord as error:
                failures.append(Failure.of(index, error))
                index = self.order.substitute(position, attempt)
        drawn = f"none of {MAX_ATTEMPTS} records drawn one after the other, of {len(self.source)} in all,"
        raise none_usable(failures, drawn)


class EvalRows:
    """Record i as row i, in order; `mask` False marks padding and records that can't be used, `index` is i."""

    def __init__(self, source: Source, make_example: MakeExample):
        self.source, self.make_example = source, make_example
        self.blank = self._blank()

    def _blank(self) -> Example:
        """Zeros in the shape of an example, for rows without one."""
        failures = []
        for index in range(len(self.source)):
            try:
                example = self.make_example(self.source[index], None)
            except BadRecord as error:
                failures.append(Failure.of(index, error))
                continue
            return {key: np.zeros_like(value) for key, value in example.items()}
        raise none_usable(failures, f"none of the {len(self.source)} records")

    def __call__(self, position: int) -> Row:
        """The example of a record, or a blank."""
        example, failures = None, []
        if position < len(self.source):
            try:
                example = self.make_example(self.source[position], None)
            except BadRecord as error:
                failures.append(Failure.of(position, error))
        marks = {"mask": np.asarray(example is not None), "index": np.asarray(position, np.int32)}
        return {**(self.blank if example is None else example), **marks}, failures


class Schedule:
    """Element number -> positions, such that this process gets its rows of batch 0, 1, 2, ... in order.

    A batch is cut into a few chunks, the elements, since grain's cost per element is that of a small image. With W
    workers grain hands element e to worker e % W, each worker joins its own elements to batches, and their batches
    come back in turn. So worker w must be given the chunks of batches w, w + W, w + 2W, ...

    Args:
        start: position of row 0 of the first batch.
        batch_size: rows of the global batch.
        rows: the rows of it that this process makes, int [n].
        threads: threads that make rows, in this process or in each worker.
        workers: worker processes, or 0.
        batches: number of batches; None never ends.
    """

    def __init__(self, start: int, batch_size: int, rows: np.ndarray, threads: int, workers: int, batches: int | None):
        self.start, self.batch_size, self.threads, self.workers = start, batch_size, threads, workers
        self.chunks = np.array_split(rows, min(len(rows), _CHUNKS_PER_THREAD * threads))
        self.elements = _ENDLESS if batches is None else batches * len(self.chunks)

    def __len__(self) -> int:
        return self.elements

    def __getitem__(self, index: int) -> list[int]:
        turn, worker = divmod(int(index), max(1, self.workers))
        round_, chunk = divmod(turn, len(self.chunks))
        first = self.start + (round_ * max(1, self.workers) + worker) * self.batch_size
        return [first + int(row) for row in self.chunks[chunk]]


class _MakeRows:
    """The rows of a chunk."""

    def __init__(self, make_row: MakeRow | EvalRows):
        self.make_row = make_row

    def __call__(self, positions: Sequence[int]) -> list[Row]:
        return [self.make_row(position) for position in positions]


def collate(chunks: Sequence[Sequence[Row]]) -> HostBatch:
    """Stacks rows into a batch and joins their failures."""
    rows = [row for chunk in chunks for row in chunk]
    batch = {key: np.stack([example[key] for example, _ in rows]) for key in rows[0][0]}
    return batch, [failure for _, failures in rows for failure in failures]


def host_batches(make_row: MakeRow | EvalRows, schedule: Schedule, prefetch: int) -> Iterable[HostBatch]:
    """This process's part of each batch, as (arrays [rows, ...], failures); its iterator has a `close`.

    Args:
        make_row: position -> row.
        schedule: which positions, in which order, on how many threads and workers.
        prefetch: batches kept ready, by each worker if there are any.
    """
    chunks = len(schedule.chunks)
    read = grain.ReadOptions(num_threads=schedule.threads, prefetch_buffer_size=prefetch * chunks)
    dataset = grain.MapDataset.source(schedule).map(_MakeRows(make_row)).to_iter_dataset(read)
    dataset = dataset.batch(chunks, batch_fn=collate)
    if not schedule.workers:
        return dataset
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags; without absl.app (pytest, notebooks) it would raise
    options = grain.MultiprocessingOptions(num_workers=schedule.workers, per_worker_buffer_size=prefetch)
    return dataset.mp_prefetch(options, worker_init_fn=_die_with_parent)


def _die_with_parent(worker: int, workers: int) -> None:
    """Ties a worker's life to its parent's; and leaves Ctrl-C and SIGTERM, which reach the group, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not PR_SET_PDEATHSIG: it fires when the *thread* that started the worker ends. Grain ends that thread before it
    # stops the workers, and one killed while it writes to its queue blocks the parent for good.
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
