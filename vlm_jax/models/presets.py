"""Published models by name: sizes and the details that change numbers. Recipes around them are in configs/.

CLIP's sizes are those of Radford et al. 2021, tables 19 and 20; the larger ViTs are open_clip's (LAION-2B); SigLIP's
are Zhai et al. 2023 and Tschannen et al. 2025 (SigLIP 2, the variants of fixed resolution), as released. DINOv2's,
image towers alone, are those of Oquab et al. 2024 (table 17), and with registers of Darcet et al. 2024. Language
models, decoders alone, have the sizes of their released config files.
"""

import dataclasses
import math
from typing import Any

from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.models.rotary import PlainRope
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

SIGLIP_VOCABULARY = 32_000  # SentencePiece, trained on C4 (English)
SIGLIP2_VOCABULARY = 256_000  # Gemma's


def clip(image_width: int, image_depth: int, patch_size: int, image_size: int, text_width: int) -> TwoTowerConfig:
    """A CLIP whose heads are 64 wide, MLPs four widths, and whose joint space has the text tower's width."""
    image = ViTConfig(
        width=image_width,
        depth=image_depth,
        heads=image_width // 64,
        mlp_dim=4 * image_width,
        patch_size=patch_size,
        image_size=image_size,
    )
    return TwoTowerConfig(image, clip_text(text_width), embed_dim=text_width)


def clip_text(width: int, depth: int = 12) -> TextConfig:
    """CLIP's text tower: heads 64 wide, MLPs four widths."""
    return TextConfig(width=width, depth=depth, heads=width // 64, mlp_dim=4 * width)


def clip_resnet(
    layers: tuple[int, int, int, int], width: int, image_size: int, text_width: int, embed_dim: int
) -> TwoTowerConfig:
    """A CLIP whose image tower is a ResNet; the heads of its attention pool are 64 wide."""
    image = ResNetConfig(image_size=image_size, layers=layers, width=width, heads=32 * width // 64)
    return TwoTowerConfig(image, clip_text(text_width), embed_dim=embed_dim)


def open_clip_vit(width: int, depth: int, mlp_dim: int, text_width: int, text_depth: int) -> TwoTowerConfig:
    """One of open_clip's large ViTs of patch 14: sixteen image heads, and the exact GELU in both towers."""
    image = ViTConfig(
        width=width, depth=depth, heads=16, mlp_dim=mlp_dim, patch_size=14, image_size=224, activation="gelu"
    )
    text = TextConfig(
        width=text_width,
        depth=text_depth,
        heads=text_width // 64,
        mlp_dim=4 * text_width,
        activation="gelu",
    )
    return TwoTowerConfig(image, text, embed_dim=text_width)


def siglip(
    image: tuple[int, int, int, int],
    patch_size: int,
    image_size: int,
    *,
    text: tuple[int, int, int, int] | None = None,
    length: int = 64,
    vocab_size: int = SIGLIP_VOCABULARY,
) -> TwoTowerConfig:
    """A SigLIP.

    Args:
        image: (width, depth, heads, mlp_dim) of the image tower; the joint space has its width.
        patch_size: side of a patch in pixels.
        image_size: side of the images in pixels; what fills no patch is cut off.
        text: (width, depth, heads, mlp_dim) of the text tower; None: as the image tower.
        length: tokens of a text.
        vocab_size: number of token ids; 1 is the end token, and for SigLIP 1 the padding too.
    """
    image_tower = ViTConfig(
        **_tower(image),
        patch_size=patch_size,
        image_size=image_size,
        cut_remainder=bool(image_size % patch_size),
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        init="siglip",
    )
    text_tower = TextConfig(
        **_tower(text or image),
        vocab_size=vocab_size,
        length=length,
        activation="gelu_tanh",
        norm_eps=1e-6,
        causal=False,
        pool="last",
        eos_id=1,
        pad_id=1 if vocab_size == SIGLIP_VOCABULARY else 0,
        init="siglip",
    )
    return TwoTowerConfig(
        image_tower,
        text_tower,
        embed_dim=image_tower.width,
        projection="text",
        text_projection_bias=True,
        logit_scale_init=math.log(10),
        logit_bias_init=-10.0,
    )


def dinov2(width: int, depth: int, *, registers: int = 0, swiglu: bool = False, image_size: int = 518) -> ViTConfig:
    """A DINOv2 of patch 14, its heads 64 wide.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        registers: tokens beside the class token. The models that have some resize their positions with antialiasing.
        swiglu: whether the MLPs have gates; their hidden width is then two thirds of four widths, in steps of 8.
        image_size: side in pixels; 518 in the last steps of training and in the released weights.
    """
    return ViTConfig(
        width=width,
        depth=depth,
        heads=width // 64,
        mlp_dim=(8 * width // 3 + 7) // 8 * 8 if swiglu else 4 * width,
        activation="silu" if swiglu else "gelu",
        gated=swiglu,
        norm_eps=1e-6,
        layer_scale_init=1e-5,
        patch_size=14,
        image_size=image_size,
        registers=registers,
        pos_resize="antialias" if registers else "bicubic_offset",
        mask_token=True,
        pre_norm=False,
        patch_bias=True,
        init="dinov2",
    )


def llama(width: int, depth: int, heads: int, mlp_dim: int) -> DecoderConfig:
    """A Llama 2, or a Vicuna 1.5, which has its sizes: as many heads of keys as of queries, a head of its own."""
    return DecoderConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads,
        mlp_dim=mlp_dim,
        vocab_size=32_000,
        tied=False,
        rope=PlainRope(theta=10_000.0),
        max_length=4096,
    )


def smollm2(width: int, depth: int, heads: int, kv_heads: int, mlp_dim: int, theta: float = 100_000.0) -> DecoderConfig:
    """A SmolLM2 (Ben Allal et al. 2025): heads 64 wide, a tied head."""
    return DecoderConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        mlp_dim=mlp_dim,
        vocab_size=49_152,
        rope=PlainRope(theta=theta),
        max_length=8192,
        init="smollm",
    )


def qwen2(width: int, depth: int, heads: int, kv_heads: int, mlp_dim: int, *, large: bool = False) -> DecoderConfig:
    """A Qwen2 or Qwen2.5: biases on query, key and value; `large` has a head of its own and a padded vocabulary."""
    return DecoderConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        mlp_dim=mlp_dim,
        norm_eps=1e-6,
        qkv_bias=True,
        vocab_size=152_064 if large else 151_936,
        tied=not large,
        rope=PlainRope(theta=1_000_000.0),
        max_length=32_768,
    )


