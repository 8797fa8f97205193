"""The seam between evaluations and the rest: what an evaluation is given, and what it gives back.

No evaluation is here (`zero_shot`, `retrieval` are), and nothing that decides when one runs (the training loop does).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from vlm_jax import schema
from vlm_jax.data.sources import Record, Source, SourceConfig
from vlm_jax.data.sources.base import keys_at


class Encoder(Protocol):
    """A model with two towers on its mesh, as evaluations see it; features are L2-normalised float32."""

    @property
    def batch_size(self) -> int:
        """Rows of a global batch; a multiple of the number of devices that share the batch."""
        ...

    def image_features(self, params: Any, images_BxHxWx3: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3], sharded over the batch axes -> features [B, E]."""
        ...

    def text_features(self, params: Any, tokens_BxL: jax.Array) -> jax.Array:
        """int32 tokens [B, L], sharded over the batch axes -> features [B, E]."""
        ...

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int32 [n, L]."""
        ...

    def image_batches(self, source: Source) -> Iterable[Mapping[str, jax.Array]]:
        """Every usable record of a source once, in order, as global batches of `batch_size` rows.

        Keys: `image`; `index` int32 [B], the record's position in the source; `mask` bool [B], False for a row that is
        padding or whose record can't be used. Other keys are ignored.
        """
        ...

    def labelled_batches(self, source: Source) -> Iterable[Mapping[str, jax.Array]]:
        """As `image_batches`, with `label` int32 [B]; records without a label can't be used."""
        ...

    def shard(self, array: np.ndarray) -> jax.Array:
        """An array of `batch_size` rows, the same on every process -> a global array over the batch axes."""
        ...


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        metrics: flat name -> value, such as `zero_shot/digits/top1`; the same on every process. Shares are in 0..1.
        images: flat name -> uint8 [H, W, 3], on the primary process; empty on the others.
    """

    metrics: dict[str, float]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class EvalError(ValueError):
    """The data can't be evaluated in this way; the sentence says why and what to do."""


class Evaluator(Protocol):
    """An evaluation that is ready to run; every process of a job calls it at the same step."""

    def run(self, params: Any, step: int) -> EvalResult:
        """Evaluates `params`; `step` is only for captions of pictures.

        Raises:
            EvalError: the data can't be evaluated in this way; the sentence says why.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EvalConfig(schema.Choice):
    """Family of the evaluations; its members add their own keys."""

    # Stands in the names of the metrics: `zero_shot/<name>/top1`.
    name: str
    # What is evaluated.
    source: SourceConfig
    # Steps from one run to the next; 0 = whenever the loop evaluates.
    every: int = 0
    # Only the first this many records; 0 = all.
    limit: int = 0

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The evaluations by name."""
        # Here and not on top: the members' modules import this one.
        from vlm_jax.evals import retrieval, zero_shot

        return {"zero_shot": zero_shot.ZeroShotConfig, "retrieval": retrieval.RetrievalConfig}

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in the common keys."""
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            yield "name", f"= {self.name!r} stands in names of metrics and files; use letters, digits, '_' and '-'"
        for key, value in (("every", self.every), ("limit", self.limit)):
            if value < 0:
                yield key, f"= {value} can't be negative; 0 is the default"

    def build(self, encoder: Encoder, cache_dir: str) -> Evaluator:
        """Opens the source and returns the evaluator; `cache_dir` is where a source may keep its index."""
        raise TypeError(f"{type(self).__name__} is a family of evaluations; use one of {', '.join(self.kinds())}")

    def open_source(self, cache_dir: str) -> Source:
        """The source, cut to `limit`.

        Raises:
            ConfigError: it can't be opened, or holds no records.
        """
        key = f"config.evals.{self.name}.source."
        with keys_at(f"{key}path", key):
            source = self.source.build(cache_dir)
        if len(source) == 0:
            raise schema.ConfigError(
                f"The source of evaluation {self.name!r} holds no records; check its path and split."
            )
        return FirstRecords(source, self.limit) if 0 < self.limit < len(source) else source


class FirstRecords:
    """The first `count` records of a source, as a source."""

    def __init__(self, source: Source, count: int):
        self._source = source
        self._count = count
        self.class_names = source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return self._source[self._checked(index)]

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of one record."""
        return self._source.texts(self._checked(index))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"Record {index} is not among the first {self._count}.")
        return index
