"""What all of open_clip's models share: the names and settings of the text tower and of a block. OpenAI's are the same.

The image towers are formats of their own: `open_clip_vit`, `open_clip_resnet`, `open_clip_timm`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.interop.formats import (
    TwoTowerFormat,
    block_sizes,
    check_expressible,
    check_supported,
    heads_of_64,
    known_activation,
)
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    fused_attention,
    norm,
    shape_of,
    within,
    without_wrappers,
)
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import TransformerConfig
from vlm_jax.models.two_tower import TwoTowerConfig

LAYERS = "transformer.resblocks.{layer}"
POOLS = {"eot_argmax": "argmax", "first_eos": "eos", "last": "last", "first": "first"}
# Settings that names and shapes do not show, with the one value that our towers compute.
TEXT = {"final_ln_after_pool": False, "embed_cls": False, "proj_type": "linear"}
_BUFFERS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}


def block_rows(ours: str, theirs: str) -> list[Row]:
    """A stack of blocks, `theirs` with `{layer}`."""
    rows = fused_attention("attn", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj")
    rows += affine("mlp/fc1", "mlp.c_fc") + affine("mlp/fc2", "mlp.c_proj")
    rows += norm("ln_1", "ln_1") + norm("ln_2", "ln_2")
    return within(rows, f"{ours}/", f"{theirs}.")


def text_rows(config: TwoTowerConfig) -> list[Row]:
    """The text tower."""
    head = [Row("text/projection/kernel", "text_projection", "same")]
    return [
        Row("text/token_embed", "token_embedding.weight", "same"),
        Row("text/pos_embed", "positional_embedding", "same"),
        *block_rows("text/blocks", LAYERS),
        *norm("text/ln_final", "ln_final"),
        *(affine("text/projection", "text_projection") if config.text_projection_bias else head),
    ]


def scalar_rows(config: TwoTowerConfig) -> list[Row]:
    """Scale and bias of the logits."""
    names = ["logit_scale", *["logit_bias"] * (config.logit_bias_init is not None)]
    return [Row(name, name, "same") for name in names]


def canonical(tensors: Tensors) -> dict[str, Any]:
    """The tensors under the names of a CLIP whose text tower is no module of its own, constants dropped."""
    renamed = {}
    for name, value in without_wrappers(tensors).items():
        # CustomTextCLIP keeps the text tower in a module of its own.
        name = re.sub(r"^text\.", "", name)
        if name not in _BUFFERS and not name.endswith("num_batches_tracked"):
            # Some models have scales with one axis.
            renamed[name] = value.reshape(()) if name in ("logit_scale", "logit_bias") else value
    return renamed


def tower_sizes(tensors: Tensors, prefix: str, what: str) -> dict[str, Any]:
    """Width, depth and MLP of a tower."""
    return block_sizes(tensors, f"{prefix}{LAYERS}.", "ln_1.weight", "mlp.c_fc.bias", what)


class OpenClipFormat(TwoTowerFormat):
    """Everything but the image tower."""

    library = "open_clip"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return canonical(tensors)

    def image_rows(self, config: TwoTowerConfig) -> list[Row]:
        """The image tower and its projection."""
        raise TypeError(f"{type(self).__name__} defines no image_rows")

    def rows(self, config: TwoTowerConfig) -> list[Row]:
        """See the base."""
        return [*scalar_rows(config), *self.image_rows(config), *text_rows(config)]

    def read_image(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> ImageTowerConfig:
        """The image tower's config; `settings` are those of the whole model."""
        raise TypeError(f"{type(self).__name__} defines no read_image")

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> TwoTowerConfig:
        """See the base."""
        known_activation(settings, activation)
        image = self.read_image(tensors, settings, activation)
        text = TextConfig(**read_text(tensors, settings, activation, self.title))
        return TwoTowerConfig(image, text, **read_joint(tensors, settings, self.title), **self.joint(tensors))

    def joint(self, tensors: Tensors) -> dict[str, Any]:
        """What the format adds to a `TwoTowerConfig` beside the towers."""
        return {}

    def write_image(self, config: TwoTowerConfig) -> dict[str, Any]:
        """`vision_cfg`."""
        raise TypeError(f"{type(self).__name__} defines no write_image")

    def write_config(self, config: TwoTowerConfig) -> dict[str, Any]:
        """See the base."""
        text = config.text
        check_expressible(
            self.title,
            {"text.mask_padding": (text.mask_padding, (False,)), "text.pool": (text.pool, tuple(POOLS))},
        )
        written = write_text(config, self.title) | {"pool_type": POOLS[text.pool]}
        return write_joint(config) | {"vision_cfg": self.write_image(config), "text_cfg": written}


