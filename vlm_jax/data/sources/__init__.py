"""Sources of records: random access by index to images with captions or labels, or to texts, from files or drawn."""

import dataclasses
import os
from typing import Any

from vlm_jax.data.sources.array_record import ArrayRecordConfig
from vlm_jax.data.sources.base import BadRecord, Record, Source, SourceConfig, keys_at
from vlm_jax.data.sources.benchmark import BenchmarkConfig
from vlm_jax.data.sources.class_folders import ClassFoldersConfig, class_folders, image_files
from vlm_jax.data.sources.digits import DigitsConfig
from vlm_jax.data.sources.json_lists import JsonListsConfig
from vlm_jax.data.sources.llava_json import LlavaJsonConfig
from vlm_jax.data.sources.mismatched import MismatchedConfig
from vlm_jax.data.sources.mixture import MixtureConfig, MixturePart
from vlm_jax.data.sources.parquet import ParquetConfig
from vlm_jax.data.sources.question_lists import QuestionListsConfig
from vlm_jax.data.sources.referring import ReferringConfig
from vlm_jax.data.sources.shapes import ShapesConfig
from vlm_jax.data.sources.shapes_statements import ShapesStatementsConfig
from vlm_jax.data.sources.subset import SubsetConfig
from vlm_jax.data.sources.tables import CsvConfig, JsonlConfig
from vlm_jax.data.sources.tar import TarConfig
from vlm_jax.data.sources.text_files import TextFilesConfig
from vlm_jax.data.sources.tfds_source import TfdsConfig
from vlm_jax.schema import ConfigError

KINDS: dict[str, type[Any]] = {
    "digits": DigitsConfig,
    "shapes": ShapesConfig,
    "shapes_statements": ShapesStatementsConfig,
    "tar": TarConfig,
    "jsonl": JsonlConfig,
    "csv": CsvConfig,
    "json": JsonListsConfig,
    "referring": ReferringConfig,
    "tfds": TfdsConfig,
    "array_record": ArrayRecordConfig,
    "class_folders": ClassFoldersConfig,
    "llava_json": LlavaJsonConfig,
    "parquet": ParquetConfig,
    "text": TextFilesConfig,
    "mixture": MixtureConfig,
    "subset": SubsetConfig,
    "mismatched": MismatchedConfig,
    "benchmark": BenchmarkConfig,
    "questions": QuestionListsConfig,
}


def source_for_path(path: str) -> SourceConfig:
    """The kind of source that a path's name, or what lies in the folder that it names, speaks of; with its defaults.

    Raises:
        ConfigError: the name speaks of none; says which names do.
    """
    lower = path.lower()
    if lower.endswith(".jsonl"):
        return JsonlConfig(path=path)
    if lower.endswith(".json"):
        return _json_source(path)
    if lower.endswith(".parquet"):
        return ParquetConfig(path=path)
    if lower.endswith((".csv", ".tsv")):
        return CsvConfig(path=path)
    if lower.endswith(".txt"):
        return TextFilesConfig(path=path)
    if os.path.isdir(path):
        return _source_for_folder(path)
    if "array_record" in lower:
        return ArrayRecordConfig(path=path)
    if ".tar" in lower:
        return TarConfig(path=path)
    raise _unknown(path, "of no kind that is known")


def source_at(path: str, source: SourceConfig, path_key: str, source_key: str, cache_dir: str) -> Source:
    """Opens what the short form `path` of a source names, or the source itself where that is empty.

    Args:
        path: tar shards, a table, a folder; replaces the source, whose other keys stay if it is of the same kind.
        source: the source.
        path_key: how the path was given, for messages: `config.data.path`.
        source_key: how the source is given: `config.data.source`.
        cache_dir: folder for indices of files that lie in folders that can't be written.

    Raises:
        ConfigError: it can't be opened; names the keys as they were given.
    """
    if not path:
        with keys_at(f"{source_key}.path", f"{source_key}."):
            return source.build(cache_dir)
    with keys_at(path_key, f"{source_key}."):
        # A *.jsonl may hold images with captions, documents or questions, a *.json captions or conversations: the
        # source that is there tells.
        told = isinstance(source, TextFilesConfig | JsonListsConfig | BenchmarkConfig)
        named = source if told else source_for_path(path)
    others = f"{source_key}."
    if isinstance(source, type(named)):
        named = dataclasses.replace(source, path=path)
    else:
        others = f"{source_key}={named.kind()}, {others}"
    with keys_at(path_key, others):
        return named.build(cache_dir)


def _json_source(path: str) -> SourceConfig:
    """By the first of some *.json files: LLaVA's layout, a list of questions, or one of captions."""
    first = path.split(",")[0]
    if not os.path.isfile(first):
        return LlavaJsonConfig(path=path)
    with open(first, "rb") as stream:
        start = stream.read(1 << 16)
    if b'"conversations"' in start:
        return LlavaJsonConfig(path=path)
    if b'"question"' in start and b'"image"' in start:
        return QuestionListsConfig(path=path)
    return JsonListsConfig(path=path) if b'"caption"' in start else LlavaJsonConfig(path=path)


def _source_for_folder(path: str) -> SourceConfig:
    names = os.listdir(path)
    if any(name.endswith(".tar") for name in names):
        return TarConfig(path=path)
    if "dataset_info.json" in names:
        return TfdsConfig(path=path)
    if any(name.endswith(".parquet") for name in names):
        return ParquetConfig(path=path)
    if any("array_record" in name for name in names):
        return ArrayRecordConfig(path=path)
    if any(True for folder in class_folders(path) for _ in image_files(path, folder)):
        return ClassFoldersConfig(path=path)
    raise _unknown(path, "a folder without *.tar, *.array_record, *.parquet or class folders with images")


def _unknown(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"config.data.source.path = {path!r} is {what}; give tar shards (folder, glob, or shard-{{000..009}}.tar), "
        "a .jsonl, .json, .csv, .tsv or .txt file, *.array_record files, a folder with a folder per class, *.parquet "
        "of conversations, or set config.data.source to a kind and its own keys"
    )


__all__ = [
    "KINDS",
    "ArrayRecordConfig",
    "BadRecord",
    "BenchmarkConfig",
    "ClassFoldersConfig",
    "CsvConfig",
    "DigitsConfig",
    "JsonListsConfig",
    "JsonlConfig",
    "LlavaJsonConfig",
    "MismatchedConfig",
    "MixtureConfig",
    "MixturePart",
    "ParquetConfig",
    "QuestionListsConfig",
    "Record",
    "ReferringConfig",
    "ShapesConfig",
    "ShapesStatementsConfig",
    "Source",
    "SourceConfig",
    "SubsetConfig",
    "TarConfig",
    "TextFilesConfig",
    "TfdsConfig",
    "source_at",
    "source_for_path",
]
