"""A decoder as a model of its own, that reads and writes text alone."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.models.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The decoder."""

    decoder: DecoderConfig = DecoderConfig()  # the decoder

    def forward_flops(self, tokens: int) -> int:
        """Model FLOPs of one row's forward pass."""
        return self.decoder.forward_flops(tokens)


class LanguageModel(nn.Module):
    """Parameters: `decoder/...`.

    Attributes:
        config: the decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: LanguageModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares the decoder."""
        self.decoder = Decoder(self.config.decoder, self.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        keys: jax.Array | None = None,
        *,
        segments_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        prefix_BxT: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """As the decoder's call: "hidden" [B, T, D], and "head" [V, D], whose products with the former are logits."""
        hidden = self.decoder(
            tokens, keys, segments_BxT=segments_BxT, positions_BxT=positions_BxT, prefix_BxT=prefix_BxT
        )
        return {"hidden": hidden, "head": self.decoder.head_rows()}

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """States -> fp32 [B, T, V]."""
        return self.decoder.logits(hidden_BxTxD)


__all__ = ["LanguageModel", "LanguageModelConfig"]
