"""What the classifiers on frozen features share: their data, which vector of an image they see, and their metrics.

The classifiers are `linear_probe`, `knn` and `few_shot`, and the probes of `trained_probe`; they need images and
labels, no text.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.sources import Source, SourceConfig, source_at
from vlm_jax.evals.base import Encoder, EvalConfig, EvalError, Vectors, first_records
from vlm_jax.evals.classification import check_labels
from vlm_jax.evals.features import Labelled, encode_labelled
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class TransferConfig(EvalConfig):
    """Family of what is trained on one source and tested on another, which is `source`."""

    # What they are trained on.
    train_source: SourceConfig = dataclasses.field(kw_only=True)
    # Only the first this many records of it; 0 = all.
    train_limit: int = 0
    # Short form of train_source, as data.path.
    train_path: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is impossible in these keys."""
        yield from super().problems()
        if self.train_limit < 0:
            yield "train_limit", f"= {self.train_limit} can't be negative; 0 is the default"

    def open_sources(self, cache_dir: str) -> "Sources":
        """Both sources.

        Raises:
            ConfigError: one can't be opened or holds no records, or they name different classes.
        """
        test = self.open_source(cache_dir)
        key = f"config.evals.{self.name}"
        train = source_at(self.train_path, self.train_source, f"{key}.train_path", f"{key}.train_source", cache_dir)
        train = first_records(train, f"{key}.train_source", self.train_limit)
        if train.class_names and test.class_names and tuple(train.class_names) != tuple(test.class_names):
            raise ConfigError(
                f"Evaluation {self.name!r}: train_source names the classes {_some(train.class_names)} and source names "
                f"them {_some(test.class_names)}; the labels of both must mean the same classes in the same order."
            )
        return Sources(train, test, tuple(train.class_names or test.class_names))


@dataclasses.dataclass(frozen=True)
class FrozenConfig(TransferConfig):
    """Family of the classifiers on one vector of an image."""

    # Vector of an image: "pooled", before the projection into the joint space (as in the CLIP paper), or "embedding",
    # after it; not normalised. Towers of methods on images alone also give "cls", the class token, "mean", that of the
    # patches, whichever of them they pool, and "blocks", the means of the patches after each block, one after the other
    # (what a method learns need not be readiest in the last block: BEiT and AIM are probed in others).
    features: Vectors = "pooled"


class Sources(NamedTuple):
    """Records to train on and to test on, and the names of their classes (empty where no source has them)."""

    train: Source
    test: Source
    class_names: tuple[str, ...]


class Split(NamedTuple):
    """Vectors to train on and to test on.

    Attributes:
        train: with labels.
        test: with labels.
        class_count: number of classes: those named, else one more than the largest label.
    """

    train: Labelled
    test: Labelled
    class_count: int


def encode_split(encoder: Encoder, params: Any, config: FrozenConfig, sources: Sources, multi: bool = False) -> Split:
    """Vectors and labels of both sources, on every host.

    Args:
        encoder: its image tower is used.
        params: of the model.
        config: of the evaluation.
        sources: what `config.open_sources` opened.
        multi: whether a record may have several labels; needs named classes.

    Raises:
        EvalError: no usable record, a label that is not one of the classes, or vectors that are not finite.
    """
    count = len(sources.class_names) if multi else 0
    train, test = (
        encode_labelled(encoder, params, source, config.features, config.name, count)
        for source in (sources.train, sources.test)
    )
    if not (np.isfinite(train.vectors).all() and np.isfinite(test.vectors).all()):
        raise EvalError(f"Evaluation {config.name!r}: the model's vectors are not finite; the parameters are broken.")
    if multi:
        return Split(train, test, count)
    count = len(sources.class_names) or int(max(train.labels.max(), test.labels.max())) + 1
    for part in (train, test):
        check_labels(part.labels, part.index, count, config.name)
    return Split(train, test, count)


def _some(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; {len(names)} in all)"
