"""Datasets prepared by tensorflow-datasets in a random-access format (ArrayRecord), read without TensorFlow."""

import dataclasses
import glob
import os
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.keyed import KeyedConfig
from vlm_jax.data.sources.texts import captions_or_why
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class TfdsConfig(KeyedConfig):
    """A builder's folder that lies prepared on disk, e.g. ~/tensorflow_datasets/cifar10/3.0.2.

    `path` holds dataset_info.json, or is a folder above it that holds a single version. Nested features are named by
    their path: captions/text.
    """

    # labels alone, as most of these datasets have them
    text_key: tuple[str, ...] = ()
    # the usual name of the class
    label_key: str = "label"
    # split, in TFDS's notation: train, test[:50%], train+test, ...
    split: str = "train"

    def build(self, cache_dir: str) -> "TfdsSource":
        """Opens the prepared files."""
        return TfdsSource(self)


class TfdsSource:
    """Images stay encoded until they are needed."""

    def __init__(self, config: TfdsConfig):
        import tensorflow_datasets as tfds  # a second to import, and only this source needs it

        self.config, self.captions = config, config.caption_keys()
        self.where = _prepared_folder(config.path)
        try:
            builder = tfds.builder_from_directory(self.where)
        except (OSError, ValueError) as error:  # DatasetNotFoundError is a ValueError
            raise ConfigError(
                f"config.data.source.path = {config.path!r} holds no prepared dataset ({error}); "
                "give the folder with dataset_info.json"
            ) from error
        features = _flat_features(builder.info.features)
        config.check_keys(sorted(features), f"the dataset in {self.where}", "feature")
        label: Any = features[config.label_key] if config.label_key else None
        named = isinstance(label, tfds.features.ClassLabel)
        self.class_names = config.class_names or (tuple(label.names or ()) if named else ())
        # of every picture, so that masks and the like cost nothing
        pictures = [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]
        still_encoded: Any = {name: tfds.decode.SkipDecoding() for name in pictures if "/" not in name}
        open_split: Any = builder.as_data_source  # a decorator hides its parameters from type checkers
        try:
            self.data = open_split(split=config.split, decoders=still_encoded)
        except NotImplementedError:
            raise ConfigError(
                f"the dataset in {self.where} is stored as {builder.info.file_format}, which allows no random access; "
                "prepare it with file_format='array_record', or convert it (tfds convert_format)"
            ) from None
        except ValueError as error:
            raise ConfigError(f"config.data.source.split = {config.split!r} can't be read from it: {error}") from error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        """The encoded image, its captions and its label."""
        row, key = self._row(index), self._key(index)
        record: Record = {
            "image": _value(row, self.config.image_key),
            **(captions_or_why(lambda: self._texts(row, key)) if self.config.text_key else {"texts": ()}),
            "key": key,
            "where": self.where,
        }
        if self.config.label_key and (label := int(_value(row, self.config.label_key))) >= 0:  # TFDS: -1 is unknown
            record["label"] = label
        return record

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        if not self.config.text_key:
            raise BadRecord(self.where, self._key(index), "it has no caption (config.data.source.text_key)")
        return self._texts(self._row(index), self._key(index))["texts"]

    def _key(self, index: int) -> str:
        return f"{self.config.split}:{index}"

    def _row(self, index: int) -> dict[str, Any]:
        try:
            return self.data[index]
        except RuntimeError as error:  # of the ArrayRecord reader, whose records carry checksums
            raise BadRecord(self.where, self._key(index), f"it can't be read: {error}") from error

    def _texts(self, row: Any, key: str) -> dict[str, Any]:
        values = {name: np.asarray(_value(row, name), object).ravel().tolist() for name in self.captions.keys}
        return self.captions.read(decoded(values, self.where, key), self.where, key)


def decoded(values: dict[str, list[Any]], where: str, key: str) -> dict[str, list[Any]]:
    """Stored bytes as texts; raises `BadRecord` when they are no UTF-8."""
    try:
        return {
            name: [text.decode("utf-8") if isinstance(text, bytes) else text for text in texts]
            for name, texts in values.items()
        }
    except UnicodeDecodeError as error:
        raise BadRecord(where, key, f"its caption is not UTF-8: {error}") from error


def _prepared_folder(path: str) -> str:
    """The folder with dataset_info.json: the path itself, or the only version (of the only config) below it."""
    path = os.path.expanduser(path)
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        return path
    levels = [glob.glob(os.path.join(glob.escape(path), *depth, "dataset_info.json")) for depth in ("*", ("*", "*"))]
    found = sorted(os.path.dirname(name) for level in levels for name in level)
    if len(found) > 1:
        raise ConfigError(
            f"config.data.source.path = {path!r} holds several prepared datasets; give one of: {', '.join(found)}"
        )
    return found[0] if found else path


def _flat_features(features: Any, prefix: str = "") -> dict[str, Any]:
    """Every feature by its path: `image`, `captions`, `captions/text`."""
    flat: dict[str, Any] = {}
    for name, feature in features.items():
        flat[prefix + name] = feature
        inner = getattr(feature, "feature", feature)  # of a sequence
        if hasattr(inner, "items"):
            flat |= _flat_features(inner, f"{prefix}{name}/")
    return flat


def _value(row: Any, path: str) -> Any:
    for name in path.split("/"):
        row = row[name]
    return row
