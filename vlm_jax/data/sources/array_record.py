"""ArrayRecord files of serialised `tf.train.Example`s (TFDS, big_vision, t5x write them), read without TensorFlow.

A dataset that TFDS prepared, with its dataset_info.json, is read by `tfds_source`, which knows its features.
"""

import bisect
import contextlib
import dataclasses
import itertools
from typing import Any

from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.keyed import KeyedConfig
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.texts import captions_or_why
from vlm_jax.data.sources.tfds_source import decoded
from vlm_jax.schema import ConfigError

_RECORDS_TRIED = 100


@dataclasses.dataclass(frozen=True)
class ArrayRecordConfig(KeyedConfig):
    """Files of examples with an encoded image.

    `path` is name.array_record@10 (name.array_record-00000-of-00010, ...), a glob, a folder, braces, or several with
    commas between.
    """

    def build(self, cache_dir: str) -> "ArrayRecordSource":
        """Finds the files and counts their records."""
        return ArrayRecordSource(self)


class ArrayRecordSource:
    """All records of the files, in the order of the files."""

    def __init__(self, config: ArrayRecordConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.config, self.captions, self.class_names = config, config.caption_keys(), config.class_names
        self.paths = find_files(config.path, "*array_record*", "ArrayRecord files, e.g. train.array_record@10")
        self.files: list[Any] = []  # open when first read, safe in threads, and picklable
        for path in self.paths:
            try:
                self.files.append(ArrayRecordDataSource(path))
            except RuntimeError as error:
                raise ConfigError(f"{path} is not a readable ArrayRecord file ({error}); write it again") from error
        self.ends = list(itertools.accumulate(map(len, self.files)))
        if not self.ends[-1]:
            raise ConfigError(f"no file of config.data.source.path = {config.path!r} holds a record")
        config.check_keys(self._features({name for _, name in config.wanted_keys()}), self.paths[0], "feature")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The encoded image, its captions, and its label when there is one."""
        row, where, key = self._row(index)
        image = row.get(self.config.image_key)
        if not image or not isinstance(image[0], bytes):
            raise BadRecord(where, key, f"it has no encoded image under {self.config.image_key!r}")
        texts = captions_or_why(lambda: self._texts(row, where, key)) if self.captions.keys else {"texts": ()}
        return {"image": image[0], **texts, **self._label(row, where, key), "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        return self._texts(*self._row(index))["texts"]

    def _texts(self, row: dict[str, list[Any]], where: str, key: str) -> dict[str, Any]:
        texts = {name: row[name] for name in self.captions.keys if name in row}
        return self.captions.read({**row, **decoded(texts, where, key)}, where, key)

    def _label(self, row: dict[str, list[Any]], where: str, key: str) -> dict[str, int]:
        value = row.get(self.config.label_key) if self.config.label_key else None
        if not value:
            return {}
        if not isinstance(value[0], int) or not 0 <= value[0] < (len(self.class_names) or 1 << 31):
            what = f"the number of one of the {len(self.class_names)} class names" if self.class_names else "a number"
            raise BadRecord(where, key, f"its label is {value[0]!r:.60}, not {what}")
        return {"label": value[0]}

    def _row(self, index: int) -> tuple[dict[str, list[Any]], str, str]:
        """(features, file, number of the record in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"the files hold {len(self)} records, there is no record {index}")
        number = bisect.bisect_right(self.ends, index)
        place = index - self.ends[number] + len(self.files[number])
        where, key = self.paths[number], f"number {place + 1}"
        try:
            return parse_example(self.files[number][place]), where, key
        except RuntimeError as error:  # of the reader: every record carries a checksum
            raise BadRecord(where, key, f"it can't be read: {error}") from error
        except ValueError as error:
            raise BadRecord(where, key, str(error)) from error

    def _features(self, wanted: set[str]) -> list[str]:
        """Names of the features of the first records, of as many as it takes to find those that are wanted."""
        found: set[str] = set()
        for index in range(min(len(self), _RECORDS_TRIED)):
            with contextlib.suppress(BadRecord):  # training meets it again and reports it
                found |= self._row(index)[0].keys()
            if found >= wanted:
                break
        if not found:
            raise ConfigError(f"the first records of {self.paths[0]} are no tf.train.Example; check its format")
        return sorted(found)


def parse_example(data: bytes) -> dict[str, list[Any]]:
    """The features of a serialised `tf.train.Example`: lists of bytes, ints or floats.

    Raises:
        ValueError: it is none.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # half a second to import, and only this source needs it

    message: Any = tf_example_pb2  # its classes are made when it is imported, so type checkers see none
    try:
        example = message.Example.FromString(data)
    except DecodeError as error:
        raise ValueError(f"it is not a tf.train.Example ({error})") from error
    return {name: _values(feature) for name, feature in example.features.feature.items()}


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []
