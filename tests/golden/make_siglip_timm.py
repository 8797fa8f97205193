"""Writes siglip_open_clip_timm.safetensors: a tiny SigLIP as open_clip builds it, with an image tower of timm.

Run from the repository's root where torch, open_clip and timm (1.0.31) are: `python tests/golden/make_siglip_timm.py`.
timm need not be installed for the tests. The image tower is timm's class rather than one of its registered models,
which have but one size each; the name in the settings tells the activation and the number of heads.
"""

import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "interop"), str(HERE.parents[1] / "benchmarks")]

import clip_reference as reference  # noqa: E402

HEADS = 12
SETTINGS = {
    "embed_dim": 24,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 24,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 10,
        "vocab_size": 60,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 3.5,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


class _Interpolation(enum.Enum):
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(6)


class _Stub(types.ModuleType):
    InterpolationMode = _Interpolation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


class _Torchvision:
    """Finds every torchvision module as a stub: timm needs it for transforms only."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        own = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None  # pyright: ignore

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    open_clip = reference.import_open_clip()
    sys.meta_path.insert(0, _Torchvision())  # pyright: ignore
    from timm.models.vision_transformer import VisionTransformer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    trunk = VisionTransformer(
        img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=HEADS, mlp_ratio=2.5, class_token=False,
        global_pool="map", num_classes=0,
    )  # fmt: skip
    text = open_clip.model._build_text_tower(SETTINGS["embed_dim"], dict(SETTINGS["text_cfg"]))
    towers = {"visual.trunk": reference.randomise(trunk, 5), "text": reference.randomise(text, 6)}
    state = {f"{prefix}.{name}": x for prefix, tower in towers.items() for name, x in tower.state_dict().items()}
    state |= {"logit_scale": torch.tensor(2.3), "logit_bias": torch.tensor(-3.0)}
    tensors = {f"weights/{name}": value for name, value in reference.to_numpy(state).items()}
    images, ids = reference.batch(size=4)
    with torch.no_grad():
        image = trunk.double()(torch.from_numpy(images).permute(0, 3, 1, 2).double())
        caption = text.double()(torch.from_numpy(ids).long())
    tensors |= {"inputs/images": images, "inputs/ids": ids}
    for name, value in (("image_features", image), ("text_features", caption)):
        tensors[f"outputs/{name}"] = torch.nn.functional.normalize(value, dim=-1).numpy().astype(np.float32)
    file = HERE / "siglip_open_clip_timm.safetensors"
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    save_file(contiguous, file, {"settings": json.dumps(SETTINGS)})
    print(file, file.stat().st_size)


if __name__ == "__main__":
    main()