def write_joint(config: TwoTowerConfig) -> dict[str, Any]:
    """What stands beside the towers' settings."""
    joint: dict[str, Any] = {"embed_dim": config.embed_dim, "quick_gelu": config.text.activation == "quick_gelu"}
    if config.logit_bias_init is not None:
        joint |= {"init_logit_scale": config.logit_scale_init, "init_logit_bias": config.logit_bias_init}
    return joint


def read_joint(tensors: Tensors, settings: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """What stands in `TwoTowerConfig` beside the towers."""
    bias = "text_projection.bias" in tensors
    shape = shape_of(tensors, "text_projection.weight" if bias else "text_projection", what)
    joint: dict[str, Any] = {"embed_dim": shape[0] if bias else shape[1], "text_projection_bias": bias}
    if "logit_bias" in tensors:
        joint["logit_bias_init"] = (settings or {}).get("init_logit_bias") or -10.0
        joint["logit_scale_init"] = (settings or {}).get("init_logit_scale", math.log(10))
    return joint


def read_text(
    tensors: Tensors,
    settings: Mapping[str, Any] | None,
    activation: str | None,
    what: str,
    computed: Mapping[str, Any] = TEXT,
) -> dict[str, Any]:
    """The text tower, whose settings must be those of `computed` where shapes do not show them."""
    text = tower_sizes(tensors, "", what)
    text["vocab_size"] = shape_of(tensors, "token_embedding.weight", what)[0]
    text["length"] = shape_of(tensors, "positional_embedding", what)[0]
    text["eos_id"] = text["vocab_size"] - 1
    if settings is None:
        return text | {"heads": heads_of_64(text["width"])[0], "activation": activation}
    section = settings["text_cfg"]
    check_supported("text_cfg", section, computed)
    pools = {theirs: ours for ours, theirs in POOLS.items()}
    pool = section.get("pool_type", "argmax")
    if pool not in pools:
        raise ConversionError(f"text_cfg.pool_type = {pool!r} of the config file is not supported, only {list(pools)}")
    text |= read_tower(settings, "text_cfg", activation)
    text |= {
        "heads": section.get("heads", 8),
        "causal": not section.get("no_causal_mask", False),
        "pool": pools[pool],
        "pad_id": section.get("pad_id", 0),
    }
    return text | ({"eos_id": section.get("eos_id", 2)} if pool == "eos" else {})


def read_tower(settings: Mapping[str, Any], section: str, activation: str | None) -> dict[str, Any]:
    """Activation and eps of a transformer tower."""
    tower = settings[section]
    found = "quick_gelu" if settings.get("quick_gelu", False) else "gelu"
    if (tower.get("act_kwargs") or {}).get("approximate") == "tanh":
        found = "gelu_tanh"
    return {"activation": activation or found, "norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5)}


def write_tower(tower: TransformerConfig) -> dict[str, Any]:
    """The settings that transformer towers of images and of texts have in common."""
    ratio = tower.mlp_dim / tower.width
    if int(tower.width * ratio) < tower.mlp_dim:  # rounded down there
        ratio = float(np.nextafter(ratio, math.inf))
    shared: dict[str, Any] = {"layers": tower.depth, "width": tower.width, "mlp_ratio": ratio}
    if tower.norm_eps != 1e-5:
        shared["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        shared["act_kwargs"] = {"approximate": "tanh"}
    return shared


def write_text(config: TwoTowerConfig, title: str) -> dict[str, Any]:
    """`text_cfg`, without the pooling."""
    text = config.text
    check_expressible(title, {"text.activation": (text.activation, ("gelu", "quick_gelu", "gelu_tanh"))})
    return {
        **write_tower(text),
        "heads": text.heads,
        "context_length": text.length,
        "vocab_size": text.vocab_size,
        "pad_id": text.pad_id,
        "eos_id": text.eos_id,
        "no_causal_mask": not text.causal,
        "proj_bias": config.text_projection_bias,
    }


__all__ = [
    "LAYERS",
    "TEXT",
    "OpenClipFormat",
    "block_rows",
    "read_joint",
    "read_text",
    "read_tower",
    "scalar_rows",
    "text_rows",
    "tower_sizes",
    "write_joint",
    "write_text",
    "write_tower",
]
