"""Sources of records: random access by index to images with captions or labels, from files or drawn."""

import os
from typing import Any

from vlm_jax.data.sources.base import BadRecord, Record, Source, SourceConfig
from vlm_jax.data.sources.digits import DigitsConfig
from vlm_jax.data.sources.shapes import ShapesConfig
from vlm_jax.data.sources.tables import CsvConfig, JsonlConfig
from vlm_jax.data.sources.tar import TarConfig
from vlm_jax.data.sources.tfds_source import TfdsConfig
from vlm_jax.schema import ConfigError

KINDS: dict[str, type[Any]] = {
    "digits": DigitsConfig,
    "shapes": ShapesConfig,
    "tar": TarConfig,
    "jsonl": JsonlConfig,
    "csv": CsvConfig,
    "tfds": TfdsConfig,
}


def source_for_path(path: str) -> SourceConfig:
    """The kind of source that a path's name speaks of, with its defaults.

    Raises:
        ConfigError: the name speaks of none; says which names do.
    """
    lower = path.lower()
    if lower.endswith(".jsonl"):
        return JsonlConfig(path=path)
    if lower.endswith((".csv", ".tsv")):
        return CsvConfig(path=path)
    if ".tar" in lower:
        return TarConfig(path=path)
    if os.path.isdir(path) and any(name.endswith(".tar") for name in os.listdir(path)):
        return TarConfig(path=path)
    state = "a folder without *.tar" if os.path.isdir(path) else "of no kind that is known"
    raise ConfigError(
        f"config.data.path = {path!r} is {state}; give tar shards (folder, glob, or shard-{{000..009}}.tar), "
        "a .jsonl, .csv or .tsv file, or set config.data.source to a kind and its own keys"
    )


__all__ = [
    "KINDS",
    "BadRecord",
    "CsvConfig",
    "DigitsConfig",
    "JsonlConfig",
    "Record",
    "ShapesConfig",
    "Source",
    "SourceConfig",
    "TarConfig",
    "TfdsConfig",
    "source_for_path",
]
