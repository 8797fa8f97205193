"""The published models by shape alone: parameters and FLOPs against open_clip's profile of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vlm_jax import schema
from vlm_jax.models.presets import CLIP, PRESETS
from vlm_jax.models.resnet import ResNetConfig
from vlm_jax.models.two_tower import TwoTower, TwoTowerConfig

# Millions of parameters and GFLOP of image and text tower in open_clip's docs/model_profile.csv.
PROFILE = {
    "RN50": (102.01, 12.22, 5.96),
    "RN101": (119.69, 19.54, 5.96),
    "RN50x4": (178.3, 42.56, 9.27),
    "RN50x16": (290.98, 149.39, 13.3),
    "RN50x64": (623.26, 529.11, 23.55),
    "ViT-B/32": (151.28, 8.82, 5.96),
    "ViT-B/16": (149.62, 35.13, 5.96),
    "ViT-L/14": (427.62, 162.03, 13.3),
    "ViT-L/14-336": (427.94, 381.92, 13.3),
    "ViT-H/14": (986.11, 334.59, 47.09),
    "ViT-g/14": (1366.68, 534.06, 47.09),
    "ViT-bigG/14": (2539.57, 967.5, 97.86),
    "SigLIP-B/16": (203.16, 35.42, 11.02),
    "SigLIP-B/16-256": (203.2, 46.82, 11.02),
    "SigLIP-B/16-384": (203.45, 112.13, 11.02),
    "SigLIP-B/16-512": (203.79, 216.24, 11.02),
    "SigLIP-L/16-256": (652.15, 162.56, 39.06),
    "SigLIP-L/16-384": (652.48, 383.85, 39.06),
    "SigLIP-So400m/14": (877.36, 220.35, 13.19),
    "SigLIP-So400m/14-384": (877.96, 670.35, 53.13),
}
EXACT = {"ViT-B/32": 151_277_313, "ViT-L/14": 427_616_513, "ViT-L/14-336": 427_944_193}


def count(config: TwoTowerConfig) -> int:
    """Parameters that are learned: libraries count running statistics as buffers."""
    images = jax.ShapeDtypeStruct((1, *config.image.image_shape, 3), jnp.float32)
    texts = jax.ShapeDtypeStruct((1, config.text.length), jnp.int32)
    abstract = nn.unbox(jax.eval_shape(TwoTower(config).init, jax.random.key(0), images, texts))
    leaves = flatten_dict(abstract["params"], sep="/")
    return sum(int(np.prod(leaf.shape)) for path, leaf in leaves.items() if "running_" not in path)


@pytest.mark.parametrize("name", PROFILE)
def test_sizes_are_the_published_ones(name: str):
    config, (millions, image_gigaflops, text_gigaflops) = PRESETS[name], PROFILE[name]
    schema.validate(config)
    parameters = count(config)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.005)
    assert parameters == EXACT.get(name, parameters)
    embed_dim = config.embed_dim
    image = config.image.forward_flops(0 if config.image_head is None else embed_dim)
    if isinstance(config.image, ResNetConfig):
        # Their attention pool computes an output for every token and drops all but one.
        width, dropped = config.image.pooled_width, config.image.token_count
        image += 2 * dropped * (width**2 + 2 * (dropped + 1) * width + width * embed_dim)
    assert image / 1e9 == pytest.approx(image_gigaflops, rel=2e-3)
    assert config.text.forward_flops(embed_dim) / 1e9 == pytest.approx(text_gigaflops, rel=2e-3)


def test_every_preset_is_a_model():
    """Those without a published profile: SigLIP 2 differs from SigLIP by its vocabulary, and in three sizes."""
    for name in PRESETS.keys() - PROFILE.keys():
        schema.validate(PRESETS[name])
    small, large = PRESETS["SigLIP-B/16"], PRESETS["SigLIP2-B/16"]
    assert count(large) - count(small) == (256_000 - 32_000) * 768
    assert CLIP.items() <= PRESETS.items()
