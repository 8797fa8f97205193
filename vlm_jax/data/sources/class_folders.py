"""A folder per class: `path/CLASS/**/*.jpg`, as ImageNet and most collections of labelled images lie on disk.

Captions are made from the names of the classes.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data.sources.base import BadRecord, PackedStrings, Record, SourceConfig
from vlm_jax.data.sources.texts import fill_templates, template_problems
from vlm_jax.schema import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClassFoldersConfig(SourceConfig):
    """Images in folders that are their classes."""

    # folder of the class folders
    path: str = ""
    # captions of an image; {} stands for the name of its class
    templates: tuple[str, ...] = ("a photo of a {}.",)
    # names of the classes: .json (a list in the order of the folders, or folder -> name), or a text with one name a
    # line or "folder name" a line (n01440764 tench). A file with folders decides the numbers of the classes too, by
    # its order. Empty: the folders' names with spaces for underscores, numbered in their sorted order
    class_names_file: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Templates that can't make a caption."""
        yield from template_problems(self.templates, "the name of the class")

    def build(self, cache_dir: str) -> "ClassFoldersSource":
        """Lists the folders."""
        return ClassFoldersSource(self)


class ClassFoldersSource:
    """Images in the sorted order of classes and paths; the paths are kept, the files are read when needed.

    Files and folders whose names begin with a dot are passed over. Links are followed, but into no folder twice. A
    folder without an image is a class nevertheless: its number must be that of the same folder in another split.
    """

    def __init__(self, config: ClassFoldersConfig):
        self.config, self.root = config, os.path.expanduser(config.path)
        folders = class_folders(self.root) if os.path.isdir(self.root) else []
        if not folders:
            what = "has no folder in it" if os.path.isdir(self.root) else "is not a folder"
            raise ConfigError(f"config.data.source.path = {config.path!r} {what}; give one with a folder per class")
        names = _read_names(config.class_names_file, folders)
        self.class_names = tuple(names.values())
        labels, paths = [], []
        for label, folder in enumerate(names):
            found = sorted(image_files(self.root, folder)) if folder in folders else []
            if not found:
                _log.warning("%s: the class %s has no image", self.root, folder)
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise ConfigError(
                f"the folders in {self.root} ({', '.join(folders[:5])}, ...) hold no image ({' '.join(EXTENSIONS)}); "
                "check config.data.source.path"
            )
        self.paths, self.labels = PackedStrings.pack(paths), np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """The bytes of the file, its captions and its label; `key` is the path below the root."""
        path = self.paths[index]
        try:
            with open(os.path.join(self.root, path), "rb") as file:
                image = file.read()
        except OSError as error:
            raise BadRecord(self.root, path, f"it can't be read: {error.strerror}") from error
        label = int(self.labels[index])
        return {"image": image, "texts": self.texts(index), "label": label, "key": path, "where": self.root}

    def texts(self, index: int) -> tuple[str, ...]:
        """The templates with the name of the class."""
        return fill_templates(self.config.templates, self.class_names[self.labels[index]])


def class_folders(root: str) -> list[str]:
    """Names of the folders in a folder, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: str, folder: str) -> Iterator[str]:
    """Paths, relative to `root`, of the images in one of its folders and all folders below."""
    waiting, seen = [folder], set()
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(os.path.join(root, place))
        if real in seen:  # a link to a folder above it
            continue
        seen.add(real)
        with os.scandir(os.path.join(root, place)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(os.path.join(place, entry.name))
                elif entry.name.lower().endswith(EXTENSIONS):  # a link to nothing too: it is reported when it is read
                    yield os.path.join(place, entry.name)


def _read_names(path: str, folders: list[str]) -> dict[str, str]:
    """Folder -> name of its class, in the order of the classes' numbers."""
    if not path:
        return {folder: folder.replace("_", " ") for folder in folders}
    key = f"config.data.source.class_names_file = {path!r}"
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        stored = json.loads(text) if path.lower().endswith(".json") else _names_of_lines(text, folders)
    except OSError as error:
        raise ConfigError(f"{key} can't be read: {error.strerror}; check the path") from error
    except ValueError as error:  # of the bytes or of the JSON
        raise ConfigError(f"{key} can't be read: {error}") from error
    if isinstance(stored, list):
        if len(stored) != len(folders):
            raise ConfigError(
                f"{key} holds {len(stored)} names for {len(folders)} folders; give one for each in sorted order, or "
                "lines of folder, tab and name"
            )
        stored = dict(zip(folders, stored, strict=True))
    names = _as_mapping(stored, key)
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise ConfigError(f"{key} has no name for the folder {missing[0]!r} ({len(missing)} in all have none)")
    return names


def _as_mapping(stored: Any, key: str) -> dict[str, str]:
    """Folder -> name, also from Keras's form of ImageNet's: number -> [folder, name]."""
    if isinstance(stored, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in stored.values()):
        stored = dict(stored.values())
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored.values()):
        raise ConfigError(f"{key} must hold a list of names, or an object folder -> name")
    return stored


def _names_of_lines(text: str, folders: list[str]) -> list[str] | dict[str, str]:
    """A mapping if every folder begins a line, else the lines themselves."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [line.split("\t" if "\t" in line else None, 1) for line in lines]
    if all(len(pair) == 2 for pair in pairs) and ("\t" in text or {pair[0] for pair in pairs} >= set(folders)):
        return {folder.strip(): name.strip() for folder, name in pairs}
    return lines
