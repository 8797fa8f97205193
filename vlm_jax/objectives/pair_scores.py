"""What an ALBEF tells without training: features, whether pairs belong together, and on which patches that rests."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain
from vlm_jax.models.albef import MATCHED, Albef
from vlm_jax.models.grad_cam import attention_cam, token_cam
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.pairs import PairObjective
from vlm_jax.schema import ConfigError


class MatchingObjective(PairObjective):
    """A method whose module is an `Albef`."""

    module: Albef

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """See `Albef`."""
        return self._apply(params, batch, None, intermediates=intermediates)

    def image_features(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base."""
        return self._apply_images(params, images, "encode_image")["features"]

    def text_features(self, params: Any, texts: jax.Array) -> jax.Array:
        """See the base."""
        return self._call(params, "encode_text", texts)["features"]

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base."""
        return self._apply_images(params, images, "image_vectors", which)

    def match_images(self, params: Any, images: jax.Array) -> jax.Array:
        """See the base: the tokens of the image tower."""
        return self._apply_images(params, images, "image_states")["tokens"]

    def match_texts(self, params: Any, texts: jax.Array) -> dict[str, jax.Array]:
        """See the base: "states" of the text encoder and which tokens are "valid"."""
        return {
            "states": self._call(params, "text_states", texts)["tokens"],
            "valid": self._call(params, "valid", texts),
        }

    def match_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array
    ) -> jax.Array:
        """See the base: logits of the head on the fused class token, "yes" at `MATCHED`."""
        fused = self._call(params, "fuse", *self._paired(images_BxSxC, texts, pairs_Px2))
        return self._call(params, "match", fused)

    def prompt_scores(self, params: Any, images: jax.Array, texts: jax.Array) -> jax.Array:
        """log p(they belong together), fp32 [B, P], by the fusion encoder; one text after the other, as `Caption`."""
        tokens, rows = self.match_images(params, images), images.shape[0]
        found = self.match_texts(params, texts)

        def score(text: tuple[jax.Array, jax.Array]) -> jax.Array:
            fused = self._call(params, "fuse", *(jnp.broadcast_to(x, (rows, *x.shape)) for x in text), tokens)
            return jax.nn.log_softmax(self._call(params, "match", fused), axis=-1)[:, MATCHED]

        return jax.lax.map(score, (found["states"], found["valid"])).T

    def ground_pairs(
        self, params: Any, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array, layer: int
    ) -> jax.Array:
        """See the base: Grad-CAM from the score "yes" (Li et al. 2021, section 6.4)."""
        model, tower = self.module.config, self.module.config.image
        if not isinstance(tower, ViTConfig):
            raise ConfigError("grounding needs an image tower whose tokens are patches; use a model with a ViT")
        fusion_layers = model.fusion.depth // model.fusion.cross_every
        if not 1 <= layer <= fusion_layers:
            raise ConfigError(f"layer = {layer} is none of the {fusion_layers} fusion layers that look at images")
        states, valid, tokens = self._paired(images_BxSxC, texts, pairs_Px2)

        def score(fused_PxTxD: jax.Array) -> jax.Array:
            return self._call(params, "match", fused_PxTxD)[:, MATCHED]

        cam = attention_cam(model.fusion, params["fusion"], states, valid, tokens, layer - 1, score, self.module.dtype)
        return token_cam(cam, valid)[:, tower.prefix_tokens :].reshape(-1, *tower.grid)

    def _paired(
        self, images_BxSxC: jax.Array, texts: dict[str, jax.Array], pairs_Px2: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(states of texts, their valid tokens, tokens of images) of pairs of rows."""
        image_P, text_P = pairs_Px2[:, 0], pairs_Px2[:, 1]
        tokens, states = (
            constrain(jnp.take(x, rows_P, axis=0), "batch", "length", "embed")
            for x, rows_P in ((images_BxSxC, image_P), (texts["states"], text_P))
        )
        return states, jnp.take(texts["valid"], text_P, axis=0), tokens


__all__ = ["MatchingObjective"]
