"""The other libraries' models with random weights, in sizes that a test can afford. Imports torch."""

from typing import Any

import numpy as np
import torch
from peers import import_open_clip
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

IMAGE = {"width": 24, "depth": 2, "heads": 3, "mlp_dim": 96, "image_size": 24, "patch_size": 8}
TEXT = {"width": 16, "depth": 3, "heads": 2, "mlp_dim": 64, "vocab_size": 60, "length": 10}
RESNET = {"layers": [1, 2, 1, 1], "width": 4, "head_width": 32, "image_size": 64}
EMBED_DIM = 16
EOS_ID = 59


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight away from its start: biases and norms too, which initialisers leave at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit_"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 if parameter.ndim < 2 else 0.05))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.3)
    return model.eval()


def hf_model(activation: str) -> CLIPModel:
    config = CLIPConfig(
        projection_dim=EMBED_DIM,
        vision_config={
            "hidden_size": IMAGE["width"],
            "num_hidden_layers": IMAGE["depth"],
            "num_attention_heads": IMAGE["heads"],
            "intermediate_size": IMAGE["mlp_dim"],
            "image_size": IMAGE["image_size"],
            "patch_size": IMAGE["patch_size"],
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": TEXT["width"],
            "num_hidden_layers": TEXT["depth"],
            "num_attention_heads": TEXT["heads"],
            "intermediate_size": TEXT["mlp_dim"],
            "vocab_size": TEXT["vocab_size"],
            "max_position_embeddings": TEXT["length"],
            "hidden_act": activation,
            "eos_token_id": EOS_ID,
            "bos_token_id": EOS_ID - 1,
        },
    )
    torch.manual_seed(0)
    return randomise(CLIPModel(config), 1)


def siglip_model() -> SiglipModel:
    sizes = {
        "num_hidden_layers": 2,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = SiglipConfig(
        vision_config={
            "hidden_size": IMAGE["width"],
            "num_attention_heads": IMAGE["heads"],
            "intermediate_size": 40,
            "image_size": IMAGE["image_size"] + 2,  # two pixels fill no patch
            "patch_size": IMAGE["patch_size"],
            **sizes,
        },
        text_config={
            "hidden_size": TEXT["width"],
            "projection_size": IMAGE["width"],
            "num_attention_heads": TEXT["heads"],
            "intermediate_size": 56,
            "vocab_size": TEXT["vocab_size"],
            "max_position_embeddings": TEXT["length"],
            **sizes,
        },
    )
    torch.manual_seed(0)
    model = randomise(SiglipModel(config), 4)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-3.0)
    return model


def resnet_settings() -> dict[str, Any]:
    """An open_clip model config with a ResNet."""
    return open_clip_settings("gelu") | {"vision_cfg": RESNET}


def open_clip_settings(activation: str) -> dict[str, Any]:
    """An open_clip model config."""
    return {
        "embed_dim": EMBED_DIM,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            "layers": IMAGE["depth"],
            "width": IMAGE["width"],
            "head_width": IMAGE["width"] // IMAGE["heads"],
            "patch_size": IMAGE["patch_size"],
            "image_size": IMAGE["image_size"],
        },
        "text_cfg": {
            "context_length": TEXT["length"],
            "vocab_size": TEXT["vocab_size"],
            "width": TEXT["width"],
            "heads": TEXT["heads"],
            "layers": TEXT["depth"],
        },
    }


def open_clip_model(settings: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(import_open_clip().CLIP(**settings), 2)


def to_numpy(state_dict: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in state_dict.items()}


def batch(seed: int = 3, size: int = 6, side: int = IMAGE["image_size"]) -> tuple[np.ndarray, np.ndarray]:
    """Images NHWC and token ids, each text ending in the end id and padded with zeros."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, side, side, 3)).astype(np.float32)
    ids = rng.integers(1, EOS_ID - 1, (size, TEXT["length"])).astype(np.int32)
    for row, end in zip(ids, rng.integers(2, TEXT["length"], size), strict=True):
        row[end], row[end + 1 :] = EOS_ID, 0
    return images, ids
