"""Classification by labels: supervised training of an image tower from scratch, or fine-tuning of a pre-trained one.

Fine-tuning is how MAE, BEiT and SimMIM are judged: `init_from` the pre-training run, layer-wise decay of the learning
rate by `config.parts`, mixup, CutMix, label smoothing, drop path by the tower's own `drop_path`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.examples import LabelledImages, MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import Source
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.models.classifier import ClassifierConfig
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.base import ObjectiveConfig, normalise_images
from vlm_jax.objectives.images import ImageObjective, ImagesConfig
from vlm_jax.objectives.mixing import MixingConfig, mix, own_share, partners
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(ImagesConfig):
    """Softmax cross-entropy with the label of an image."""

    model: ClassifierConfig = ClassifierConfig()  # image tower and head
    mixing: MixingConfig = MixingConfig()  # mixup and CutMix
    # share of the target that is spread evenly over all classes (Szegedy et al. 2016, section 7)
    label_smoothing: float = 0.0

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        yield from super().problems()
        if not 0 <= self.label_smoothing < 1:
            yield "label_smoothing", f"= {self.label_smoothing} must lie in [0, 1)"

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """Rows that can't be paired."""
        if self.mixing.on and data.batch_size % 2:
            yield "data.batch_size", f"= {data.batch_size} must be even: config.objective.mixing mixes pairs of rows"

    def check_source(self, source: Source) -> None:
        """The source must name as many classes as the head has."""
        check_classes(self.model.classes, source, "config.data.source")

    def without_dropping(self) -> "ObjectiveConfig":
        """See the base; images are not mixed either."""
        return dataclasses.replace(super().without_dropping(), mixing=MixingConfig())  # pyright: ignore

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """Image and label."""
        return LabelledImages(self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3] and `label` int32 [B]."""
        return super().batch_shapes(batch_size) | {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def train_flops(self) -> float:
        """Three times the forward pass."""
        return float(TRAIN_OVER_FORWARD * self.model.forward_flops())

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Classify":
        """See the base."""
        return Classify(self, preprocess, dtype)


class Classify(ImageObjective):
    """See `ClassifyConfig`."""

    def __init__(self, config: ClassifyConfig, preprocess: PreprocessConfig, dtype: Dtype):
        super().__init__(config, config.model.build(dtype), preprocess, dtype)
        self.config, self.class_count = config, config.model.classes

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters of tower and head; nothing else is kept."""
        height, width = self.image_tower.image_shape
        return self.module.init(key, jnp.zeros((1, height, width, 3)))["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """Cross-entropy with soft targets; `top1` counts hits of the label that weighs more."""
        images, targets_BxC = self._mixed(batch, step)
        outputs: Any = self.module.apply({"params": params}, images, keys)
        losses_B, hits_B = _cross_entropy(outputs["logits"], targets_BxC)
        count = jnp.asarray(losses_B.shape[0], jnp.float32)
        return (losses_B.sum(), count), Aux({"top1": (hits_B.sum(), count)}, {"statistics": outputs.get("statistics")})

    def constrain(self, params: Any, updates: Any) -> Any:
        """Running statistics of the image tower, where it has some, moved by those of the step."""
        return params | {"image": self.image_tower.updated(params["image"], updates["statistics"])}

    def class_scores(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        outputs: Any = self.module.apply({"params": params}, normalise_images(images, self.preprocess))
        return outputs["logits"].astype(jnp.float32)

    def _mixed(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised images and their targets, fp32 [B, C]."""
        config, images = self.config, normalise_images(batch["image"], self.preprocess)
        smooth = config.label_smoothing
        targets = jax.nn.one_hot(batch["label"], self.class_count) * (1 - smooth) + smooth / self.class_count
        if not config.mixing.on:
            return images, targets
        share_HxW = own_share(config.mixing, step, *images.shape[1:3])
        # The partners travel between the devices as bytes, before they are normalised.
        others = normalise_images(partners(batch["image"]), self.preprocess)
        return mix(images, others, share_HxW[None, :, :, None]), mix(targets, partners(targets), share_HxW.mean())


def _cross_entropy(logits_BxC: jax.Array, targets_BxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(losses, whether the likeliest class is that of the largest target), fp32 [B] each."""
    logits_BxC = logits_BxC.astype(jnp.float32)
    losses_B = -jnp.sum(targets_BxC * jax.nn.log_softmax(logits_BxC), axis=-1)
    return losses_B, (logits_BxC.argmax(axis=-1) == targets_BxC.argmax(axis=-1)).astype(jnp.float32)


def check_classes(classes: int, source: Source, where: str) -> None:
    """Raises `ConfigError` when the source at the key `where` doesn't name `classes` classes."""
    if len(source.class_names) != classes:
        named = f"names {len(source.class_names)} classes" if source.class_names else "has no labels"
        raise ConfigError(
            f"{where} {named}, but config.objective.model.classes = {classes}; set classes to the source's, or give "
            "the source the names of its classes"
        )


__all__ = ["Classify", "ClassifyConfig", "check_classes"]
