"""Batches for the mesh: endless ones for training, from any position, and one ordered pass for evaluation.

Row r of the global batch that starts at position p is the example at position p + r, on any number of hosts: each
process makes the rows that its own devices hold. The state of a run's data is its position, one integer.
"""

import collections
import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from vlm_jax.data.bad_records import BadRecordAccount, Failure
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.examples import Example, MakeExample
from vlm_jax.data.images import AugmentConfig, PreprocessConfig
from vlm_jax.data.rows import EvalRows, HostBatch, MakesRows, Schedule, TrainRows, host_batches, order_of
from vlm_jax.data.sources import DigitsConfig, Source, SourceConfig, source_at
from vlm_jax.data.text import ClipBpeConfig, TokenizerConfig
from vlm_jax.mesh import batch_sharding
from vlm_jax.schema import ConfigError

Batch = dict[str, jax.Array]
_AHEAD = 2  # batches whose transfer to the chips has been started


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become batches."""

    # records
    source: SourceConfig = dataclasses.field(default_factory=DigitsConfig)
    # short form: tar shards, a table (.jsonl, .csv, .tsv), .json lists, .txt lines, *.array_record, a folder per class;
    # when set it replaces `source`, whose other keys stay if it is of the same kind
    path: str = ""
    # rows of the global batch
    batch_size: int = 256
    # neighbouring records of the source that stay together in the shuffled order and so in a batch, as near-duplicates
    # that are each other's hard negatives; 1 shuffles records
    shuffle_block: int = 1
    # evaluation view, and the normalisation on the chip
    preprocess: PreprocessConfig = dataclasses.field(default_factory=PreprocessConfig)
    # random view of training; None trains on the evaluation view
    augment: AugmentConfig | None = dataclasses.field(default_factory=AugmentConfig)
    # conversations to rows, for methods that read them
    chat: ChatConfig | None = None
    # captions to ids
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=ClipBpeConfig)
    # worker processes that decode; 0 decodes on threads of the training process
    workers: int = 0
    # threads that decode, in the training process or in each worker
    threads: int = 4
    # batches kept ready, per worker
    prefetch: int = 2
    # unusable records that a run may replace: below 1 a share of the source (rounded up), else a number of records
    bad_record_budget: float = 0.01

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key, least in (
            ("batch_size", 1),
            ("shuffle_block", 1),
            ("workers", 0),
            ("threads", 1),
            ("prefetch", 1),
            ("bad_record_budget", 0),
        ):
            if getattr(self, key) < least:
                yield key, f"= {getattr(self, key)} must be {least} or more"
        if self.shuffle_block > 1 and self.batch_size % self.shuffle_block:
            yield "shuffle_block", f"= {self.shuffle_block} does not divide batch_size = {self.batch_size}"

    def build_source(self, cache_dir: str) -> Source:
        """The source of `path` if that is set, else of `source`; raises `ConfigError`."""
        return source_at(self.path, self.source, "config.data.path", "config.data.source", cache_dir)


class _Layout:
    """Which rows of a global batch this process makes, and how they become global arrays."""

    def __init__(self, mesh: Mesh, batch_size: int):
        self.sharding: NamedSharding = batch_sharding(mesh)
        self.batch_size = batch_size
        try:
            self.sharding.shard_shape((batch_size,))
        except ValueError as error:
            sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
            raise ConfigError(
                f"config.data.batch_size = {batch_size} can't be split evenly over the mesh ({sizes}); "
                "use a multiple of data x fsdp"
            ) from error
        indices = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index})
        self.rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
        lengths = [stop - start for start, stop in spans]
        self.offsets = {span[0]: sum(lengths[:place]) for place, span in enumerate(spans)}

    def to_global(self, host: Example) -> Batch:
        """Global arrays from this process's rows; starts the transfer and does not wait for it."""
        return {key: self._array(value) for key, value in host.items()}

    def _array(self, local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = index[0].indices(self.batch_size) if index else (0, self.batch_size, 1)
            offset = self.offsets[start]
            return local[offset : offset + stop - start]

        return jax.make_array_from_callback((self.batch_size, *local.shape[1:]), self.sharding, shard)


class TrainLoader:
    """Endless global batches from a position of a run; iterate it, or call `next`.

    The stream depends on (source, make_example, seed, position) alone, so a run may resume with other worker, thread
    or host counts, and with the same rows in every batch if the batch size stays.

    Attributes:
        position: positions consumed so far, the one number that a checkpoint needs.
        bad_records: distinct unusable records met by this process since it started.
    """

    def __init__(
        self,
        source: Source,
        make_example: MakeExample,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        start_position: int,
        config: DataConfig,
        cache_dir: str = "",
    ):
        layout = _Layout(mesh, batch_size)
        schedule = Schedule(start_position, batch_size, layout.rows, config.threads, config.workers, batches=None)
        if isinstance(make_example, MakesRows):
            if config.shuffle_block > 1:
                raise ConfigError(
                    f"config.data.shuffle_block = {config.shuffle_block} is for rows of one record each, and this "
                    "method puts rows together in an order of its own; set it to 1"
                )
            rows = make_example.rows(source, seed, config.threads, cache_dir)
            _check_same_table(rows.table)
        else:
            rows = TrainRows(source, make_example, seed, order_of(source, seed, config.shuffle_block))
        self.position, self.batch_size = start_position, batch_size
        self._account = BadRecordAccount(len(source), config.bad_record_budget)
        self._account.add(rows.known_failures)
        dataset = host_batches(rows, schedule, config.prefetch)
        self._stream = _Stream(dataset, layout)

    @property
    def bad_records(self) -> int:
        """Distinct unusable records met by this process since it started."""
        return len(self._account)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        """The next batch; raises `BadRecordBudgetExceeded` when too many records could not be used."""
        batch, failures = self._stream.take()
        self._account.add(failures)
        self.position += self.batch_size
        return batch

    def close(self) -> None:
        """Stops threads and worker processes; the loader can't be used afterwards."""
        self._stream.close()


def _check_same_table(digest: str) -> None:
    """Raises `ConfigError` where processes that look at the data by themselves find different things: their rows would.

    All processes must call it together.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(digest.encode().ljust(64), np.uint8)
    others = multihost_utils.process_allgather(mine)
    differing = np.flatnonzero((others != others[:1]).any(axis=1))
    if len(differing):
        raise ConfigError(
            f"process {differing[0]} found other lengths of the conversations of config.data.source than process 0: a "
            "file is missing there, or another one; give all processes the same data"
        )


class _Stream:
    """Global batches, made and sent to the chips by one thread, `_AHEAD` of the consumer."""

    def __init__(self, dataset: Iterable[HostBatch], layout: _Layout):
        self._layout = layout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._iterator: list[Any] = [iter(dataset)]
        self._pending: collections.deque[Future[tuple[Batch, list[Failure]]]] = collections.deque()
        # also when the loader is dropped or the interpreter exits
        self.close = weakref.finalize(self, _close, self._thread, self._iterator, self._pending)
        for _ in range(_AHEAD):
            self._submit()

    def _submit(self) -> None:
        self._pending.append(self._thread.submit(_next_batch, self._iterator[0], self._layout))

    def take(self) -> tuple[Batch, list[Failure]]:
        """The next batch and its failures; raises what the making of it raised."""
        if not self.close.alive:
            raise ValueError("this loader is closed; build another one at its position")
        result = self._pending.popleft().result()
        self._submit()
        return result


class DataWorkerError(RuntimeError):
    """A worker process ended that should not have."""


def _next_batch(iterator: Iterator[HostBatch], layout: _Layout) -> tuple[Batch, list[Failure]]:
    try:
        host, failures = next(iterator)
    except RuntimeError as error:
        # grain has no class of its own for it; errors of our own code come through it as they are.
        if "terminated unexpectedly" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        raise DataWorkerError(
            f"a data worker process ended: {reason}. Most often the system killed it for its memory: lower "
            "config.data.workers, config.data.prefetch or config.data.batch_size. The same command goes on from the "
            "last checkpoint"
        ) from error
    # What a worker made lies in shared memory, which must not live as long as the arrays on a CPU that alias it.
    owned = {key: value if value.flags.owndata else value.copy() for key, value in host.items()}
    return layout.to_global(owned), failures


def _close(thread: ThreadPoolExecutor, iterator: list[Any], pending: collections.deque[Future[Any]]) -> None:
    """Waits for the batch in the making, then stops the workers and the thread."""
    wait([future for future in pending if not future.cancel()])
    pending.clear()
    iterator.pop().close()  # popped, so that no reference outlives grain's modules when the interpreter exits
    thread.shutdown()


class EvalBatches:
    """One pass over a source in its order: every record once, the last batch padded. Iterate it as often as needed.

    Batches hold what `make_example` makes, `mask` bool [B] (False: padding, or a record that can't be used) and
    `index` int32 [B].

    Attributes:
        bad_records: distinct unusable records met by this process.
    """

    def __init__(self, source: Source, make_example: MakeExample, batch_size: int, mesh: Mesh, threads: int):
        self._rows, self._layout, self._threads = EvalRows(source, make_example), _Layout(mesh, batch_size), threads
        self._account = BadRecordAccount(len(source), budget=None)
        self._batches = -(-len(source) // batch_size)

    @property
    def bad_records(self) -> int:
        """Distinct unusable records met by this process."""
        return len(self._account)

    def __len__(self) -> int:
        """Number of batches in a pass."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        size, rows = self._layout.batch_size, self._layout.rows
        schedule = Schedule(0, size, rows, self._threads, workers=0, batches=self._batches)
        stream = _Stream(host_batches(self._rows, schedule, prefetch=1), self._layout)
        try:
            for _ in range(self._batches):
                batch, failures = stream.take()
                self._account.add(failures)
                yield batch
        finally:
            stream.close()


def eval_batches(
    source: Source, make_example: MakeExample, batch_size: int, mesh: Mesh, threads: int = 4
) -> EvalBatches:
    """The batches of one evaluation pass, laid out on the mesh as in training."""
    return EvalBatches(source, make_example, batch_size, mesh, threads)
