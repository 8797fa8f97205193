"""Image-text matching with hard negatives (ITM; Li et al. 2021, section 3.3): which pairs are made, and their loss.

For objectives whose model tells whether an image and a text belong together; the model and the weights of the losses
are theirs.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from vlm_jax.losses.momentum_contrast import hard_negatives, in_chunks, take_rows
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.mesh import constrain
from vlm_jax.models.albef import MATCHED
from vlm_jax.models.stochastic import row_keys
from vlm_jax.step import Ratio

# (states of texts, their valid tokens, tokens of images, keys) of R pairs -> scores fp32 [R, 2]
Match = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
_PAIRS = 3  # of a row: its own, its text with a wrong image, its image with a wrong text


def matching_loss(
    match: Match,
    embeddings: Mapping[str, jax.Array],
    logits: tuple[jax.Array, jax.Array],
    candidates_BxB: jax.Array,
    *,
    groups: int,
    chunks: int,
) -> dict[str, Ratio]:
    """The loss over each pair, its text with a wrong image, and its image with a wrong text.

    Args:
        match: the model.
        embeddings: "text_tokens" [B, T, D], "valid" [B, T], "image_tokens" [B, S, C], "keys" [B]; and where they are
            not to be drawn int32 [B] "negative_image" of each text and "negative_text" of each image.
        logits: of images to texts and back, [B, B] each, by which negatives are drawn.
        candidates_BxB: bool, symmetric, the pairs of rows that may be negatives.
        groups: into which the rows fall; candidates lie in the row's own.
        chunks: parts of the rows whose pairs are matched one after the other.

    Returns:
        "itm_loss" and "itm_accuracy" over all pairs, and "pairs_without_negative": a row without a candidate has fewer
        pairs, which neither count nor learn.
    """
    keys, valid = embeddings["keys"], embeddings["valid"]
    tokens, states = embeddings["image_tokens"], embeddings["text_tokens"]
    image_B, image_found_B = hard_negatives(logits[1], candidates_BxB, row_keys(keys, 0))
    text_B, text_found_B = hard_negatives(logits[0], candidates_BxB, row_keys(keys, 1))
    image_B, text_B = embeddings.get("negative_image", image_B), embeddings.get("negative_text", text_B)
    other_valid = take_rows(valid[:, :, None], text_B, groups)[:, :, 0]
    other_tokens, other_states = take_rows(tokens, image_B, groups), take_rows(states, text_B, groups)
    # The pairs of a row beside each other, so that they stay on the row's device.
    pairs_BxK = (
        jnp.stack([states, states, other_states], axis=1),
        jnp.stack([valid, valid, other_valid], axis=1),
        jnp.stack([tokens, other_tokens, tokens], axis=1),
        jnp.stack([row_keys(keys, 2 + place) for place in range(_PAIRS)], axis=1),
    )

    def scores(pairs_RxK: tuple[jax.Array, ...]) -> jax.Array:
        flat = [x.reshape(-1, *x.shape[2:]) for x in pairs_RxK]
        for place in (0, 2):
            flat[place] = constrain(flat[place], "batch", "length", "embed")
        return match(*flat).reshape(-1, _PAIRS, 2)

    scores_Bx3x2 = in_chunks(scores, pairs_BxK, chunks)
    counted_Bx3 = jnp.stack([jnp.ones_like(image_found_B), image_found_B, text_found_B], axis=1)
    label_Bx3 = jnp.where(jnp.arange(_PAIRS)[None] == 0, MATCHED, 1 - MATCHED).repeat(len(scores_Bx3x2), axis=0)
    sums, counts = token_cross_entropy(scores_Bx3x2, label_Bx3, counted_Bx3)
    hits, missing = correct_tokens(scores_Bx3x2, label_Bx3, counted_Bx3), (~counted_Bx3).sum(dtype=jnp.float32)
    return {
        "itm_loss": (sums.sum(), counts.sum()),
        "itm_accuracy": (hits.sum(), counts.sum()),
        "pairs_without_negative": (missing, jnp.ones(())),
    }


__all__ = ["Match", "matching_loss"]
