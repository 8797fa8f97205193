"""CoCa (Yu et al. 2022): two towers, and a decoder that goes on from the text tower's tokens to a caption.

The losses are in `vlm_jax.objectives.coca`; the pooling of the image tower's tokens in `attentional_pool`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.mesh import constrain
from vlm_jax.models.attentional_pool import AttentionalPoolConfig
from vlm_jax.models.captions import CaptionForm, CaptionStart
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import INITIALIZERS
from vlm_jax.models.linear import Linear
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.text import TextConfig
from vlm_jax.models.transformer import CrossDecoderConfig, run_blocks
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig
from vlm_jax.models.vit import ViTConfig

UNIMODAL = TextConfig(width=768, heads=12, mlp_dim=3072, activation="gelu", length=76, pool="cls", mask_padding=True)


@dataclasses.dataclass(frozen=True)
class CoCaModelConfig(TwoTowerConfig):
    """Towers and decoder; the defaults are the sizes of open_clip's coca_ViT-L-14, in the paper's form of pooling."""

    # the image tower with its poolers
    image: ImageTowerConfig = dataclasses.field(default_factory=AttentionalPoolConfig)
    # the text tower, unimodal: causal, with an appended token that stands for the text
    text: TextConfig = UNIMODAL
    # the decoder on its tokens, multimodal
    decoder: CrossDecoderConfig = CrossDecoderConfig(activation="gelu")
    start: CaptionStart = CaptionStart()  # what captions begin with
    embed_dim: int = 768  # dimension of the joint space

    def problems(self) -> Iterator[tuple[str, str]]:
        """A text tower that the decoder can't go on from."""
        yield from super().problems()
        if self.text.pool != "cls":
            yield "text.pool", f"= {self.text.pool!r} must be 'cls', the token that CoCa appends to a text"
        if not (self.text.causal and self.decoder.causal):
            tower = "text" if not self.text.causal else "decoder"
            yield f"{tower}.causal", "= false would show the decoder the very words that it is to predict"
        if self.text.width != self.decoder.width:
            yield (
                "decoder.width",
                f"= {self.decoder.width} must be text.width = {self.text.width}, whose tokens it takes",
            )
        if not 0 <= self.start.id < self.text.vocab_size:
            yield "start.id", f"= {self.start.id} is no id of a vocabulary of {self.text.vocab_size}"
        if self.text.mask_padding and self.start.id == self.text.pad_id:
            yield "start.id", f"= {self.start.id} is text.pad_id, which is masked; use another id, such as text.eos_id"

    @property
    def captions(self) -> CaptionForm:
        """Rows of captions."""
        return CaptionForm(self.start, self.text.length, self.text.eos_id, self.text.pad_id)

    @property
    def text_tower(self) -> TextConfig:
        """With a position for the start token, where the model adds it."""
        return dataclasses.replace(self.text, length=self.text.length + self.start.added)

    def build(self, dtype: Dtype) -> "CoCa":
        """See the base."""
        return CoCa(self, dtype)

    def forward_flops(self) -> int:
        """See the base."""
        tokens = self.text_tower.length - 1
        stack = self.decoder.stack_flops(tokens, self.image.token_count, self.image.token_width)
        return super().forward_flops() + stack + 2 * tokens * self.decoder.width * self.text.vocab_size


class CoCa(TwoTower):
    """Parameters: those of `TwoTower`, and `decoder/...`."""

    config: CoCaModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the decoder too."""
        super().setup()
        self.decoder = Decoder(self.config.decoder, self.config.text.vocab_size, self.dtype)

    def __call__(
        self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None, **options: Any
    ) -> dict[str, jax.Array]:
        """As `TwoTower`, and "caption_logits" [B, T - 1, V]: after each token but the last, with the image in view.

        T is the number of tokens with the start; see `CaptionStart`.
        """
        outputs = super().__call__(images, self.config.start.put_before(texts), keys, **options)
        words, image = outputs["text/stream"][:, :-1], outputs["image/tokens"]
        return outputs | {"caption_logits": self.decoder(words, image, fold_in(keys, 2))}

    def encode_text(self, texts: jax.Array, keys: jax.Array | None = None, *, normalize: bool = True) -> jax.Array:
        """See the base."""
        return super().encode_text(self.config.start.put_before(texts), keys, normalize=normalize)

    def image_tokens(self, images: jax.Array) -> jax.Array:
        """Normalised float [B, H, W, 3] -> [B, Q, D], what the decoder looks at."""
        return self.image(images)["tokens"]

    def next_logits(self, image_BxQxD: jax.Array, ids_BxT: jax.Array, position: jax.Array) -> jax.Array:
        """Logits [B, V] of what follows `position` () of the ids, which include the start."""
        return self.decoder(self.text(ids_BxT)["stream"], image_BxQxD, position=position)[:, 0]


class Decoder(nn.Module):
    """Blocks with cross-attention, a norm, and a linear map to the vocabulary.

    Attributes:
        config: of the blocks.
        vocab_size: number of token ids.
        dtype: compute dtype; parameters are fp32.
    """

    config: CrossDecoderConfig
    vocab_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        context_BxSxC: jax.Array,
        keys: jax.Array | None = None,
        *,
        position: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens and context -> logits [B, T, V]; with a position () those of that token alone, [B, 1, V]."""
        config = self.config
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        x, _ = run_blocks(config, x_BxTxD, keys, context=context_BxSxC, causal=config.causal, dtype=self.dtype)
        if position is not None:
            x = jax.lax.dynamic_slice_in_dim(x, position, 1, axis=1)
        x = LayerNorm(config.norm_eps, name="ln_final")(x)
        head = Linear(
            (self.vocab_size,), ("embed", "vocab"), init.projection, use_bias=False, dtype=self.dtype, name="head"
        )
        return constrain(head(x), "batch", "length", "vocab")


# open_clip's coca_ViT-L-14 as it was released
COCA_L14 = CoCaModelConfig(
    image=AttentionalPoolConfig(
        ViTConfig(
            width=1024,
            depth=24,
            heads=16,
            mlp_dim=4096,
            patch_size=14,
            image_size=224,
            activation="gelu",
            pool="none",
            post_norm=False,
        ),
        form="open_clip",
    ),
    text=dataclasses.replace(UNIMODAL, mask_shift=1),
    decoder=CrossDecoderConfig(activation="gelu", self_mlp_dim=3072),
)

__all__ = ["COCA_L14", "CoCa", "CoCaModelConfig"]
