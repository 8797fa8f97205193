"""Another source with a seeded share of its captions exchanged, for studies of what wrong captions do to a method."""

import dataclasses
from collections.abc import Iterator

from vlm_jax.data.order import example_rng
from vlm_jax.data.sources.base import Record, Source, SourceConfig
from vlm_jax.data.sources.shapes import ShapesConfig
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class MismatchedConfig(SourceConfig):
    """The records of a source, some of them with the captions of others."""

    # the records
    source: SourceConfig = dataclasses.field(default_factory=ShapesConfig)
    # short form of the source, as data.path
    path: str = ""
    # probability of a record to have the captions of another one, drawn among all others
    share: float = 0.3
    # which, and whose captions; the same records are wrong in every epoch
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """A share that is none, and a mixture, whose weights would be lost."""
        if not 0 <= self.share <= 1:
            yield "share", f"= {self.share} must lie in [0, 1]"
        if self.source.kind() == "mixture":
            yield "source", "= mixture would lose its weights; make each part's source mismatched instead"

    def build(self, cache_dir: str) -> "MismatchedSource":
        """Builds the source; an error names its keys."""
        from vlm_jax.data.sources import source_at  # that module imports this one

        key = "config.data.source"
        source = source_at(self.path, self.source, f"{key}.path", f"{key}.source", cache_dir)
        if len(source) < 2:
            raise ConfigError(f"{key}.source holds {len(source)} records; captions can be exchanged among 2 or more")
        return MismatchedSource(source, self.share, self.seed)


class MismatchedSource:
    """The images of a source in their order, each with the captions of the record that a draw by (seed, index) names.

    What else a record has stays its own.
    """

    def __init__(self, source: Source, share: float, seed: int):
        self.source, self.share, self.seed, self.class_names = source, share, seed, source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """The record; raises `BadRecord` where the captions can't be read."""
        teller, record = self.teller(index), self.source[index]
        if teller == index:
            return record
        return {key: x for key, x in record.items() if key != "no_caption"} | {"texts": self.source.texts(teller)}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a record."""
        return self.source.texts(self.teller(index))

    def teller(self, index: int) -> int:
        """The record whose captions a record has."""
        rng = example_rng(self.seed, index)
        if rng.random() >= self.share:
            return index
        return (index + int(rng.integers(1, len(self.source)))) % len(self.source)


__all__ = ["MismatchedConfig", "MismatchedSource"]
