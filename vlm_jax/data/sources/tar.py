"""Tar shards in the layout of webdataset (`000.jpg`, `000.txt` or `000.json`, `000.cls`), read at random.

Shards must be plain tar files on a file system. An index of offsets, made once per shard, is cached beside it.
"""

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig
from vlm_jax.data.sources.chats import ImageBytes, Turn, message_texts, read_turns
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.shards import IMAGE, JSON, LABEL, TEXT, ShardIndex, shard_index
from vlm_jax.data.sources.texts import CaptionKeys, captions_or_why, checked_texts
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class TarConfig(SourceConfig):
    """Shards of images, with captions, labels, conversations, or nothing."""

    # shard-{000..009}.tar, a glob, a folder, or several of these with commas between
    path: str = ""
    # keys of the captions in *.json members; a value is a text or a list of texts
    json_text_key: tuple[str, ...] = ("caption",)
    # how often the captions of each key are trained on; empty: every caption is as likely as every other
    text_probabilities: tuple[float, ...] = ()
    # key of the turns in *.json members, such as "conversations": then records are conversations, with one image
    # (0007.jpg), several (0007.0.jpg, 0007.1.jpg, ...) or none; empty: they are captions
    json_chat_key: str = ""
    # names of the classes that *.cls members number; empty: the shards carry no labels
    class_names: tuple[str, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """A label per class name."""
        if len(set(self.class_names)) != len(self.class_names):
            yield "class_names", "names a class twice"
        yield from self.caption_keys().problems()

    def caption_keys(self) -> CaptionKeys:
        """What a json member says of captions."""
        return CaptionKeys(self.json_text_key, self.text_probabilities, "json_text_key")

    def build(self, cache_dir: str) -> "TarSource":
        """Finds the shards and indexes those that have no valid index yet."""
        return TarSource(self, cache_dir)


class TarSource:
    """All records of the shards, in the order of the shards and of their members."""

    def __init__(self, config: TarConfig, cache_dir: str):
        self.config, self.class_names = config, config.class_names
        self.captions = config.caption_keys()
        self.shards = find_files(config.path, "*.tar", "tar shards, e.g. shard-{000..009}.tar")
        self.indices: list[ShardIndex] = []
        for shard in self.shards:
            try:
                self.indices.append(shard_index(shard, cache_dir))
            except OSError as error:
                raise ConfigError(f"the shard {shard} can't be read: {error.strerror}; check its permissions") from None
        self.ends = list(itertools.accumulate(len(index) for index in self.indices))
        if not any(len(index) > bool(index.damage) for index in self.indices):
            first = next(i for i, index in enumerate(self.indices) if index.damage)
            raise ConfigError(
                f"no shard of {config.path!r} holds a record; {self.shards[first]}: {self.indices[first].damage}. "
                "Fetch the shards again, or correct config.data.source.path"
            )

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The image's bytes, its captions, and its label when there is one."""
        shard, row = self._locate(index)
        where, key = self.shards[shard], self.indices[shard].keys[row]
        if self.config.json_chat_key:
            return self._chat(shard, row)
        image, label = self._part(shard, row, IMAGE), self._part(shard, row, LABEL)
        if image is None:
            raise BadRecord(where, key, "it has no image (jpg, jpeg, png or webp)")
        texts: dict[str, Any] = {"texts": ()}
        if label is None or self._has_text(shard, row):
            texts = captions_or_why(lambda: self._texts(shard, row))
        record = {"image": image, **texts, "key": key, "where": where}
        return record if label is None else {**record, "label": self._label(label, where, key)}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of the record's txt member, else of its json member; read without the image.

        With `json_chat_key` the messages of its turns.
        """
        if self.config.json_chat_key:
            return message_texts(self._turns(*self._locate(index)))
        return self._texts(*self._locate(index))["texts"]

    def _texts(self, shard: int, row: int) -> dict[str, Any]:
        where, key = self.shards[shard], self.indices[shard].keys[row]
        for part in (TEXT, JSON):
            data = self._part(shard, row, part)
            if data is None:
                continue
            if part == TEXT:
                return {"texts": checked_texts([_text(data, where, key).strip()], where, key)}
            return self.captions.read(_json_object(data, where, key), where, key)
        raise BadRecord(where, key, "it has no caption (txt or json)")

    def _chat(self, shard: int, row: int) -> Record:
        where, key = self.shards[shard], self.indices[shard].keys[row]
        turns, spans = self._turns(shard, row), self.indices[shard].images(row)
        images = tuple(ImageBytes(self._bytes(shard, row, offset, size)) for offset, size in spans)
        return {"turns": turns, "images": images, "texts": message_texts(turns), "key": key, "where": where}

    def _turns(self, shard: int, row: int) -> tuple[Turn, ...]:
        where, key, data = self.shards[shard], self.indices[shard].keys[row], self._part(shard, row, JSON)
        if data is None:
            raise BadRecord(where, key, "it has no json with a conversation")
        return read_turns(_json_object(data, where, key).get(self.config.json_chat_key), where, key)

    def fingerprint(self) -> str:
        """Of the shards and the keys."""
        stats = [(shard, os.stat(shard).st_size, os.stat(shard).st_mtime_ns) for shard in self.shards]
        return repr((stats, dataclasses.astuple(self.config)))

    def _label(self, data: bytes, where: str, key: str) -> int:
        try:
            label = int(data)
        except ValueError:
            raise BadRecord(where, key, f"its label is {data[:40]!r}, not a number") from None
        if self.class_names and not 0 <= label < len(self.class_names):
            raise BadRecord(where, key, f"its label is {label}, but there are {len(self.class_names)} class names")
        return label

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"the shards hold {len(self)} records, there is no record {index}")
        shard = bisect.bisect_right(self.ends, index)
        row = index - self.ends[shard] + len(self.indices[shard])
        damage = self.indices[shard].damage
        if damage and row == len(self.indices[shard]) - 1:
            raise BadRecord(self.shards[shard], self.indices[shard].keys[row], f"{damage}; fetch the shard again")
        return shard, row

    def _has_text(self, shard: int, row: int) -> bool:
        return bool((self.indices[shard].spans[row, [TEXT, JSON], 0] >= 0).any())

    def _part(self, shard: int, row: int, part: int) -> bytes | None:
        """Bytes of a member; the shard is opened each time, which costs microseconds and keeps no handle to lose."""
        offset, size = (int(number) for number in self.indices[shard].spans[row, part])
        return None if offset < 0 else self._bytes(shard, row, offset, size)

    def _bytes(self, shard: int, row: int, offset: int, size: int) -> bytes:
        where, key = self.shards[shard], self.indices[shard].keys[row]
        try:
            with open(where, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadRecord(where, key, f"the shard can't be read: {error.strerror}") from error
        if len(data) != size:
            raise BadRecord(where, key, "the shard became shorter while it was in use; fetch it again")
        return data


def _text(data: bytes, where: str, key: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise BadRecord(where, key, f"its caption can't be read: {error}") from error


def _json_object(data: bytes, where: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(data, where, key))
    except ValueError as error:
        raise BadRecord(where, key, f"its caption can't be read: {error}") from error
    if not isinstance(value, dict):
        raise BadRecord(where, key, f"its json is a {type(value).__name__}, not an object with a caption")
    return value
