"""Features of whole data sets, computed batch by batch on the mesh and collected on every host.

It encodes; it compares nothing (`zero_shot`, `retrieval` and the classifiers on frozen features do).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.data.sources import Source
from vlm_jax.evals.base import Encoder, EvalError, Vectors

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


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with rows of zeros after it, so that there are `rows`."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def padded_batches(array: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(count of real rows, array of exactly `batch_size` rows), the last one filled up with zeros."""
    for start in range(0, len(array), batch_size):
        rows = array[start : start + batch_size]
        yield len(rows), padded(rows, batch_size)


def gather(dispatched: Iterable[Mapping[str, jax.Array]], nothing: str) -> dict[str, np.ndarray]:
    """The usable rows of batches, on every process.

    Args:
        dispatched: batches of global arrays with one row an example, among them `mask`, bool [B]. One is made while
            the one before it is fetched.
        nothing: the sentence for an empty result.

    Raises:
        EvalError: no row of any batch is usable.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for batch in map(to_host, lookahead(dispatched)):
        mask = batch.pop("mask")
        for key, array in batch.items():
            parts.setdefault(key, []).append(array[mask])
    rows = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    if not rows or not len(next(iter(rows.values()))):
        raise EvalError(nothing)
    return rows


def first_rows(
    batches: Iterable[Mapping[str, jax.Array]],
    made: Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    count: int,
    nothing: str,
) -> dict[str, np.ndarray]:
    """As `gather`, of the first `count` usable rows and of no more batches than these take.

    Args:
        batches: with `mask`, bool [B].
        made: what is wanted of a batch.
        count: rows at most.
        nothing: the sentence for an empty result.
    """

    def enough() -> Iterator[dict[str, jax.Array]]:
        found = 0
        for batch in batches:
            yield {**made(batch), "mask": batch["mask"]}
            found += int(to_host(batch["mask"]).sum())
            if found >= count:
                return

    return {name: rows[:count] for name, rows in gather(enough(), nothing).items()}


def encode_images(encoder: Encoder, params: Any, source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of all usable images of a source.

    Returns:
        float32 [N, E] and int32 [N], the records' positions in the source.

    Raises:
        EvalError: no record of the source was usable; names the evaluation `name`.
    """
    rows = gather(
        (
            {"features": encoder.image_features(params, batch["image"]), "index": batch["index"], "mask": batch["mask"]}
            for batch in encoder.image_batches(source)
        ),
        f"Evaluation {name!r} found no usable image among {len(source)} records; see the log above.",
    )
    return rows["features"], rows["index"]


class Labelled(NamedTuple):
    """Vectors of N usable records with their labels.

    Attributes:
        vectors: float32 [N, D].
        labels: int32 [N], or bool [N, C] where a record may have several.
        index: int32 [N], the records' positions in the source.
    """

    vectors: np.ndarray
    labels: np.ndarray
    index: np.ndarray


def encode_labelled(
    encoder: Encoder, params: Any, source: Source, which: Vectors, name: str, class_count: int = 0
) -> Labelled:
    """Vectors and labels of all usable records of a source.

    Args:
        encoder: its image tower is used.
        params: of the model.
        source: the records.
        which: vector of an image.
        name: of the evaluation, for messages.
        class_count: see `Encoder.labelled_batches`.

    Raises:
        EvalError: no record of the source was usable.
    """
    rows = gather(
        (
            {
                "vectors": encoder.image_vectors(params, batch["image"], which),
                **{key: batch[key] for key in ("label", "index", "mask")},
            }
            for batch in encoder.labelled_batches(source, class_count)
        ),
        f"Evaluation {name!r} found no image with a label among {len(source)} records; the log above says why.",
    )
    return Labelled(rows["vectors"], rows["label"], rows["index"])


def encode_texts(encoder: Encoder, params: Any, tokens_NxL: np.ndarray) -> Iterator[np.ndarray]:
    """Features of tokenised texts in their order: float32 [n, E] a batch, n <= `encoder.batch_size`."""
    dispatched = (
        (count, encoder.text_features(params, encoder.shard(rows)))
        for count, rows in padded_batches(tokens_NxL, encoder.batch_size)
    )
    for count, features_BxE in lookahead(dispatched):
        yield to_host(features_BxE)[:count]
