"""Referring expressions with true boxes and those of a detector: RefCOCO, RefCOCO+, RefCOCOg in their public files."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, Record
from vlm_jax.data.sources.json_lists import JsonListsConfig, JsonListsSource
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class ReferringConfig(JsonListsConfig):
    """Lists of {"image": file, "text": expression, "ref_id": number}, as ALBEF has them, and what they refer to."""

    # names of the expressions
    text_key: tuple[str, ...] = ("text",)
    # name of the number by which `refs` knows the object
    ref_key: str = "ref_id"
    # the data set's own list of references, `refs(unc).p` (or the same list as .json)
    refs: str = ""
    # its annotations in COCO's form, `instances.json`
    instances: str = ""
    # {image number: [[left, top, width, height, ...], ...]} of a detector (MAttNet's `dets.json`); empty: none
    detections: str = ""

    @property
    def other_keys(self) -> tuple[str, ...]:
        """See the base."""
        return (self.ref_key,)

    def build(self, cache_dir: str) -> "ReferringSource":
        """Reads lists, references and boxes into memory."""
        return ReferringSource(self)


class ReferringSource(JsonListsSource):
    """Records with `phrases`, their `boxes`, `candidates`, the image's `size` (width, height) and its `split`."""

    def __init__(self, config: ReferringConfig):
        super().__init__(config)
        self.ref_key = config.ref_key
        refs = _read(config.refs, "refs", _plain_pickle if config.refs.endswith(".p") else _json)
        self.refs = {ref["ref_id"]: (ref["ann_id"], ref["image_id"], ref.get("split", "")) for ref in refs}
        instances = _read(config.instances, "instances", _json)
        self.boxes = {entry["id"]: tuple(entry["bbox"]) for entry in instances["annotations"]}
        self.sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in instances["images"]}
        found = _read(config.detections, "detections", _json) if config.detections else {}
        self.detections = {
            number: np.asarray(boxes, np.float64).reshape(len(boxes), -1) for number, boxes in found.items()
        }

    def __getitem__(self, index: int) -> Record:
        """As the base, with what the expression refers to; raises `BadRecord` when the files don't tell."""
        record, number = super().__getitem__(index), self._row(index).get(self.ref_key)
        if number not in self.refs:
            raise BadRecord(
                record["where"], record["key"], f"its {self.ref_key} {number!r} is not among the references"
            )
        annotation, image, split = self.refs[number]
        if annotation not in self.boxes or image not in self.sizes:
            why = f"the annotations lack number {annotation} or its image {image}"
            raise BadRecord(record["where"], record["key"], why)
        phrases = record["texts"][:1]
        record |= {"phrases": phrases, "boxes": np.asarray([self.boxes[annotation]] * len(phrases), np.float64)}
        record |= {"size": self.sizes[image], "split": split}
        if str(image) in self.detections:
            record["candidates"] = self.detections[str(image)][:, :4]
        return record


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers alone: a pickle that asks for anything else could run any code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module_name}.{global_name}, which is not read from such a file")


def _plain_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()  # written by Python 2


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: str, key: str, read: Callable[[Path], Any]) -> Any:
    if not path:
        raise ConfigError(f"config.data.source.{key} is empty; give the data set's file")
    try:
        return read(Path(path))
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"config.data.source.{key} = {path!r} can't be read: {error}") from error


__all__ = ["ReferringConfig", "ReferringSource"]
