"""The model of DINOv2: an image tower, and two heads that score prototypes. Teacher and student are both one of these.

How views become a loss is the method's business (`vlm_jax.objectives.dino`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal, ones

from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.presets import dinov2
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class PrototypeHeadConfig:
    """A head of DINO: three layers to a point on a sphere, and its cosines with prototypes."""

    hidden: int = 2048  # width between the layers
    bottleneck: int = 256  # dimension of the sphere
    prototypes: int = 65_536

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        for key in ("hidden", "bottleneck", "prototypes"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1"

    def forward_flops(self, width: int) -> int:
        """Model FLOPs of one token's forward pass."""
        layers = width * self.hidden + self.hidden**2 + self.hidden * self.bottleneck
        return 2 * (layers + self.bottleneck * self.prototypes)


@dataclasses.dataclass(frozen=True)
class DinoModelConfig:
    """Tower and heads."""

    image: ViTConfig = dataclasses.field(default_factory=lambda: dinov2(1024, 24, swiglu=True, image_size=224))
    dino_head: PrototypeHeadConfig = PrototypeHeadConfig(bottleneck=384)  # on the class token
    ibot_head: PrototypeHeadConfig = PrototypeHeadConfig()  # on masked patches

    def problems(self) -> Iterator[tuple[str, str]]:
        """A tower that lacks what the method needs."""
        image = self.image
        if image.pool != "cls":
            yield "image.pool", f"= {image.pool!r} must be 'cls': the class token is what the views agree on"
        if not image.mask_token:
            yield "image.mask_token", "= false must be true: it stands in the place of the masked patches"
        if image.pos_resize is None:
            yield "image.pos_resize", "= None must name a form: local views are smaller than image_size"
        if image.patch_dropout:
            yield "image.patch_dropout", f"= {image.patch_dropout} must be 0: masked patches are found by their place"


class PrototypeHead(nn.Module):
    """Parameters: `fc1`, `fc2`, `fc3`, and `last` with `kernel` [E, K] and `magnitude` [K] (Salimans & Kingma 2016).

    Attributes:
        config: sizes.
        dtype: compute dtype.
    """

    config: PrototypeHeadConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the layers."""
        config, spread = self.config, normal(0.02)
        self.fc1 = Linear((config.hidden,), ("embed", "mlp"), spread, dtype=self.dtype)
        self.fc2 = Linear((config.hidden,), ("mlp", "embed"), spread, dtype=self.dtype)
        self.fc3 = Linear((config.bottleneck,), ("embed", "joint"), spread, dtype=self.dtype)
        self.last = Prototypes(config, self.dtype)

    def __call__(self, x_RxD: jax.Array) -> jax.Array:
        """[R, D] -> scores of the prototypes, fp32 [R, K]."""
        return self.score(self.project(x_RxD))

    def project(self, x_RxD: jax.Array) -> jax.Array:
        """[R, D] -> points on the unit sphere, [R, E] in the compute dtype."""
        for layer, name in ((self.fc1, "mlp"), (self.fc2, "embed")):
            x_RxD = jax.nn.gelu(constrain(layer(x_RxD), "batch", name), approximate=False)
        z_RxE = constrain(self.fc3(x_RxD), "batch", None).astype(jnp.float32)
        square = jnp.square(z_RxE).sum(axis=-1, keepdims=True)
        return (z_RxE * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(self.dtype)

    def score(self, z_RxE: jax.Array) -> jax.Array:
        """Points [R, E] -> scores of the prototypes, fp32 [R, K]."""
        return self.last(z_RxE)


class Prototypes(nn.Module):
    """A linear map without bias whose columns have a direction and a magnitude of their own."""

    config: PrototypeHeadConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z_RxE: jax.Array) -> jax.Array:
        """[R, E] -> fp32 [R, K]."""
        shape = (self.config.bottleneck, self.config.prototypes)
        kernel_ExK = weight(self, "kernel", torch_linear(shape[0]), ("embed", "vocab"), shape)
        magnitude_K = weight(self, "magnitude", ones, ("vocab",), shape[1:])
        factor_K = magnitude_K * jax.lax.rsqrt(jnp.square(kernel_ExK).sum(axis=0))
        unit_ExK = (kernel_ExK * factor_K[None]).astype(self.dtype)
        scores = jnp.einsum("RE,EK->RK", z_RxE.astype(self.dtype), unit_ExK, preferred_element_type=jnp.float32)
        return constrain(scores, "batch", "vocab")


class DinoModel(nn.Module):
    """Parameters: `image/...`, `dino_head/...`, `ibot_head/...`.

    Attributes:
        config: tower and heads.
        dtype: compute dtype; parameters are fp32.
    """

    config: DinoModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tower and heads."""
        self.image: Any = self.config.image.build(None, self.dtype)
        self.dino_head = PrototypeHead(self.config.dino_head, self.dtype)
        self.ibot_head = PrototypeHead(self.config.ibot_head, self.dtype)

    def __call__(self, images_BxHxWxC: jax.Array) -> dict[str, jax.Array]:
        """Normalised images -> "dino_scores" [B, K] of class tokens, "ibot_scores" [B, N, K'] of all patches, fp32."""
        views = self.image(images_BxHxWxC)
        patches = views["tokens"][:, self.config.image.prefix_tokens :]
        ibot = self.ibot_head(patches.reshape(-1, patches.shape[-1]))
        return {"dino_scores": self.dino_head(views["pooled"]), "ibot_scores": ibot.reshape(*patches.shape[:2], -1)}

    def class_tokens(self, images_RxHxWxC: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Normalised views, all of one size -> [R, D]."""
        return self.image(images_RxHxWxC, keys)["pooled"]

    def tokens(
        self, images_RxHxWxC: jax.Array, keys: jax.Array | None, masked_RxN: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Normalised views, all of one size -> class tokens [R, D] and patches [R, N, D]."""
        views = self.image(images_RxHxWxC, keys, masked_BxN=masked_RxN)
        return views["pooled"], views["tokens"][:, self.config.image.prefix_tokens :]

    def project(self, head: str, x_RxD: jax.Array) -> jax.Array:
        """Tokens [R, D] -> points [R, E] by the head "dino" or "ibot"."""
        return self._head(head).project(x_RxD)

    def score(self, head: str, z_RxE: jax.Array) -> jax.Array:
        """Points [R, E] -> scores, fp32 [R, K], by the head "dino" or "ibot"."""
        return self._head(head).score(z_RxE)

    def _head(self, name: str) -> PrototypeHead:
        return {"dino": self.dino_head, "ibot": self.ibot_head}[name]


__all__ = ["DinoModel", "DinoModelConfig", "PrototypeHead", "PrototypeHeadConfig"]
