"""What a source of records is: the protocol, the record that can't be used, and the family of source configs.

A source knows files and keys, not image codecs, tokens or batches; those are `images`, `text` and `pipeline`.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from vlm_jax.schema import Choice, ConfigError

Record = dict[str, Any]
"""One example as it is stored: `image` (encoded bytes, or uint8 [H, W, 3]), `texts` (tuple of captions, which may be
empty), `key`, `where` (the shard or file it came from), for labelled sources `label` (int), `text_weights` (the
probability of each caption) where the source gives its captions different ones, `image_id` (text) where several
records may hold one image, `images` (tuple, `image` its first) where a text is read beside several, `phrases` (tuple)
and `boxes` ([n, 4]: left, top, width and height in pixels) where parts of the image are named, and `no_caption` (why
`texts` is empty) where a caption was looked for: who needs one raises `BadRecord` with it, who reads the image alone
doesn't. A conversation has `turns` and `images` instead of `image` (see `chats`), and `notes` on what was left out of
it; a question of a benchmark has `question` and `reference` instead of `turns` (see `benchmark`). Sources of documents
have `texts` and no `image`."""


class BadRecord(Exception):  # noqa: N818 - it names the record, and most are replaced
    """A record that can't be used. Training replaces and counts it; evaluation masks it.

    Attributes:
        where: shard, file or source that holds the record.
        key: name of the record inside it.
        why: what is wrong with it.
    """

    def __init__(self, where: str, key: str, why: str):
        super().__init__(where, key, why)
        self.where, self.key, self.why = where, key, why

    def __str__(self) -> str:
        return f"record {self.key} of {self.where} can't be used: {self.why}"


class Source(Protocol):
    """Random access to records. It must be picklable, for worker processes, and safe to read from threads."""

    class_names: tuple[str, ...]
    """Names of the classes that `label` counts; empty when the records carry no labels."""

    def __len__(self) -> int:
        """Number of records, the unusable ones included."""
        ...

    def __getitem__(self, index: int) -> Record:
        """The record; raises `BadRecord` when it has no image that can be read, or its label is no class."""
        ...

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions alone, without reading the image where that can be avoided.

        Raises:
            BadRecord: there is none, or it can't be read.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SourceConfig(Choice):
    """Where the records come from; pick a kind."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The table kind -> config."""
        from vlm_jax.data.sources import KINDS  # the members derive from this class: their modules import this one

        return KINDS

    def build(self, cache_dir: str) -> Source:
        """The source itself.

        Args:
            cache_dir: folder for indices of files that lie in folders that can't be written.

        Raises:
            ConfigError: the files don't exist or hold no record; names them and the remedy.
        """
        raise TypeError(f"{type(self).__name__} is a family of sources; build one of its kinds")


@contextlib.contextmanager
def keys_at(path: str, others: str) -> Iterator[None]:
    """Errors of a source name its keys as they were given: `path` for its path, and `others` before any other key."""
    try:
        yield
    except ConfigError as error:
        sentence = str(error).replace("config.data.source.path", path).replace("config.data.source.", others)
        raise ConfigError(sentence) from error


class PackedStrings:
    """A read-only list of texts in two arrays: a tenth of the memory of Python strings, and cheap to pickle."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedStrings":
        """Packs the texts; lone surrogates, which stand for undecodable bytes, survive."""
        blob, ends = bytearray(), []
        for text in texts:
            blob += text.encode("utf-8", "surrogatepass")
            ends.append(len(blob))
        return cls(np.frombuffer(bytes(blob), np.uint8), np.asarray(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self.ends[index - 1])
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogatepass")
