"""Import and export as whole steps: files of another library to a checkpoint of ours, and back.

Command-line flags are `__main__`'s; tensors and names are the formats' (`registry` knows them).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax import schema
from vlm_jax.checkpoint import read_extra, save_params
from vlm_jax.config import Config, TrainConfig, to_json
from vlm_jax.data.bpe import MAX_MERGES, ClipBpe
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.interop import files
from vlm_jax.interop.formats import Format, Library
from vlm_jax.interop.preprocess import KNOWN, export_preprocess, import_preprocess
from vlm_jax.interop.registry import FORMATS, for_export, recognise
from vlm_jax.interop.tables import ConversionError, from_params, to_params, without_constants
from vlm_jax.interop.tokenizer_export import export_tokenizer
from vlm_jax.loading import Model, load
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.albef import AlbefConfig
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.objectives.image_text import ImageTextConfig
from vlm_jax.objectives.images import ImagesConfig
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.objectives.mlm import MlmConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.optim import AdamW

WEIGHT_FILES: dict[Library, str] = {
    "hf": "model.safetensors",
    "hf_live": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
    "big_vision": "model.npz",
    "official": "model.safetensors",
    "ml_l3m": "model.safetensors",
}


def import_weights(
    source: Path,
    target: Path,
    *,
    family: Library | None = None,
    activation: str | None = None,
    tokenizer: str = "",
    preprocess: str = "",
    allow_unexpected: bool = False,
) -> str:
    """Writes weights of another library as a checkpoint that `vlm_jax.load` and `init_from` take.

    Args:
        source: a file of weights, or a directory with one and its config files.
        target: a new directory.
        family: whose names they carry; None to find out.
        activation: overrides what the config files say.
        tokenizer: a file of the tokenizer: CLIP's merges, a SentencePiece *.model or a tokenizer.json; "none" to store
            none; "" takes what lies beside the weights, or CLIP's for a vocabulary of CLIP's size.
        preprocess: a name in `KNOWN`, overrides the files; "" takes what they say.
        allow_unexpected: whether to pass over names that the model has no place for.

    Returns:
        A sentence that says what was imported.

    Raises:
        ConversionError, WeightsError, ConfigError, CheckpointError: what is wrong and where.
    """
    weights = files.read_weights(source)
    found, tensors = recognise(weights.tensors, family)
    model_settings, preprocess_settings = _settings(weights.settings, found)
    if weights.torchscript:
        # OpenAI published its weights in this form, all of one activation and preprocessing.
        activation, preprocess = activation or "quick_gelu", preprocess or "clip"
    model = found.read_config(tensors, model_settings, activation)
    schema.validate(model)
    extra = found.read_extra(tensors, model)
    tensors = without_constants(found.own(tensors, model), found.constants(model), found.title)
    params = to_params(tensors, found.rows(model), found.shapes(model), found.title, allow_unexpected=allow_unexpected)
    objective = found.objective(model)
    view = PreprocessConfig()
    if found.reads_images:
        view = _preprocess(found, preprocess, preprocess_settings, objective.image_size)
    data, built, note = DataConfig(preprocess=view), None, "it reads no text"
    if found.chat() is not None:
        data = dataclasses.replace(data, chat=found.chat(), augment=None)
    if objective.reads_text:
        built, note, settings = found.tokenizer(weights.folder, tokenizer, model)
        data = dataclasses.replace(data, tokenizer=settings)
        objective = _sparing_special_words(objective, built)
    config = described(objective, data)
    if built is not None:
        objective.check_tokenizer(built)
    save_params(
        target,
        params,
        config=to_json(config),
        tokenizer=built.state() if built else None,
        preprocess=schema.to_dict(view),
        extra=extra,
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    images = f"images: {view.resize}, mean {view.mean}, std {view.std}" if found.reads_images else "it reads no images"
    return (
        f"imported {count:,} parameters of {found.title} ({found.remark(objective, model)}) into {target}; "
        f"{images}; {note}"
    )


def _sparing_special_words(objective: ObjectiveConfig, tokenizer: Tokenizer | None) -> ObjectiveConfig:
    """A method that hides words never hides those that begin, end and fill a text."""
    if tokenizer is None or tokenizer.mask_id < 0 or not isinstance(objective, AlbefConfig | MlmConfig):
        return objective
    spared = (tokenizer.pad_id, tokenizer.bos_id, *[tokenizer.eos_id] * tokenizer.config.eos)
    words = dataclasses.replace(objective.hidden_words, mask_id=tokenizer.mask_id, spared_ids=spared)
    return dataclasses.replace(objective, hidden_words=words)


def _settings(found: Mapping[str, Any], known: Format) -> tuple[Any, Any]:
    """(model settings, preprocessing settings) among the JSON files beside the weights; None where there is none."""
    if known.library == "open_clip":
        settings = found.get("open_clip_config.json", {})
        return settings.get("model_cfg"), settings.get("preprocess_cfg")
    if known.library == "hf" or known.has_config:
        # transformers 5 writes what belongs to images and what belongs to texts in one file.
        view = found.get("preprocessor_config.json") or found.get("processor_config.json", {}).get("image_processor")
        return found.get("config.json"), view
    return None, None


def _preprocess(found: Format, name: str, settings: Mapping[str, Any] | None, side: int) -> PreprocessConfig:
    """What the flag names, else what the files say, else what all models of a format share."""
    if name:
        return KNOWN[name]
    if settings:
        return import_preprocess(settings, found.library, (side, side))
    if found.preprocess:
        return KNOWN[found.preprocess]
    raise ConversionError(
        "no file beside the weights says how images are prepared, and a wrong preprocessing costs accuracy without a "
        f"word; pass --preprocess={'|'.join(KNOWN)} ({KNOWN['clip'].resize} and CLIP's mean and deviation, or "
        f"{KNOWN['siglip'].resize} and 0.5)"
    )


def described(objective: ObjectiveConfig, data: DataConfig) -> Config:
    """A config whose objective and data describe the model; the rest is at its defaults, for nothing was trained."""
    name = f"imported_{objective.kind()}"
    config = Config(name=name, objective=objective, data=data, optimizer=AdamW(), train=TrainConfig())
    schema.validate(config)
    return config


def export_weights(
    source: Path, target: Path, *, family: Library, dtype: str = "float32", shard_bytes: int = files.SHARD_BYTES
) -> str:
    """Writes a checkpoint of ours as a directory that the library loads, with preprocessing and tokenizer.

    Args:
        source: a workdir, a step directory or an imported checkpoint.
        target: the directory to write; made if need be.
        family: the library.
        dtype: of the stored floats, "float32", "float16" or "bfloat16".
        shard_bytes: a safetensors file is split where it would be larger, with an index beside the parts.

    Returns:
        A sentence that says what was written, and what of the tokenizer could not be.

    Raises:
        ConversionError: the library's model can't express this one.
        CheckpointError: there is no usable checkpoint.
        WeightsError: a file can't be written.
    """
    model = load(source)
    objective = model.config.objective
    config, ours = _exported(objective, model.params, family, source)
    found = for_export(config, family)
    settings = found.write_config(config)
    view = {}
    transformers = family in ("hf", "hf_live")
    if found.reads_images and (transformers or family == "open_clip"):
        side = objective.image_size
        view = export_preprocess(model.config.data.preprocess, (side, side), "hf" if transformers else family)
    params = jax.tree.map(np.asarray, found.parameters(ours))
    tensors = from_params(params, found.rows(config), found.title) | found.constants(config)
    tensors = {**found.published(tensors), **found.write_extra(_extra(found, source), config)}
    files.make_directory(target)
    files.write_weights(target / WEIGHT_FILES[family], tensors, dtype, shard_bytes)
    note = _write_tokenizer(model, target, family, settings)
    if transformers:
        if not found.reads_images:
            settings |= {"dtype": dtype} | _special_ids(model.tokenizer)
        files.write_json(target / "config.json", settings)
        if found.reads_images:
            files.write_json(target / "preprocessor_config.json", view)
    elif family == "open_clip":
        files.write_json(target / "open_clip_config.json", {"model_cfg": settings, "preprocess_cfg": view})
    elif found.has_config:
        files.write_json(target / "config.json", settings)
    return f"exported {len(tensors)} tensors as {found.title} to {target}; tokenizer: {note}"


def _extra(found: Format, source: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its parameters, where the format has a place for it."""
    keeps = type(found).write_extra is not Format.write_extra
    return jax.tree.map(np.asarray, read_extra(source)) if keeps else {}


