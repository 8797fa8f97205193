"""The rows of a training run on conversations: in random order, grouped by length and kind, or several to a row.

Which conversations share a row is a table made from their lengths before the run (`measure`, `packing`): the row
at a position is a pure function of (seed, position), as everywhere.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vlm_jax.data.bad_records import Failure, none_usable
from vlm_jax.data.chat import Document
from vlm_jax.data.chat_config import ChatConfig
from vlm_jax.data.examples import Example, MakeExample
from vlm_jax.data.grouping import GroupedOrder
from vlm_jax.data.interleave import Interleaved
from vlm_jax.data.measure import Measurable, Measured, measure
from vlm_jax.data.order import Epochs, Order, subseed
from vlm_jax.data.packing import Packing, pack_windows
from vlm_jax.data.rows import MAX_ATTEMPTS, Row, TrainRows
from vlm_jax.data.sources.base import BadRecord, Record, Source
from vlm_jax.data.sources.mixture import MixtureSource
from vlm_jax.schema import ConfigError


class JoinsDocuments(MakeExample, Measurable, Protocol):
    """What makes a row of several records (`chat_examples`)."""

    config: ChatConfig

    def read(self, record: Record) -> tuple[Document, np.ndarray]:
        """The document of a record and its tiles; raises `BadRecord`."""
        ...

    def joined(self, documents: Sequence[tuple[Document, np.ndarray]]) -> Example:
        """A row of these documents."""
        ...


def chat_rows(
    source: Source, maker: JoinsDocuments, seed: int, threads: int, cache_dir: str
) -> "TrainRows | PackedRows":
    """The rows of a run, as the config wants them.

    Args:
        source: the conversations.
        maker: makes documents of them and joins those.
        seed: of the run.
        threads: threads to measure on.
        cache_dir: folder that keeps what was measured.

    Raises:
        ConfigError: groups of like length are wanted from a mixture with weights.
        BadRecordBudgetExceeded: no record can be used.
    """
    config = maker.config
    if config.packing == "none" and not config.group:
        return TrainRows(source, maker, seed)
    measured = measure(source, maker, threads, cache_dir)
    if not (measured.tokens >= 0).any():
        raise none_usable(measured.failures, f"none of the {len(source)} conversations")
    if config.packing != "none":
        return PackedRows(source, maker, measured, seed)
    if isinstance(source, MixtureSource):
        raise ConfigError(
            "config.data.chat.group makes an order of its own, in which the weights of a mixture have no place; set it "
            "to 0, or join the data"
        )
    lengths = np.where(measured.tiles > 0, measured.tokens, -measured.tokens) * (measured.tokens > 0)
    order = GroupedOrder(lengths, config.group, seed)
    return TrainRows(source, maker, seed, order, measured.failures, measured.digest())


class PackedRows:
    """Several conversations to a row: a `MakeRow`.

    A conversation that can't be read when its row is made (a damaged image) leaves its place in the row empty, and is
    counted; a row of nothing else is replaced.

    Attributes:
        packing: the conversations of each row.
    """

    def __init__(self, source: Source, maker: JoinsDocuments, measured: Measured, seed: int):
        self.source, self.maker, self.seed = source, maker, seed
        self.known_failures, self.table = measured.failures, measured.digest()
        tables: list[Packing] = []
        self.order = _order(source, maker.config, measured, seed, 0, tables)
        self.packing = Packing.joined(tables)

    def __call__(self, position: int) -> Row:
        """See `MakeRow`."""
        failures: list[Failure] = []
        row = self.order.index(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            documents = []
            for index in self.packing[row].tolist():
                try:
                    documents.append(self.maker.read(self.source[index]))
                except BadRecord as error:
                    failures.append(Failure.of(index, error))
            if documents:
                return self.maker.joined(documents), failures
            row = self.order.substitute(position, attempt)
        raise none_usable(failures, f"none of the conversations of {MAX_ATTEMPTS} rows")


def _order(
    source: Source, config: ChatConfig, measured: Measured, seed: int, first: int, tables: list[Packing]
) -> Order:
    """The walk through the rows of a source, whose tables are added: those of a mixture's parts take turns."""
    if isinstance(source, MixtureSource):
        starts = [first, *(first + end for end in source.ends[:-1])]
        orders, lengths = [], []
        for number, (part, start) in enumerate(zip(source.sources, starts, strict=True)):
            own: list[Packing] = []
            orders.append(_order(part, config, measured, subseed(seed, number), start, own))
            lengths.append(sum(map(len, own)))
            tables += own
        return Interleaved(orders, lengths, source.weights)
    members = slice(first, first + len(source))
    gap = int(config.isolation == "none")
    tokens = measured.tokens[members]
    if not (tokens >= 0).any():
        where = measured.failures[0].where
        raise none_usable((f for f in measured.failures if first <= f.index < members.stop), f"no record of {where}")
    packed = pack_windows(
        np.where(tokens >= 0, tokens + gap, -1),
        config.row_length + gap,
        seed,
        tiles=measured.tiles[members],
        max_tiles=config.max_tiles,
        window=config.window,
        fit="balanced" if config.packing == "balanced" else "tight",
        spare_rows=5 if config.packing == "balanced" else 0,
    )
    tables.append(Packing(packed.documents + first, packed.ends))
    return Epochs(len(packed), seed)
