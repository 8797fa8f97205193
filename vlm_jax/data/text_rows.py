"""Rows of a language model: documents tokenised once, cut where a row is full, and packed into rows side by side.

The tokens and the table of rows are made before training, from the documents in their order, and kept in a folder of
the run when the source can tell that it has not changed. So a row at a position of a run is read in constant time, and
a checkpoint needs one integer as for any other source. Which documents share a row is `packing`'s business.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlm_jax.data.bad_records import BadRecordAccount, Failure
from vlm_jax.data.examples import Example
from vlm_jax.data.packing import Packing, lay_out, pack_windows, pieces
from vlm_jax.data.sources.base import BadRecord, Record, Source
from vlm_jax.data.sources.mixture import MixtureSource
from vlm_jax.data.sources.text_files import TextFilesSource
from vlm_jax.data.text import Tokenizer
from vlm_jax.schema import ConfigError

_VERSION = 1
_WINDOW = 4096  # documents that are tokenised beside each other
_log = logging.getLogger(__name__)


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """All ids of a document, with the start and end tokens that the tokenizer's config asks for; nothing is cut."""
    return prompt_ids(tokenizer, text) + [tokenizer.eos_id] * tokenizer.config.eos


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """All ids of a text that goes on: as a document's, without an end token."""
    return [tokenizer.bos_id] * tokenizer.config.bos + tokenizer.encoder.encode(tokenizer.clean(text))


class PackedTexts:
    """The rows of a corpus as a source of records: `pieces`, the ids of the documents (or parts) that share a row.

    Args:
        source: documents; the first text of each record is read.
        tokenizer: gives the ids.
        row_length: tokens of a row.
        cache_dir: folder for the tokens of a corpus that lies in files; "": they are kept in memory.
        budget: as `DataConfig.bad_record_budget`, of documents that can't be read.

    Raises:
        ConfigError: no document has a token.
        BadRecordBudgetExceeded: too many documents can't be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, source: Source, tokenizer: Tokenizer, row_length: int, cache_dir: str, budget: float):
        self.row_length = row_length
        folder = ""
        if cache_dir and isinstance(source, TextFilesSource):
            folder = os.path.join(cache_dir, f"tokens-{_digest(source.stamp, tokenizer)}")
        self.corpus = _corpus(source, tokenizer, folder, budget)
        lengths = np.diff(self.corpus.ends, prepend=0)
        _, self.first, self.stop = pieces(lengths, row_length)
        starts = np.repeat(self.corpus.ends - lengths, -(-lengths // row_length))
        self.first, self.stop = self.first + starts, self.stop + starts
        self.packing: Packing = pack_windows(self.stop - self.first, row_length, seed=0)
        if not len(self.packing):
            raise ConfigError("config.data.source: no document has a token; give a corpus with text in it")

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Record:
        """Arrays of ids."""
        tokens = self.corpus.tokens()
        ids = [np.asarray(tokens[self.first[i] : self.stop[i]], np.int32) for i in self.packing[index]]
        return {"pieces": ids, "key": f"row {index}", "where": "the packed corpus"}

    def texts(self, index: int) -> tuple[str, ...]:
        """None: rows hold ids."""
        raise BadRecord("the packed corpus", f"row {index}", "it holds ids, not a text")

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        return int((self.stop - self.first).sum()) / (len(self) * self.row_length)


def pack_texts(
    source: Source, tokenizer: Tokenizer, row_length: int, cache_dir: str, budget: float
) -> PackedTexts | MixtureSource:
    """`PackedTexts`; of a mixture each part by itself, so that a part's weight is its share of the rows."""
    if not isinstance(source, MixtureSource):
        return PackedTexts(source, tokenizer, row_length, cache_dir, budget)
    parts = [PackedTexts(part, tokenizer, row_length, cache_dir, budget) for part in source.sources]
    return MixtureSource(source.names, parts, source.weights)


