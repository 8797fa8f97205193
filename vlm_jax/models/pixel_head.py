"""The head that turns a tower's tokens into pixels (AIM, El-Nouby et al. 2024, section 3.2).

Which patch an output speaks of, and what it is compared with, are the objectives' business.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.flops import transformer_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import InitName, xavier_uniform
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.norms import NORMS
from vlm_jax.models.position import sincos_2d
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.transformer import Block, TransformerConfig, run_blocks


@dataclasses.dataclass(frozen=True)
class PixelHeadConfig(TransformerConfig):
    """A pixel head; the defaults are AIM's for all its sizes (407 M parameters on the 0.6 B trunk)."""

    form: Literal["none", "mlp", "transformer"] = "mlp"  # one linear map, MLPs on each token, or whole blocks
    # Whether a block of MLPs also adds its first norm's output, x += norm(x), which is what is left of a block whose
    # attention is the identity (ml-l3m, the authors' code); false: MLPs alone, as the paper's text reads.
    identity_residual: bool = True
    width: int = 2048  # of the residual stream
    heads: int = 16  # attention heads of the form "transformer"; divides width
    mlp_dim: int = 8192  # hidden width of the MLP
    activation: ActivationName = "gelu"  # of the MLP
    qkv_bias: bool = False  # biases on query, key and value
    out_bias: bool = False  # bias on the output projection of attention
    mlp_bias: bool = False  # biases in the MLP
    init: InitName = "aim"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if self.form != "none" and self.width % 4:
            yield "width", f"= {self.width} must be divisible by 4 for the sine-cosine positions"

    def forward_flops(self, tokens: int, token_width: int, pixels: int) -> int:
        """Model FLOPs of one image's forward pass: `tokens` of `token_width` channels to `pixels` numbers each."""
        if self.form == "none":
            return 2 * tokens * token_width * pixels
        ends = 2 * tokens * self.width * (token_width + pixels)
        whole = transformer_flops(self.width, self.depth, self.mlp_dim, tokens, self.gated)
        attention = transformer_flops(self.width, self.depth, 0, tokens) if self.form == "mlp" else 0
        return ends + whole - attention


class MLPBlock(Block):
    """`Block` with the identity for its attention: x += ln_1 x; x += mlp(ln_2 x); the first line by config."""

    config: PixelHeadConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        layer: tuple[jax.Array, jax.Array],
        keys: jax.Array | None,
        mask: jax.Array | None,
        bias: jax.Array | None,
        context_BxSxC: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `Block`; tokens don't see each other, so `mask` and `bias` have no effect."""
        config, (index, rate) = self.config, layer
        keys, init = fold_in(keys, index), self.initializers.at_layer(index)
        if config.identity_residual:
            branch = NORMS[config.norm](config.norm_eps, name="ln_1")(x_BxTxD)
            x_BxTxD = self._add(x_BxTxD, branch, "layer_scale_1", rate, fold_in(keys, 0))
        x_BxTxD = self._add_mlp(x_BxTxD, init, rate, fold_in(keys, 1))
        return x_BxTxD, x_BxTxD if self.keep_output else None


class PixelHead(nn.Module):
    """Projection, fixed positions of its own, blocks, norm, and a linear map to the pixels of a patch.

    Attributes:
        config: sizes and form.
        grid: (rows, columns) of patches.
        pixels: numbers per patch, p p C.
        dtype: compute dtype; parameters are fp32.
    """

    config: PixelHeadConfig
    grid: tuple[int, int]
    pixels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_BxNxD: jax.Array,
        keys: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        causal: bool = False,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Tokens of the patches in raster order to pixels.

        Args:
            tokens_BxNxD: after the tower's last norm.
            keys: [B] typed keys, or None for no randomness.
            mask: as of the tower's attention, for the form "transformer".
            causal: likewise.
            intermediates: whether to return every block's output.

        Returns:
            "pixels" [B, N, p p C] in the compute dtype; with intermediates "projection" [B, N, W] and "blocks"
            [L, B, N, W].
        """
        config = self.config
        if config.form == "none":
            return {"pixels": self._pixels(tokens_BxNxD)}
        width = tokens_BxNxD.shape[-1]
        init = xavier_uniform(width, config.width)
        # The output's axis is the residual stream's, but one name can't stand for both axes of a kernel.
        project = Linear((config.width,), ("embed", "joint"), init, dtype=self.dtype, name="projection")
        projection = constrain(project(tokens_BxNxD), "batch", "length", "embed")
        positions = jnp.asarray(sincos_2d(self.grid, config.width), self.dtype)
        x, blocks = run_blocks(
            config,
            projection + positions[None],
            keys,
            mask=mask,
            causal=causal,
            intermediates=intermediates,
            dtype=self.dtype,
            block=MLPBlock if config.form == "mlp" else None,
        )
        outputs = {"pixels": self._pixels(NORMS[config.norm](config.norm_eps, name="norm")(x))}
        return outputs if blocks is None else outputs | {"projection": projection, "blocks": blocks}

    def _pixels(self, x_BxNxD: jax.Array) -> jax.Array:
        init = xavier_uniform(x_BxNxD.shape[-1], self.pixels)
        linear = Linear((self.pixels,), ("embed", "joint"), init, dtype=self.dtype, name="pixels")
        return constrain(linear(x_BxNxD), "batch", "length", None)


__all__ = ["PixelHead", "PixelHeadConfig"]
