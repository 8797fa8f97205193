"""Files with a part of a vision-language model: LLaVA's projector, and the small matrices of LoRA as PEFT stores them.

They come in onto a checkpoint of ours, the base, and go out of a run on their own. Whole models are `commands`'.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax import schema
from vlm_jax.checkpoint import save_params
from vlm_jax.config import to_json
from vlm_jax.interop import files
from vlm_jax.interop.commands import described
from vlm_jax.interop.formats import check_supported
from vlm_jax.interop.hf_vit_mae import renamed
from vlm_jax.interop.llava import TO_HUB, TO_LIVE, HfLlava, OriginalLlava
from vlm_jax.interop.tables import ConversionError, Row, Tensors, from_params, to_params
from vlm_jax.interop.vision_language import decoder_rows
from vlm_jax.loading import Model, load
from vlm_jax.models.lora import TARGETS, LoraConfig, Target, merged
from vlm_jax.models.projector import LinearProjectorConfig
from vlm_jax.models.vision_language import VisionLanguageConfig
from vlm_jax.objectives.lm import LmConfig
from vlm_jax.objectives.vlm import VlmConfig

ExportedPart = Literal["projector", "adapter"]
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")  # of LLaVA, beside an adapter
SETTINGS = "adapter_config.json"
_WRAPPER = "base_model.model."  # PEFT's, before every name
_MODULES: dict[Target, str] = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "gate": "gate_proj",
    "fc1": "up_proj",
    "fc2": "down_proj",
}
_COMPUTED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}
_IS_PROJECTOR = re.compile(r"(^|\.)(mm_projector|multi_modal_projector)\.")


def needs_base(source: Path) -> bool:
    """Whether a file or folder holds a part alone, which is imported onto a base."""
    if not source.is_dir():
        return source.name in (*PROJECTOR_FILES, *ADAPTER_FILES)
    names = {path.name for path in source.iterdir()}
    return not names.isdisjoint((SETTINGS, *PROJECTOR_FILES)) and names.isdisjoint(files.WEIGHT_FILES)


def import_part(source: Path, target: Path, base: Path) -> str:
    """Writes the base with the projector of a file, or with an adapter (and the projector beside it), as a checkpoint.

    An adapter of a language model's base is added to its matrices; a vision-language model keeps it apart
    (`objective.model.lora`), to be trained on.

    Args:
        source: `mm_projector.safetensors` or `.bin`, or a folder with one; or a folder with adapter_config.json.
        target: a new directory.
        base: a workdir, a step directory or an imported checkpoint.

    Returns:
        A sentence that says what was imported.

    Raises:
        ConversionError: names, shapes or settings don't fit the base; says which.
        WeightsError, CheckpointError: a file or the base can't be read.
    """
    model = load(base)
    method, params = model.config.objective, jax.tree.map(np.asarray, model.params)
    if not isinstance(method, VlmConfig | LmConfig):
        raise ConversionError(
            f"{base} holds a {method.kind()} model; these files belong to a language model's (vlm, lm)"
        )
    settings_file = source / SETTINGS
    said = []
    if settings_file.exists():
        settings = files.read_json(settings_file)
        tensors = _read(source, ADAPTER_FILES) | (_read(source, TRAINED_FILES) if _first(source, TRAINED_FILES) else {})
        small = {name: x for name, x in tensors.items() if not _IS_PROJECTOR.search(name)}
        method, params, lora = _with_adapter(method, params, small, settings)
        said.append(f"an adapter of rank {lora.rank} of {', '.join(lora.targets)}")
    else:
        tensors = _read(source, PROJECTOR_FILES)
        strangers = sorted(name for name in tensors if not _IS_PROJECTOR.search(name))
        if strangers:
            raise ConversionError(f"{source} holds more than a projector ({strangers[0]}); import it without --base")
    projector = {name: x for name, x in tensors.items() if _IS_PROJECTOR.search(name)}
    if projector:
        params = {**params, "projector": _projector(method, projector)}
        said.append("a projector")
    data = model.config.data
    save_params(
        target,
        params,
        config=to_json(described(method, data)),
        tokenizer=model.tokenizer.state() if model.tokenizer else None,
        preprocess=schema.to_dict(data.preprocess),
    )
    return f"imported {' and '.join(said)} onto {base} into {target}"


def export_part(
    source: Path, target: Path, *, part: ExportedPart, family: str = "official", dtype: str = "float32"
) -> str:
    """Writes the projector of a checkpoint, or what its LoRA learned, as a folder of small files.

    Args:
        source: a workdir, a step directory or an imported checkpoint.
        target: the directory to write; made if need be.
        part: "projector" is `mm_projector.safetensors`. "adapter" is a folder of PEFT; the projector lies beside it as
            `non_lora_trainables.safetensors` (official), or in it, as a module to save (hf).
        family: "official": in the names of LLaVA's authors, whose decoder is a LlamaForCausalLM. "hf": in those that
            the modules of transformers' LLaVA have.
        dtype: of the stored floats.

    Returns:
        A sentence that says what was written.

    Raises:
        ConversionError: there is no such part, or the family has no names for it.
        CheckpointError: there is no usable checkpoint.
        WeightsError: a file can't be written.
    """
    model = load(source)
    config = vars(model.config.objective).get("model")
    if not isinstance(config, VisionLanguageConfig):
        raise ConversionError(f"{source} holds a {model.config.objective.kind()} model, which has no {part} of its own")
    if family not in ("official", "hf"):
        raise ConversionError(f"a {part} is written with --family=official or hf, not {family}")
    projector = _written_projector(model, config, family)
    files.make_directory(target)
    if part == "projector":
        files.write_weights(target / PROJECTOR_FILES[0], projector, dtype)
        return f"exported {len(projector)} tensors of the projector to {target}"
    if config.lora is None:
        raise ConversionError(f"{source} has no adapter: it was trained without objective.model.lora")
    small = from_params(_small(model.params), adapter_rows(config, config.lora.targets), "PEFT")
    if family == "hf":
        small = renamed(small, ((r"^", "language_model."), *TO_LIVE))
    small |= projector if family == "hf" else {}
    named = {f"{_WRAPPER}{name}": x for name, x in small.items()}
    files.write_weights(target / ADAPTER_FILES[0], named, dtype)
    if family == "official":
        trained = {f"{_WRAPPER}{name}": x for name, x in projector.items()}
        files.write_weights(target / TRAINED_FILES[0], trained, dtype)
    files.write_json(target / SETTINGS, _adapter_settings(config.lora, family))
    return f"exported an adapter of rank {config.lora.rank} and the projector to {target}"


def adapter_rows(config: VisionLanguageConfig, targets: tuple[Target, ...]) -> list[Row]:
    """A row for each small matrix of the decoder, in the names of PEFT without its prefix."""
    rows = []
    for row in decoder_rows(config.decoder, ""):
        module, _, leaf = row.ours.rpartition("/")
        if leaf != "kernel" or module.rpartition("/")[2] not in targets:
            continue
        theirs = row.theirs.removesuffix(".weight")
        layouts = {
            "a": "from_heads" if row.layout == "from_heads" else "linear",
            "b": "to_heads" if row.layout == "to_heads" else "linear",
        }
        rows += [Row(f"{module}/lora_{x}", f"{theirs}.lora_{x.upper()}.weight", y) for x, y in layouts.items()]
    return rows


def _first(source: Path, names: tuple[str, ...]) -> Path | None:
    return next((source / name for name in names if (source / name).exists()), None)


def _read(source: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Tensors of a file, or of the first of these in a folder, without what wraps their names."""
    file = source
    if source.is_dir():
        found = _first(source, names)
        if found is None:
            raise files.WeightsError(f"{source} holds none of {', '.join(names)}; pass the file itself")
        file = found
    tensors = files.read_weights(file).tensors
    return renamed(tensors, ((rf"^({re.escape(_WRAPPER)})+", ""), (r"\.(modules_to_save\.)?default\.", ".")))


