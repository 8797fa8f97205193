"""The discrete autoencoder of DALL-E (Ramesh et al. 2021), trained to give BEiT its visual tokenizer."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.examples import ImageExamples, MakeExample
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.autoencoding import divergence_from_uniform, gumbel_softmax, logit_laplace
from vlm_jax.models.dvae import Dvae as DvaeModule
from vlm_jax.models.dvae import DvaeModelConfig, decoded_images, map_pixels
from vlm_jax.models.projection import unit_length
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig, denormalise_images
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio


@dataclasses.dataclass(frozen=True)
class Annealed:
    """A number that goes from `start` to `end` along half a cosine, and stays there."""

    start: float  # at step 0
    end: float  # from step `steps` on
    steps: int  # of the way

    def problems(self) -> Iterator[tuple[str, str]]:
        """Ways without a step."""
        if self.steps < 1:
            yield "steps", f"= {self.steps} must be at least 1"

    def at(self, step: jax.Array) -> jax.Array:
        """Its value at a step, () fp32."""
        share = jnp.minimum(step.astype(jnp.float32) / self.steps, 1.0)
        return self.end + 0.5 * (self.start - self.end) * (1 + jnp.cos(math.pi * share))


@dataclasses.dataclass(frozen=True)
class DvaeConfig(ObjectiveConfig):
    """Training of a discrete autoencoder; the schedules are the published ones (appendix A.2)."""

    model: DvaeModelConfig = DvaeModelConfig()  # encoder and decoder
    temperature: Annealed = Annealed(1.0, 1 / 16, 150_000)  # of the relaxed samples
    kl_weight: Annealed = Annealed(0.0, 6.6, 5_000)  # on the divergence of the codes from uniform

    def problems(self) -> Iterator[tuple[str, str]]:
        """Temperatures that no softmax has."""
        if min(self.temperature.start, self.temperature.end) <= 0:
            yield "temperature", f"= {self.temperature} must be positive"

    @property
    def reads_text(self) -> bool:
        """No."""
        return False

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.model.image_size

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "Dvae":
        """See the base."""
        return Dvae(self, preprocess, dtype)

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> MakeExample:
        """The image; raises `ConfigError` for an encoder alone, which can't be trained."""
        if not self.model.decoder:
            raise ConfigError(
                "config.objective.model.decoder = false leaves an encoder without a loss; set it to true, or use the "
                "encoder as the tokenizer of config.objective = 'beit' by --config.init_from"
            )
        return ImageExamples(self.image_size, data.preprocess, data.augment)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3]."""
        return {"image": jax.ShapeDtypeStruct((batch_size, self.image_size, self.image_size, 3), jnp.uint8)}

    def train_flops(self) -> float:
        """Three times the forward pass."""
        return float(TRAIN_OVER_FORWARD * (self.model.encoder_flops() + self.model.decoder_flops()))


class Dvae(ModelObjective):
    """See `DvaeConfig`."""

    joint_space = False

    def __init__(self, config: DvaeConfig, preprocess: PreprocessConfig, dtype: Dtype):
        self.config, self.module, self.preprocess = config, DvaeModule(config.model, dtype), preprocess

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """See the base."""
        side = self.config.image_size
        return self.module.init(key, jnp.zeros((1, side, side, 3)))["params"], {}

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The negative evidence bound over the number of values of an image, its mean over images (appendix A.2)."""
        pixels = map_pixels(denormalise_images(batch["image"], self.preprocess))
        logits = self._apply(params, pixels, "encode")
        codes = gumbel_softmax(logits, self.config.temperature.at(step), keys)
        decoded = self._apply(params, codes, "decode")
        values = float(math.prod(pixels.shape[1:]))
        reconstruction = (logit_laplace(decoded, pixels) / values).sum()
        divergence = divergence_from_uniform(logits).sum()
        weight = self.config.kl_weight.at(step)
        rows, one = jnp.asarray(pixels.shape[0], jnp.float32), jnp.ones((), jnp.float32)
        metrics = {
            "reconstruction": (reconstruction, rows),  # nats a value
            "divergence": (divergence, rows * math.prod(self.config.model.grid)),  # nats a code
            "temperature": (self.config.temperature.at(step), one),
            "kl_weight": (weight, one),
        }
        return (reconstruction + weight / values * divergence, rows), Aux(metrics)

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """`code_logits` [B, R, C, V], `codes` [B, R, C] int32; with a decoder `reconstruction` [B, H, W, 3] uint8."""
        logits = self._logits(params, batch["image"])
        codes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        named = {"code_logits": logits, "codes": codes}
        if self.config.model.decoder:
            decoded = self._apply(params, jax.nn.one_hot(codes, self.config.model.vocab_size), "decode")
            named["reconstruction"] = decoded_images(decoded)
        return named

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        return unit_length(self.image_vectors(params, images, "pooled"))

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base: the share of each code in an image, fp32 [B, V]; both kinds are the same."""
        return jax.nn.softmax(self._logits(params, images)).mean(axis=(1, 2))

    def _logits(self, params: Any, images: jax.Array) -> jax.Array:
        return self._apply(params, map_pixels(denormalise_images(images, self.preprocess)), "encode")

    def _apply(self, params: Any, x: jax.Array, method: str) -> jax.Array:
        return self.module.apply({"params": params}, x, method=method)  # pyright: ignore


__all__ = ["Annealed", "Dvae", "DvaeConfig"]
