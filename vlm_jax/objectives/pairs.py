"""What every method on ALBEF's encoders has: texts and images, and an averaged model with a share of the targets."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.mesh import unbox
from vlm_jax.models.albef import PairEncoderConfig
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.objectives.image_text import ImageTextConfig, ImageTextObjective


@dataclasses.dataclass(frozen=True)
class PairConfig(ImageTextConfig):
    """Family of the methods on pairs that are fused."""

    model: PairEncoderConfig = PairEncoderConfig()  # the encoders
    text_length: int = 25  # tokens of a caption, the class token included
    distillation: float = 0.4  # alpha: share of the averaged model in the targets
    distillation_steps: int = 0  # of a linear rise of that share from 0 (published: those of the first epoch)
    momentum: float = 0.995  # of the averaged model

    @property
    def image_tower(self) -> ImageTowerConfig:
        """See the base."""
        return self.model.image

    @property
    def text_sizes(self) -> tuple[int, int]:
        """See the base."""
        return self.model.text.vocab_size, self.text_length

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        yield from super().problems()
        for key in ("distillation", "momentum"):
            if not 0 <= getattr(self, key) <= 1:
                yield key, f"= {getattr(self, key)} must lie in [0, 1]"
        if self.distillation_steps < 0:
            yield "distillation_steps", f"= {self.distillation_steps} must not be negative"
        if self.text_length > self.model.text.positions:
            yield "text_length", f"= {self.text_length} exceeds model.text.positions = {self.model.text.positions}"

    def data_problems(self, data: DataConfig) -> Iterator[tuple[str, str]]:
        """The length of the texts must agree with the batches."""
        if data.tokenizer.length != self.text_length:
            yield (
                "data.tokenizer.length",
                f"= {data.tokenizer.length} must equal config.objective.text_length = {self.text_length}; set both",
            )


class PairObjective(ImageTextObjective):
    """See `PairConfig`.

    `extra` holds "averaged", copies of the parts of the parameters that are named, by name.

    Args:
        config: of the method.
        module: its model.
        preprocess: its normalisation.
        averaged_parts: what the averaged model has of its own; none without distillation.
    """

    def __init__(
        self, config: PairConfig, module: nn.Module, preprocess: PreprocessConfig, averaged_parts: tuple[str, ...]
    ):
        super().__init__(config, module, preprocess)
        self.config, self._averaged_parts = config, averaged_parts

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Parameters, and an averaged model that starts as they do."""
        params, extra = super().init(key)
        return params, self.begin(extra, unbox(params))

    def begin(self, extra: Any, params: Any) -> Any:
        """The averaged model is the model; a copy, for the step donates both."""
        own = {name: params[name] for name in self._averaged_parts}
        return extra | ({"averaged": jax.tree.map(jnp.copy, own)} if own else {})

    def _averaged(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(a whole tree of parameters, the parts of it to keep): moved towards the model before they are used."""
        keep, fixed = self.config.momentum, jax.lax.stop_gradient(params)
        moved = {
            name: jax.tree.map(lambda old, now: keep * old + (1 - keep) * now, part, fixed[name])
            for name, part in extra.get("averaged", {}).items()
        }
        return fixed | moved, moved

    def after(self, extra: Any, params: Any, updates: Any, step: jax.Array) -> Any:
        """The averaged model, moved for the next step to use."""
        return extra | ({"averaged": self._averaged(params, extra)[1]} if "averaged" in extra else {})

    def _share(self, step: jax.Array) -> jax.Array:
        """() fp32, the averaged model's share of the targets."""
        rise = max(self.config.distillation_steps, 1)
        progress = jnp.minimum(step.astype(jnp.float32) / rise, 1.0) if self.config.distillation_steps else 1.0
        return jnp.asarray(self.config.distillation * progress, jnp.float32)

    def _call(self, params: Any, method: str, *arguments: Any) -> Any:
        return self.module.apply({"params": params}, *arguments, method=method)


__all__ = ["PairConfig", "PairObjective"]
