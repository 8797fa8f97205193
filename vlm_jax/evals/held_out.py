"""A method's own loss as an evaluation: rows that are random by their place in the source, and sums over them.

Which evaluation asks for it is `held_out_loss`; no loss is defined here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.examples import Example, MakeExample
from vlm_jax.data.sources import Record, Source
from vlm_jax.evals.features import to_host
from vlm_jax.objectives.base import ModelObjective
from vlm_jax.step import Ratio

MARKS = ("mask", "index")  # what evaluation adds to a batch
_PLACE = "place"


class HeldOut:
    """The loss of a method on any number of rows: row by row where rows must be left out of a sum.

    Args:
        objective: the method with nothing dropped.
        make_example: a record as a row of its batches, on the evaluation view.
        arrange: a source of documents as one of the records that `make_example` takes.
    """

    def __init__(
        self,
        objective: ModelObjective,
        make_example: MakeExample,
        arrange: Callable[[Source], Source] = lambda source: source,
    ):
        self.objective, self.make_example, self.arrange = objective, make_example, arrange
        self._whole, self._rows = jax.jit(self._batch_loss), jax.jit(jax.vmap(self._row_loss, in_axes=(None, 0, 0)))
        self._embed, self._pair_loss = jax.jit(self._embeddings), jax.jit(self._loss_of_sums)

    @property
    def possible(self) -> bool:
        """Whether the loss is made of sums over rows, and needs no more than parameters (no teacher, no queue)."""
        extra = jax.eval_shape(lambda: self.objective.init(jax.random.key(0))[1])
        return (self.objective.additive or not self.objective.coupled) and not jax.tree.leaves(extra)

    def loss(self, params: Any, batches: Iterable[Mapping[str, jax.Array]], seed: int) -> tuple[float, float]:
        """(sum, count) over all rows whose `mask` is True; of a coupled loss the count is that of the rows."""
        sums = [self._sums(params, batch, seed) for batch in batches]
        total = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *sums)
        if not self.objective.coupled:
            return float(total["sum"]), float(total["count"])
        rows = float(total.pop("rows"))
        mean, count = to_host(self._pair_loss(params, total))
        return rows * float(mean) / float(count), rows

    def _sums(self, params: Any, batch: Mapping[str, jax.Array], seed: int) -> dict[str, Any]:
        """What the loss is made of, summed over the rows of a batch whose `mask` is True."""
        keys = example_keys(batch["index"], seed)
        rows = {key: value for key, value in batch.items() if key not in MARKS}
        mask_B = to_host(batch["mask"])
        if self.objective.coupled:
            named = to_host(self._embed(params, rows, keys)) | {"rows": np.ones(len(mask_B))}
        elif mask_B.all():
            total, count = to_host(self._whole(params, rows, keys))
            return {"sum": total, "count": count}
        else:  # A row that is padding can't be told from the others in a sum, so each row is a batch of its own.
            named = dict(zip(("sum", "count"), to_host(self._rows(params, rows, keys)), strict=True))
        return {name: rows_B[mask_B].sum(axis=0, dtype=np.float64) for name, rows_B in named.items()}

    def _batch_loss(self, params: Any, rows: Any, keys: jax.Array) -> Ratio:
        return self.objective.loss(params, {}, rows, keys, jnp.int32(0))[0]

    def _embeddings(self, params: Any, rows: Any, keys: jax.Array) -> dict[str, jax.Array]:
        return self.objective.embed(params, {}, rows, keys, jnp.int32(0))

    def _loss_of_sums(self, params: Any, sums: dict[str, Any]) -> Ratio:
        embeddings = {name: jnp.asarray(value, jnp.float32)[None] for name, value in sums.items()}
        return self.objective.pair_loss(params, {}, embeddings, jnp.int32(0))[0]

    def _row_loss(self, params: Any, row: Any, key: jax.Array) -> Ratio:
        return self._batch_loss(params, jax.tree.map(lambda x: x[None], row), key[None])


class SeededRows:
    """A method's rows in evaluation, where what it draws on the host (masks) depends on (seed, place in the source)."""

    def __init__(self, make_example: MakeExample, seed: int):
        self.make_example, self.seed = make_example, seed

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row of a record of a `Numbered` source; raises `BadRecord`."""
        return self.make_example(record, np.random.default_rng((self.seed, record[_PLACE])))


class Numbered:
    """A source whose records know their place."""

    def __init__(self, source: Source):
        self._source = source
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return {**self._source[index], _PLACE: index}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of one record."""
        return self._source.texts(index)


@jax.jit
def example_keys(index_B: jax.Array, seed: int | jax.Array) -> jax.Array:
    """[B] typed keys, a function of (seed, the record's place in its source)."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(index_B)


__all__ = ["MARKS", "HeldOut", "Numbered", "SeededRows", "example_keys"]
