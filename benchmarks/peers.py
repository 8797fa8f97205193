"""The same models in PyTorch: transformers' and open_clip's, with random weights, trained as those libraries train.

Only `benchmarks/step.py` uses it. torch is imported when a peer is asked for.
"""

import functools
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.interop.formats import Library
from vlm_jax.interop.registry import for_export
from vlm_jax.interop.tables import ConversionError
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.objectives.dual_encoder import DualEncoderConfig
from vlm_jax.objectives.siglip import SiglipConfig
from vlm_jax.schema import ConfigError

PACKAGES = {"open_clip": ("torch", "open_clip"), "transformers": ("torch", "transformers")}


def installed() -> str:
    """The first peer whose packages are there, or "none"."""
    for peer, packages in PACKAGES.items():
        if all(importlib.util.find_spec(package) for package in packages):
            return peer
    return "none"


def build(peer: str, config: Config) -> Any:
    """The peer's torch module for the model of a config, with random weights.

    Args:
        peer: `open_clip` or `transformers`.
        config: ours.

    Raises:
        ConfigError: the packages are missing, or the peer has no such model.
    """
    missing = [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"peer {peer} needs {' and '.join(missing)}; install them or give --peer=none")
    objective = config.objective
    # Their subclasses add losses that no peer here has.
    if not isinstance(objective, DualEncoderConfig) or type(objective) not in (ClipConfig, SiglipConfig):
        raise ConfigError(f"peers train CLIP and SigLIP; {config.name} is {objective.kind()}; give --peer=none")
    try:
        return (_open_clip if peer == "open_clip" else _transformers)(objective)
    except ConversionError as error:
        raise ConfigError(f"peer {peer} can't build this model: {error}") from error


def train_steps(
    peer: str, model: Any, config: Config, batch: dict[str, np.ndarray], *, bfloat16: bool, compiled: bool
) -> Callable[[int], None]:
    """A function that runs n training steps of a peer's model and waits for them.

    Args:
        peer: `open_clip` or `transformers`.
        model: from `build`.
        config: ours; its preprocessing and loss are used.
        batch: `image` uint8 [B, H, W, 3] and `text` int32 [B, L].
        bfloat16: autocast, as those libraries' mixed precision.
        compiled: through torch.compile.

    Raises:
        ConfigError: JAX has a GPU and torch has none, or the other way round.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (device == "cuda") != (jax.default_backend() == "gpu"):
        raise ConfigError(
            f"torch would run on {device} and JAX on {jax.default_backend()}; install the builds of both for one "
            "device, or give --peer=none"
        )
    model = model.to(device).train()
    forward: Any = torch.compile(model) if compiled else model
    mean, std = (
        torch.tensor(value, device=device).reshape(1, 3, 1, 1)
        for value in (config.data.preprocess.mean, config.data.preprocess.std)
    )
    images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
    texts = torch.from_numpy(batch["text"]).long().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    features = _FEATURES[peer]
    pair_loss = _sigmoid if isinstance(config.objective, SiglipConfig) else _softmax

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                image, text, scale = features(forward, (images.float() / 255 - mean) / std, texts)
                loss = pair_loss(scale * image.float() @ text.float().T, model)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_bytes() -> int | None:
    """The most that torch held of its GPU's memory; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _softmax(logits: Any, model: Any) -> Any:
    import torch

    targets = torch.arange(len(logits), device=logits.device)
    return sum(torch.nn.functional.cross_entropy(x, targets) for x in (logits, logits.T)) / 2


def _sigmoid(logits: Any, model: Any) -> Any:
    import torch

    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -torch.nn.functional.logsigmoid(signs * (logits + model.logit_bias)).sum() / len(logits)


def _settings(objective: DualEncoderConfig, library: Library) -> dict[str, Any]:
    return for_export(objective.model, library).write_config(objective.model)


def _open_clip(objective: DualEncoderConfig) -> Any:
    settings = _settings(objective, "open_clip")
    open_clip = import_open_clip()
    custom = "custom_text" in settings and settings.pop("custom_text")
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)


def _transformers(objective: DualEncoderConfig) -> Any:
    import transformers

    settings = _settings(objective, "hf")
    if settings["model_type"] == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(**settings))
    return transformers.CLIPModel(transformers.CLIPConfig(**settings))


def _open_clip_features(model: Any, images: Any, texts: Any) -> tuple[Any, Any, Any]:
    return model(images, texts)[:3]


def _transformers_features(model: Any, images: Any, texts: Any) -> tuple[Any, Any, Any]:
    outputs = model(input_ids=texts, pixel_values=images)
    return outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp()


_FEATURES: dict[str, Callable[[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "open_clip": _open_clip_features,
    "transformers": _transformers_features,
}


class _PlaceholderModule(types.ModuleType):
    """A module that has every name; nothing here calls what it gives out."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import torch

        return type(name, (torch.nn.Module,), {"BICUBIC": None, "BILINEAR": None})  # defaults of arguments there


@functools.cache
def import_open_clip() -> Any:
    """open_clip without torchvision, which it needs for transforms only and which may not fit the torch installed."""
    if importlib.util.find_spec("transformers"):
        # It remembers whether torchvision is there, so it must look before the stand-ins are.
        from transformers import CLIPModel, SiglipModel  # noqa: F401
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    stubs = {f"torchvision{name}": _PlaceholderModule(f"torchvision{name}") for name in names}
    for name, stub in stubs.items():
        stub.__spec__, stub.__path__ = importlib.machinery.ModuleSpec(name, None), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    blocked = {"timm": None}  # optional there, and it would look into the stubs
    saved = {name: sys.modules.get(name) for name in (*stubs, *blocked)}
    sys.modules.update({**stubs, **blocked})  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        import open_clip
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return open_clip
