"""Questions in JSON files that hold one list of objects each, as ALBEF's data sets are published, beside image files.

Those of benchmarks in their own layouts are `benchmark`'s.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record, SourceConfig
from vlm_jax.data.sources.chats import ImageFile, checked_text
from vlm_jax.data.sources.json_lists import place_in, read_lists
from vlm_jax.schema import ConfigError

_KEYS = ("question", "question_id", "image", "answer", "dataset")


@dataclasses.dataclass(frozen=True)
class QuestionListsConfig(SourceConfig):
    """Lists of {"question", "image", "answer", "question_id", "dataset"} in one or several files, one after the other.

    An answer is a text or a list with what each of several people said, and may be missing (test splits).
    """

    # the file or files, with commas or a glob
    path: str = ""
    # folder that names of images start from; empty: the folder of the list
    image_root: str = ""
    # the same for objects whose `dataset` is "vg", Visual Genome; empty: as the others
    vg_root: str = ""
    # weight of the answers of those, beside 1 for the others
    vg_weight: float = 0.5

    def problems(self) -> Iterator[tuple[str, str]]:
        """Weights without effect."""
        if self.vg_weight <= 0:
            yield "vg_weight", f"= {self.vg_weight} must be positive; leave the file of these questions out of path"

    def build(self, cache_dir: str) -> "QuestionListsSource":
        """Reads the questions into memory, and no image."""
        return QuestionListsSource(self)


class QuestionListsSource:
    """Records as those of `benchmark`, with `answer_weight` besides; the objects of all files in memory, packed."""

    class_names: tuple[str, ...] = ()

    def __init__(self, config: QuestionListsConfig):
        self.config = config
        for key, root in (("image_root", config.image_root), ("vg_root", config.vg_root)):
            if root and not os.path.isdir(root):
                raise ConfigError(
                    f"config.data.source.{key} = {root!r} is not a folder; give the one that names of images start from"
                )
        self.files, self.ends = [], []
        packed: list[str] = []
        for file, rows in read_lists(config.path):
            if rows and "question" not in rows[0]:
                raise ConfigError(f"{file} has no key 'question'; it has: {', '.join(rows[0])}")
            packed += [json.dumps([row.get(key) for key in _KEYS], ensure_ascii=False) for row in rows]
            self.files.append(file)
            self.ends.append(len(packed))
        if not packed:
            raise ConfigError(f"config.data.source.path = {config.path!r} holds no question; give lists with some")
        self.rows = PackedStrings.pack(packed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """The question with its image and answers; raises `BadRecord` when one of them is not what it should be."""
        row, (key, where) = self._row(index), self._place(index)
        name, of_vg = row["image"], row["dataset"] == "vg"
        if not isinstance(name, str) or not name:
            raise BadRecord(where, key, "it names no image under 'image'")
        root = (
            (self.config.vg_root if of_vg else "") or self.config.image_root or os.path.dirname(os.path.abspath(where))
        )
        question, answers = self._texts(row, where, key)
        return {
            "question": question,
            "reference": answers[0] if answers else "",
            "images": (ImageFile(name, root),),
            "texts": (question, *dict.fromkeys(answers)),
            "key": key,
            "where": where,
            "question_id": key if row["question_id"] is None else row["question_id"],
            "answers": answers,
            "answer_weight": self.config.vg_weight if of_vg else 1.0,
        }

    def texts(self, index: int) -> tuple[str, ...]:
        """The question and its different answers."""
        key, where = self._place(index)
        question, answers = self._texts(self._row(index), where, key)
        return (question, *dict.fromkeys(answers))

    def fingerprint(self) -> str:
        """Of the files and the keys."""
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self.files]
        return repr((stats, dataclasses.astuple(self.config)))

    def _texts(self, row: Mapping[str, Any], where: str, key: str) -> tuple[str, tuple[str, ...]]:
        """(question, answers)."""
        question, said = checked_text(row["question"], "question", where, key), row["answer"]
        said = [] if said is None else said if isinstance(said, list) else [said]
        return question, tuple(checked_text(answer, "answer", where, key) for answer in said)

    def _row(self, index: int) -> Mapping[str, Any]:
        return dict(zip(_KEYS, json.loads(self.rows[index]), strict=True))

    def _place(self, index: int) -> tuple[str, str]:
        """(number in its file, file)."""
        return place_in(self.files, self.ends, index)


__all__ = ["QuestionListsConfig", "QuestionListsSource"]
