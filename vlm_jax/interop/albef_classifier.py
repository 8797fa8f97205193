"""ALBEF fine-tuned to classes, SNLI-VE or NLVR2, as its authors store it: without a config file and without `bert.`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.interop.albef import OfficialAlbef
from vlm_jax.interop.formats import check_expressible
from vlm_jax.interop.hf_bert import BLOCK, block_rows, cross_rows, embedding_rows
from vlm_jax.interop.layouts import Shape
from vlm_jax.interop.mae import encoder_rows
from vlm_jax.interop.tables import (
    ConversionError,
    Row,
    Tensors,
    affine,
    from_params,
    parameter_shapes,
    shape_of,
    within,
)
from vlm_jax.models.pair_classifier import PairClassifier, PairClassifierConfig
from vlm_jax.objectives.pair_classify import PairClassifyConfig

_TEXT = "text_encoder."
_HEAD = "cls_head.2.bias"
_QUERY = ".crossattention.self.query.weight"
_KEYS = re.compile(r"(text_encoder\.bert\.encoder\.layer\.)(\d+)(\.crossattention\.self\.(?:key|value)\..*)")


class OfficialPairClassifier(OfficialAlbef):
    """The `checkpoint_*.pth` of the published VE.py and NLVR.py.

    Of a model of two images keys and values of each second fusion layer are those of the one before it, stored twice.
    """

    title = "an official ALBEF with a classifier"

    def canonical(self, tensors: Tensors) -> dict[str, Any]:
        """See the base; with `bert.`, as the pre-trained file has it."""
        named = {re.sub(r"^(text_encoder(_m)?\.)(?!bert\.)", r"\1bert.", name): x for name, x in tensors.items()}
        return super().canonical(named)

    def recognises(self, tensors: Tensors) -> bool:
        """See the base."""
        return {"visual_encoder.pos_embed", "cls_head.0.weight", _HEAD} <= tensors.keys()

    def read_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tensors: Tensors, settings: Mapping[str, Any] | None, activation: str | None
    ) -> PairClassifierConfig:
        """See the base; fusion layers whose keys are equal two by two look at two images."""
        encoders = self.read_encoders(tensors, settings)
        if self._doubled(tensors, encoders["text"].depth, encoders["fusion"].depth):
            encoders["fusion"] = dataclasses.replace(encoders["fusion"], contexts=2)
        return PairClassifierConfig(**encoders, classes=shape_of(tensors, _HEAD, self.title)[0])

    @staticmethod
    def _doubled(tensors: Tensors, first: int, depth: int) -> bool:
        names = [f"{_TEXT}{BLOCK}crossattention.self.key.weight".format(layer=first + i) for i in range(depth)]
        pairs = zip(names[::2], names[1::2], strict=False)
        return depth % 2 == 0 and all(np.array_equal(tensors[name], tensors[other]) for name, other in pairs)

    def objective(self, model: PairClassifierConfig) -> PairClassifyConfig:  # pyright: ignore
        """See the base."""
        return PairClassifyConfig(model=model, text_length=min(40, model.text.positions))

    def claims(self, config: Any) -> bool:
        """Every classifier on ALBEF's encoders."""
        return isinstance(config, PairClassifierConfig)

    def write_config(self, config: PairClassifierConfig) -> dict[str, Any]:  # pyright: ignore
        """See the base."""
        check_expressible(self.title, self.wanted(config) | {"fusion.contexts": (config.images, (1, 2))})
        return {}

    def rows(self, config: PairClassifierConfig) -> list[Row]:  # pyright: ignore
        """See the base."""
        image = [*encoder_rows(), Row("pos_embed", "pos_embed", "batch_of_one")]
        text = [
            *embedding_rows(),
            *within(block_rows(), "text/blocks/", BLOCK),
            *within(_fusion_rows(config), "fusion/blocks/", BLOCK),
        ]
        return [
            *within(image, "image/", "visual_encoder."),
            *within(text, "", _TEXT),
            *affine("classifier/hidden", "cls_head.0"),
            *affine("classifier/out", "cls_head.2"),
        ]

    def shapes(self, config: PairClassifierConfig) -> dict[str, Shape]:  # pyright: ignore
        """See the base."""
        several = () if config.images == 1 else (config.images,)
        images = jax.ShapeDtypeStruct((1, *several, *config.image.image_shape, 3), jnp.float32)
        return parameter_shapes(PairClassifier(config), images, jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def own(self, tensors: Tensors, config: PairClassifierConfig) -> dict[str, np.ndarray]:  # pyright: ignore
        """See the base; without the second copies of keys and values."""
        kept = {
            name: x for name, x in tensors.items() if not re.match(r"(visual_encoder|text_encoder|cls_head)_m\.", name)
        }
        for name, first in self._copies(kept, config).items():
            if not np.array_equal(kept[name], kept[first]):
                raise ConversionError(
                    f"{name} of these weights differs from {first}, which {self.title} has in its place"
                )
            del kept[name]
        return kept

    @staticmethod
    def _copies(names: Any, config: PairClassifierConfig) -> dict[str, str]:
        """{name of a second copy: that of the first} among the keys and values that are there or should be."""
        copies = {}
        for name in names if config.images == 2 else ():
            match = _KEYS.fullmatch(name)
            if match and (place := int(match[2]) - config.text.depth) % 2:
                copies[name] = f"{match[1]}{config.text.depth + place - 1}{match[3]}"
        return copies

    def published(self, tensors: Tensors) -> Tensors:
        """With second copies of keys and values, and without `bert.`."""
        full = dict(tensors)
        for name, value in tensors.items():
            if match := _KEYS.fullmatch(name):
                following = f"{match[1]}{int(match[2]) + 1}"
                # A layer that looks at an image and has no keys of its own shares those of the one before it.
                if following + match[3] not in tensors and following + _QUERY in tensors:
                    full[following + match[3]] = value
        return {name.replace("text_encoder.bert.", "text_encoder."): x for name, x in full.items()}

    def write_extra(self, extra: Mapping[str, Any], config: PairClassifierConfig) -> dict[str, np.ndarray]:  # pyright: ignore
        """See the base; only an averaged model."""
        if "averaged" not in extra:
            return {}
        slow = self.published(from_params(extra["averaged"], self.rows(config), f"the averaged {self.title}"))
        return {re.sub(r"^(visual_encoder|text_encoder|cls_head)\.", r"\1_m.", name): x for name, x in slow.items()}


def _fusion_rows(config: PairClassifierConfig) -> list[Row]:
    """The fusion layers, or layers that share keys and values two by two."""
    first, rows = config.text.depth, [*block_rows(), *cross_rows()]
    if config.images == 1:
        return [dataclasses.replace(row, first=first) for row in rows]
    shared = [row for row in rows if row.ours.startswith(("cross/key", "cross/value"))]
    found = [dataclasses.replace(row, first=first, step=2) for row in shared]
    for place in range(2):
        own = [dataclasses.replace(row, first=first + place, step=2) for row in rows if row not in shared]
        found += within(own, f"layer_{place}/", "")
    return found


__all__ = ["OfficialPairClassifier"]
