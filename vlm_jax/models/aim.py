"""AIM: a vision transformer and the head that predicts pixels from its tokens (El-Nouby et al. 2024).

What is hidden, and what is compared with what, is in `vlm_jax.objectives`.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from vlm_jax.models.pixel_head import PixelHead, PixelHeadConfig
from vlm_jax.models.stochastic import fold_in
from vlm_jax.models.vit import ViTConfig


def aim_trunk(
    width: int, depth: int, heads: int, *, image_size: int | tuple[int, int] = 224, norm_eps: float = 1e-5
) -> ViTConfig:
    """A trunk of AIM: heads 128 wide in the published sizes, patches of 14 pixels, no biases but the patches' own.

    Args:
        width: of the residual stream; the MLP is four times as wide.
        depth: number of blocks.
        heads: attention heads.
        image_size: in pixels.
        norm_eps: in every norm; 1e-5 in the pre-training code (ml-l3m), 1e-6 in the released one (ml-aim).
    """
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        activation="gelu",
        norm_eps=norm_eps,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        image_size=image_size,
        patch_size=14,
        pool="none",
        class_token=False,
        pos_embed="sincos",
        patch_norm=True,
        patch_bias=True,
        pre_norm=False,
        init="aim",
    )


@dataclasses.dataclass(frozen=True)
class AimModelConfig:
    """Trunk and pixel head; the defaults are AIM-0.6B."""

    image: ViTConfig = dataclasses.field(default_factory=lambda: aim_trunk(1536, 24, 12))  # the trunk
    head: PixelHeadConfig = PixelHeadConfig()  # the pixel head

    def problems(self) -> Iterator[tuple[str, str]]:
        """A trunk that gives no token of each patch and of nothing else."""
        yield from patch_token_problems(self.image)

    @property
    def pixels(self) -> int:
        """Numbers in a patch."""
        return 3 * self.image.patch_size**2

    def build(self, dtype: Dtype) -> "Aim":
        """The module."""
        return Aim(self, dtype)

    def forward_flops(self) -> int:
        """Model FLOPs of one image's forward pass."""
        image = self.image
        return image.forward_flops(0) + self.head.forward_flops(image.patches, image.width, self.pixels)


def patch_token_problems(image: ViTConfig) -> Iterator[tuple[str, str]]:
    """What keeps the tokens of a tower from being its patches, one for one, as a prediction of pixels needs them."""
    if image.prefix_tokens:
        yield (
            "image.class_token",
            "and image.registers are no patches, and pixels are predicted after each token; unset",
        )
    if image.patch_dropout or image.cut_remainder:
        yield "image.patch_dropout", "and image.cut_remainder leave pixels out that are to be predicted; unset them"
    if image.pools:
        yield "image.pool", f"= {image.pool!r} makes a vector that nothing is trained with; set it to 'none'"
    if image.patches < 2:
        yield "image.patch_size", f"= {image.patch_size} makes one patch of an image, which leaves nothing to predict"


class Aim(nn.Module):
    """Parameters: `image/...` and `head/...`.

    Attributes:
        config: trunk and head.
        dtype: compute dtype; parameters are fp32.
    """

    config: AimModelConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declares trunk and head."""
        config = self.config
        self.image = config.image.build(None, self.dtype)
        self.head = PixelHead(config.head, config.image.grid, config.pixels, self.dtype)

    def __call__(
        self,
        images: jax.Array,
        keys: jax.Array | None = None,
        *,
        masked_BxN: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        causal: bool = False,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """Predicts pixels at every patch.

        Args:
            images: normalised float [B, H, W, 3].
            keys: [B] typed keys, or None for no randomness.
            masked_BxN: bool, the patches that the mask token stands for.
            attention_mask: bool, broadcasts to [B, H, N, N], True where attention is allowed.
            causal: whether a token sees only those before it.
            intermediates: whether to return every block's output.

        Returns:
            "pixels" [B, N, p p 3] and the other outputs of trunk and head as "image/tokens", "head/blocks", ...
        """
        image = self.image(
            images,
            fold_in(keys, 0),
            masked_BxN=masked_BxN,
            attention_mask=attention_mask,
            causal=causal,
            intermediates=intermediates,
        )
        head = self.head(
            image["tokens"], fold_in(keys, 1), mask=attention_mask, causal=causal, intermediates=intermediates
        )
        pixels = head.pop("pixels")
        named = {"image": image, "head": head}
        return {"pixels": pixels} | {
            f"{part}/{name}": x for part, outputs in named.items() for name, x in outputs.items()
        }


# Width, blocks, heads: table 1 of the paper and the released code.
SIZES = {"AIM-0.6B": (1536, 24, 12), "AIM-1B": (2048, 24, 16), "AIM-3B": (3072, 24, 24), "AIM-7B": (4096, 32, 32)}
AIM: dict[str, AimModelConfig] = {name: AimModelConfig(image=aim_trunk(*sizes)) for name, sizes in SIZES.items()}

__all__ = ["AIM", "Aim", "AimModelConfig", "aim_trunk", "patch_token_problems"]
