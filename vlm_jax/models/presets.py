"""The published sizes of CLIP by name (Radford et al. 2021, table 20). Recipes around them are in configs/."""

from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig


def clip(image_width: int, image_depth: int, patch_size: int, image_size: int, text_width: int) -> TwoTowerConfig:
    """A CLIP whose heads are 64 wide, MLPs four widths, and whose joint space has the text tower's width."""
    image = ViTConfig(
        width=image_width,
        depth=image_depth,
        heads=image_width // 64,
        mlp_dim=4 * image_width,
        patch_size=patch_size,
        image_size=image_size,
    )
    text = TextConfig(width=text_width, depth=12, heads=text_width // 64, mlp_dim=4 * text_width)
    return TwoTowerConfig(image, text, embed_dim=text_width)


CLIP: dict[str, TwoTowerConfig] = {
    "ViT-B/32": clip(768, 12, 32, 224, 512),
    "ViT-B/16": clip(768, 12, 16, 224, 512),
    "ViT-L/14": clip(1024, 24, 14, 224, 768),
    "ViT-L/14-336": clip(1024, 24, 14, 336, 768),
}

__all__ = ["CLIP", "clip"]
