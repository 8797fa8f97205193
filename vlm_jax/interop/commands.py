"""Import and export as whole steps: files of another library to a checkpoint of ours, and back.

Command-line flags are `__main__`'s; tensors and names are the families' (`clip`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax import schema
from vlm_jax.checkpoint import save_params
from vlm_jax.config import Config, TrainConfig, to_json
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import ClipBpeConfig, SentencePieceConfig, Tokenizer, TokenizerConfig, build_tokenizer
from vlm_jax.interop import clip, files
from vlm_jax.interop.clip import ConversionError, Family
from vlm_jax.interop.clip_config import export_config, import_config
from vlm_jax.interop.preprocess import export_preprocess, import_preprocess
from vlm_jax.loading import load
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.schema import ConfigError

FAMILIES: tuple[Family, ...] = ("hf", "open_clip")
WEIGHT_FILES: dict[Family, str] = {"hf": "model.safetensors", "open_clip": "open_clip_model.safetensors"}


def import_weights(
    source: Path,
    target: Path,
    *,
    family: Family | None = None,
    activation: str | None = None,
    tokenizer: str = "",
    allow_unexpected: bool = False,
) -> str:
    """Writes weights of another library as a checkpoint that `vlm_jax.load` and `init_from` take.

    Args:
        source: a file of weights, or a directory with one and its config files.
        target: a new directory.
        family: whose names they carry; None to find out.
        activation: overrides what the config files say.
        tokenizer: merges file of CLIP's BPE or a SentencePiece *.model; "" takes CLIP's, where it is installed, for a
            vocabulary of CLIP's size.
        allow_unexpected: whether to pass over names that the model has no place for.

    Returns:
        A sentence that says what was imported.

    Raises:
        ConversionError, WeightsError, ConfigError, CheckpointError: what is wrong and where.
    """
    weights = files.read_weights(source)
    tensors = clip.canonical_names(weights.tensors)
    family = family or clip.detect_family(tensors)
    if family is None:
        raise ConversionError(
            f"the names in {source} (such as {', '.join(sorted(tensors)[:3])}) are those of none of "
            f"{', '.join(FAMILIES)}; only CLIP models can be imported"
        )
    settings, preprocess_settings = _settings(weights.settings, family)
    if weights.torchscript and activation is None:
        activation = "quick_gelu"  # OpenAI published its weights in this form, all trained with it
    model = import_config(tensors, family, settings, activation)
    params = clip.to_params(tensors, model, family, allow_unexpected=allow_unexpected)
    preprocess = import_preprocess(preprocess_settings, family)
    built, note = _tokenizer(model, tokenizer)
    config = _config(model, preprocess, built.config if built else ClipBpeConfig(length=model.text.length))
    save_params(
        target,
        params,
        config=to_json(config),
        tokenizer=built.state() if built else None,
        preprocess=schema.to_dict(preprocess),
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"imported {count:,} parameters of a {family} CLIP ({model.image.activation}) into {target}; {note}"


def _settings(found: Mapping[str, Any], family: Family) -> tuple[Any, Any]:
    """(model settings, preprocessing settings) among the JSON files beside the weights; None where there is none."""
    if family == "hf":
        return found.get("config.json"), found.get("preprocessor_config.json")
    settings = found.get("open_clip_config.json")
    return (settings["model_cfg"], settings.get("preprocess_cfg")) if settings else (None, None)


def _tokenizer(model: TwoTowerConfig, path: str) -> tuple[Tokenizer | None, str]:
    """The tokenizer to store, and a remark on it."""
    length, config = model.text.length, None
    if path.endswith(".model"):
        config = SentencePieceConfig(length=length, path=path)
    elif path or model.text.vocab_size == ClipConfig().model.text.vocab_size:
        config = ClipBpeConfig(length=length, path=path)
    if config is None:
        return None, "no tokenizer is stored: its vocabulary is not CLIP's, pass --tokenizer=FILE"
    try:
        tokenizer = build_tokenizer(config, None)
        ClipConfig(model=model).check_tokenizer(tokenizer)
    except ConfigError as error:
        if path:
            raise
        return None, f"no tokenizer is stored: {error}"
    return tokenizer, f"tokenizer: {config.kind()} of {tokenizer.vocab_size} ids"


def _config(model: TwoTowerConfig, preprocess: PreprocessConfig, tokenizer: TokenizerConfig) -> Config:
    """A config whose objective and data describe the model; the rest is at its defaults, for nothing was trained."""
    config = Config(
        name="imported_clip",
        objective=ClipConfig(model=model),
        data=DataConfig(preprocess=preprocess, tokenizer=tokenizer),
        optimizer=AdamW(),
        train=TrainConfig(),
    )
    schema.validate(config)
    return config


def export_weights(source: Path, target: Path, *, family: Family, dtype: str = "float32") -> str:
    """Writes a checkpoint of ours as a directory that the family's library loads.

    Args:
        source: a workdir, a step directory or an imported checkpoint.
        target: the directory to write; made if need be.
        family: "hf" (transformers.CLIPModel.from_pretrained) or "open_clip".
        dtype: of the stored floats, "float32" or "float16".

    Returns:
        A sentence that says what was written.

    Raises:
        ConversionError: the family's model can't express this one.
        CheckpointError: there is no usable checkpoint.
    """
    model = load(source)
    if not isinstance(model.config.objective, ClipConfig):
        raise ConversionError(f"{source} holds a {model.config.objective.kind()} model; only clip can be exported")
    config, preprocess = model.config.objective.model, model.config.data.preprocess
    settings = export_config(config, family)
    preprocess_settings = export_preprocess(preprocess, config.image.image_shape, family)
    params = jax.tree.map(np.asarray, model.params)
    tensors = clip.from_params(params, config, family)
    files.make_directory(target)
    files.write_weights(target / WEIGHT_FILES[family], tensors, dtype)
    if family == "hf":
        files.write_json(target / "config.json", settings)
        files.write_json(target / "preprocessor_config.json", preprocess_settings)
    else:
        content = {"model_cfg": settings, "preprocess_cfg": preprocess_settings}
        files.write_json(target / "open_clip_config.json", content)
    return f"exported {len(tensors)} tensors as {family} to {target}"


__all__ = ["FAMILIES", "export_weights", "import_weights"]
