"""Several sources as one: their records end to end, and the shares in which training draws from them.

A mixture knows no order; `interleave` makes one of its weights.
"""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from vlm_jax.data.interleave import MAX_PERIOD
from vlm_jax.data.sources.base import BadRecord, Record, Source, SourceConfig, keys_at


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """A source and its share."""

    # stands in overrides (config.data.source.sources.NAME...), in errors and in the records' `where`
    name: str
    # the records
    source: SourceConfig
    # share of the examples of training, relative to the other parts; not the number of epochs
    weight: float = 1.0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Names and weights that can't be used."""
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            yield "name", f"= {self.name!r} stands in overrides; use letters, digits, '_' and '-'"
        if not 0 < self.weight < float("inf"):
            yield "weight", f"= {self.weight} must be positive; leave the part out to train without it"


@dataclasses.dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """Training draws from every part in proportion to its weight; a small part repeats while a large one goes on."""

    # the parts; those that share a weight share the stream evenly, whatever their lengths
    sources: tuple[MixturePart, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Parts that can't be told apart, or none."""
        if not self.sources:
            yield "sources", "is empty; give parts, each with a name, a source and a weight"
        names = [part.name for part in self.sources]
        for name in names:
            if names.count(name) > 1:
                yield "sources", f"has two parts named {name!r}; give each its own name"
        total = sum(part.weight for part in self.sources)
        for part in self.sources:
            if part.weight * MAX_PERIOD < total:
                yield f"sources.{part.name}.weight", f"= {part.weight} is less than 1/{MAX_PERIOD} of all weights"

    def build(self, cache_dir: str) -> "MixtureSource":
        """Builds every part; an error names the part's keys."""
        sources = []
        for part in self.sources:
            with keys_at("config.data.source.path", f"config.data.source.sources.{part.name}.source."):
                sources.append(part.source.build(cache_dir))
        return MixtureSource([part.name for part in self.sources], sources, [part.weight for part in self.sources])


class MixtureSource:
    """The records of the parts, one part after the other.

    Labels stay where all parts count the same classes. Else they are dropped: the same number would mean another
    thing in each part.

    Attributes:
        sources: the parts.
        weights: their shares in training.
    """

    def __init__(self, names: Sequence[str], sources: Sequence[Source], weights: Sequence[float]):
        self.names, self.sources, self.weights = tuple(names), tuple(sources), tuple(weights)
        self.ends = list(itertools.accumulate(map(len, self.sources)))
        classes = {source.class_names for source in self.sources}
        self.same_classes = len(classes) == 1
        self.class_names: tuple[str, ...] = classes.pop() if self.same_classes else ()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The record of its part; `where` begins with the part's name."""
        part, row = self._locate(index)
        with self._named(part):
            record = self.sources[part][row]
        record = {**record, "where": f"{self.names[part]}: {record['where']}"}
        if not self.same_classes:
            record.pop("label", None)
        return record

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a record."""
        part, row = self._locate(index)
        with self._named(part):
            return self.sources[part].texts(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture holds {len(self)} records, there is no record {index}")
        part = bisect.bisect_right(self.ends, index)
        return part, index - self.ends[part] + len(self.sources[part])

    @contextlib.contextmanager
    def _named(self, part: int) -> Iterator[None]:
        try:
            yield
        except BadRecord as error:
            raise BadRecord(f"{self.names[part]}: {error.where}", error.key, error.why) from error
