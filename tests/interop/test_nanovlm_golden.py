"""nanoVLM's own code on a small model: tower, pixel shuffle, spliced embeddings, loss, gradients, packed rows, text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import GoldenVectors
from vision_language_rows import empty_rows

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.nanovlm import NanoVlm
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.models.projector import pixel_shuffle
from vlm_jax.objectives.vlm import VlmConfig

GOLDEN, FORMAT = GoldenVectors("nanovlm_model"), NanoVlm()
TENSORS = FORMAT.canonical(GOLDEN.weights)
CONFIG = FORMAT.read_config(TENSORS, GOLDEN.settings, None)
PARAMS = to_params(TENSORS, FORMAT.rows(CONFIG), FORMAT.shapes(CONFIG), FORMAT.title)
TILES = GOLDEN.images("tiles")
VLM = VlmConfig(model=CONFIG, length=40, tiles=3).build(PreprocessConfig(), jnp.float32)
PACKED = GOLDEN.settings["packed_sample"]
INPUTS = ("text", "tile_slots", "tiles")
IMAGE_TOKEN = GOLDEN.settings["image_token_id"]


def rows(
    ids: np.ndarray, mask: np.ndarray, tiles: list[np.ndarray], labels: np.ndarray | None = None
) -> dict[str, Any]:
    """The reference's rows: one document whatever is packed in it, positions counted from the row's beginning on.

    Its labels are shifted: that of a token is what follows it.
    """
    batch = empty_rows(len(ids), ids.shape[1], (max(map(len, tiles)), *TILES.shape[1:]))
    batch["text"], batch["segments"] = ids.astype(np.int32), (mask > 0).astype(np.int32)
    batch["positions"] = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    if labels is not None:
        batch["supervised"][:, 1:] = labels[:, :-1] != -100
    for row, images in enumerate(tiles):
        places = ids[row] == IMAGE_TOKEN
        batch["tile_slots"][row, places] = np.arange(places.sum())
        batch["tiles"][row, : len(images)] = images
    return batch


TRAINED = rows(
    GOLDEN.inputs["input_ids"],
    GOLDEN.inputs["attention_mask"],
    [TILES[:3], TILES[3:], TILES[:0]],
    GOLDEN.inputs["labels"],
)


def of_the_separator(params: Any) -> jax.Array:
    """Loss of what follows the token between two packed documents, which these vectors count and no row of ours does.

    The token sees the document before it, and not itself.
    """
    row, place = PACKED["index"], PACKED["second_document_start"] - 1
    inputs = VLM.module.apply({"params": params}, *(TRAINED[name] for name in INPUTS), method="inputs")
    segments, positions = (TRAINED[name][row, :place][None] for name in ("segments", "positions"))
    decoder = {"params": params["decoder"]}
    _, own = VLM.decoder.apply(decoder, inputs[row, None, :place], None, segments, positions, method="with_keys")
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)]), own)
    seen = np.append(segments > 0, False)[None]
    token = TRAINED["text"][row : row + 1, place : place + 1]
    where = jnp.full((1,), place)
    hidden, _ = VLM.decoder.apply(decoder, token, where, cache, jnp.int32(place), seen, method="step")
    logits: Any = VLM.decoder.apply(decoder, hidden, method="logits")
    return -jax.nn.log_softmax(logits[0, 0])[GOLDEN.inputs["labels"][row, place]]


@pytest.fixture(scope="module")
def found() -> Any:
    """((loss, logits), gradients)."""

    def mean_loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        (total, count), _ = VLM.loss(params, {}, batch, None, jnp.int32(0))
        return (total + of_the_separator(params)) / (count + 1), VLM.outputs(params, batch)["logits"]

    return jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(PARAMS, TRAINED)


def test_tower_and_pixel_shuffle() -> None:
    tokens = VLM.tower.apply({"params": PARAMS["image"]}, TILES)["tokens"]  # pyright: ignore
    np.testing.assert_allclose(tokens, GOLDEN.outputs["vit"], atol=2e-5)
    shuffled = pixel_shuffle(jnp.asarray(GOLDEN.outputs["vit"]), 4, 4, 2)
    np.testing.assert_array_equal(shuffled, GOLDEN.outputs["pixel_shuffle"])
    features: Any = VLM.module.apply({"params": PARAMS}, TILES[:, None], method="features")
    np.testing.assert_allclose(features, GOLDEN.outputs["image_embeds"], atol=2e-5)


def test_the_kth_run_of_placeholders_takes_the_kth_tile() -> None:
    inputs: Any = VLM.module.apply({"params": PARAMS}, *(TRAINED[name] for name in INPUTS), method="inputs")
    np.testing.assert_allclose(inputs, GOLDEN.outputs["spliced_embeds"], atol=2e-5)


def test_logits_loss_and_gradients(found: Any) -> None:
    (loss, logits), gradients = found
    mask = GOLDEN.outputs["real_mask"]
    np.testing.assert_allclose(np.asarray(logits)[mask], GOLDEN.outputs["logits"][mask], atol=2e-5)
    assert float(loss) == pytest.approx(float(GOLDEN.outputs["loss"][0]), rel=1e-5)
    named = from_params(gradients, FORMAT.rows(CONFIG), FORMAT.title)
    wanted = {name.removeprefix("grad."): x for name, x in GOLDEN.outputs.items() if name.startswith("grad.")}
    assert named.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # A bias on keys moves all logits of a query alike: its gradient is rounding alone.
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(named[name], gradient, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_a_packed_document_is_what_it_is_alone() -> None:
    """The reference lets the second document of a row see the first, and its logits differ by up to 2.5."""
    row, start = PACKED["index"], PACKED["second_document_start"]
    batch = {name: x[row : row + 1].copy() for name, x in TRAINED.items()}
    batch["segments"][0, start:] *= 2
    batch["positions"][0, start:] -= start
    logits = np.asarray(VLM.outputs(PARAMS, batch)["logits"][0, start:])
    alone = GOLDEN.outputs["packed_B_alone_logits"]
    np.testing.assert_allclose(logits[: len(alone)], alone, atol=2e-5)
    assert np.abs(GOLDEN.outputs["logits"][row, start : start + len(alone)] - alone).max() > 2


@pytest.mark.parametrize("which", ["gen", "genb"])
def test_greedy_ids(which: str) -> None:
    """Of one row, and of two of which one is filled up on the left."""
    prompt = GOLDEN.outputs[f"{which}_prompt"]
    mask = GOLDEN.outputs.get(f"{which}_mask", np.ones_like(prompt))
    tiles = [TILES[: int((row == IMAGE_TOKEN).sum()) // CONFIG.tile_tokens] for row in prompt]
    config = GenerationConfig(max_new_tokens=8)
    ids = jax.jit(lambda params, batch: VLM.answer(params, batch, config).ids)(PARAMS, rows(prompt, mask, tiles))
    np.testing.assert_array_equal(ids, GOLDEN.outputs[f"{which}_ids"])
