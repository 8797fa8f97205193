"""CLIP configs and the JSON files of other libraries, both ways. No weights are converted here.

On import, sizes come from the shapes of the tensors; what shapes can't tell (heads, activation, eps, pooling) comes
from the config file beside them. Without one, OpenAI's rule of 64 channels a head holds, and the activation must be
named: a wrong one loads without complaint and costs accuracy.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax import schema
from vlm_jax.interop.clip import ConversionError, Family, Tensors, count_layers, shape_of
from vlm_jax.models.mlp import ACTIVATIONS, ActivationName
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

HF_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # the others have the same name there
OPEN_CLIP_POOLS = {"eot_argmax": "argmax", "first_eos": "eos", "last": "last", "first": "first"}
# Settings that open_clip's names and shapes do not show, with the one value that our towers compute.
OPEN_CLIP_IMAGE = {"pool_type": "tok", "final_ln_after_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable"}
OPEN_CLIP_TEXT = {"final_ln_after_pool": False, "embed_cls": False, "proj_type": "linear"}
# CLIPTextConfig's end id before 2023; it stands for "the largest id" there.
HF_LEGACY_EOS = 2
HF_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def import_config(
    tensors: Tensors, family: Family, settings: Mapping[str, Any] | None, activation: str | None
) -> TwoTowerConfig:
    """The config that a family's weights were trained with.

    Args:
        tensors: under canonical names.
        family: whose names they carry.
        settings: the family's config file: Hugging Face's `config.json`, open_clip's `model_cfg`; None without one.
        activation: overrides the activation of both towers.

    Raises:
        ConversionError: the activation or the heads can't be known, or a setting is one that our towers lack.
        ConfigError: the sizes make no model.
    """
    if settings is None and activation is None:
        raise ConversionError(
            "no config file says which activation these weights were trained with; pass --activation=quick_gelu "
            "(OpenAI's weights, open_clip models named *-quickgelu) or --activation=gelu"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ConversionError(f"the activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    read = _from_hf if family == "hf" else _from_open_clip
    image, text = (_sizes(tensors, tower, family) for tower in ("image", "text"))
    if settings is None and any(tower["width"] % 64 or tower["width"] > 1024 for tower in (image, text)):
        raise ConversionError(
            f"no config file says how many heads towers of width {image['width']} and {text['width']} have, and only "
            "OpenAI's widths imply 64 channels a head; put config.json or open_clip_config.json beside the weights"
        )
    image_settings, text_settings = ({}, {}) if settings is None else read(settings, image["width"])
    image |= _without_activation(image_settings, activation) | _image_sizes(tensors, family, image_settings)
    text |= _without_activation(text_settings, activation)
    text["vocab_size"], _ = shape_of(tensors, "text/token_embed", family)
    text["length"], _ = shape_of(tensors, "text/pos_embed", family)
    text.setdefault("eos_id", text["vocab_size"] - 1)
    projection = shape_of(tensors, "text/projection/kernel", family)
    config = TwoTowerConfig(
        ViTConfig(**image), TextConfig(**text), embed_dim=projection[0] if family == "hf" else projection[1]
    )
    schema.validate(config)
    return config


def _sizes(tensors: Tensors, tower: str, family: Family) -> dict[str, Any]:
    (width,) = shape_of(tensors, f"{tower}/blocks/ln_1/scale", family)
    (mlp_dim,) = shape_of(tensors, f"{tower}/blocks/mlp/fc1/bias", family)
    return {
        "width": width,
        "depth": count_layers(tensors, tower, family),
        "mlp_dim": mlp_dim,
        "heads": max(1, width // 64),
    }


def _without_activation(settings: dict[str, Any], activation: str | None) -> dict[str, Any]:
    return settings if activation is None else settings | {"activation": activation}


def _image_sizes(tensors: Tensors, family: Family, settings: Mapping[str, Any]) -> dict[str, Any]:
    patch_size = shape_of(tensors, "image/patch_embed/kernel", family)[-1]
    patches = shape_of(tensors, "image/pos_embed", family)[0] - 1
    side = math.isqrt(patches)
    image_size = settings.get("image_size", side * patch_size)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (height // patch_size) * (width // patch_size) != patches:
        raise ConversionError(
            f"the position embedding is for {patches} patches of {patch_size}x{patch_size} pixels, which an image of "
            f"{height}x{width} does not have; add the config file with the image size"
        )
    return {"patch_size": patch_size, "image_size": image_size}


def _from_hf(settings: Mapping[str, Any], image_width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hugging Face writes only what differs from its defaults, so those are here."""
    image = {"num_attention_heads": 12, "image_size": 224, **HF_DEFAULTS, **settings.get("vision_config", {})}
    text = {"num_attention_heads": 8, "eos_token_id": 49407, **HF_DEFAULTS, **settings.get("text_config", {})}
    ours = {theirs: name for name, theirs in HF_ACTIVATIONS.items()}
    towers = []
    for name, tower in (("vision_config", image), ("text_config", text)):
        activation = ours.get(tower["hidden_act"], tower["hidden_act"])
        if activation not in ACTIVATIONS:
            raise ConversionError(f"{name}.hidden_act {tower['hidden_act']!r} of the config file is not supported")
        towers.append(
            {"heads": tower["num_attention_heads"], "activation": activation, "norm_eps": tower["layer_norm_eps"]}
        )
    towers[0]["image_size"] = image["image_size"]
    eos = text["eos_token_id"]
    towers[1] |= {"pool": "eot_argmax"} if eos == HF_LEGACY_EOS else {"pool": "first_eos", "eos_id": eos}
    return towers[0], towers[1]


