"""Matching with hard negatives against a loop over pairs, with a model that is a sum; and rows without a negative."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.objectives.matching import matching_loss

ROWS = 4


def match(states: jax.Array, valid: jax.Array, tokens: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores that depend on every input: states of valid tokens, and their product with the image."""
    del keys
    text = (states * valid[:, :, None]).sum(axis=1)
    return jnp.stack([text.sum(axis=1), (text * tokens.sum(axis=1)).sum(axis=1)], axis=1)


@pytest.fixture(scope="module")
def embeddings() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "text_tokens": jnp.asarray(rng.normal(size=(ROWS, 3, 5)), jnp.float32),
        "valid": jnp.asarray(rng.random((ROWS, 3)) < 0.7).at[:, 0].set(True),
        "image_tokens": jnp.asarray(rng.normal(size=(ROWS, 2, 5)), jnp.float32),
        "keys": jax.random.split(jax.random.key(0), ROWS),
    }


LOGITS = (jnp.zeros((ROWS, ROWS)), jnp.zeros((ROWS, ROWS)))
OTHERS = ~jnp.eye(ROWS, dtype=bool)


def by_loops(found: dict[str, Any], pairs: list[tuple[int, int, int]]) -> float:
    """Sum over (text, image, label)."""
    total = 0.0
    for text, image, label in pairs:
        rows = [found["text_tokens"][text], found["valid"][text], found["image_tokens"][image]]
        scores = np.asarray(match(*(x[None] for x in rows), None)[0], np.float64)  # pyright: ignore[reportArgumentType]
        total -= scores[label] - np.log(np.exp(scores).sum())
    return total


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_negatives_that_are_given(chunks: int, embeddings: dict[str, Any]) -> None:
    images, texts = [2, 0, 1, 1], [3, 3, 0, 2]
    given = {"negative_image": jnp.asarray(images), "negative_text": jnp.asarray(texts)}
    ratios = matching_loss(match, embeddings | given, LOGITS, OTHERS, groups=1, chunks=chunks)
    pairs = [(b, b, 1) for b in range(ROWS)] + [(b, images[b], 0) for b in range(ROWS)]
    pairs += [(texts[b], b, 0) for b in range(ROWS)]
    total, count = ratios["itm_loss"]
    assert float(count) == 3 * ROWS
    assert float(total) == pytest.approx(by_loops(embeddings, pairs), rel=1e-5)
    assert float(ratios["pairs_without_negative"][0]) == 0


def test_the_likeliest_are_drawn_and_each_way_by_its_own_logits(embeddings: dict[str, Any]) -> None:
    """With logits this far apart the draw is certain: the image next to a text, the text two after an image."""
    next_image, next_text = ([(b + step) % ROWS for b in range(ROWS)] for step in (1, 2))
    image_to_text = 1e4 * jax.nn.one_hot(jnp.asarray(next_text), ROWS)
    text_to_image = 1e4 * jax.nn.one_hot(jnp.asarray(next_image), ROWS)
    ratios = matching_loss(match, embeddings, (image_to_text, text_to_image), OTHERS, groups=1, chunks=1)
    pairs = [(b, b, 1) for b in range(ROWS)] + [(b, next_image[b], 0) for b in range(ROWS)]
    pairs += [(next_text[b], b, 0) for b in range(ROWS)]
    assert float(ratios["itm_loss"][0]) == pytest.approx(by_loops(embeddings, pairs), rel=1e-5)


def test_rows_without_a_candidate_train_on_their_own_pair(embeddings: dict[str, Any]) -> None:
    """Of one image all: nothing but the pairs themselves; and no gradient is NaN."""

    def loss(tokens: jax.Array) -> Any:
        none = jnp.zeros((ROWS, ROWS), bool)
        ratios = matching_loss(match, embeddings | {"image_tokens": tokens}, LOGITS, none, groups=1, chunks=1)
        return ratios["itm_loss"][0] / ratios["itm_loss"][1], ratios

    (mean, ratios), gradient = jax.value_and_grad(loss, has_aux=True)(embeddings["image_tokens"])
    assert float(ratios["itm_loss"][1]) == ROWS
    assert float(ratios["pairs_without_negative"][0]) == 2 * ROWS
    assert float(mean) == pytest.approx(by_loops(embeddings, [(b, b, 1) for b in range(ROWS)]) / ROWS, rel=1e-5)
    assert bool(jnp.isfinite(gradient).all())
