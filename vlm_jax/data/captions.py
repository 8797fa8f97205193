"""The captions of a source alone, for what needs no images: training a tokenizer."""

from collections.abc import Iterator

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Source


def captions(source: Source, limit: int = 200_000) -> Iterator[str]:
    """Captions of a source, to train a tokenizer from: those of at most `limit` records spread over it evenly.

    Records that can't be read are passed over; training meets, counts and reports them.
    """
    for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(np.int64)):
        try:
            yield from source.texts(int(index))
        except BadRecord:
            continue