def _exported(objective: ObjectiveConfig, params: Any, family: Library, source: Path) -> tuple[Any, Any]:
    """(config, parameters) of what the family has, or else some other: the whole model, or its image tower."""
    config = vars(objective).get("model")
    if isinstance(config, VisionLanguageConfig):
        config, params = config.merged(params)
    offers = [(config, params)]
    if isinstance(objective, ImagesConfig | ImageTextConfig):
        offers.append((objective.image_tower, {"image": params["image"]}))
    for formats in ([known for known in FORMATS if known.library == family], FORMATS):
        for config, ours in offers:
            if any(known.claims(config) for known in formats):
                return config, ours
    raise ConversionError(f"{source} holds a {objective.kind()} model, which no library here has")


def _write_tokenizer(model: Model, target: Path, family: Library, settings: dict[str, Any]) -> str:
    """Writes the tokenizer's files where the library reads them; open_clip's settings then point to them."""
    if family in ("big_vision", "official", "ml_l3m") or model.tokenizer is None:
        return "none is written" if model.tokenizer else "the checkpoint has none"
    if family == "open_clip" and _is_clips(model.tokenizer):
        return "open_clip's own"
    try:
        goes_on = isinstance(model.config.objective, LmConfig | VlmConfig)
        note = export_tokenizer(model.tokenizer, target, prompts=goes_on)
    except ConversionError as error:
        return f"none is written: {error}"
    if family == "open_clip":
        # Any name will do: beside a local folder's weights the library reads the folder's tokenizer.
        settings["text_cfg"]["hf_tokenizer_name"] = target.name
    return note


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """What begins, ends and fills up a text, as a language model's config.json says it."""
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in ids.items() if value >= 0}


def _is_clips(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.encoder, ClipBpe) and len(tokenizer.encoder.merges) == MAX_MERGES


__all__ = ["described", "export_weights", "import_weights"]
