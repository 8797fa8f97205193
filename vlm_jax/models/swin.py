"""The Swin transformer, version 1 (Liu et al. 2021): attention in windows that shift, in stages that merge patches.

Parameter layout: `stage1/blocks/regular/...` and `stage1/blocks/shifted/...` hold the even and the odd blocks of a
stage, stacked by pairs; `merge1` halves the sides of its output. What windows are is in `windows`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.mesh import constrain
from vlm_jax.models.attention import Attention, AttentionImpl
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import MLP, ActivationName
from vlm_jax.models.norms import LayerNorm
from vlm_jax.models.patches import PatchEmbed
from vlm_jax.models.pooling import mean_tokens
from vlm_jax.models.projection import ProjectionConfig, project
from vlm_jax.models.remat import RematName
from vlm_jax.models.stochastic import drop_path, dropout, fold_in
from vlm_jax.models.transformer import scanned
from vlm_jax.models.weights import weight
from vlm_jax.models.windows import WindowBias, Windows, merge_windows, partition_windows


@dataclasses.dataclass(frozen=True)
class SwinConfig(ImageTowerConfig):
    """An image tower; the defaults are Swin-T's at 224 pixels."""

    image_size: int = 224  # side of the square images in pixels; a multiple of the patch
    patch_size: int = 4  # side of a patch in pixels
    width: int = 96  # channels of the first stage; each further one has twice as many
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage; even, as every other one shifts its windows
    heads: tuple[int, ...] = (3, 6, 12, 24)  # attention heads of each stage
    window: int = 7  # side of a window in tokens; a stage that is not larger is one window
    mlp_ratio: float = 4.0  # hidden width of the MLP over the width
    activation: ActivationName = "gelu"  # of the MLP; "gelu" is the exact one
    norm_eps: float = 1e-5  # added to the variance in every norm
    pool: Literal["mean", "none"] = "mean"  # mean of the last tokens, or nothing
    mask_token: bool = False  # a learned token in the place of masked patches (SimMIM)
    drop_path: float = 0.0  # stochastic depth of the last block, rising linearly from 0 at the first
    dropout: float = 0.0  # on the output of attention and of the MLP
    scan: bool = True  # one compiled pair of blocks in a loop for each stage; false unrolls it
    remat: RematName = "none"  # what a pair of blocks keeps for its backward pass
    attention_impl: AttentionImpl = "xla"  # attention kernel; windows are short, tiling gains nothing
    init: InitName = "swin"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            yield "image_size", f"= {self.image_size} must be a positive multiple of patch_size {self.patch_size}"
        for key, value in (("width", self.width), ("window", self.window)):
            if value < 1:
                yield key, f"= {value} must be at least 1"
        if not self.depths or min(self.depths) < 2 or any(depth % 2 for depth in self.depths):
            yield "depths", f"= {self.depths} must be even and at least 2: blocks come in pairs, the second one shifted"
        if len(self.heads) != len(self.depths):
            yield "heads", f"= {self.heads} must have a number for each of the {len(self.depths)} stages of depths"
        elif any(heads < 1 or width % heads for heads, width in zip(self.heads, self.widths, strict=True)):
            yield "heads", f"= {self.heads} does not divide the widths of the stages, {self.widths}"
        for key, value in (("drop_path", self.drop_path), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                yield key, f"= {value} is a probability; it must lie in [0, 1)"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def windows(self) -> tuple[Windows, ...]:
        """The windows of each stage; sides are rounded up where patches are merged."""
        sides = [self.image_size // self.patch_size]
        for _ in self.depths[1:]:
            sides.append(-(-sides[-1] // 2))
        return tuple(Windows.of((side, side), self.window) for side in sides)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size, self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.windows[0].grid

    @property
    def stride(self) -> int:
        """Side in pixels of what one of "tokens" stands for."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def pools(self) -> bool:
        """Whether the tower makes one vector of an image."""
        return self.pool != "none"

    @property
    def pooled_width(self) -> int:
        """Channels of "pooled"."""
        return self.widths[-1]

    @property
    def token_width(self) -> int:
        """Channels of "tokens"."""
        return self.widths[-1]

    @property
    def token_count(self) -> int:
        """Places of the last stage."""
        rows, columns = self.windows[-1].grid
        return rows * columns

    def build(self, projection: ProjectionConfig | None, dtype: Dtype) -> "Swin":
        """The module."""
        return Swin(self, projection, dtype)

    def forward_flops(self, embed_dim: int) -> int:
        """See the base."""
        rows, columns = self.grid
        total = 2 * rows * columns * 3 * self.patch_size**2 * self.width
        for stage, (windows, width, depth) in enumerate(zip(self.windows, self.widths, self.depths, strict=True)):
            tokens = windows.grid[0] * windows.grid[1]
            padded = windows.padded[0] * windows.padded[1]
            attention = 2 * padded * 4 * width**2 + 2 * 2 * padded * windows.side**2 * width
            total += depth * (attention + 2 * tokens * 2 * width * self.mlp_dim(stage))
            if stage + 1 < len(self.depths):
                after = self.windows[stage + 1].grid
                total += 2 * after[0] * after[1] * 4 * width * 2 * width
        return total + 2 * self.token_width * embed_dim

    def mlp_dim(self, stage: int) -> int:
        """Hidden width of the MLPs of a stage, counted from 0."""
        return int(self.mlp_ratio * self.widths[stage])


# Liu et al. 2021, section 3.3
SWIN: dict[str, SwinConfig] = {
    "Swin-T": SwinConfig(),
    "Swin-S": SwinConfig(depths=(2, 2, 18, 2)),
    "Swin-B": SwinConfig(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
    "Swin-L": SwinConfig(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48)),
}


class Swin(nn.Module):
    """See `SwinConfig`.

    Attributes:
        config: the tower.
        projection: the head on the pooled vector, or None.
        dtype: compute dtype; parameters are fp32.
    """

    config: SwinConfig
    projection: ProjectionConfig | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        keys: jax.Array | None = None,
        *,
        masked_BxN: jax.Array | None = None,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Encodes normalised images.

        Args:
            images_BxHxWxC: float, of the config's image size.
            keys: [B] typed keys, one a row, or None at evaluation (no dropping of anything).
            masked_BxN: bool, True for the patches whose embedding the mask token replaces; needs `config.mask_token`.
            intermediates: whether to return what stands between the layers.

        Returns:
            "tokens" [B, T, D] after the last norm; "pooled" [B, D], their mean, unless pool is "none"; "embedding"
            [B, E] if there is a projection; with intermediates "embed" [B, N, D1], the first block's input, "stage1",
            ... [L, B, T, D], every block's output, and "merge1", ... [B, T, D], the merged patches.

        Raises:
            ValueError: the images have another size than the config.
        """
        config = self.config
        if images_BxHxWxC.shape[1:3] != config.image_shape:
            raise ValueError(
                f"this tower takes images of {config.image_size}x{config.image_size} (height x width), not "
                f"{images_BxHxWxC.shape[1]}x{images_BxHxWxC.shape[2]}; resize them, or set image_size"
            )
        x = self._embed(images_BxHxWxC, masked_BxN)
        named = {"embed": x}
        keys = fold_in(keys, 1)
        ends = np.cumsum(config.depths)
        rates = np.linspace(0.0, config.drop_path, ends[-1], dtype=np.float32)
        for stage, (depth, windows) in enumerate(zip(config.depths, config.windows, strict=True)):
            layers = np.arange(ends[stage] - depth, ends[stage]).reshape(-1, 2)
            run = Stage(config, stage, intermediates, dtype=self.dtype, name=f"stage{stage + 1}")
            x, blocks = run(x, jnp.asarray(layers), jnp.asarray(rates[layers]), keys)
            if blocks is not None:
                named[f"stage{stage + 1}"] = blocks
            if stage + 1 < len(config.depths):
                init = self._initializers(stage)
                x = PatchMerge(windows.grid, config.norm_eps, init, dtype=self.dtype, name=f"merge{stage + 1}")(x)
                named[f"merge{stage + 1}"] = x
        outputs = {"tokens": LayerNorm(config.norm_eps, name="ln_post")(x)}
        if config.pools:
            outputs["pooled"] = mean_tokens(outputs["tokens"])
        if self.projection is not None:
            init = self._initializers(len(config.depths) - 1).projection
            outputs["embedding"] = project(self.projection, init, outputs["pooled"], self.dtype)
        return outputs | named if intermediates else outputs

    def _initializers(self, stage: int) -> Initializers:
        config = self.config
        return INITIALIZERS[config.init](config.widths[stage], sum(config.depths), config.mlp_dim(stage))

    def _embed(self, images: jax.Array, masked_BxN: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, N, D]: normed patch embeddings, some of them replaced by the mask token."""
        config, init = self.config, self._initializers(0)
        embed = PatchEmbed(config.patch_size, config.width, True, init, dtype=self.dtype, name="patch_embed")
        x = LayerNorm(config.norm_eps, name="patch_norm")(constrain(embed(images), "batch", "length", "embed"))
        if config.mask_token:
            token = weight(self, "mask_token", init.mask_token, ("embed",), (config.width,)).astype(self.dtype)
            if masked_BxN is not None:
                x = jnp.where(masked_BxN[:, :, None], jnp.broadcast_to(token, x.shape), x)
        return constrain(x, "batch", "length", "embed")


class Stage(nn.Module):
    """The blocks of a stage, scanned in pairs.

    Attributes:
        config: the tower.
        stage: which, from 0.
        keep_outputs: whether to return every block's output.
        dtype: compute dtype.
    """

    config: SwinConfig
    stage: int
    keep_outputs: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, layers_Px2: jax.Array, rates_Px2: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, T, D] -> the same, and all outputs [2 P, B, T, D] or None; numbers and drop-path rates by pair."""
        config, pairs = self.config, layers_Px2.shape[0]
        stack = scanned(SwinPair, pairs, config.remat, config.scan, broadcast=1)
        blocks = stack(config, self.stage, self.keep_outputs, self.dtype, name="blocks")
        x_BxTxD, outputs = blocks(x_BxTxD, (layers_Px2, rates_Px2), keys)
        return x_BxTxD, None if outputs is None else outputs.reshape(2 * pairs, *x_BxTxD.shape)


class SwinPair(nn.Module):
    """A block with windows from the corner, and one whose windows are shifted by half of their side.

    Attributes: see `Stage`.
    """

    config: SwinConfig
    stage: int
    keep_outputs: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, layers: tuple[jax.Array, jax.Array], keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Carry [B, T, D] and both outputs [2, B, T, D] or None; `layers` are the numbers [2] and rates [2]."""
        (indices, rates), outputs = layers, []
        for i, name in enumerate(("regular", "shifted")):
            block = SwinBlock(self.config, self.stage, bool(i), self.dtype, name=name)
            x_BxTxD = block(x_BxTxD, rates[i], fold_in(keys, indices[i]))
            outputs.append(x_BxTxD)
        return x_BxTxD, jnp.stack(outputs) if self.keep_outputs else None


class SwinBlock(nn.Module):
    """x += attention(ln_1 x) inside of windows; x += mlp(ln_2 x).

    Attributes:
        config: the tower.
        stage: which, from 0.
        shifted: whether the windows are shifted, where there are several.
        dtype: compute dtype.
    """

    config: SwinConfig
    stage: int
    shifted: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `rate` is that of drop path."""
        config, width, hidden = self.config, x_BxTxD.shape[-1], self.config.mlp_dim(self.stage)
        init = INITIALIZERS[config.init](width, sum(config.depths), hidden)
        branch = self._attend(LayerNorm(config.norm_eps, name="ln_1")(x_BxTxD), init)
        x_BxTxD = checkpoint_name(self._add(x_BxTxD, branch, rate, fold_in(keys, 0)), "middle")
        mlp = MLP(hidden, config.activation, init, dtype=self.dtype, name="mlp")
        branch = mlp(LayerNorm(config.norm_eps, name="ln_2")(x_BxTxD))
        return self._add(x_BxTxD, branch, rate, fold_in(keys, 1))

    def _attend(self, x_BxTxD: jax.Array, init: Initializers) -> jax.Array:
        config, windows, heads = self.config, self.config.windows[self.stage], self.config.heads[self.stage]
        shift = windows.shift if self.shifted else 0
        x_MxSxD = constrain(partition_windows(x_BxTxD, windows, shift), "batch", None, "embed")
        bias_1xHxSxS = WindowBias(windows.side, heads, init, name="position_bias")()
        mask = None
        if shift:
            mask_WxSxS = jnp.asarray(windows.mask())
            # Repeated by the compiler where it is read; no mask of all rows is ever written.
            copies = x_MxSxD.shape[0] // mask_WxSxS.shape[0]
            mask = jnp.broadcast_to(mask_WxSxS[None], (copies, *mask_WxSxS.shape))
            mask = mask.reshape(x_MxSxD.shape[0], 1, *mask_WxSxS.shape[1:])
        attention = Attention(heads, init, impl=config.attention_impl, dtype=self.dtype, name="attn")
        x_MxSxD = attention(x_MxSxD, bias=bias_1xHxSxS, mask=mask)
        return merge_windows(x_MxSxD, windows, shift)

    def _add(self, x: jax.Array, branch: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        branch = dropout(branch, self.config.dropout, fold_in(keys, 0))
        if self.config.drop_path > 0:
            branch = drop_path(branch, rate, fold_in(keys, 1))
        return constrain(x + branch, "batch", "length", "embed")


class PatchMerge(nn.Module):
    """Four neighbours as one token of twice the width: half of the sides, rounded up.

    Attributes:
        grid: (rows, columns) of the tokens.
        eps: of the norm.
        initializers: those of the tower.
        dtype: compute dtype.
    """

    grid: tuple[int, int]
    eps: float
    initializers: Initializers
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, about T / 4, 2 D]."""
        (rows, columns), (batch, _, width) = self.grid, x_BxTxD.shape
        x = x_BxTxD.reshape(batch, rows, columns, width)
        x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
        x = x.reshape(batch, (rows + 1) // 2, 2, (columns + 1) // 2, 2, width)
        # Of the four neighbours the row changes first, as the published weights have it.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * width)
        x = LayerNorm(self.eps, name="ln")(constrain(x, "batch", "length", "embed"))
        kernel = self.initializers.fc1_kernel
        reduce = Linear((2 * width,), ("embed", "joint"), kernel, use_bias=False, dtype=self.dtype, name="reduction")
        return constrain(reduce(x), "batch", "length", "embed")


__all__ = ["SWIN", "Swin", "SwinConfig"]
