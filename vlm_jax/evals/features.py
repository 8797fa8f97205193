"""Features of whole data sets, computed batch by batch on the mesh and collected on every host.

It encodes; it compares nothing (`zero_shot` and `retrieval` do).
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalError

T = TypeVar("T")


def to_host(tree: Any) -> Any:
    """Global arrays -> numpy arrays with all rows, on every process; a collective where a process holds a part only."""
    return jax.tree.map(_array_to_host, tree)


def _array_to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def lookahead(items: Iterable[T]) -> Iterator[T]:
    """Yields each item only when the next one was made: the devices work on that one while the host reads this one."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def padded_batches(array: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(count of real rows, array of exactly `batch_size` rows), the last one filled up with zeros."""
    for start in range(0, len(array), batch_size):
        rows = array[start : start + batch_size]
        filler = np.zeros((batch_size - len(rows), *array.shape[1:]), array.dtype)
        yield len(rows), np.concatenate([rows, filler])


def encode_images(encoder: Encoder, params: Any, source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of all usable images of a source.

    Returns:
        float32 [N, E] and int32 [N], the records' positions in the source.

    Raises:
        EvalError: no record of the source was usable; names the evaluation `name`.
    """
    dispatched = (
        {"features": encoder.image_features(params, batch["image"]), "index": batch["index"], "mask": batch["mask"]}
        for batch in encoder.image_batches(source)
    )
    features, index = [], []
    for batch in map(to_host, lookahead(dispatched)):
        features.append(batch["features"][batch["mask"]])
        index.append(batch["index"][batch["mask"]])
    if not sum(map(len, index)):
        raise EvalError(f"Evaluation {name!r} found no usable image among {len(source)} records; see the log above.")
    return np.concatenate(features), np.concatenate(index)


def encode_texts(encoder: Encoder, params: Any, tokens_NxL: np.ndarray) -> Iterator[np.ndarray]:
    """Features of tokenised texts in their order: float32 [n, E] a batch, n <= `encoder.batch_size`."""
    dispatched = (
        (count, encoder.text_features(params, encoder.shard(rows)))
        for count, rows in padded_batches(tokens_NxL, encoder.batch_size)
    )
    for count, features_BxE in lookahead(dispatched):
        yield to_host(features_BxE)[:count]
