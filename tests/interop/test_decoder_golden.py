"""The decoder inside LLaVA-1.5's own code, on embeddings with image features among them: no torch is needed here."""

from typing import Any

import jax
import numpy as np
import pytest
from golden_vectors import GoldenVectors

from vlm_jax.interop.hf_decoder import HfDecoder
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.losses.vocabulary import vocabulary_cross_entropy
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.generation import GenerationConfig, generate
from vlm_jax.objectives.lm import next_tokens

GOLDEN, FORMAT = GoldenVectors("llava_decoder"), HfDecoder()
IMAGE_TOKEN, IGNORED = -200, -100
CONFIG = FORMAT.read_config(GOLDEN.weights, GOLDEN.settings, None)
PARAMS = to_params(GOLDEN.weights, FORMAT.rows(CONFIG), FORMAT.shapes(CONFIG), FORMAT.title)["decoder"]
DECODER = Decoder(CONFIG.decoder)


def forward(params: Any, embeds: Any, mask: Any) -> Any:
    segments = mask.astype(np.int32)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return DECODER.apply({"params": params}, embeds, segments_BxT=segments, positions_BxT=positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_loss_and_gradients(side: str) -> None:
    """Only answers are predicted: labels of other tokens are ignored."""
    embeds, mask, labels = (GOLDEN.inputs[f"{side}.{name}"] for name in ("embeds", "attention_mask", "labels"))
    targets, follows = next_tokens(labels.astype(np.int32), mask.astype(np.int32))
    valid = follows & (targets != IGNORED)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        hidden = forward(params, embeds, mask)
        head: Any = DECODER.apply({"params": params}, method="head_rows")
        found = vocabulary_cross_entropy(hidden, head, targets, valid)
        return found.total / found.count, DECODER.apply({"params": params}, hidden, method="logits")

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    np.testing.assert_allclose(np.asarray(logits)[mask], GOLDEN.outputs[f"{side}.logits"][mask], atol=2e-5)
    assert float(value) == pytest.approx(float(GOLDEN.outputs[f"{side}.loss"][0]), rel=1e-5)
    named = from_params({"decoder": gradients}, FORMAT.rows(CONFIG), FORMAT.title)
    wanted = {name.removeprefix("grad."): x for name, x in GOLDEN.outputs.items() if name.startswith("grad.")}
    assert len(wanted) == len(named) - 1  # that of the embeddings also comes from the text that LLaVA embeds
    for name, gradient in wanted.items():
        np.testing.assert_allclose(named[name], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=name)


def test_text_after_an_image() -> None:
    """Greedy ids of LLaVA's generate, from embeddings."""
    prompt = GOLDEN.inputs["prompt"][0]
    words: Any = DECODER.apply({"params": PARAMS}, np.maximum(prompt, 0)[None].astype(np.int32), method="embed")
    place = int(np.flatnonzero(prompt == IMAGE_TOKEN)[0])
    embeds = np.concatenate([words[0, :place], GOLDEN.inputs["image_embeds"][0], words[0, place + 1 :]])[None]
    config = GenerationConfig(max_new_tokens=8)
    write = jax.jit(lambda embeds, valid: generate(DECODER, PARAMS, embeds, valid, config).ids)
    np.testing.assert_array_equal(write(embeds, np.ones(embeds.shape[:2], bool)), GOLDEN.outputs["ids"])
