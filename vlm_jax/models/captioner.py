"""An image tower and a text decoder that writes the caption, as in VirTex (Desai and Johnson 2021).

The captioning baseline of CLIP (Radford et al. 2021, section 2.3). There is no joint space here; CoCa has both.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.mesh import constrain
from vlm_jax.models.captions import CaptionForm, CaptionStart
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import INITIALIZERS
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.transformer import CrossDecoderConfig, run_blocks
from vlm_jax.models.vit import ViTConfig
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class TextDecoderConfig(CrossDecoderConfig):
    """A text decoder; the defaults are the sizes of CLIP's text tower (63 M parameters without cross-attention)."""

    width: int = 512  # of the residual stream
    heads: int = 8  # attention heads; divides width
    mlp_dim: int = 2048  # hidden width of the MLP
    vocab_size: int = 49408  # number of token ids
    length: int = 77  # tokens per caption
    start: CaptionStart = CaptionStart()  # what captions begin with
    eos_id: int = 49407  # end-of-text id
    pad_id: int = 0  # padding id

    @property
    def captions(self) -> CaptionForm:
        """Rows of captions."""
        return CaptionForm(self.start, self.length, self.eos_id, self.pad_id)

    @property
    def positions(self) -> int:
        """Tokens that something is predicted after."""
        return self.length + self.start.added - 1

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.positions < 1:
            yield "length", f"= {self.length} leaves nothing to predict; use 2 or more"
        for key, value in (("start.id", self.start.id), ("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if not 0 <= value < self.vocab_size:
                yield key, f"= {value} is no id of a vocabulary of {self.vocab_size}"
        if not self.causal:
            yield "causal", "= false would show the decoder the very words that it is to predict"


@dataclasses.dataclass(frozen=True)
class CaptionerModelConfig:
    """An image tower and the decoder that looks at its tokens."""

    image: ImageTowerConfig = dataclasses.field(default_factory=lambda: ViTConfig(pool="none"))  # the image tower
    decoder: TextDecoderConfig = TextDecoderConfig()  # the text decoder

    def forward_flops(self) -> int:
        """Model FLOPs of one pair's forward pass."""
        tokens, decoder = self.decoder.positions, self.decoder
        stack = decoder.stack_flops(tokens, self.image.token_count, self.image.token_width)
        return self.image.forward_flops(0) + stack + 2 * tokens * decoder.width * decoder.vocab_size


class TextDecoder(nn.Module):
    """Embeddings, blocks with cross-attention, and logits by the table of the embeddings (tied, as in VirTex).

    Attributes:
        config: the decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: TextDecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids_BxT: jax.Array,
        context_BxSxC: jax.Array,
        keys: jax.Array | None = None,
        *,
        position: jax.Array | None = None,
    ) -> jax.Array:
        """Ids and context -> logits [B, T, V]; with a position () those of that token alone, [B, 1, V]."""
        config = self.config
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        table = weight(self, "token_embed", init.token, ("vocab", "embed"), (config.vocab_size, config.width))
        positions = weight(self, "pos_embed", init.position, (None, "embed"), (config.positions, config.width))
        # Whole before the lookup, for the reason given in `text`.
        table = constrain(table.astype(self.dtype), "vocab", "embed")
        positions = constrain(positions.astype(self.dtype), None, "embed")
        x = table[ids_BxT] + positions[None, : ids_BxT.shape[1]]
        x, _ = run_blocks(config, x, keys, context=context_BxSxC, causal=config.causal, dtype=self.dtype)
        if position is not None:
            x = jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1)
        x = LayerNorm(config.norm_eps, name="ln_final")(x)
        return constrain(jnp.einsum("BTD,VD->BTV", x, table), "batch", "length", "vocab")


class Captioner(nn.Module):
    """Parameters: `image/...` and `decoder/...`.

    Attributes:
        config: tower and decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: CaptionerModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares tower and decoder."""
        self.image = self.config.image.build(None, self.dtype)
        self.decoder = TextDecoder(self.config.decoder, self.dtype)

    def __call__(
        self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None, *, intermediates: bool = False
    ) -> dict[str, jax.Array]:
        """Captions images, with the true words before each in view.

        Args:
            images: normalised float [B, H, W, 3].
            texts: int32 [B, L] token ids of the tokenizer.
            keys: [B] typed keys, one a pair, or None at evaluation.
            intermediates: whether to return every block's output of the image tower.

        Returns:
            "caption_logits" [B, T - 1, V], T being the number of tokens with the start, and the tower's outputs as
            "image/tokens", ...
        """
        image = self.image(images, fold_in(keys, 0), intermediates=intermediates)
        words = self.config.decoder.captions.inputs(texts)
        logits = self.decoder(words, image["tokens"], fold_in(keys, 1))
        return {"caption_logits": logits} | {f"image/{name}": value for name, value in image.items()}

    def image_tokens(self, images: jax.Array) -> jax.Array:
        """Normalised float [B, H, W, 3] -> [B, S, D], what the decoder looks at."""
        return self.image(images)["tokens"]

    def image_vectors(self, images: jax.Array, which: str) -> jax.Array:
        """Normalised float [B, H, W, 3] -> fp32 [B, D]: the tower's "pooled", or the mean of its tokens."""
        del which  # There is no space that the vector could be embedded in.
        outputs = self.image(images)
        return outputs.get("pooled", outputs["tokens"].mean(axis=1)).astype(jnp.float32)

    def caption_logits(self, image_BxSxD: jax.Array, texts: jax.Array) -> jax.Array:
        """As `__call__`, from the image's tokens."""
        return self.decoder(self.config.decoder.captions.inputs(texts), image_BxSxD)

    def next_logits(self, image_BxSxD: jax.Array, ids_BxT: jax.Array, position: jax.Array) -> jax.Array:
        """Logits [B, V] of what follows `position` () of the ids, which include the start."""
        return self.decoder(ids_BxT, image_BxSxD, position=position)[:, 0]


__all__ = ["Captioner", "CaptionerModelConfig", "TextDecoder", "TextDecoderConfig"]
