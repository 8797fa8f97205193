"""ALBEF as its authors store it: model, averaged model and queues in one file, without a config file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.data.text import ALBEF_TOKENIZER, Tokenizer, TokenizerConfig
from vlm_jax.interop.formats import Format, block_sizes, check_expressible, heads_of_64, square_side
from vlm_jax.interop.hf_bert import (
    BLOCK,
    block_rows,
    cross_rows,
    embedding_rows,
    head_rows,
    published_form,
    read_encoder,
    with_ties,
    without_ties,
)
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.mae import encoder_rows
from vlm_jax.interop.tables import Row, Tensors, affine, from_params, parameter_shapes, shape_of, to_params, within
from vlm_jax.interop.tokenizer_import import import_word_pieces
from vlm_jax.models.albef import Albef, AlbefModelConfig, PairEncoderConfig, deit_b16
from vlm_jax.models.bert import TextStackConfig
from vlm_jax.objectives.albef import AlbefConfig
from vlm_jax.objectives.pairs import PairConfig

_TEXT = "text_encoder."
_POSITIONS = "visual_encoder.pos_embed"
_CROSS = f"{_TEXT}{BLOCK}crossattention.self.key.bias"
_BUFFERS = re.compile(r".*embeddings\.position_ids")
_OWN = re.compile(r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)\.")
_SLOW = re.compile(r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)_m\.")
_QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
# The settings that BERT's file would tell.
_BERT: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
    "activation": None,
}


class OfficialAlbef(Format):
    """The published `ALBEF.pth`, `ALBEF_4M.pth` and training checkpoints."""

    library, title, preprocess = "official", "an official ALBEF", "albef"
    # what the names of the head of words begin with
    head: str = _TEXT

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base."""
        return {name: x for name, x in super().canonical(tensors).items() if not _BUFFERS.fullmatch(name)}

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {_POSITIONS, "vision_proj.weight", f"{_TEXT}cls.predictions.bias"} <= tensors.keys()

    def read_config(
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> PairEncoderConfig:
        """See the base; heads are 64 wide unless the settings say `image_heads` and `text_heads`."""
        encoders = self.read_encoders(tensors, settings)
        return AlbefModelConfig(**encoders, embed_dim=shape_of(tensors, "vision_proj.weight", self.title)[0])

    def read_encoders(self, tensors: Tensors, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """`image`, `text` and `fusion` of the config."""
        sizes: dict[str, Any] = block_sizes(
            tensors, "visual_encoder.blocks.{layer}.", "norm1.weight", "mlp.fc1.bias", self.title
        )
        patch_size = shape_of(tensors, "visual_encoder.patch_embed.proj.weight", self.title)[-1]
        sizes |= square_side(shape_of(tensors, _POSITIONS, self.title)[1] - 1, patch_size, {}, self.title)
        width = shape_of(tensors, f"{_TEXT}bert.embeddings.LayerNorm.weight", self.title)[0]
        settings = settings or {}
        if {"image_heads", "text_heads"} <= settings.keys():
            heads = [settings["image_heads"], settings["text_heads"]]
        else:
            heads = heads_of_64(sizes["width"], width)
        image = dataclasses.replace(deit_b16(), heads=heads[0], **sizes)
        text = read_encoder(tensors, _TEXT, self.title, _BERT | {"num_attention_heads": heads[1]})
        cross = [int(match[1]) for name in tensors if (match := re.fullmatch(_layer_pattern(_CROSS), name))]
        keys = [field.name for field in dataclasses.fields(TextStackConfig)]
        stack: dict[str, Any] = {key: getattr(text, key) for key in keys} | {"depth": len(cross), "cross_every": 1}
        text = dataclasses.replace(text, depth=text.depth - len(cross))
        return {"image": image, "text": text, "fusion": TextStackConfig(**stack)}

    def objective(self, model: Any) -> PairConfig:
        """See the base."""
        return AlbefConfig(model=model, text_length=min(AlbefConfig().text_length, model.text.positions))

    def tokenizer(
        self, folder: Path, flag: str, model: PairEncoderConfig
    ) -> tuple[Tokenizer | None, str, TokenizerConfig]:
        """See the base; from BERT's vocabulary."""
        return import_word_pieces(folder, flag, ALBEF_TOKENIZER, self.objective(model).text_length)

    def claims(self, config: Any) -> bool:
        """Every ALBEF."""
        return isinstance(config, AlbefModelConfig)

    def write_config(self, config: Any) -> dict[str, Any]:
        """See the base. There is no file, so everything must be as these models have it."""
        check_expressible(self.title, self.wanted(config) | {"words.tied": (config.words.tied, (True,))})
        return {}

    def wanted(self, config: PairEncoderConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """What must be so of the encoders: see `check_expressible`."""
        image, text, fusion, like = config.image, config.text, config.fusion, deit_b16()
        wanted = {f"text.{key}": value for key, value in published_form(text).items()}
        for key in ("pool", "norm_eps", "activation", "pre_norm", "post_norm", "patch_bias", "pos_embed", "registers"):
            wanted[f"image.{key}"] = (getattr(image, key, None), (getattr(like, key),))
        for key in (*published_form(text), "width", "heads", "mlp_dim", "activation", "norm_eps"):
            wanted[f"fusion.{key}"] = (getattr(fusion, key), (getattr(text, key),))
        return wanted | {"fusion.cross_every": (fusion.cross_every, (1,))}

    def rows(self, config: Any) -> list[Row]:
        """See the base."""
        return [
            *self.encoder_rows(config),
            *within(head_rows(config.words.tied), "", self.head),
            *affine("image_projection", "vision_proj"),
            *affine("text_projection", "text_proj"),
            *affine("matching_head", "itm_head"),
            Row("temperature", "temp", "same"),
        ]

    def encoder_rows(self, config: PairEncoderConfig) -> list[Row]:
        """Image tower, text encoder and fusion encoder."""
        image = [*encoder_rows(), Row("pos_embed", "pos_embed", "batch_of_one")]
        fusion = [dataclasses.replace(row, first=config.text.depth) for row in (*block_rows(), *cross_rows())]
        text = [
            *embedding_rows(),
            *within(block_rows(), "text/blocks/", BLOCK),
            *within(fusion, "fusion/blocks/", BLOCK),
        ]
        return [*within(image, "image/", "visual_encoder."), *within(text, "", _TEXT)]

    def module(self, config: Any) -> nn.Module:
        """The model of a config."""
        return Albef(config)

    def shapes(self, config: Any) -> dict[str, Shape]:
        """See the base."""
        images = jax.ShapeDtypeStruct((1, *config.image.image_shape, 3), jnp.float32)
        return parameter_shapes(self.module(config), images, jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def own(self, tensors: Tensors, config: Any) -> dict[str, np.ndarray]:
        """See the base."""
        tensors = {name: x for name, x in tensors.items() if not _SLOW.match(name) and name not in _QUEUES}
        return without_ties(tensors, self.head, config.words.tied, self.title)

    def published(self, tensors: Tensors) -> Tensors:
        """See the base."""
        return with_ties(tensors, self.head)

    def read_extra(self, tensors: Tensors, config: Any) -> dict[str, Any]:
        """The averaged model and the queues, as `extra` of the objective has them; what the file has of them."""
        extra: dict[str, Any] = {}
        slow = {_SLOW.sub(r"\1.", name): x for name, x in tensors.items() if _SLOW.match(name)}
        if slow:
            shapes = {path: shape for path, shape in self.shapes(config).items() if _averaged(path)}
            own = self.own(slow, config)
            extra["averaged"] = to_params(own, self._averaged_rows(config), shapes, f"the averaged {self.title}")
        if "image_queue" in tensors:
            length = tensors["image_queue"].shape[1]
            images = tensors.get("idx_queue", np.full((1, length), -1)).reshape(-1)
            images = np.where(images < 0, -1, images)
            extra["queue"] = {
                "image": np.asarray(tensors["image_queue"].T, np.float32),
                "text": np.asarray(tensors["text_queue"].T, np.float32),
                "identity": np.stack([images, np.full(length, -1)], axis=1).astype(np.int32),
                "pointer": np.asarray(tensors["queue_ptr"].reshape(()), np.int32),
            }
        return extra

    def write_extra(self, extra: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
        """The inverse of `read_extra`."""
        tensors: dict[str, np.ndarray] = {}
        if "averaged" in extra:
            rows = [row for row in self._averaged_rows(config) if row.ours.split("/")[0] in extra["averaged"]]
            slow = from_params(extra["averaged"], rows, f"the averaged {self.title}")
            slow = self.published(slow) if "words" in extra["averaged"] else slow
            tensors |= {_OWN.sub(r"\1_m.", name): x for name, x in slow.items()}
        if "queue" in extra:
            queue = {name: np.asarray(x) for name, x in extra["queue"].items()}
            tensors |= {f"{name}_queue": np.ascontiguousarray(queue[name].T) for name in ("image", "text")}
            tensors["queue_ptr"] = queue["pointer"].reshape(1).astype(np.int64)
        return tensors

    def _averaged_rows(self, config: Any) -> list[Row]:
        return [row for row in self.rows(config) if _averaged(row.ours)]


def _averaged(path: str) -> bool:
    """Whether the averaged model has a copy of a parameter."""
    return path.split("/")[0] not in ("matching_head", "temperature")


def _layer_pattern(name: str) -> str:
    return re.escape(name).replace(r"\{layer\}", r"(\d+)")


__all__ = ["OfficialAlbef"]