def _with_adapter(
    method: VlmConfig | LmConfig, params: Any, tensors: Tensors, settings: Mapping[str, Any]
) -> tuple[VlmConfig | LmConfig, Any, LoraConfig]:
    """Method and parameters with the small matrices beside the decoder's, or of a language model added to them."""
    check_supported(SETTINGS, {key: value or _COMPUTED.get(key) for key, value in settings.items()}, _COMPUTED)
    named = renamed(tensors, (*TO_HUB, (r"^language_model\.", "")))
    targets: tuple[Target, ...] = tuple(
        target for target in TARGETS if any(f".{_MODULES[target]}.lora_A." in name for name in named)
    )
    lora = LoraConfig(
        rank=settings.get("r", 8),
        alpha=float(settings.get("lora_alpha", 8)),
        dropout=float(settings.get("lora_dropout", 0.0)),
        targets=targets,
    )
    schema.validate(lora)
    if isinstance(method, VlmConfig) and method.model.lora is not None:
        raise ConversionError("the base has an adapter already; take the checkpoint that it started from as --base")
    config = dataclasses.replace(
        method.model if isinstance(method, VlmConfig) else VisionLanguageConfig(decoder=method.model.decoder), lora=lora
    )
    shapes = {path: shape for path, shape in OriginalLlava().shapes(config).items() if "/lora_" in path}
    small = to_params(named, adapter_rows(config, targets), shapes, f"an adapter of rank {lora.rank} for this base")
    both = unflatten_dict({**flatten_dict(params), **flatten_dict(small)})
    if isinstance(method, VlmConfig):
        return dataclasses.replace(method, model=config), both, lora
    return method, {"decoder": merged(both["decoder"], lora)}, lora


