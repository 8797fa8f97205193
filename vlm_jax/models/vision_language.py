"""A vision tower, a projector and a decoder: images as tokens among those of a text (Liu et al. 2023, LLaVA).

Which token takes which feature is said by the slots of `vlm_jax.data.chat_examples`; nothing is counted here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal

from vlm_jax.data.tiles import NEWLINE
from vlm_jax.mesh import constrain
from vlm_jax.models.decoder import Decoder, DecoderConfig
from vlm_jax.models.lora import LoraConfig, adapted, merged
from vlm_jax.models.projector import MlpProjectorConfig, ProjectorConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """Tower, projector and decoder."""

    # the vision tower, which pools nothing
    image: ViTConfig = ViTConfig(pool="none")
    # which block's output the features are: -1 of the last, -2 of the one before (LLaVA), without the last norm, and
    # what is above doesn't run; None: the tower's tokens after its last norm (SigLIP)
    layer: int | None = None
    # patches alone, or the class token before them
    features: Literal["patch", "cls_patch"] = "patch"
    # features to tokens of the decoder
    projector: ProjectorConfig = MlpProjectorConfig()
    # a learned vector that ends each row of features of a grid of tiles (LLaVA-NeXT)
    newline: bool = False
    # id that stands for a feature in other libraries' texts; a note for exports, -1: the vocabulary has none
    image_token: int = -1
    # small matrices that learn in the place of the decoder's own; None: there are none
    lora: LoraConfig | None = None
    # the language model
    decoder: DecoderConfig = DecoderConfig()

    @property
    def feature_count(self) -> int:
        """Features of a tile, before the projector."""
        return self.image.patches + self.prefix_features

    @property
    def prefix_features(self) -> int:
        """Features before those of patches."""
        return int(self.features == "cls_patch")

    @property
    def tile_tokens(self) -> int:
        """Tokens that the decoder sees of a tile."""
        return self.projector.tokens(self.feature_count)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Features that the tower doesn't have or the projector can't read."""
        image = self.image
        if image.pools:
            yield "image.pool", f"= {image.pool!r} makes a vector that nothing reads; set it to 'none'"
        if image.patch_dropout:
            yield "image.patch_dropout", f"= {image.patch_dropout} would leave out features; set it to 0"
        if self.layer is not None and not -image.depth <= self.layer < 0:
            yield "layer", f"= {self.layer} must lie in -{image.depth}..-1, counted from the last block, or be None"
        if self.prefix_features and (not image.class_token or image.registers):
            yield "features", "= 'cls_patch' needs image.class_token = true, and image.registers = 0 behind it"
        problem = self.projector.grid_problem(image.grid, self.prefix_features)
        if problem:
            yield "projector", problem

    def forward_flops(self, tokens: int, tiles: int) -> int:
        """Model FLOPs of the forward pass of a row of `tokens` with `tiles`."""
        run = 0 if self.layer is None else self.layer + 1
        tower = dataclasses.replace(self.image, depth=self.image.depth + run).forward_flops(0)
        projector = self.projector.forward_flops(self.feature_count, self.image.width, self.decoder.width)
        adapters = 0 if self.lora is None else self.lora.forward_flops(self.decoder, tokens)
        return tiles * (tower + projector) + self.decoder.forward_flops(tokens) + adapters

    def merged(self, params: Any) -> "tuple[VisionLanguageConfig, Any]":
        """The same model, and its parameters, with what `lora` learned added to the decoder's matrices."""
        if self.lora is None:
            return self, params
        return dataclasses.replace(self, lora=None), {**params, "decoder": merged(params["decoder"], self.lora)}


