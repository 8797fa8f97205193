"""Tar shards in the layout of webdataset (`000.jpg`, `000.txt` or `000.json`, `000.cls`), read at random.

Shards must be plain tar files on a file system. An index of offsets, made once per shard, is cached beside it.
"""

import bisect
import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig, checked_texts
from vlm_jax.data.sources.shards import IMAGE, JSON, LABEL, TEXT, ShardIndex, shard_index
from vlm_jax.schema import ConfigError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclasses.dataclass(frozen=True)
class TarConfig(SourceConfig):
    """Shards of images with captions, labels, or both."""

    # shard-{000..009}.tar, a glob, a folder, or several of these with commas between
    path: str = ""
    # key of the caption in *.json members; its value is a text or a list of texts
    json_text_key: str = "caption"
    # names of the classes that *.cls members number; empty: the shards carry no labels
    class_names: tuple[str, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """A label per class name."""
        if len(set(self.class_names)) != len(self.class_names):
            yield "class_names", "names a class twice"

    def build(self, cache_dir: str) -> "TarSource":
        """Finds the shards and indexes those that have no valid index yet."""
        return TarSource(self, cache_dir)


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}b` to a08b, a09b, a10b and `{x,y}` to x, y, as a shell does; every combination of several."""
    pieces: list[list[str]] = []
    position = 0
    for match in _BRACES.finditer(pattern):
        pieces += [[pattern[position : match.start()]], _alternatives(match[1])]
        position = match.end()
    return ["".join(choice) for choice in itertools.product(*pieces, [pattern[position:]])]


def _alternatives(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    width = max(len(numbers[1]), len(numbers[2])) if "0" in (numbers[1][0], numbers[2][0]) else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _split_list(path: str) -> list[str]:
    """Splits at commas outside of braces."""
    return [part.strip() for part in re.split(r",(?![^{}]*\})", path) if part.strip()]


def find_shards(path: str) -> list[str]:
    """The shard files that a path speaks of: in the order of the path, each glob and folder sorted.

    Raises:
        ConfigError: a file that is named doesn't exist, or a glob or folder gives none.
    """
    shards: list[str] = []
    for part in _split_list(path):
        for name in expand_braces(part):
            if os.path.isdir(name):
                found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
            elif glob.has_magic(name) and not os.path.exists(name):
                found = sorted(glob.glob(name, recursive=True))
            else:
                found = [name] if os.path.isfile(name) else []
            if not found:
                what = "a folder without *.tar" if os.path.isdir(name) else "no file"
                if glob.has_magic(name):
                    what = "a pattern that no file matches"
                raise ConfigError(f"config.data.source.path: {name!r} is {what}; check the path (it was {path!r})")
            shards += found
    if not shards:
        raise ConfigError("config.data.source.path is empty; give tar shards, e.g. shard-{000..009}.tar")
    return shards


class TarSource:
    """All records of the shards, in the order of the shards and of their members."""

    def __init__(self, config: TarConfig, cache_dir: str):
        self.config, self.class_names = config, config.class_names
        self.shards = find_shards(config.path)
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
        record = {
            "image": self._part(shard, row, IMAGE),
            "texts": self.texts(index) if self._has_text(shard, row) else (),
            "key": key,
            "where": where,
        }
        label = self._part(shard, row, LABEL)
        if record["image"] is None:
            raise BadRecord(where, key, "it has no image (jpg, jpeg, png or webp)")
        if label is None and not record["texts"]:
            raise BadRecord(where, key, "it has no caption (txt or json) and no label (cls)")
        return record if label is None else {**record, "label": self._label(label, where, key)}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of the record's txt member, else of its json member; read without the image."""
        shard, row = self._locate(index)
        where, key = self.shards[shard], self.indices[shard].keys[row]
        for part in (TEXT, JSON):
            data = self._part(shard, row, part)
            if data is None:
                continue
            try:
                text = data.decode("utf-8-sig")
                value = text if part == TEXT else json.loads(text)
            except ValueError as error:  # of the bytes or of the JSON
                raise BadRecord(where, key, f"its caption can't be read: {error}") from error
            if part == JSON:
                value = self._from_json(value, where, key)
            return checked_texts(value if isinstance(value, list) else [value.strip()], where, key)
        raise BadRecord(where, key, "it has no caption (txt or json)")

    def _from_json(self, value: Any, where: str, key: str) -> list[Any]:
        name = self.config.json_text_key
        if not isinstance(value, dict) or name not in value:
            has = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise BadRecord(where, key, f"its json has no {name!r} (the source's json_text_key); it has: {has}")
        return value[name] if isinstance(value[name], list) else [value[name]]

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
        if offset < 0:
            return None
        where, key = self.shards[shard], self.indices[shard].keys[row]
        try:
            with open(where, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadRecord(where, key, f"the shard can't be read: {error.strerror}") from error
        if len(data) != size:
            raise BadRecord(where, key, "the shard became shorter while it was in use; fetch it again")
        return data
