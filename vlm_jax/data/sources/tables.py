"""Captions in a table (.jsonl, .csv, .tsv) beside a folder of image files."""

import contextlib
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record
from vlm_jax.data.sources.keyed import KeyedConfig
from vlm_jax.data.sources.texts import captions_or_why
from vlm_jax.schema import ConfigError

_SCAN_BYTES = 1 << 24
_LINES_TRIED = 100
_EXTRA = "(fields beyond the header)"


@dataclasses.dataclass(frozen=True)
class TableConfig(KeyedConfig):
    """One row per image; every row names its file, and may name its caption and its class (a number or a name).

    Classes without `class_names` are numbered in the sorted order of their names.
    """

    # folder that relative image names start from; empty: the folder of the table
    image_root: str = ""

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

    def read_image(self, name: str, key: str, table: str = "") -> bytes:
        """Bytes of an image file; raises `BadRecord` when it can't be read.

        Args:
            name: of the file.
            key: of the record.
            table: the file that names it, where `path` is not one file.
        """
        root = self.image_root or os.path.dirname(os.path.abspath(table or self.path))
        try:
            with open(os.path.join(root, name), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            why = getattr(error, "strerror", None) or str(error)
            where = "" if os.path.isabs(name) else f" in {root}, the source's image_root"
            raise BadRecord(table or self.path, key, f"its image {name!r} can't be read: {why}{where}") from error


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


class Labels:
    """The numbers of the classes that a table names.

    Attributes:
        names: class names in the order of their numbers; empty where the table holds numbers.
    """

    def __init__(self, values: Iterable[Any], names: tuple[str, ...]):
        """Takes the values of the column, to find the classes in it where `names` gives none."""
        single = (item for value in values for item in (value if isinstance(value, list) else [value]))
        distinct = () if names else {value for value in single if isinstance(value, int | str) and value != ""}
        numbers = all(_as_number(value) is not None for value in distinct)
        self.names = names if numbers else tuple(sorted(map(str, distinct)))
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def read(self, value: Any, where: str, key: str) -> dict[str, int | tuple[int, ...]]:
        """`label` of a record, if it has one: a number, or of a list a tuple, which may be empty.

        Raises:
            BadRecord: a label that is no class.
        """
        if value is None or value == "":
            return {}
        if isinstance(value, list):
            return {"label": tuple(self._number(item, where, key) for item in value)}
        return {"label": self._number(value, where, key)}

    def _number(self, value: Any, where: str, key: str) -> int:
        number = self._numbers.get(str(value), _as_number(value))
        if number is None or number < 0 or (self.names and number >= len(self.names)):
            known = f"one of the {len(self.names)} class names or their numbers" if self.names else "a number"
            raise BadRecord(where, key, f"its label is {value!r:.60}, not {known}")
        return number


def _as_number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class JsonlSource:
    """Lines are read when they are needed; only their offsets are kept."""

    def __init__(self, config: JsonlConfig):
        self.config, self.captions = config, config.caption_keys()
        self.starts, self.stops = line_spans(config.table())
        if not len(self.starts):
            raise ConfigError(f"{config.path} holds no line; give a file with one JSON object per line")
        config.check_keys(self._columns(), config.path, "column")
        self.labels = Labels(self._all_labels() if config.label_key else (), config.class_names)
        self.class_names = self.labels.names

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        """The bytes of the image file, its captions, and its label when there is one."""
        row, key, where = self._row(index), self._key(index), self.config.path
        name = row.get(self.config.image_key)
        if not isinstance(name, str) or not name:
            raise BadRecord(self.config.path, key, f"it names no image under {self.config.image_key!r}")
        texts = captions_or_why(lambda: self.captions.read(row, where, key)) if self.captions.keys else {"texts": ()}
        label = self.labels.read(row.get(self.config.label_key), where, key) if self.config.label_key else {}
        return {"image": self.config.read_image(name, key), **texts, **label, "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        return self.captions.read(self._row(index), self.config.path, self._key(index))["texts"]

    def _all_labels(self) -> Iterator[Any]:
        """The label of every line that can be read, for one pass over the file."""
        if self.config.class_names:
            return
        with open(self.config.path, "rb") as file:
            for index in range(len(self)):
                with contextlib.suppress(BadRecord):  # training meets it again and reports it
                    yield self._parse(self._line(file, index), index).get(self.config.label_key)

    def _key(self, index: int) -> str:
        return f"number {index + 1}"

    def _columns(self) -> Iterable[str]:
        """Keys of the first objects, in their order: a line may lack what others have."""
        found: dict[str, None] = {}
        for index in range(min(len(self), _LINES_TRIED)):
            with contextlib.suppress(BadRecord):  # training meets it again and reports it
                found |= dict.fromkeys(self._row(index))
        if found:
            return found
        raise ConfigError(f"{self.config.path} has no JSON object in its first lines; give one per line")

    def _row(self, index: int) -> dict[str, Any]:
        with open(self.config.path, "rb") as file:
            return self._parse(self._line(file, index), index)

    def _line(self, file: BinaryIO, index: int) -> bytes:
        start, stop = int(self.starts[index]), int(self.stops[index])
        file.seek(start)
        return file.read(stop - start)

    def _parse(self, line: bytes, index: int) -> dict[str, Any]:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:  # of the bytes or of the JSON
            raise BadRecord(self.config.path, self._key(index), f"it is not JSON in UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise BadRecord(self.config.path, self._key(index), f"it is a {type(row).__name__}, not a JSON object")
        return row


def line_spans(path: str) -> tuple[np.ndarray, np.ndarray]:
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
    """The columns that are used in memory, packed."""

    def __init__(self, config: CsvConfig):
        self.config, self.caption_keys = config, config.caption_keys()
        label_key = [config.label_key] * bool(config.label_key)
        columns: dict[str, list[str]] = {name: [] for name in (config.image_key, *config.text_key, *label_key)}
        self.torn: dict[int, int] = {}  # number of fields of each row that has more than the header
        for index, row in enumerate(_csv_rows(config)):
            for name, column in columns.items():
                column.append(row.get(name) or "")
            if _EXTRA in row:
                self.torn[index] = len(row) - 1 + len(row[_EXTRA])
        if not columns[config.image_key]:
            raise ConfigError(f"{config.path} holds a header and no row; give one row per image")
        self.labels = Labels((value for name in label_key for value in columns[name]), config.class_names)
        self.class_names = self.labels.names
        self.columns = {name: PackedStrings.pack(column) for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.columns[self.config.image_key])

    def __getitem__(self, index: int) -> Record:
        """The bytes of the image file, its captions, and its label when there is one."""
        key, where, name = self._key(index), self.config.path, self.columns[self.config.image_key][index]
        self._check_fields(index)
        texts = captions_or_why(lambda: self._texts(index)) if self.caption_keys.keys else {"texts": ()}
        if not name:
            raise BadRecord(where, key, f"its column {self.config.image_key!r} is empty")
        label = {}
        if self.config.label_key:
            label = self.labels.read(self.columns[self.config.label_key][index], where, key)
        return {"image": self.config.read_image(name, key), **texts, **label, "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        self._check_fields(index)
        return self._texts(index)["texts"]

    def _texts(self, index: int) -> dict[str, Any]:
        row = {name: self.columns[name][index] for name in self.caption_keys.keys}
        return self.caption_keys.read(row, self.config.path, self._key(index))

    def _check_fields(self, index: int) -> None:
        if index in self.torn:
            why = f"it has {self.torn[index]} fields, more than the header; put quotes around what holds a separator"
            raise BadRecord(self.config.path, self._key(index), why)

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
        config.check_keys(reader.fieldnames or (), path, "column")
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