class VisionLanguageModel(nn.Module):
    """Parameters: `image/...`, `projector/...`, `decoder/...`, and with newlines `newline` [D].

    Attributes:
        config: tower, projector and decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: VisionLanguageConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the parts."""
        config = self.config
        width = config.decoder.width
        self.image = config.image.build(None, self.dtype)
        self.projector = config.projector.build(config.image.grid, width, self.dtype)
        self.decoder = Decoder(config.decoder, self.dtype)
        self.newline = weight(self, "newline", normal(width**-0.5), ("embed",), (width,)) if config.newline else None

    def features(self, tiles_BxTxHxWxC: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Normalised tiles, and [B] typed keys or None -> what tokens may take of each row, [B, T * K, D]."""
        batch, tiles = tiles_BxTxHxWxC.shape[:2]
        images = constrain(tiles_BxTxHxWxC.reshape(batch * tiles, *tiles_BxTxHxWxC.shape[2:]), "batch", *[None] * 3)
        if keys is not None:
            keys = jax.vmap(lambda key: jax.random.split(key, tiles))(keys).reshape(-1)
        x = self.image(images, fold_in(keys, 0), layer=self.config.layer)["tokens"]
        x = x[:, self.config.image.prefix_tokens - self.config.prefix_features :]
        x = self.projector(x, fold_in(keys, 1))
        return constrain(x.reshape(batch, -1, x.shape[-1]), "batch", "length", "embed")

    def inputs(
        self,
        ids_BxL: jax.Array,
        slots_BxL: jax.Array,
        tiles_BxTxHxWxC: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """What enters the decoder, [B, L, D]: the embedding of each id, or the feature that its slot names.

        Args:
            ids_BxL: int32.
            slots_BxL: int32, `tile * K + feature`, -1 for a word, -2 for the newline.
            tiles_BxTxHxWxC: normalised tiles; T may be 0.
            keys: [B] typed keys, or None for nothing random.
        """
        x_BxLxD = self.decoder.embed(ids_BxL)
        if tiles_BxTxHxWxC.shape[1] or self.is_initializing():
            features = self.features(tiles_BxTxHxWxC, keys).astype(x_BxLxD.dtype)
            taken = jnp.take_along_axis(features, jnp.maximum(slots_BxL, 0)[:, :, None], axis=1)
            x_BxLxD = jnp.where(slots_BxL[:, :, None] >= 0, taken, x_BxLxD)
        if self.newline is not None:
            newline = jnp.broadcast_to(self.newline.astype(x_BxLxD.dtype), x_BxLxD.shape)
            x_BxLxD = jnp.where(slots_BxL[:, :, None] == NEWLINE, newline, x_BxLxD)
        return constrain(x_BxLxD, "batch", "length", "embed")

    def __call__(
        self,
        ids_BxL: jax.Array,
        slots_BxL: jax.Array,
        tiles_BxTxHxWxC: jax.Array,
        keys: jax.Array | None = None,
        *,
        segments_BxL: jax.Array | None = None,
        positions_BxL: jax.Array | None = None,
        prefix_BxL: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Rows of text and images -> "hidden" [B, L, D], and "head" [V, D], whose products with it are logits.

        Args:
            ids_BxL: see `inputs`.
            slots_BxL: see `inputs`.
            tiles_BxTxHxWxC: see `inputs`.
            keys: see `inputs`.
            segments_BxL: see `Decoder`.
            positions_BxL: see `Decoder`.
            prefix_BxL: see `Decoder`.
        """
        x_BxLxD = self.inputs(ids_BxL, slots_BxL, tiles_BxTxHxWxC, fold_in(keys, 0))
        with adapted(self.config.lora):
            hidden = self.decoder(
                x_BxLxD, fold_in(keys, 1), segments_BxT=segments_BxL, positions_BxT=positions_BxL, prefix_BxT=prefix_BxL
            )
        return {"hidden": hidden, "head": self.decoder.head_rows()}

    def logits(self, hidden_BxLxD: jax.Array) -> jax.Array:
        """States -> fp32 [B, L, V]."""
        return self.decoder.logits(hidden_BxLxD)


__all__ = ["VisionLanguageConfig", "VisionLanguageModel"]
