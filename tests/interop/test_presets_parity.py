"""Our presets against open_clip's model configs, which are read from the installed package; no weights are made."""

import json
from pathlib import Path
from typing import Any

import clip_reference as reference
import pytest
import torch

from vlm_jax.interop.open_clip_timm import _SIZES, MODELS
from vlm_jax.interop.registry import recognise
from vlm_jax.models.presets import CLIP, OPEN_CLIP, SIGLIP, SIGLIP2
from vlm_jax.models.vit import ViTConfig


def model_config(name: str) -> Any:
    folder = Path(reference.import_open_clip().__file__).parent / "model_configs"
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [*CLIP, *OPEN_CLIP])
def test_the_config_read_from_open_clips_model_is_the_preset(name: str):
    """By the shapes of open_clip's own model on no device, and its config file."""
    settings = model_config(name.replace("/", "-") + ("-quickgelu" if name in CLIP and name != "ViT-L/14-336" else ""))
    with torch.device("meta"):
        model = reference.import_open_clip().CLIP(**settings)
    found, tensors = recognise(model.state_dict())
    activation = "quick_gelu" if name in CLIP else None
    config = found.read_config(tensors, settings, activation)
    preset = (CLIP | OPEN_CLIP)[name]
    assert config == preset
    if name in CLIP:  # OpenAI's files have no config
        assert found.read_config(tensors, None, activation) == preset
    shapes = found.shapes(config)
    learned = sum(torch.Size(shape).numel() for path, shape in shapes.items() if "running_" not in path)
    assert learned == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [*SIGLIP, *SIGLIP2])
def test_siglip_presets_have_open_clips_sizes(name: str):
    version, _, size = name.partition("-")
    size, _, side = size.replace("g-opt", "gopt").replace("So400m", "SO400M").partition("-")
    settings = model_config("-".join(["ViT", size.replace("/", "-"), version, *([side] if side else [])]))
    config = (SIGLIP | SIGLIP2)[name]
    image, text, their_text = config.image, config.text, settings["text_cfg"]
    assert isinstance(image, ViTConfig)
    kind, patch_size, image_size, _ = MODELS[settings["vision_cfg"]["timm_model_name"]]
    assert (image.width, image.depth, image.heads, image.mlp_dim) == _SIZES[kind]
    assert (image.patch_size, image.image_size) == (patch_size, image_size)
    assert (config.embed_dim, config.logit_bias_init) == (settings["embed_dim"], settings["init_logit_bias"])
    assert (text.width, text.depth, text.heads) == tuple(their_text[key] for key in ("width", "layers", "heads"))
    assert text.mlp_dim == int(text.width * their_text.get("mlp_ratio", 4.0))
    assert (text.length, text.vocab_size) == (their_text["context_length"], their_text["vocab_size"])
    assert text.norm_eps == their_text["norm_kwargs"]["eps"]
    assert not text.causal and their_text["no_causal_mask"] and text.pool == their_text["pool_type"] == "last"
