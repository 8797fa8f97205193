"""Conversations about images in LLaVA's layout: one JSON list (or one object a line), images in a folder beside it.

`blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` are read as they are. Only where each record lies in the
file is kept in memory.
"""

import array
import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig
from vlm_jax.data.sources.chats import Turn, images_of, message_texts, read_turns
from vlm_jax.data.sources.paths import find_files
from vlm_jax.schema import ConfigError

_BETWEEN = " \t\r\n,"
_MARK = b"\xef\xbb\xbf"  # of UTF-8, as some editors write it


@dataclasses.dataclass(frozen=True)
class LlavaJsonConfig(SourceConfig):
    """`{"id": ..., "image": "path", "conversations": [{"from": "human", "value": ...}, ...]}`, with or without image.

    `image` may be a list of paths; turns may be `{"role": ..., "content": ...}` too.
    """

    # the .json or .jsonl; several with commas between, a glob, or a folder
    path: str = ""
    # folder that relative image names start from; empty: the folder of the file
    image_root: str = ""
    # name of the image, or of the list of images
    image_key: str = "image"
    # name of the turns
    conversation_key: str = "conversations"
    # name of what tells the record in messages
    id_key: str = "id"

    def build(self, cache_dir: str) -> "LlavaJsonSource":
        """Reads the files once, to find where their records are."""
        return LlavaJsonSource(self)


class LlavaJsonSource:
    """Records are read when they are needed, their images when those are."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: LlavaJsonConfig):
        self.config = config
        self.files = find_files(config.path, "*.json", "a .json or .jsonl of conversations")
        if config.image_root and not os.path.isdir(config.image_root):
            raise ConfigError(
                f"config.data.source.image_root = {config.image_root!r} is not a folder; give the one that the image "
                f"names in {self.files[0]} start from"
            )
        self.spans = [_record_spans(file) for file in self.files]
        self.ends = list(itertools.accumulate(map(len, self.spans)))
        if not self.ends[-1]:
            raise ConfigError(f"{config.path} holds no record; give a list of objects, or an object a line")
        self._check_keys()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """`turns` and `images` of the conversation; raises `BadRecord`."""
        row, where, key = self._row(index)
        root = self.config.image_root or os.path.dirname(os.path.abspath(where))
        turns = read_turns(row.get(self.config.conversation_key), where, key)
        images = images_of(row.get(self.config.image_key), root, where, key)
        return {"turns": turns, "images": images, "texts": message_texts(turns), "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The messages."""
        return message_texts(self._turns(index))

    def fingerprint(self) -> str:
        """Of the files and the keys."""
        stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files]
        return repr((stats, dataclasses.astuple(self.config)))

    def _turns(self, index: int) -> tuple[Turn, ...]:
        row, where, key = self._row(index)
        return read_turns(row.get(self.config.conversation_key), where, key)

    def _row(self, index: int) -> tuple[dict[str, Any], str, str]:
        """(object, file, name) of a record."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.path} holds {len(self)} records, there is no record {index}")
        number = bisect.bisect_right(self.ends, index)
        file, spans = self.files[number], self.spans[number]
        row = index - self.ends[number] + len(spans)
        start, stop = spans[row].tolist()
        with open(file, "rb", buffering=0) as opened:
            data = os.pread(opened.fileno(), stop - start, start)
        key = f"number {row + 1}"
        try:
            found = json.loads(data)
        except ValueError as error:  # not UTF-8
            raise BadRecord(file, key, f"it is not JSON in UTF-8: {error}") from error
        if not isinstance(found, dict):
            raise BadRecord(file, key, f"it is a {type(found).__name__}, not a JSON object")
        name = found.get(self.config.id_key)
        return found, file, key if name is None else f"{name} ({key})"

    def _check_keys(self) -> None:
        """Raises `ConfigError` when none of the first records has a conversation: then the key is wrong."""
        seen: dict[str, None] = {}
        for index in range(min(len(self), 20)):
            try:
                row = self._row(index)[0]
            except BadRecord:
                continue  # training meets it again and reports it
            if self.config.conversation_key in row:
                return
            seen |= dict.fromkeys(row)
        raise ConfigError(
            f"{self.files[0]} has no {self.config.conversation_key!r} in its first records "
            f"(config.data.source.conversation_key); they have: {', '.join(seen) or '(none)'}"
        )


def _record_spans(path: str) -> np.ndarray:
    """Byte offsets, first and past the last, of the values of a JSON list or of a file of values, int64 [n, 2]."""
    with open(path, "rb") as file:
        data = file.read()
    shift = len(_MARK) if data.startswith(_MARK) else 0
    # Byte for byte: JSON's own characters are ASCII, so that places in this text are places in the file.
    text = data[shift:].decode("latin-1")
    flat = array.array("q")
    for start, stop in _value_spans(text, path):
        flat.extend((start + shift, stop + shift))
    return np.asarray(flat, np.int64).reshape(-1, 2)


def _value_spans(text: str, path: str) -> Iterator[tuple[int, int]]:
    decode = json.JSONDecoder(strict=False).raw_decode
    place = _skip(text, 0)
    is_list = text[place : place + 1] == "["
    place = _skip(text, place + is_list)
    while place < len(text):
        if is_list and text[place] == "]":
            return
        try:
            _, stop = decode(text, place)
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged at byte {place}: what stands there is no JSON ({str(error).partition(':')[0]}); "
                "fetch it again"
            ) from None
        yield place, stop
        place = _skip(text, stop)
    if is_list:
        raise ConfigError(f"{path} is cut short: its list has no end; fetch it again")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BETWEEN:
        place += 1
    return place
