"""The vision transformer of every image objective. Swin and convolutional towers are other modules."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import constant

from vlm_jax.flops import vit_flops
from vlm_jax.mesh import constrain
from vlm_jax.models.image_tower import ImageTowerConfig
from vlm_jax.models.initializers import INITIALIZERS, Initializers, InitName
from vlm_jax.models.norms import NORMS
from vlm_jax.models.patches import PatchEmbed
from vlm_jax.models.pooling import MapHead, mean_tokens
from vlm_jax.models.position import GridResize, resize_matrices, sincos_2d
from vlm_jax.models.projection import ProjectionConfig, project
from vlm_jax.models.relative_position import RelativeGrid, RelativePositionBias, RelativePositionName
from vlm_jax.models.stochastic import drop_patches, fold_in, kept_patches
from vlm_jax.models.transformer import TransformerConfig, run_blocks
from vlm_jax.models.weights import weight


@dataclasses.dataclass(frozen=True)
class ViTConfig(TransformerConfig, ImageTowerConfig):
    """An image tower; the defaults are CLIP's ViT-B/32."""

    image_size: tuple[int, int] | int = 224  # (height, width) in pixels, or the side of a square
    patch_size: int = 32  # side of a patch in pixels
    # leave out the pixels at the right and lower edge that fill no patch (SigLIP So400m/14 at 384); else an error
    cut_remainder: bool = False
    pool: Literal["cls", "mean", "map", "none"] = "cls"  # class token, mean of patches, attention pooling, nothing
    class_token: bool = True  # a learned token before the patches
    registers: int = 0  # learned tokens between class token and patches, without position
    # learned table; fixed 2-D sine-cosine; a learned table that starts there (fine-tuning in MAE); or nothing
    pos_embed: Literal["learned", "sincos", "sincos_learned", "none"] = "learned"
    # learned bias on the attention logits by the offset of two patches: one table for all blocks, or one for each
    relative_position: RelativePositionName = "none"
    # how learned positions follow images of another size than image_size (DINOv2); None: such images are an error
    pos_resize: GridResize | None = None
    patch_norm: bool = False  # norm on the patch embedding, before positions are added (AIM, AIMv2)
    mask_token: bool = False  # a learned token in the place of masked patches (BEiT, SimMIM, DINOv2)
    pre_norm: bool = True  # norm before the first block (CLIP)
    post_norm: bool = True  # norm after the last block
    patch_bias: bool = False  # bias on the patch embedding
    patch_dropout: float = 0.0  # share of patches dropped in training before the blocks (FLIP)
    init: InitName = "clip_image"  # recipe of the initial weights

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.class_token) + self.registers

    @property
    def has_class_token(self) -> bool:
        """See the base."""
        return self.class_token

    @property
    def block_count(self) -> int:
        """See the base."""
        return self.depth

    def normed(self, params: Any, tokens: jax.Array) -> jax.Array:
        """See the base."""
        if not self.post_norm:
            return tokens
        return NORMS[self.norm](self.norm_eps).apply({"params": params["ln_post"]}, tokens)  # pyright: ignore

    @property
    def pools(self) -> bool:
        """Whether the tower makes one vector of an image."""
        return self.pool != "none"

    @property
    def pooled_width(self) -> int:
        """Channels of "pooled"."""
        return self.width

    @property
    def token_width(self) -> int:
        """Channels of "tokens"."""
        return self.width

    @property
    def token_count(self) -> int:
        """Prefix tokens and the patches that are kept."""
        return self.prefix_tokens + kept_patches(self.patches, self.patch_dropout)

    def build(self, projection: ProjectionConfig | None, dtype: Dtype) -> "ViT":
        """The module."""
        return ViT(self, projection, dtype)

    def forward_flops(self, embed_dim: int) -> int:
        """See the base."""
        return vit_flops(
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            patches=self.patches,
            patch_size=self.patch_size,
            embed_dim=embed_dim,
            extra_tokens=self.prefix_tokens,
            kept_patches=kept_patches(self.patches, self.patch_dropout),
            map_head=self.pool == "map",
            gated=self.gated,
        )

    def without_dropped_patches(self) -> "ViTConfig":
        """See the base."""
        return dataclasses.replace(self, patch_dropout=0.0)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        height, width = self.image_shape
        if self.patch_size < 1 or min(height, width) < 1:
            yield "patch_size", f"= {self.patch_size} and image_size {height}x{width} must be at least 1"
        elif min(height, width) < self.patch_size:
            yield "patch_size", f"= {self.patch_size} is larger than image_size {height}x{width}"
        elif (height % self.patch_size or width % self.patch_size) and not self.cut_remainder:
            divisors = [p for p in range(2, 65) if height % p == 0 and width % p == 0]
            near = sorted(sorted(divisors, key=lambda p: abs(p - self.patch_size))[:3]) or [1]
            yield "patch_size", f"= {self.patch_size} does not divide image_size {height}x{width}; use one of {near}"
        if self.pool == "cls" and not self.class_token:
            yield "pool", "= 'cls' needs class_token = true; set it, or pool by 'mean' or 'map'"
        if self.pos_embed in ("sincos", "sincos_learned") and self.width % 4:
            yield "pos_embed", f"= {self.pos_embed!r} needs a width divisible by 4, not {self.width}"
        if not 0 <= self.patch_dropout < 1:
            yield "patch_dropout", f"= {self.patch_dropout} is a share of the patches; it must lie in [0, 1)"
        if self.registers < 0:
            yield "registers", f"= {self.registers} must be at least 0"
        if self.relative_position != "none" and (self.registers or self.patch_dropout):
            yield (
                "relative_position",
                f"= {self.relative_position!r} knows the whole grid and a class token; set registers and patch_dropout "
                "to 0, or relative_position to 'none'",
            )


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, with the details of CLIP, SigLIP, MAE and FLIP by config.

    Attributes:
        config: the tower.
        projection: the head on the pooled vector, or None.
        dtype: compute dtype; parameters are fp32.
    """

    config: ViTConfig
    projection: ProjectionConfig | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images_BxHxWxC: jax.Array,
        keys: jax.Array | None = None,
        *,
        masked_BxN: jax.Array | None = None,
        kept_BxK: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        causal: bool = False,
        intermediates: bool = False,
        layer: int | None = None,
    ) -> dict[str, jax.Array]:
        """Encodes normalised images.

        Args:
            images_BxHxWxC: float, of the config's image size; of any size in patches with `config.pos_resize`.
            keys: [B] typed keys, one a row, or None at evaluation (no dropping of anything).
            masked_BxN: bool, True for the patches whose embedding the mask token replaces; needs `config.mask_token`.
            kept_BxK: int32, the patches that go through the blocks, in this order (MAE); the others are left out.
            attention_mask: bool, broadcasts to [B, H, T, T], True where attention is allowed.
            causal: whether a token sees only those before it.
            intermediates: whether to return what stands between the layers.
            layer: -1, -2, ...: only "tokens" is returned, the output of the last block, of the one before, ... without
                the last norm, and no block behind that one is run; None: the whole tower.

        Returns:
            "tokens" [B, T, D] after the last norm, prefix tokens first; "pooled" [B, D] unless pool is "none";
            "embedding" [B, E] if there is a projection; with intermediates "embed" [B, T, D], the first block's
            input, and "blocks" [L, B, T, D], every block's output.

        Raises:
            ValueError: the images have a size that the config does not allow, or patches are left out of a relative
                position.
        """
        config = self.config
        self._check_size(*images_BxHxWxC.shape[1:3])
        relative = None
        if config.relative_position != "none":
            relative = RelativeGrid(config.grid, config.class_token)
            if kept_BxK is not None:
                raise ValueError("a tower with relative_position sees all patches; set it to 'none' to leave some out")
        bias = None
        if config.relative_position == "shared" and relative is not None:
            bias = RelativePositionBias(relative, config.heads, name="relative_position")()
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        x = self._embed(images_BxHxWxC, init, fold_in(keys, 0), masked_BxN, kept_BxK)
        embed = x
        # At initialisation the whole tower runs: every parameter is declared.
        first = None if layer is None or self.is_initializing() else config.depth + 1 + layer
        x, blocks = run_blocks(
            config,
            x,
            fold_in(keys, 1),
            mask=attention_mask,
            bias=bias,
            causal=causal,
            relative=relative if config.relative_position == "per_block" else None,
            intermediates=intermediates,
            dtype=self.dtype,
            first=first,
        )
        if first is not None:
            return {"tokens": x}
        outputs = self._pool(x, init)
        if self.projection is not None:
            outputs["embedding"] = project(self.projection, init.projection, outputs["pooled"], self.dtype)
        if blocks is not None:
            outputs |= {"embed": embed, "blocks": blocks}
        return outputs

    def _check_size(self, height: int, width: int) -> None:
        config, (rows, columns) = self.config, self.config.image_shape
        if (height, width) == (rows, columns):
            return
        if config.pos_resize is None:
            raise ValueError(
                f"this tower takes images of {rows}x{columns} (height x width), not {height}x{width}; resize them, or "
                "set image_size, or pos_resize"
            )
        if (height % config.patch_size or width % config.patch_size) and not config.cut_remainder:
            raise ValueError(
                f"this tower takes images whose sides are multiples of {config.patch_size}, not {height}x{width}; "
                "resize them"
            )

    def _embed(
        self,
        images: jax.Array,
        init: Initializers,
        keys: jax.Array | None,
        masked_BxN: jax.Array | None,
        kept_BxK: jax.Array | None,
    ) -> jax.Array:
        """[B, H, W, C] -> [B, T, D]: patches with positions, some replaced or left out, behind the prefix tokens."""
        config = self.config
        patch_embed = PatchEmbed(
            config.patch_size, config.width, config.patch_bias, init, dtype=self.dtype, name="patch_embed"
        )
        rows, columns = grid = (images.shape[1] // config.patch_size, images.shape[2] // config.patch_size)
        x = patch_embed(images[:, : rows * config.patch_size, : columns * config.patch_size])
        x = constrain(x, "batch", "length", "embed")
        norm = NORMS[config.norm]
        if config.patch_norm:
            x = norm(config.norm_eps, name="patch_norm")(x)
        if config.mask_token:
            token = weight(self, "mask_token", init.mask_token, ("embed",), (config.width,)).astype(self.dtype)
            if masked_BxN is not None:
                x = jnp.where(masked_BxN[:, :, None], jnp.broadcast_to(token, x.shape), x)
        class_positions = int(config.class_token)
        positions = self._positions(init, class_positions, grid)
        x = drop_patches(x + positions[None, class_positions:], config.patch_dropout, keys)
        if kept_BxK is not None:
            x = jnp.take_along_axis(x, kept_BxK[:, :, None], axis=1)
        prefix = []
        if config.class_token:
            token = weight(self, "class_token", init.class_token, ("embed",), (config.width,))
            prefix.append((token.astype(self.dtype) + positions[0])[None])
        if config.registers:
            shape = (config.registers, config.width)
            prefix.append(weight(self, "registers", init.class_token, (None, "embed"), shape).astype(self.dtype))
        rows = [jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)) for tokens in prefix]
        x = constrain(jnp.concatenate([*rows, x], axis=1), "batch", "length", "embed")
        return norm(config.norm_eps, name="ln_pre")(x) if config.pre_norm else x

    def _positions(self, init: Initializers, class_positions: int, grid: tuple[int, int]) -> jax.Array:
        """[class token + patches, D] of a grid of patches."""
        config = self.config
        if config.pos_embed == "none":
            return jnp.zeros((class_positions + grid[0] * grid[1], config.width), self.dtype)
        if config.pos_embed == "sincos":
            return jnp.asarray(sincos_2d(grid, config.width, class_positions), self.dtype)
        start = init.position
        if config.pos_embed == "sincos_learned":
            start = constant(sincos_2d(config.grid, config.width, class_positions))
        shape = (class_positions + config.patches, config.width)
        table = weight(self, "pos_embed", start, (None, "embed"), shape)
        if grid != config.grid and config.pos_resize is not None:
            rows, columns = (jnp.asarray(m, jnp.float32) for m in resize_matrices(config.grid, grid, config.pos_resize))
            patches = table[class_positions:].reshape(*config.grid, config.width)
            resized = jnp.einsum("ah,bw,hwd->abd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
            table = jnp.concatenate([table[:class_positions], resized.reshape(-1, config.width)])
        return table.astype(self.dtype)

    def _pool(self, x: jax.Array, init: Initializers) -> dict[str, jax.Array]:
        config = self.config
        norm = NORMS[config.norm](config.norm_eps, name="ln_post") if config.post_norm else (lambda y: y)
        outputs = {"tokens": norm(x)}
        if config.pool == "cls":
            # Normalised apart from the tokens: a caller that only wants the pooled vector pays for one token.
            outputs["pooled"] = norm(x[:, 0])
        elif config.pool == "mean":
            outputs["pooled"] = mean_tokens(outputs["tokens"][:, config.prefix_tokens :])
        elif config.pool == "map":
            outputs["pooled"] = MapHead(config, init, dtype=self.dtype, name="map_head")(outputs["tokens"])
        return outputs


__all__ = ["ViT", "ViTConfig"]
