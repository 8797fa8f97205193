"""The length of every conversation of a source, found once: what packing, grouping and the token budget start from.

No pixel is decoded: an image's size stands in its header, and is read only where the tiles depend on it. What was found
is kept in a file, under a digest of the source, the tokenizer and the settings.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from vlm_jax.data.bad_records import Failure
from vlm_jax.data.chat import Document
from vlm_jax.data.sources.base import BadRecord, Record, Source
from vlm_jax.data.sources.mixture import MixtureSource
from vlm_jax.data.tiles import NO_SLOT

_VERSION = 2
_CHUNK = 128
_log = logging.getLogger(__name__)


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether it is the same as another time."""

    def fingerprint(self) -> str:
        """Changes when the records do; cheap, from names, sizes and times of files. Empty: it can't be told."""
        ...


class Measurable(Protocol):
    """What makes documents of records, as far as their lengths go."""

    def fitted(self, record: Record) -> tuple[Document, int]:
        """The document of a record as it goes into a row, and its tokens before it was cut; raises `BadRecord`."""
        ...

    def fingerprint(self) -> str:
        """Changes when the documents of the same records do."""
        ...


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of the documents of a source, by the number of their record.

    Attributes:
        tokens: int32 [records], tokens in a row; -1 for a record that can't be used.
        whole: int32 [records], tokens before the document was cut.
        learned: int32 [records], tokens that are learned.
        image_tokens: int32 [records], tokens that take features of images.
        tiles: int32 [records].
        failures: the records that can't be used.
        notes: what was done to make records usable: how many there are, and the name of the first.
    """

    tokens: np.ndarray
    whole: np.ndarray
    learned: np.ndarray
    image_tokens: np.ndarray
    tiles: np.ndarray
    failures: tuple[Failure, ...]
    notes: Mapping[str, tuple[int, str]]

    def digest(self) -> str:
        """Of all that decides which documents share a row."""
        return hashlib.sha256(self.tokens.tobytes() + self.tiles.tobytes()).hexdigest()


# Of one record: its index, what the arrays hold, what was done to it, its name.
_Looked = tuple[int, tuple[int, ...], tuple[str, ...], str]
_ARRAYS = ("tokens", "whole", "learned", "image_tokens", "tiles")


def measure(source: Source, maker: Measurable, threads: int = 4, cache_dir: str = "") -> Measured:
    """Looks at every record once.

    Args:
        source: the conversations.
        maker: makes their documents.
        threads: threads that read and tokenise.
        cache_dir: folder that keeps the result; empty, or a source without a fingerprint: it is not kept.
    """
    place = ""
    if cache_dir and (records := fingerprint(source)):
        digest = hashlib.sha256(f"{_VERSION} {records} {maker.fingerprint()}".encode()).hexdigest()
        place = os.path.join(cache_dir, f"lengths-{digest[:24]}.npz")
        if (kept := _read(place)) is not None:
            return kept
    _log.info(
        "measuring %d conversations, once%s", len(source), f"; their lengths are kept in {place}" if place else ""
    )
    measured = _measure(source, maker, threads)
    for note, (count, first) in measured.notes.items():
        _log.warning("%d of %d records: %s; the first is %s", count, len(source), note, first)
    if place:
        _write(place, measured)
    return measured


def fingerprint(source: Source) -> str:
    """That of a source, or of all parts of a mixture; empty: it can't be told."""
    if isinstance(source, MixtureSource):
        parts = [fingerprint(part) for part in source.sources]
        return "\n".join(parts) if all(parts) else ""
    return source.fingerprint() if isinstance(source, Fingerprinted) else ""


def _measure(source: Source, maker: Measurable, threads: int) -> Measured:
    found = np.full((len(source), len(_ARRAYS)), -1, np.int32)
    failures: list[Failure] = []
    notes: dict[str, tuple[int, str]] = {}

    def look(chunk: range) -> list[_Looked | Failure]:
        return [_look(source, maker, index) for index in chunk]

    chunks = (range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK))
    with ThreadPoolExecutor(threads, thread_name_prefix="measure") as pool:
        # Not all at once: the results of a source of millions of records would wait in memory beside their futures.
        while batch := list(itertools.islice(chunks, 16 * threads)):
            for result in itertools.chain.from_iterable(pool.map(look, batch)):
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    found[result[0]] = result[1]
                    for note in result[2]:
                        count, first = notes.get(note, (0, result[3]))
                        notes[note] = count + 1, first
    tokens, whole, learned, image_tokens, tiles = found.T.copy()
    return Measured(tokens, whole, learned, image_tokens, tiles, tuple(failures), notes)


def _look(source: Source, maker: Measurable, index: int) -> _Looked | Failure:
    try:
        record = source[index]
        document, whole = maker.fitted(record)
    except BadRecord as error:
        return Failure.of(index, error)
    features = int((document.slots != NO_SLOT).sum())
    counts = len(document), whole, int(document.supervised.sum()), features, document.tile_count
    return index, counts, document.notes, record["key"]


def _read(place: str) -> Measured | None:
    try:
        with np.load(place, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            failures = tuple(Failure(*failure) for failure in about["failures"])
            tokens, whole, learned, image_tokens, tiles = (kept[name] for name in _ARRAYS)
            notes = {note: (count, first) for note, (count, first) in about["notes"].items()}
            return Measured(tokens, whole, learned, image_tokens, tiles, failures, notes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing, or half-written by another program: the source itself tells


def _write(place: str, measured: Measured) -> None:
    """Keeps the result; a reader sees the old file or the whole new one. Where it can't be written, nothing is kept."""
    about = json.dumps({"failures": measured.failures, "notes": measured.notes})
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(place), suffix=".tmp", delete=False) as file:
            np.savez(file, about=np.asarray(about), **{name: getattr(measured, name) for name in _ARRAYS})
        os.replace(file.name, place)
    except OSError as error:
        _log.warning("what was measured can't be kept in %s: %s", place, error)


def counted_reasons(failures: Iterable[Failure]) -> list[tuple[str, int, Failure]]:
    """(reason, records, the first of them) by the number of records; numbers and names in a reason are left out."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(_reason(failure.why), []).append(failure)
    return sorted(((why, len(found), found[0]) for why, found in groups.items()), key=lambda item: -item[1])


def _reason(why: str) -> str:
    """A sentence without what differs from record to record: `its image 'a.jpg' ...` becomes `its image '...' ...`."""
    return re.sub(r"\d+", "N", re.sub(r"(?<!\w)'[^']*'", "'...'", why))
