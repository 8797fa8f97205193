"""Writes clip_*.safetensors: tiny CLIPs of transformers and open_clip with their inputs and outputs.

Run from the repository's root where torch, transformers and open_clip are: `python tests/golden/make_clip.py`.
The files are what holds the parity where those are not installed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "interop"), str(HERE.parents[1] / "benchmarks")]

import clip_reference as reference  # noqa: E402


def make(family: str, activation: str) -> None:
    if family == "hf":
        model = reference.hf_model(activation)
        settings = {key: model.config.to_dict()[key] for key in ("vision_config", "text_config")}
    else:
        model = reference.open_clip_model(reference.open_clip_settings(activation))
        settings = reference.open_clip_settings(activation)
    weights = {f"weights/{name}": value for name, value in reference.to_numpy(model.state_dict()).items()}
    model.double()
    images, ids = reference.batch(size=4)
    torch_images, torch_ids = torch.from_numpy(images).permute(0, 3, 1, 2).double(), torch.from_numpy(ids).long()
    if family == "hf":
        out = model(input_ids=torch_ids, pixel_values=torch_images)
        features = out.image_embeds, out.text_embeds, model.logit_scale.exp()
    else:
        features = model(torch_images, torch_ids)
    loss = reference.import_open_clip().ClipLoss()(*features)
    loss.backward()
    tensors = weights | {"inputs/images": images, "inputs/ids": ids}
    names = ("image_features", "text_features", "logit_scale")
    for name, value in (*zip(names, features, strict=True), ("loss", loss)):
        tensors[f"outputs/{name}"] = value.detach().numpy().astype(np.float32)
    # Norms only: whole gradients are compared live, and would double the file.
    for name, parameter in model.named_parameters():
        tensors[f"gradient_norms/{name}"] = np.asarray(parameter.grad.norm(), np.float32)
    file = HERE / f"clip_{family}_{activation}.safetensors"
    save_file(
        {name: np.asarray(value, order="C") for name, value in tensors.items()},
        file,
        {"settings": json.dumps(settings, default=str)},
    )
    print(file, file.stat().st_size)


if __name__ == "__main__":
    make("hf", "gelu")
    make("open_clip", "quick_gelu")
