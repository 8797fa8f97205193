"""Documents of text from files: a JSON object per line, plain text, or columns of parquet. No images, no tokens."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from typing import Any, Literal

import numpy as np
from pyarrow import parquet

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.tables import line_spans
from vlm_jax.data.sources.texts import checked_texts
from vlm_jax.schema import ConfigError

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclasses.dataclass(frozen=True)
class TextFilesConfig(SourceConfig):
    """One document per line, file, or row of a table."""

    # *.jsonl, *.txt and *.parquet files: names, globs, folders, with commas between
    path: str = ""
    # name of the text in an object of *.jsonl, and of the column of *.parquet
    text_key: str = "text"
    # whether each line of a *.txt is a document, or the whole file
    documents: Literal["lines", "files"] = "lines"

    def build(self, cache_dir: str) -> "TextFilesSource":
        """Reads where the documents begin, and no more."""
        return TextFilesSource(self)


class TextFilesSource:
    """All documents, in the order of the files and in the order inside each.

    Attributes:
        stamp: digest of the files' names, sizes and times and of what is read in them: it tells one corpus from another
            without reading it.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, config: TextFilesConfig):
        self.config = config
        wanted = f"files of text ({', '.join(f'*{suffix}' for suffix in SUFFIXES)})"
        found = find_files(config.path, "*", wanted)
        self.files = [file for file in found if file.endswith(SUFFIXES)]
        if not self.files:
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no {wanted}; check the path")
        self.parts = [self._open(file) for file in self.files]
        self.ends = list(itertools.accumulate(len(part) for part in self.parts))
        if not self.ends[-1]:
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no document; check the path")
        self.stamp = self._stamp()

    def _open(self, file: str) -> "_Lines | _Whole | _Parquet":
        if file.endswith(".parquet"):
            return _Parquet(file, self.config.text_key)
        if file.endswith(".txt"):
            return _Whole(file) if self.config.documents == "files" else _Lines(file, "")
        return _Lines(file, self.config.text_key)

    def _stamp(self) -> str:
        digest = hashlib.sha256(f"{self.config.text_key}\0{self.config.documents}".encode())
        for file in self.files:
            stat = os.stat(file)
            digest.update(f"\0{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """The document as the only one of `texts`."""
        where, key, texts = self._read(index)
        return {"texts": texts, "key": key, "where": where}

    def texts(self, index: int) -> tuple[str, ...]:
        """The document."""
        return self._read(index)[2]

    def _read(self, index: int) -> tuple[str, str, tuple[str, ...]]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.path} has {len(self)} documents, no document {index}")
        part = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[part - 1] if part else 0)
        where, key = self.files[part], f"number {row + 1}"
        return where, key, checked_texts((self.parts[part].read(row, key),), where, key)


class _Lines:
    """Lines of a file, each a text, or a JSON object that holds one under `text_key`."""

    def __init__(self, file: str, text_key: str):
        self.file, self.text_key = file, text_key
        self.starts, self.stops = line_spans(file)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, row: int, key: str) -> Any:
        with open(self.file, "rb") as stream:
            stream.seek(int(self.starts[row]))
            line = stream.read(int(self.stops[row] - self.starts[row]))
        try:
            text = line.decode("utf-8-sig" if row == 0 else "utf-8")
            return self._value(json.loads(text), key) if self.text_key else text
        except ValueError as error:  # of the bytes or of the JSON
            raise BadRecord(self.file, key, f"it can't be read: {error}") from error

    def _value(self, found: Any, key: str) -> Any:
        if not isinstance(found, dict) or self.text_key not in found:
            has = f"it has: {', '.join(found)}" if isinstance(found, dict) else f"it is a {type(found).__name__}"
            raise BadRecord(self.file, key, f"it is no object with {self.text_key!r} (the source's text_key); {has}")
        return found[self.text_key]


class _Whole:
    """A file as one text."""

    def __init__(self, file: str):
        self.file = file

    def __len__(self) -> int:
        return 1

    def read(self, row: int, key: str) -> Any:
        try:
            with open(self.file, encoding="utf-8-sig") as stream:
                return stream.read()
        except ValueError as error:
            raise BadRecord(self.file, key, f"it is not UTF-8: {error}") from error


class _Parquet:
    """A column of a parquet file. A group of rows is decoded as a whole: read it in order, not at random."""

    def __init__(self, file: str, text_key: str):
        self.file, self.text_key = file, text_key
        try:
            meta = parquet.ParquetFile(file).metadata
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} can't be read as parquet ({error}); fetch it again") from error
        columns = [meta.schema.column(i).path for i in range(meta.num_columns)]
        if text_key not in columns:
            raise ConfigError(
                f"{file} has no column {text_key!r} (config.data.source.text_key); it has: {', '.join(columns)}"
            )
        self.ends = np.cumsum([meta.row_group(i).num_rows for i in range(meta.num_row_groups)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, row: int, key: str) -> Any:
        group = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        return _parquet_group(self.file, self.text_key, group)[row - first].as_py()


@functools.lru_cache(maxsize=2)
def _parquet_group(file: str, column: str, group: int) -> Any:
    return parquet.ParquetFile(file).read_row_group(group, columns=[column]).column(0)


__all__ = ["TextFilesConfig", "TextFilesSource"]
