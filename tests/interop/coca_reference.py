"""open_clip's CoCa with random weights, in a size that a test can afford, and the same weights by our names."""

from typing import Any

import clip_reference as reference
import numpy as np
import torch

from vlm_jax.interop.registry import recognise
from vlm_jax.interop.tables import to_params
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captions import CaptionStart
from vlm_jax.models.coca import CoCaModelConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig
from vlm_jax.models.vit import ViTConfig

WIDTH, HEADS, VOCABULARY, LENGTH, QUERIES = 16, 2, 60, 10, 5
START_ID = 58
IMAGE = {"width": 24, "heads": 3, "depth": 2, "patch_size": 8, "image_size": 24}


def settings() -> dict[str, Any]:
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": 2}
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "layers": IMAGE["depth"],
            "width": IMAGE["width"],
            "head_width": IMAGE["width"] // IMAGE["heads"],
            "patch_size": IMAGE["patch_size"],
            "image_size": IMAGE["image_size"],
            "attentional_pool": True,
            "attn_pooler_queries": QUERIES,
            "attn_pooler_heads": HEADS,
            "output_tokens": True,
        },
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": text | {"layers": 3},
    }


def open_clip_model() -> torch.nn.Module:
    """Double precision, weights that single precision holds exactly."""
    torch.manual_seed(0)
    open_clip = reference.import_open_clip()
    model = open_clip.coca_model.CoCa(**settings())
    # Left uninitialised by open_clip until a checkpoint is loaded.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=WIDTH**-0.5)
    return reference.randomise(model, 2).double()


def config() -> CoCaModelConfig:
    tower = ViTConfig(mlp_dim=4 * IMAGE["width"], activation="gelu", pool="none", post_norm=False, **IMAGE)
    return CoCaModelConfig(
        image=AttentionalPoolConfig(tower, "open_clip", QUERIES, WIDTH, HEADS),
        text=TextConfig(
            width=WIDTH,
            depth=2,
            heads=HEADS,
            mlp_dim=4 * WIDTH,
            activation="gelu",
            vocab_size=VOCABULARY,
            length=LENGTH,
            pool="cls",
            mask_padding=True,
            mask_shift=1,
            eos_id=reference.EOS_ID,
        ),
        decoder=CrossDecoderConfig(
            width=WIDTH, depth=3, heads=HEADS, mlp_dim=4 * WIDTH, self_mlp_dim=4 * WIDTH, activation="gelu"
        ),
        start=CaptionStart(id=START_ID),
        embed_dim=WIDTH,
    )


def our_tree(tensors: dict[str, np.ndarray]) -> Any:
    """A state dict, or gradients by its names, as our parameters."""
    found, canonical = recognise(tensors)
    return to_params(canonical, found.rows(config()), found.shapes(config()), found.title)
