"""Captions in JSON files that hold one list of objects each, as ALBEF's data sets are published, beside image files."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.tables import TableConfig
from vlm_jax.data.sources.texts import captions_or_why
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class JsonListsConfig(TableConfig):
    """Lists of {"image": file, "caption": text or list of texts} in one or several files, one after the other.

    Objects with the same `image_id`, or where they have none with the same image, are one image to what asks for that.
    """

    # name of what tells images apart
    image_id_key: str = "image_id"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Keys that only tables have."""
        yield from super().problems()
        if self.label_key:
            yield "label_key", f"= {self.label_key!r} is not read from lists; use a .jsonl file"

    def build(self, cache_dir: str) -> "JsonListsSource":
        """Reads image names and captions into memory."""
        return JsonListsSource(self)


class JsonListsSource:
    """The objects of all files in memory, packed."""

    def __init__(self, config: JsonListsConfig):
        self.config, self.captions = config, config.caption_keys()
        self.files = find_files(config.path, "*.json", "one or several .json files")
        self.class_names: tuple[str, ...] = ()
        ends, packed = [], []
        for file in self.files:
            rows = _read(file)
            config.check_keys({key: None for row in rows[:100] for key in row}, file, "key")
            # The captions as JSON, so that one text and a list of texts survive.
            kept = ([row.get(key) for key in (config.image_key, config.image_id_key, *config.text_key)] for row in rows)
            packed += [json.dumps(values, ensure_ascii=False) for values in kept]
            ends.append(len(packed))
        if not packed:
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no object; give lists with some")
        self.rows, self.ends = PackedStrings.pack(packed), np.asarray(ends)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """The bytes of the image file, its captions, and what tells the image apart."""
        (name, identity, row), key, where = self._row(index), *self._place(index)
        if not isinstance(name, str) or not name:
            raise BadRecord(where, key, f"it names no image under {self.config.image_key!r}")
        texts = captions_or_why(lambda: self.captions.read(row, where, key)) if self.captions.keys else {"texts": ()}
        image_id = name if identity is None else str(identity)
        image = self.config.read_image(name, key, where)
        return {"image": image, **texts, "image_id": image_id, "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        key, where = self._place(index)
        return self.captions.read(self._row(index)[2], where, key)["texts"]

    def _row(self, index: int) -> tuple[Any, Any, Mapping[str, Any]]:
        """(image, what tells it apart, captions by key)."""
        name, identity, *texts = json.loads(self.rows[index])
        return name, identity, {k: v for k, v in zip(self.captions.keys, texts, strict=True) if v is not None}

    def _place(self, index: int) -> tuple[str, str]:
        """(number in its file, file)."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, no record {index}")
        place = int(np.searchsorted(self.ends, index, side="right"))
        first = 0 if place == 0 else int(self.ends[place - 1])
        return f"number {index - first + 1}", self.files[place]


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


__all__ = ["JsonListsConfig", "JsonListsSource"]
