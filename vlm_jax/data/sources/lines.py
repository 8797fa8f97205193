"""Plain text, one record a line, for what learns from texts alone."""

import dataclasses

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig
from vlm_jax.data.sources.paths import find_files
from vlm_jax.data.sources.tables import line_spans
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class LinesConfig(SourceConfig):
    """Text files in UTF-8; every line that holds anything is a text."""

    # the file, files or folder
    path: str = ""

    def build(self, cache_dir: str) -> "LinesSource":
        """Reads where the lines start, and no more."""
        return LinesSource(self)


class LinesSource:
    """Lines are read when they are needed. Their records have no image."""

    def __init__(self, config: LinesConfig):
        self.files = find_files(config.path, "*.txt", "one or several text files")
        self.spans = [line_spans(file) for file in self.files]
        self.ends = np.cumsum([len(starts) for starts, _ in self.spans])
        self.class_names: tuple[str, ...] = ()
        if not len(self):
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no line; give files with texts")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Record:
        """The text."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} lines, no line {index}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        file, (starts, stops) = self.files[number], self.spans[number]
        place = index - (int(self.ends[number - 1]) if number else 0)
        with open(file, "rb") as stream:
            stream.seek(int(starts[place]))
            line = stream.read(int(stops[place] - starts[place]))
        key = f"line {place + 1}"
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadRecord(file, key, f"it is not UTF-8: {error}") from error
        return {"texts": (text,) if text else (), "no_caption": "it is empty", "key": key, "where": file}

    def texts(self, index: int) -> tuple[str, ...]:
        """The text."""
        return self[index]["texts"]


__all__ = ["LinesConfig", "LinesSource"]
