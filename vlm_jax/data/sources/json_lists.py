"""Captions in JSON files that hold one list of objects each, as ALBEF's data sets are published, beside image files."""

import bisect
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.tables import Labels, TableConfig
from vlm_jax.data.sources.texts import captions_or_why
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class JsonListsConfig(TableConfig):
    """Lists of {"image": file, "caption": text or list of texts} in one or several files, one after the other.

    Objects with the same `image_id`, or where they have none with the same image, are one image to what asks for that.
    An object may name several images, a list under `image_key` (NLVR2); a record then also has all of them, `images`.
    """

    # name of what tells images apart
    image_id_key: str = "image_id"
    # what the names of image files lack (SNLI-VE's ".jpg")
    image_suffix: str = ""

    @property
    def other_keys(self) -> tuple[str, ...]:
        """Names of what is read besides."""
        return ()

    def build(self, cache_dir: str) -> "JsonListsSource":
        """Reads image names and captions into memory."""
        return JsonListsSource(self)


class JsonListsSource:
    """The objects of all files in memory, packed."""

    def __init__(self, config: JsonListsConfig):
        self.config, self.captions = config, config.caption_keys()
        keys = [config.image_key, config.image_id_key, config.label_key, *config.other_keys, *config.text_key]
        self.keys = list(dict.fromkeys(key for key in keys if key))
        self.files, self.ends = [], []
        packed: list[str] = []
        for file, rows in read_lists(config.path):
            config.check_keys({key: None for row in rows[:100] for key in row}, file, "key")
            # The captions as JSON, so that one text and a list of texts survive.
            packed += [json.dumps([row.get(key) for key in self.keys], ensure_ascii=False) for row in rows]
            self.files.append(file)
            self.ends.append(len(packed))
        if not packed:
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no object; give lists with some")
        self.rows = PackedStrings.pack(packed)
        wanted = config.label_key and not config.class_names
        self.labels = Labels(
            (self._row(i).get(config.label_key) for i in range(len(self) * bool(wanted))), config.class_names
        )
        self.class_names: tuple[str, ...] = self.labels.names if config.label_key else ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """The bytes of the image file, its captions, what tells the image apart, and its label when there is one."""
        row, key, where = self._row(index), *self._place(index)
        named, identity = row.get(self.config.image_key), row.get(self.config.image_id_key)
        names: list[Any] = named if isinstance(named, list) else [named]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise BadRecord(where, key, f"it names no image under {self.config.image_key!r}")
        texts = captions_or_why(lambda: self.captions.read(row, where, key)) if self.captions.keys else {"texts": ()}
        images = tuple(self.config.read_image(name + self.config.image_suffix, key, where) for name in names)
        record: Record = {"image": images[0], **texts, "key": key, "where": where}
        record["image_id"] = " ".join(names) if identity is None else str(identity)
        if isinstance(named, list):
            record["images"] = images
        return record | (self.labels.read(row.get(self.config.label_key), where, key) if self.config.label_key else {})

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        key, where = self._place(index)
        return self.captions.read(self._row(index), where, key)["texts"]

    def _row(self, index: int) -> dict[str, Any]:
        """What is read of an object, by key."""
        values = zip(self.keys, json.loads(self.rows[index]), strict=True)
        return {key: value for key, value in values if value is not None}

    def _place(self, index: int) -> tuple[str, str]:
        """(number in its file, file)."""
        return place_in(self.files, self.ends, index)


def read_lists(path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(file, its objects) of one or several files; raises `ConfigError` for what is no list of objects."""
    for file in find_files(path, "*.json", "one or several .json files"):
        yield file, _read(file)


def place_in(files: Sequence[str], ends: Sequence[int], index: int) -> tuple[str, str]:
    """(number in its file, file) of a record of several files, which end at `ends`."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"there are {ends[-1]} records, no record {index}")
    place = bisect.bisect_right(ends, index)
    first = 0 if place == 0 else ends[place - 1]
    return f"number {index - first + 1}", files[place]


def _read(file: str) -> list[dict[str, Any]]:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            rows = json.load(stream)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} can't be read as JSON ({error}); give a file that holds one list of objects"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{file} must hold one list of objects; a file with an object a line is a .jsonl")
    return rows


__all__ = ["JsonListsConfig", "JsonListsSource", "place_in", "read_lists"]
