"""AIMv2: a vision transformer, and a causal decoder that goes over its patches and then over the caption.

Fini et al. 2024; sizes are those of the released code (ml-aim), the decoder's details those of the authors' training
code (ml-l3m). What is predicted of patches and words is in `vlm_jax.objectives.aimv2`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal, variance_scaling

from vlm_jax.flops import transformer_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.aim import patch_token_problems
from vlm_jax.models.initializers import INITIALIZERS, InitName, torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.norms import NORMS, NormName
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.transformer import TransformerConfig, run_blocks
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


def aimv2_encoder(
    width: int,
    depth: int,
    heads: int,
    mlp_dim: int,
    *,
    image_size: int | tuple[int, int] = 224,
    pos_embed: Literal["learned", "sincos"] = "learned",
) -> ViTConfig:
    """An encoder of AIMv2: RMS norms, SwiGLU, patches of 14 pixels, no biases but the patches' own.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        heads: attention heads.
        mlp_dim: hidden width of the gated MLP.
        image_size: in pixels.
        pos_embed: "sincos" for the models of native resolution.
    """
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=1e-5,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        image_size=image_size,
        patch_size=14,
        pool="none",
        class_token=False,
        pos_embed=pos_embed,
        patch_norm=True,
        patch_bias=True,
        pre_norm=False,
        init="aim",
    )


@dataclasses.dataclass(frozen=True)
class MultimodalDecoderConfig(TransformerConfig):
    """A causal decoder over patches and words; the defaults are AIMv2's for all sizes of encoders."""

    width: int = 1024  # of the residual stream
    heads: int = 8  # attention heads; divides width
    mlp_dim: int = 2816  # hidden width of the gated MLP
    activation: ActivationName = "silu"  # of the MLP
    gated: bool = True  # whether the MLP has a gate
    norm: NormName = "rms"  # layer norm, or root mean square norm
    qkv_bias: bool = False  # biases on query, key and value
    out_bias: bool = False  # bias on the output projection of attention
    mlp_bias: bool = False  # biases in the MLP
    init: InitName = "aim"  # recipe of the initial weights
    vocab_size: int = 32_000  # number of token ids
    length: int = 77  # tokens per caption
    # padding id, which is not predicted; SigLIP's vocabulary pads with the end token 1, which then isn't predicted too
    pad_id: int = 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        for key, value in (("vocab_size", self.vocab_size), ("length", self.length)):
            if value < 1:
                yield key, f"= {value} must be at least 1"

    def forward_flops(self, patches: int, token_width: int, pixels: int) -> int:
        """Model FLOPs of one pair's forward pass: `patches` tokens of `token_width` channels, then the caption."""
        ends = 2 * patches * self.width * (token_width + pixels) + 2 * self.length * self.width * self.vocab_size
        return ends + transformer_flops(self.width, self.depth, self.mlp_dim, patches + self.length, self.gated)


@dataclasses.dataclass(frozen=True)
class Aimv2ModelConfig:
    """Encoder and decoder; the defaults are AIMv2-L."""

    # the image encoder
    image: ViTConfig = dataclasses.field(default_factory=lambda: aimv2_encoder(1024, 24, 8, 2816))
    decoder: MultimodalDecoderConfig = MultimodalDecoderConfig()  # the multimodal decoder

    def problems(self) -> Iterator[tuple[str, str]]:
        """An encoder that gives no token of each patch and of nothing else, or has a mask token that is never used."""
        yield from patch_token_problems(self.image)
        if self.image.mask_token:
            yield "image.mask_token", "= true, but no patch is ever masked here; set it to false"

    @property
    def pixels(self) -> int:
        """Numbers in a patch."""
        return 3 * self.image.patch_size**2

    def build(self, dtype: Dtype) -> "Aimv2":
        """The module."""
        return Aimv2(self, dtype)

    def forward_flops(self) -> int:
        """Model FLOPs of one pair's forward pass."""
        image = self.image
        return image.forward_flops(0) + self.decoder.forward_flops(image.patches, image.width, self.pixels)