def _from_open_clip(settings: Mapping[str, Any], image_width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text = settings["vision_cfg"], settings["text_cfg"]
    for name, tower, computed in (("vision_cfg", image, OPEN_CLIP_IMAGE), ("text_cfg", text, OPEN_CLIP_TEXT)):
        for key, value in computed.items():
            if tower.get(key, value) != value:
                raise ConversionError(
                    f"{name}.{key} = {tower[key]!r} of the config file is not supported, only {value!r}"
                )
    activation: ActivationName = "quick_gelu" if settings.get("quick_gelu", False) else "gelu"
    towers = [
        {"activation": _open_clip_activation(tower, activation), "norm_eps": _open_clip_eps(tower)}
        for tower in (image, text)
    ]
    pools = {theirs: ours for ours, theirs in OPEN_CLIP_POOLS.items()}
    pool = text.get("pool_type", "argmax")
    if pool not in pools:
        raise ConversionError(f"text_cfg.pool_type = {pool!r} of the config file is not supported, only {list(pools)}")
    towers[0] |= {"heads": image_width // image.get("head_width", 64), "image_size": image.get("image_size", 224)}
    towers[1] |= {
        "heads": text.get("heads", 8),
        "causal": not text.get("no_causal_mask", False),
        "pool": pools[pool],
        "pad_id": text.get("pad_id", 0),
    }
    if pool == "eos":
        towers[1]["eos_id"] = text.get("eos_id", 2)
    return towers[0], towers[1]


def _open_clip_eps(tower: Mapping[str, Any]) -> float:
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def _open_clip_activation(tower: Mapping[str, Any], activation: str) -> str:
    arguments = tower.get("act_kwargs") or {}
    return "gelu_tanh" if arguments.get("approximate") == "tanh" else activation


def export_config(config: TwoTowerConfig, family: Family) -> dict[str, Any]:
    """The family's config file for a model of ours: the inverse of `import_config`.

    Raises:
        ConversionError: a setting that the family's model can't express; names all of them.
    """
    _check_expressible(config, family)
    return _to_hf(config) if family == "hf" else _to_open_clip(config)


def _check_expressible(config: TwoTowerConfig, family: Family) -> None:
    image, text = config.image, config.text
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "image.pool": (image.pool, ("cls",)),
        "image.registers": (image.registers, (0,)),
        "text.mask_padding": (text.mask_padding, (False,)),
    }
    if family == "hf":
        wanted["image.image_size"] = (image.image_shape, ((max(image.image_shape),) * 2,))
        wanted["text.causal"] = (text.causal, (True,))
        wanted["text.pool"] = (text.pool, ("eot_argmax", "first_eos"))
        if text.pool == "first_eos" and text.eos_id == HF_LEGACY_EOS:
            raise ConversionError(
                f"Hugging Face's CLIP takes eos_id {HF_LEGACY_EOS} for 'the largest id'; use open_clip"
            )
    else:
        wanted["text.activation"] = (text.activation, (image.activation,))
        wanted["image.activation"] = (image.activation, ("gelu", "quick_gelu", "gelu_tanh"))
        wanted["text.pool"] = (text.pool, tuple(OPEN_CLIP_POOLS))
    wrong = [f"{key} = {value!r} (only {allowed})" for key, (value, allowed) in wanted.items() if value not in allowed]
    if wrong:
        raise ConversionError(f"the {family} CLIP can't express this model: {'; '.join(wrong)}")


def _to_hf(config: TwoTowerConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    towers = [
        {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_dim,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads,
            "hidden_act": HF_ACTIVATIONS.get(tower.activation, tower.activation),
            "layer_norm_eps": tower.norm_eps,
            "projection_dim": config.embed_dim,
        }
        for tower in (image, text)
    ]
    special = {
        # The largest id is what our argmax pool looks for, and what this id means to that library.
        "eos_token_id": HF_LEGACY_EOS if text.pool == "eot_argmax" else text.eos_id,
        "pad_token_id": text.pad_id,
        "bos_token_id": None,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": {
            "model_type": "clip_vision_model",
            **towers[0],
            "image_size": image.image_shape[0],
            "patch_size": image.patch_size,
            "num_channels": 3,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **towers[1],
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.length,
            **special,
        },
    }


def _to_open_clip(config: TwoTowerConfig) -> dict[str, Any]:
    image, text = config.image, config.text
    towers = []
    for tower in (image, text):
        shared: dict[str, Any] = {"layers": tower.depth, "width": tower.width, "mlp_ratio": tower.mlp_dim / tower.width}
        if tower.norm_eps != 1e-5:
            shared["norm_kwargs"] = {"eps": tower.norm_eps}
        if tower.activation == "gelu_tanh":
            shared["act_kwargs"] = {"approximate": "tanh"}
        towers.append(shared)
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            **towers[0],
            "head_width": image.width // image.heads,
            "patch_size": image.patch_size,
            "image_size": image.image_size,
        },
        "text_cfg": {
            **towers[1],
            "heads": text.heads,
            "context_length": text.length,
            "vocab_size": text.vocab_size,
            "pad_id": text.pad_id,
            "eos_id": text.eos_id,
            "pool_type": OPEN_CLIP_POOLS[text.pool],
            "no_causal_mask": not text.causal,
        },
    }


__all__ = ["export_config", "import_config"]
