"""A seeded share of another source, for studies of the amount of data: a smaller share lies within a larger one."""

import dataclasses
from collections.abc import Iterator

from vlm_jax.data.order import record_index
from vlm_jax.data.sources.base import Record, Source, SourceConfig
from vlm_jax.data.sources.digits import DigitsConfig


@dataclasses.dataclass(frozen=True)
class SubsetConfig(SourceConfig):
    """Some of the records of a source."""

    # the records; in the place of a mixture, every part of it can have a subset
    source: SourceConfig = dataclasses.field(default_factory=DigitsConfig)
    # short form of the source, as data.path
    path: str = ""
    # how many of them, as a share (rounded, at least one record)
    share: float = 1.0
    # which: the first ones in the order that this seed gives to all
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """A share of nothing, and a mixture, whose weights would be lost."""
        if not 0 < self.share <= 1:
            yield "share", f"= {self.share} must lie in (0, 1]"
        if self.source.kind() == "mixture":
            yield "source", "= mixture would lose its weights; make each part's source a subset instead"

    def build(self, cache_dir: str) -> "SubsetSource":
        """Builds the source; an error names its keys."""
        from vlm_jax.data.sources import source_at  # that module imports this one

        key = "config.data.source"
        return SubsetSource(
            source_at(self.path, self.source, f"{key}.path", f"{key}.source", cache_dir), self.share, self.seed
        )


class SubsetSource:
    """The first records of a seeded permutation of a source; nothing is stored, however many there are."""

    def __init__(self, source: Source, share: float, seed: int):
        self.source, self.seed, self.class_names = source, seed, source.class_names
        self.count = max(round(share * len(source)), 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """The record."""
        return self.source[self._place(index)]

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a record."""
        return self.source.texts(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"the subset holds {self.count} records, there is no record {index}")
        return record_index(index, len(self.source), self.seed)