class MultimodalDecoder(nn.Module):
    """Projection of the patches, embedding of the words, blocks, norm, and a linear head for each kind.

    Attributes:
        config: sizes.
        pixels: numbers per patch, p p 3.
        dtype: compute dtype; parameters are fp32.
    """

    config: MultimodalDecoderConfig
    pixels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image_BxNxC: jax.Array, texts_BxL: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens of the encoder and int32 ids of captions -> (pixels [B, N, p p 3], logits [B, L, V]).

        The pixels at a patch are predicted from it and those before it (and from what the encoder showed it of
        others); the logits at place t from all patches and the words before t, so that they are of word t itself.
        """
        config, count = self.config, image_BxNxC.shape[1]
        torchs = torch_linear(image_BxNxC.shape[-1])
        project = Linear((config.width,), ("embed", "joint"), torchs, torchs, dtype=self.dtype, name="image_projection")
        image = constrain(project(image_BxNxC), "batch", "length", "embed")
        x = constrain(jnp.concatenate([image, self._words(texts_BxL)], axis=1), "batch", "length", "embed")
        x, _ = run_blocks(config, x, keys, causal=True, dtype=self.dtype)
        x = NORMS[config.norm](config.norm_eps, name="norm")(x)
        pixels = constrain(self._head("pixels", self.pixels, None, x[:, :count]), "batch", "length", None)
        logits = constrain(self._head("words", config.vocab_size, "vocab", x[:, count:]), "batch", "length", "vocab")
        return pixels, logits

    def _words(self, texts_BxL: jax.Array) -> jax.Array:
        """[B, L] -> [B, L, W]: a learned start, and the embeddings of all words but the last, with positions."""
        config = self.config
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        table = weight(self, "token_embed", init.token, ("vocab", "embed"), (config.vocab_size, config.width))
        start = weight(self, "start_token", init.class_token, ("embed",), (config.width,)).astype(self.dtype)
        positions = weight(self, "pos_embed", normal(0.01), (None, "embed"), (config.length, config.width))
        # Whole before the lookup, for the reason given in `text`.
        table = constrain(table.astype(self.dtype), "vocab", "embed")
        positions = constrain(positions.astype(self.dtype), None, "embed")
        words = table[texts_BxL[:, :-1]]
        start = jnp.broadcast_to(start, (words.shape[0], 1, config.width))
        return jnp.concatenate([start, words], axis=1) + positions[None]

    def _head(self, name: str, features: int, logical: str | None, x: jax.Array) -> jax.Array:
        # Truncated normal of variance 1 / (fan in (1 + depth)), as ml-l3m's "fan_in_depth_scaled".
        init = variance_scaling(1 / (1 + self.config.depth), "fan_in", "truncated_normal")
        return Linear((features,), ("embed", logical), init, use_bias=False, dtype=self.dtype, name=name)(x)


class Aimv2(nn.Module):
    """Parameters: `image/...` and `decoder/...`.

    Attributes:
        config: encoder and decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: Aimv2ModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares encoder and decoder."""
        self.image = self.config.image.build(None, self.dtype)
        self.decoder = MultimodalDecoder(self.config.decoder, self.config.pixels, self.dtype)

    def __call__(
        self,
        images: jax.Array,
        texts: jax.Array,
        keys: jax.Array | None = None,
        *,
        attention_mask: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Predicts patches and words.

        Args:
            images: normalised float [B, H, W, 3].
            texts: int32 [B, L] token ids of the tokenizer.
            keys: [B] typed keys, or None for no randomness.
            attention_mask: bool, broadcasts to [B, H, N, N], True where attention between patches is allowed in the
                encoder; the decoder is causal.

        Returns:
            "pixels" [B, N, p p 3], "logits" [B, L, V] of the words themselves, and "image/tokens" [B, N, D].
        """
        image = self.image(images, fold_in(keys, 0), attention_mask=attention_mask)
        pixels, logits = self.decoder(image["tokens"], texts, fold_in(keys, 1))
        return {"pixels": pixels, "logits": logits} | {f"image/{name}": value for name, value in image.items()}

    def logits(self, image_BxNxD: jax.Array, texts: jax.Array) -> jax.Array:
        """As "logits" of `__call__`, from the encoder's tokens."""
        return self.decoder(image_BxNxD, texts)[1]


# Width, blocks, heads, hidden width of the MLP: the released code.
SIZES = {
    "AIMv2-B/14": (768, 12, 6, 2048),
    "AIMv2-L/14": (1024, 24, 8, 2816),
    "AIMv2-H/14": (1536, 24, 12, 4096),
    "AIMv2-1B/14": (2048, 24, 16, 5632),
    "AIMv2-3B/14": (3072, 24, 24, 8192),
}
AIMV2: dict[str, Aimv2ModelConfig] = {
    name: Aimv2ModelConfig(image=aimv2_encoder(*sizes)) for name, sizes in SIZES.items()
}

__all__ = ["AIMV2", "Aimv2", "Aimv2ModelConfig", "MultimodalDecoder", "MultimodalDecoderConfig", "aimv2_encoder"]
