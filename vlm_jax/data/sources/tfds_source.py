"""Datasets prepared by tensorflow-datasets in a random-access format (ArrayRecord), read without TensorFlow."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig, checked_texts
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class TfdsConfig(SourceConfig):
    """A builder's folder that lies prepared on disk, e.g. ~/tensorflow_datasets/cifar10/3.0.2."""

    # folder that holds dataset_info.json
    path: str = ""
    # split, in TFDS's notation: train, test[:50%], ...
    split: str = "train"
    # feature that holds the image
    image_key: str = "image"
    # feature that holds the caption or a sequence of captions; empty: the records have labels alone
    text_key: str = ""
    # feature that holds the class; empty: the records have captions alone
    label_key: str = "label"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Records without anything to learn from."""
        if not self.text_key and not self.label_key:
            yield "text_key", "and label_key are both empty; name the feature of the captions or of the class"

    def build(self, cache_dir: str) -> "TfdsSource":
        """Opens the prepared files."""
        return TfdsSource(self)


class TfdsSource:
    """Images stay encoded until they are needed."""

    def __init__(self, config: TfdsConfig):
        import tensorflow_datasets as tfds  # a second to import, and only this source needs it

        self.config = config
        try:
            builder = tfds.builder_from_directory(config.path)
        except (OSError, ValueError) as error:  # DatasetNotFoundError is a ValueError
            raise ConfigError(
                f"config.data.source.path = {config.path!r} holds no prepared dataset ({error}); "
                "give the folder with dataset_info.json"
            ) from error
        features: Any = builder.info.features
        for key in filter(None, (config.image_key, config.text_key, config.label_key)):
            if key not in features:
                raise ConfigError(f"the dataset in {config.path} has no feature {key!r}; it has: {', '.join(features)}")
        self.class_names = tuple(features[config.label_key].names or ()) if config.label_key else ()
        still_encoded: Any = {config.image_key: tfds.decode.SkipDecoding()}
        open_split: Any = builder.as_data_source  # a decorator hides its parameters from type checkers
        self.data = open_split(split=config.split, decoders=still_encoded)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        """The encoded image, its captions and its label."""
        row, key, where = self.data[index], self._key(index), self.config.path
        record: Record = {
            "image": row[self.config.image_key],
            "texts": self._texts(row, key) if self.config.text_key else (),
            "key": key,
            "where": where,
        }
        return {**record, "label": int(row[self.config.label_key])} if self.config.label_key else record

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        if not self.config.text_key:
            raise BadRecord(self.config.path, self._key(index), "it has no caption (config.data.source.text_key)")
        return self._texts(self.data[index], self._key(index))

    def _key(self, index: int) -> str:
        return f"{self.config.split}:{index}"

    def _texts(self, row: Any, key: str) -> tuple[str, ...]:
        values = np.atleast_1d(np.asarray(row[self.config.text_key], object)).tolist()
        try:
            texts = [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError as error:
            raise BadRecord(self.config.path, key, f"its caption is not UTF-8: {error}") from error
        return checked_texts(texts, self.config.path, key)
