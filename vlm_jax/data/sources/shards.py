"""What lies in a tar shard: its records, and where their bytes are. Reading them is `tar`'s business."""

import dataclasses
import hashlib
import logging
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np

from vlm_jax.data.sources.base import PackedStrings

_VERSION = 3
_log = logging.getLogger(__name__)

IMAGE, TEXT, JSON, LABEL = range(4)
PARTS = {"jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "webp": IMAGE, "txt": TEXT, "json": JSON, "cls": LABEL}
_MEMBER = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
_NUMBERED = re.compile(r"(\d+)\.(?:jpg|jpeg|png|webp)")  # of several images of a record: 0007.0.jpg, 0007.1.jpg, ...


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Records of one shard.

    Attributes:
        keys: name of each record: the members' common path up to the first dot of the base name.
        spans: int64 [records, 4, 2], offset and size of the image, text, JSON and label members; offset -1: none.
        numbered: int64 [images, 4], the numbered images of all records, as (record, number, offset, size) in order.
        damage: what is wrong with the shard, "" when nothing is. The last record then stands for what was lost.
    """

    keys: PackedStrings
    spans: np.ndarray
    numbered: np.ndarray
    damage: str

    def __len__(self) -> int:
        return len(self.spans)

    def images(self, row: int) -> list[tuple[int, int]]:
        """(offset, size) of a record's images: the one without a number, then the others in the order of theirs."""
        single = [(int(self.spans[row, IMAGE, 0]), int(self.spans[row, IMAGE, 1]))] * bool(
            self.spans[row, IMAGE, 0] >= 0
        )
        first, stop = np.searchsorted(self.numbered[:, 0], (row, row + 1))
        return single + [(offset, size) for _, _, offset, size in self.numbered[first:stop].tolist()]


def shard_index(path: str, cache_dir: str) -> ShardIndex:
    """The index of a shard, from its cache when the shard has not changed since, else by walking the headers.

    The cache lies next to the shard, or in `cache_dir` when that folder can't be written.

    Raises:
        OSError: the shard can't be read.
    """
    stat = os.stat(path)
    stamp = np.asarray([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    beside = f"{path}.index.npz"
    name = f"{os.path.basename(path)}.{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]}.index.npz"
    places = [beside, os.path.join(cache_dir, name)] if cache_dir else [beside]
    cached = (index for place in places if (index := _read_cache(place, stamp)) is not None)
    if (index := next(cached, None)) is None:
        index = scan(path)
        any(_write_cache(place, stamp, index) for place in places)  # the first place that takes it
    if index.damage:
        _log.warning("%s: %s; %d records before that are usable", path, index.damage, len(index) - 1)
    return index


def scan(path: str) -> ShardIndex:
    """Walks the headers of a shard; members of one record follow each other (webdataset's rule)."""
    keys: list[str] = []
    spans: list[np.ndarray] = []
    numbered: list[tuple[int, int, int, int]] = []
    damage = ""
    for member in _members(path):
        if isinstance(member, str):
            damage = member
            break
        if (parsed := _MEMBER.fullmatch(member.name)) is None:
            continue
        if not keys or keys[-1] != parsed[1]:
            keys.append(parsed[1])
            spans.append(_no_members())
        if (number := _NUMBERED.fullmatch(parsed[2].lower())) is not None:
            numbered.append((len(keys) - 1, int(number[1]), member.offset_data, member.size))
        part = PARTS.get(parsed[2].lower())
        if part is not None and spans[-1][part, 0] < 0:
            spans[-1][part] = member.offset_data, member.size
    if not keys:
        damage = damage or "the shard is empty: it holds no record"
    if damage and (not keys or _whole(spans[-1], os.path.getsize(path))):
        keys.append(f"(after {keys[-1]})" if keys else "(first)")  # stands for what was lost
        spans.append(_no_members())
    table = np.asarray(sorted(numbered), np.int64).reshape(-1, 4)
    return ShardIndex(PackedStrings.pack(keys), np.stack(spans), table, damage)


def _no_members() -> np.ndarray:
    return np.full((len(set(PARTS.values())), 2), -1, np.int64)


def _whole(spans: np.ndarray, size: int) -> bool:
    """Whether a record has an image and something to say about it, all within the file."""
    found = spans[:, 0] >= 0
    return bool(found[IMAGE] and found[[TEXT, JSON, LABEL]].any() and (spans.sum(axis=1) <= size).all())


def _members(path: str) -> Iterator[tarfile.TarInfo | str]:
    """The files of a shard; last of all a sentence, when it is damaged."""
    size = os.path.getsize(path)
    if size == 0:
        yield "the shard is empty: the file has 0 bytes"
        return
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            yield "the shard is compressed, which forbids random access; gunzip it"
            return
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.isfile():
                    yield member
                if member.offset_data + member.size > size:
                    yield f"the shard is cut short at byte {size}, inside {member.name}"
                    return
            end = archive.offset
            if end + tarfile.BLOCKSIZE > size:  # tar ends with blocks of zeros; tarfile does without
                yield "the shard has no end mark, so it was probably cut short"
            elif not _is_end_mark(path, end):  # tarfile stops at a header that it can't read, without a word
                yield f"the shard is damaged at byte {end}: what stands there is no header of a member"
    except tarfile.TarError as error:
        yield f"the shard is cut short or damaged ({error})"


def _is_end_mark(path: str, offset: int) -> bool:
    with open(path, "rb") as file:
        file.seek(offset)
        return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def _read_cache(place: str, stamp: np.ndarray) -> ShardIndex | None:
    try:
        with np.load(place, allow_pickle=False) as saved:
            if not np.array_equal(saved["stamp"], stamp):
                return None
            keys = PackedStrings(saved["key_bytes"], saved["key_ends"])
            return ShardIndex(keys, saved["spans"], saved["numbered"], str(saved["damage"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing, half-written by another program, or of an older version: the shard itself tells


def _write_cache(place: str, stamp: np.ndarray, index: ShardIndex) -> bool:
    """Whether the cache could be written; a reader sees the old file or the whole new one."""
    folder = os.path.dirname(os.path.abspath(place))
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(
                file,
                stamp=stamp,
                key_bytes=index.keys.blob,
                key_ends=index.keys.ends,
                spans=index.spans,
                numbered=index.numbered,
                damage=np.asarray(index.damage),
            )
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except OSError:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return False
    return True