def gemma(width: int, depth: int, heads: int, kv_heads: int, mlp_dim: int) -> DecoderConfig:
    """A Gemma: GeGLU, scaled embeddings, norms whose scale is stored as its offset from 1, heads 256 wide."""
    return DecoderConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        mlp_dim=mlp_dim,
        activation="gelu_tanh",
        norm="rms_offset",
        norm_eps=1e-6,
        vocab_size=256_000,
        scaled_embeddings=True,
        rope=PlainRope(theta=10_000.0),
        max_length=8192,
    )


def vision_tower(model: TwoTowerConfig, **changes: Any) -> ViTConfig:
    """The ViT of a dual encoder as the eye of a vision-language model: it pools nothing."""
    if not isinstance(model.image, ViTConfig):
        raise TypeError(f"the image tower is a {model.image.kind()}; take a model with a ViT")
    return dataclasses.replace(model.image, **{"pool": "none", **changes})


def _tower(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    return dict(zip(("width", "depth", "heads", "mlp_dim"), sizes, strict=True))


BASE, LARGE, SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
GIANT_OPT = (1536, 40, 16, 6144)

CLIP: dict[str, TwoTowerConfig] = {
    "RN50": clip_resnet((3, 4, 6, 3), 64, 224, 512, 1024),
    "RN101": clip_resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "RN50x4": clip_resnet((4, 6, 10, 6), 80, 288, 640, 640),
    "RN50x16": clip_resnet((6, 8, 18, 8), 96, 384, 768, 768),
    "RN50x64": clip_resnet((3, 15, 36, 10), 128, 448, 1024, 1024),
    "ViT-B/32": clip(768, 12, 32, 224, 512),
    "ViT-B/16": clip(768, 12, 16, 224, 512),
    "ViT-L/14": clip(1024, 24, 14, 224, 768),
    "ViT-L/14-336": clip(1024, 24, 14, 336, 768),
}
OPEN_CLIP: dict[str, TwoTowerConfig] = {
    "ViT-H/14": open_clip_vit(1280, 32, 5120, 1024, 24),
    "ViT-g/14": open_clip_vit(1408, 40, 6144, 1024, 24),
    "ViT-bigG/14": open_clip_vit(1664, 48, 8192, 1280, 32),
}
SIGLIP: dict[str, TwoTowerConfig] = {
    "SigLIP-B/16": siglip(BASE, 16, 224),
    "SigLIP-B/16-256": siglip(BASE, 16, 256),
    "SigLIP-B/16-384": siglip(BASE, 16, 384),
    "SigLIP-B/16-512": siglip(BASE, 16, 512),
    "SigLIP-L/16-256": siglip(LARGE, 16, 256),
    "SigLIP-L/16-384": siglip(LARGE, 16, 384),
    "SigLIP-So400m/14": siglip(SO400M, 14, 224, length=16),
    "SigLIP-So400m/14-384": siglip(SO400M, 14, 384),
}
SIGLIP2: dict[str, TwoTowerConfig] = {
    "SigLIP2-B/32-256": siglip(BASE, 32, 256, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-B/16": siglip(BASE, 16, 224, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-B/16-256": siglip(BASE, 16, 256, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-B/16-384": siglip(BASE, 16, 384, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-B/16-512": siglip(BASE, 16, 512, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-L/16-256": siglip(LARGE, 16, 256, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-L/16-384": siglip(LARGE, 16, 384, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-L/16-512": siglip(LARGE, 16, 512, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-So400m/14": siglip(SO400M, 14, 224, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-So400m/16-256": siglip(SO400M, 16, 256, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-So400m/16-384": siglip(SO400M, 16, 384, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-So400m/16-512": siglip(SO400M, 16, 512, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-g-opt/16-256": siglip(GIANT_OPT, 16, 256, text=SO400M, vocab_size=SIGLIP2_VOCABULARY),
    "SigLIP2-g-opt/16-384": siglip(GIANT_OPT, 16, 384, text=SO400M, vocab_size=SIGLIP2_VOCABULARY),
}
DINOV2: dict[str, ViTConfig] = {
    f"DINOv2-{size}/14{suffix}": dinov2(width, depth, registers=registers, swiglu=size == "g")
    for suffix, registers in (("", 0), ("-reg", 4))
    for size, (width, depth) in {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "g": (1536, 40)}.items()
}
DECODERS: dict[str, DecoderConfig] = {
    "Llama-2-7B": llama(4096, 32, 32, 11_008),
    "Llama-2-13B": llama(5120, 40, 40, 13_824),
    "Vicuna-7B": llama(4096, 32, 32, 11_008),
    "Vicuna-13B": llama(5120, 40, 40, 13_824),
    "SmolLM2-135M": smollm2(576, 30, 9, 3, 1536),
    "SmolLM2-360M": smollm2(960, 32, 15, 5, 2560),
    "SmolLM2-1.7B": smollm2(2048, 24, 32, 32, 8192, theta=130_000.0),
    "Qwen2-0.5B": qwen2(896, 24, 14, 2, 4864),
    "Qwen2-1.5B": qwen2(1536, 28, 12, 2, 8960),
    "Qwen2-7B": qwen2(3584, 28, 28, 4, 18_944, large=True),
    "Gemma-2B": gemma(2048, 18, 8, 1, 16_384),
    "tiny": DecoderConfig(
        width=64, depth=2, heads=4, kv_heads=2, mlp_dim=176, vocab_size=512, max_length=512, init="smollm"
    ),
}
DECODERS |= {name.replace("Qwen2", "Qwen2.5"): sizes for name, sizes in DECODERS.items() if name.startswith("Qwen2")}
PRESETS: dict[str, TwoTowerConfig] = CLIP | OPEN_CLIP | SIGLIP | SIGLIP2

__all__ = ["CLIP", "DECODERS", "DINOV2", "OPEN_CLIP", "PRESETS", "SIGLIP", "SIGLIP2", "dinov2", "vision_tower"]
