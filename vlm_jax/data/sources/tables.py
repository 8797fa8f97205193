"""Captions in a table (.jsonl, .csv, .tsv) beside a folder of image files."""

import csv
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record, SourceConfig, checked_texts
from vlm_jax.schema import ConfigError

_SCAN_BYTES = 1 << 24
_LINES_TRIED = 100
_EXTRA = "(fields beyond the header)"


@dataclasses.dataclass(frozen=True)
class TableConfig(SourceConfig):
    """One row per image; every row names its file and its caption."""

    # the table file
    path: str = ""
    # folder that relative image names start from; empty: the folder of the table
    image_root: str = ""
    # column (csv) or key (jsonl) of the image's file name
    image_key: str = "image"
    # column or key of the caption; in a jsonl its value may be a list of captions
    text_key: str = "caption"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Keys that can't both be read."""
        if self.image_key == self.text_key:
            yield "text_key", f"= {self.text_key!r} is image_key too; name the column of the captions"

    def table(self) -> str:
        """The table's path; raises `ConfigError` when it is not a file."""
        if not self.path:
            raise ConfigError("config.data.source.path is empty; give the table of images and captions")
        if not os.path.isfile(self.path):
            raise ConfigError(f"config.data.source.path = {self.path!r} is not a file; check the name")
        if self.image_root and not os.path.isdir(self.image_root):
            raise ConfigError(
                f"config.data.source.image_root = {self.image_root!r} is not a folder; give the one that the image "
                f"names in {self.path} start from"
            )
        return self.path

    def check_columns(self, found: Iterable[str]) -> None:
        """Raises `ConfigError` when a column is missing; lists those found and the nearest."""
        found = list(found)
        for field, name in (("image_key", self.image_key), ("text_key", self.text_key)):
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"{self.path} has no column {name!r} (config.data.source.{field}); "
                    f"it has: {', '.join(found) or '(none)'}{hint}"
                )

    def read_image(self, name: str, key: str) -> bytes:
        """Bytes of an image file; raises `BadRecord` when it can't be read."""
        root = self.image_root or os.path.dirname(os.path.abspath(self.path))
        try:
            with open(os.path.join(root, name), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            why = getattr(error, "strerror", None) or str(error)
            where = "" if os.path.isabs(name) else f" in {root}, the source's image_root"
            raise BadRecord(self.path, key, f"its image {name!r} can't be read: {why}{where}") from error


@dataclasses.dataclass(frozen=True)
class JsonlConfig(TableConfig):
    """One JSON object per line."""

    def build(self, cache_dir: str) -> "JsonlSource":
        """Reads where the lines start, and no more."""
        return JsonlSource(self)


@dataclasses.dataclass(frozen=True)
class CsvConfig(TableConfig):
    """Comma, tab, semicolon or bar separated columns under a header line."""

    # the separator; empty: found out from the header line
    separator: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Separators that the format doesn't have."""
        yield from super().problems()
        if len(self.separator) > 1:
            yield "separator", f"= {self.separator!r} must be one character, or empty to find it out"

    def build(self, cache_dir: str) -> "CsvSource":
        """Reads the image names and captions into memory."""
        return CsvSource(self)


class JsonlSource:
    """Lines are read when they are needed; only their offsets are kept."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: JsonlConfig):
        self.config = config
        self.starts, self.stops = _line_spans(config.table())
        if not len(self.starts):
            raise ConfigError(f"{config.path} holds no line; give a file with one JSON object per line")
        config.check_columns(self._first_row())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        """The captions and the bytes of the image file."""
        row, key = self._row(index), self._key(index)
        name = row.get(self.config.image_key)
        if not isinstance(name, str) or not name:
            raise BadRecord(self.config.path, key, f"it names no image under {self.config.image_key!r}")
        texts = self._texts(row, key)
        return {"image": self.config.read_image(name, key), "texts": texts, "key": key, "where": self.config.path}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        return self._texts(self._row(index), self._key(index))

    def _texts(self, row: dict[str, Any], key: str) -> tuple[str, ...]:
        if self.config.text_key not in row:
            raise BadRecord(self.config.path, key, f"it has no {self.config.text_key!r}")
        value = row[self.config.text_key]
        return checked_texts(value if isinstance(value, list) else [value], self.config.path, key)

    def _key(self, index: int) -> str:
        return f"number {index + 1}"

    def _first_row(self) -> dict[str, Any]:
        for index in range(min(len(self), _LINES_TRIED)):
            try:
                return self._row(index)
            except BadRecord:
                continue  # training meets it again and reports it
        raise ConfigError(f"{self.config.path} has no JSON object in its first lines; give one per line")

    def _row(self, index: int) -> dict[str, Any]:
        start, stop = int(self.starts[index]), int(self.stops[index])
        with open(self.config.path, "rb") as file:
            file.seek(start)
            line = file.read(stop - start)
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of the bytes or of the JSON
            raise BadRecord(self.config.path, self._key(index), f"it is not JSON in UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise BadRecord(self.config.path, self._key(index), f"it is a {type(row).__name__}, not a JSON object")
        return row


def _line_spans(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets, first and past the last, of the lines that hold anything but white space."""
    ends, position, last = [], 0, b""
    with open(path, "rb") as file:
        while block := file.read(_SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position, last = position + len(block), block
    stops = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    if last and not last.endswith(b"\n"):
        stops = np.append(stops, position)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)[: len(stops)]
    filled = stops - starts > 1  # a lone carriage return is an empty line too
    return starts[filled], stops[filled]


class CsvSource:
    """The two columns in memory, packed."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: CsvConfig):
        self.config = config
        images, texts = [], []
        self.torn: dict[int, int] = {}  # number of fields of each row that has more than the header
        for index, row in enumerate(_csv_rows(config)):
            images.append(row.get(config.image_key) or "")
            texts.append(row.get(config.text_key) or "")
            if _EXTRA in row:
                self.torn[index] = len(row) - 1 + len(row[_EXTRA])
        if not images:
            raise ConfigError(f"{config.path} holds a header and no row; give one row per image")
        self.images, self.captions = PackedStrings.pack(images), PackedStrings.pack(texts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        """The caption and the bytes of the image file."""
        key, name, texts = self._key(index), self.images[index], self.texts(index)
        if not name:
            raise BadRecord(self.config.path, key, f"its column {self.config.image_key!r} is empty")
        return {"image": self.config.read_image(name, key), "texts": texts, "key": key, "where": self.config.path}

    def texts(self, index: int) -> tuple[str, ...]:
        """The caption, as a tuple of one."""
        if index in self.torn:
            why = f"it has {self.torn[index]} fields, more than the header; put quotes around what holds a separator"
            raise BadRecord(self.config.path, self._key(index), why)
        return checked_texts([self.captions[index]], self.config.path, self._key(index))

    def _key(self, index: int) -> str:
        return f"number {index + 1}"


def _csv_rows(config: CsvConfig) -> Iterator[dict[str, Any]]:
    """Rows as dicts, missing columns reported; bytes that are no UTF-8 stay as lone surrogates in their row."""
    path = config.table()
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))  # captions longer than 128 kB exist
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline()
        file.seek(0)
        separator = config.separator or max("\t,;|", key=header.count)
        row_lines: list[str] = []  # of the row that is being read
        reader = csv.DictReader(_kept(file, row_lines), restkey=_EXTRA, delimiter=separator)
        config.check_columns(reader.fieldnames or ())
        row_lines.clear()  # of the header
        last: list[str] = []
        for row in reader:
            last = row_lines.copy()
            row_lines.clear()
            yield row
    _check_closed(last, path, separator, reader.line_num)


def _kept(lines: Iterable[str], kept: list[str]) -> Iterator[str]:
    for line in lines:
        line = line.replace("\0", "")
        kept.append(line)
        yield line


def _check_closed(last_row: list[str], path: str, separator: str, line_number: int) -> None:
    """Raises `ConfigError` when the last row's quote is never closed: it swallowed every row after the quote."""
    try:
        list(csv.reader(last_row, delimiter=separator, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            first = line_number - len(last_row) + 1
            raise ConfigError(
                f"{path}: a quote in line {first} is never closed, so that everything after it is one field; close it, "
                "or write it twice where it belongs to the text"
            ) from None
