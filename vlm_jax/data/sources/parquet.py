"""Conversations about images in parquet files with the columns of the Cauldron, as nanoVLM reads them.

`images` is a list of `{"bytes": ..., "path": ...}`, `texts` a list of `{"user": ..., "assistant": ...}`. FineVision's
ratings, one a round, leave out rounds that are rated too low.

Parquet has no random access below a row group: a record costs the reading of its own, so that files with small groups
(the 100 rows that `datasets` writes for images) are read well and files with one large group badly.
"""

import bisect
import dataclasses
import itertools
import os
import threading
from typing import Any

import pyarrow
from pyarrow import parquet

from vlm_jax.data.sources.base import BadRecord, Record, SourceConfig
from vlm_jax.data.sources.chats import ImageBytes, ImageFile, StoredImage, Turn, checked_text, message_texts
from vlm_jax.data.sources.paths import find_files
from vlm_jax.schema import ConfigError

RATINGS = ("relevance_ratings", "image_correspondence_ratings", "visual_dependency_ratings", "formatting_ratings")
RATED = "rounds rated too low were left out"


@dataclasses.dataclass(frozen=True)
class ParquetConfig(SourceConfig):
    """One conversation a row."""

    # *.parquet; several with commas between, a glob, or a folder
    path: str = ""
    # column of the images; a list, or one image
    images_key: str = "images"
    # column of the rounds
    texts_key: str = "texts"
    # rounds with a rating below this are left out, where the file has ratings
    min_relevance: int = 1
    # likewise, how well the text corresponds to the image
    min_image_correspondence: int = 1
    # likewise, how much the answer depends on the image
    min_visual_dependency: int = 1
    # likewise, the form of the text
    min_formatting: int = 1

    def build(self, cache_dir: str) -> "ParquetSource":
        """Reads the files' footers."""
        return ParquetSource(self)

    def least(self) -> dict[str, int]:
        """Column of ratings -> the least that a round must have."""
        wanted = (self.min_relevance, self.min_image_correspondence, self.min_visual_dependency, self.min_formatting)
        return dict(zip(RATINGS, wanted, strict=True))


class _Kept(threading.local):
    """The row group that a thread read last, and which it is: (group, with images)."""

    of: tuple[int, bool] | None = None
    table: Any = None


class ParquetSource:
    """Each thread keeps the row group that it read last."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: ParquetConfig):
        self.config = config
        self.files = find_files(config.path, "*.parquet", "parquet files with the columns images and texts")
        self.groups: list[tuple[int, int]] = []  # (file, row group)
        self.columns: list[list[str]] = []
        rows: list[int] = []
        for number, path in enumerate(self.files):
            try:
                footer = parquet.ParquetFile(path)
            except (OSError, pyarrow.ArrowException) as error:
                raise ConfigError(f"{path} can't be read as parquet ({error}); fetch it again") from None
            names = footer.schema_arrow.names
            for key, name in (("images_key", config.images_key), ("texts_key", config.texts_key)):
                if name not in names:
                    raise ConfigError(
                        f"{path} has no column {name!r} (config.data.source.{key}); it has: {', '.join(names)}"
                    )
            self.columns.append([n for n in (config.images_key, config.texts_key, *RATINGS) if n in names])
            counts = [footer.metadata.row_group(group).num_rows for group in range(footer.num_row_groups)]
            self.groups += [(number, group) for group in range(len(counts))]
            rows += counts
        self.ends = list(itertools.accumulate(rows))
        if not self.ends or not self.ends[-1]:
            raise ConfigError(f"{config.path} holds no row; give files with conversations")
        self._kept = _Kept()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = _Kept()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """`turns` and `images` of the conversation; raises `BadRecord`."""
        row, where, key = self._row(index, with_images=True)
        turns = self._turns(row, where, key)
        images = self._images(row[self.config.images_key], where, key)
        record = {"turns": turns, "images": images, "texts": message_texts(turns), "key": key, "where": where}
        rounds = len(row[self.config.texts_key])
        return record | {"notes": (RATED,)} if 2 * rounds > len(turns) else record

    def texts(self, index: int) -> tuple[str, ...]:
        """The messages, read without the images."""
        return message_texts(self._turns(*self._row(index, with_images=False)))

    def fingerprint(self) -> str:
        """Of the files and the keys."""
        stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in self.files]
        return repr((stats, dataclasses.astuple(self.config)))

    def _row(self, index: int, with_images: bool) -> tuple[dict[str, Any], str, str]:
        """(columns, file, name) of a record."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.config.path} holds {len(self)} rows, there is no row {index}")
        number = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        file, group = self.groups[number]
        where, key = self.files[file], f"row {row} of group {group}"
        if self._kept.of != (number, with_images):
            names = [n for n in self.columns[file] if with_images or n != self.config.images_key]
            try:
                table = parquet.ParquetFile(where, memory_map=True).read_row_group(group, columns=names)
            except (OSError, pyarrow.ArrowException) as error:
                raise BadRecord(where, key, f"its row group can't be read: {error}; fetch the file again") from error
            self._kept.of, self._kept.table = (number, with_images), table
        return self._kept.table.slice(row, 1).to_pylist()[0], where, key

    def _turns(self, row: dict[str, Any], where: str, key: str) -> tuple[Turn, ...]:
        rounds = row[self.config.texts_key]
        if not isinstance(rounds, list) or not rounds:
            raise BadRecord(where, key, f"its {self.config.texts_key} holds no round")
        turns: list[Turn] = []
        for number, item in enumerate(rounds):
            if not isinstance(item, dict):
                raise BadRecord(
                    where, key, f"its round {number + 1} is a {type(item).__name__}, not a user's and answer"
                )
            if self._rated_too_low(row, number):
                continue
            for role in ("user", "assistant"):
                turns.append(Turn(role, checked_text(item.get(role), f"{role} of round {number + 1}", where, key)))
        if not turns:
            raise BadRecord(where, key, "all its rounds are rated too low (config.data.source.min_...)")
        return tuple(turns)

    def _rated_too_low(self, row: dict[str, Any], number: int) -> bool:
        for name, least in self.config.least().items():
            ratings = row.get(name)
            rating = ratings[number] if ratings and number < len(ratings) else None
            if rating is not None and rating < least:
                return True
        return False

    def _images(self, value: Any, where: str, key: str) -> tuple[StoredImage, ...]:
        images: list[StoredImage] = []
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            data = item.get("bytes") if isinstance(item, dict) else item
            name = item.get("path") if isinstance(item, dict) else None
            if isinstance(data, bytes) and data:
                images.append(ImageBytes(data))
            elif isinstance(name, str) and name:
                images.append(ImageFile(name, os.path.dirname(os.path.abspath(where))))
            else:
                raise BadRecord(where, key, "an image of it has neither bytes nor a path")
        return tuple(images)