def _projector(method: VlmConfig | LmConfig, tensors: Tensors) -> Any:
    """The parameters under `projector/` of a file in either family's names."""
    if not isinstance(method, VlmConfig) or not isinstance(method.model.projector, LinearProjectorConfig):
        raise ConversionError("the base has no projector of this kind; give one with the projector 'linear' or 'mlp'")
    config, named = method.model, {}
    for name, x in tensors.items():
        name = re.sub(r".*?(multi_modal_projector|mm_projector)\.", r"\1.", name)
        linear = re.match(r"multi_modal_projector\.linear_(\d)", name)
        name = name if linear is None else f"mm_projector.{2 * int(linear[1]) - 2}{name[linear.end() :]}"
        named[f"model.{name}"] = x
    rows = OriginalLlava().projector_rows(config)
    shapes = {path: shape for path, shape in OriginalLlava().shapes(config).items() if path.startswith("projector/")}
    return to_params(named, rows, shapes, "the projector for this base")["projector"]


def _written_projector(model: Model, config: VisionLanguageConfig, family: str) -> dict[str, np.ndarray]:
    known = OriginalLlava() if family == "official" else HfLlava()
    params = {"projector": jax.tree.map(np.asarray, model.params["projector"])}
    tensors = from_params(params, known.projector_rows(config), f"the projector of {known.title}")
    return tensors if family == "official" else renamed(tensors, TO_LIVE)


def _small(params: Any) -> Any:
    """The small matrices alone."""
    leaves: Any = flatten_dict(jax.tree.map(np.asarray, params))
    return unflatten_dict({path: x for path, x in leaves.items() if path[-1].startswith("lora_")})


def _adapter_settings(lora: LoraConfig, family: str) -> dict[str, Any]:
    modules = [_MODULES[target] for target in lora.targets]
    # In transformers' LLaVA the vision tower has modules of the same names.
    pattern = rf".*language_model.*\.({'|'.join(modules)})"
    return {
        **_COMPUTED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules if family == "official" else pattern,
        "modules_to_save": None if family == "official" else ["multi_modal_projector"],
        "inference_mode": True,
    }


__all__ = ["adapter_rows", "export_part", "import_part", "needs_base"]