@dataclasses.dataclass
class _Corpus:
    """Ids of all documents, one after the other.

    Attributes:
        ends: int64 [documents], where each ends; one that could not be read has no token.
        held: the ids, or None where they lie in `file`.
        file: the ids on disk, mapped when they are read; worker processes share them.
        dtype: of the ids there.
    """

    ends: np.ndarray
    held: np.ndarray | None
    file: str
    dtype: str

    def tokens(self) -> np.ndarray:
        """The ids, without a copy."""
        if self.held is None:
            self.held = np.memmap(self.file, self.dtype, "r")
        return self.held

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({"held": None} if self.file else {})


def _digest(stamp: str, tokenizer: Tokenizer) -> str:
    state = json.dumps(tokenizer.state(), sort_keys=True)
    return hashlib.sha256(f"{_VERSION}\0{stamp}\0{state}".encode()).hexdigest()[:16]


def _corpus(source: Source, tokenizer: Tokenizer, folder: str, budget: float) -> _Corpus:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    if not folder:
        found = [np.asarray(ids, dtype) for ids in _documents(source, tokenizer, budget)]
        return _Corpus(np.cumsum([len(ids) for ids in found], dtype=np.int64), np.concatenate(found), "", dtype)
    tokens, table = os.path.join(folder, "tokens.bin"), os.path.join(folder, "ends.npy")
    if not os.path.exists(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        made = tempfile.mkdtemp(dir=os.path.dirname(folder))
        lengths = []
        with open(os.path.join(made, "tokens.bin"), "wb") as file:
            for ids in _documents(source, tokenizer, budget):
                file.write(np.asarray(ids, dtype).tobytes())
                lengths.append(len(ids))
        np.save(os.path.join(made, "ends.npy"), np.cumsum(lengths, dtype=np.int64))
        try:
            os.rename(made, folder)
        except OSError:  # another process was faster; it made the same
            shutil.rmtree(made)
    return _Corpus(np.load(table), None, tokens, dtype)


def _documents(source: Source, tokenizer: Tokenizer, budget: float) -> Iterator[list[int]]:
    """The ids of every document in order; none of one that can't be read."""
    account = BadRecordAccount(len(source), budget)

    def read(index: int) -> list[int] | Failure:
        try:
            return document_ids(tokenizer, source.texts(index)[0])
        except BadRecord as error:
            return Failure.of(index, error)

    # The tokenizers' libraries let go of Python's lock. Windows, for a pool takes all that it is given at once.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), _WINDOW):
            for found in pool.map(read, range(start, min(start + _WINDOW, len(source)))):
                account.add([found] if isinstance(found, Failure) else [])
                yield [] if isinstance(found, Failure) else found
    _log.info("tokenised %d documents, %d of them unusable", len(source), len(account))


class TextRows:
    """`tokens`, `segments` and `positions`, int32 [row_length], of a record of `PackedTexts`.

    Args:
        row_length: tokens of a row.
        pad_id: fills a row up; its segment is 0.
        isolated: whether documents of a row don't see each other, each with positions of its own.
        prefix: whether `prefix` bool [row_length] names the first tokens of every document, a number of them at random
            (without a generator half of them).
    """

    def __init__(self, row_length: int, pad_id: int, isolated: bool, prefix: bool):
        self.row_length, self.pad_id, self.isolated, self.prefix = row_length, pad_id, isolated, prefix

    def __call__(self, record: Record, rng: np.random.Generator | None) -> Example:
        """One row."""
        found: list[np.ndarray] = record["pieces"]
        layout = lay_out([len(ids) for ids in found], self.row_length)
        tokens = np.full(self.row_length, self.pad_id, np.int32)
        prefix = np.zeros(self.row_length, bool)
        for start, ids in zip(layout.starts, found, strict=True):
            tokens[start : start + len(ids)] = ids
            seen = len(ids) // 2 if rng is None else int(rng.integers(0, len(ids)))
            prefix[start : start + seen] = True
        segments, positions = layout.segments, layout.positions
        if not self.isolated:
            segments, positions = np.minimum(segments, 1), np.arange(self.row_length, dtype=np.int32)
        row = {"tokens": tokens, "segments": segments, "positions": positions}
        return row | {"prefix": prefix} if self.prefix else row


__all__ = ["PackedTexts", "TextRows", "document_ids", "pack_texts", "prompt_ids"]
