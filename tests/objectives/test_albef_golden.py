"""ALBEF against one whole pre-training step of the published code: losses, intermediates, gradients, queues, copies."""

import re
from typing import Any

import albef_golden as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data.word_pieces import clean_caption
from vlm_jax.interop.tables import from_params
from vlm_jax.losses.momentum_contrast import queue_contrast, same_group, same_identity
from vlm_jax.losses.pairs import block_logits
from vlm_jax.models.position import resize_grid

OUT = golden.GOLDEN.outputs
KEYS = jax.random.split(jax.random.key(0), 4)
STEP = jnp.int32(5)


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    """Loss, gradients, embeddings and what is kept after the step, of one compiled program."""
    objective, batch = golden.objective(), golden.batch()

    @jax.jit
    def run(params: Any, extra: Any) -> dict[str, Any]:
        def loss(params: Any) -> Any:
            embeddings = objective.embed(params, extra, batch, KEYS, STEP)
            (total, count), aux = objective.pair_loss(params, extra, embeddings, STEP)
            return total / count, (aux, embeddings)

        def module(method: str, *arguments: Any) -> Any:
            return objective.module.apply({"params": params}, *arguments, method=method)

        def words(tokens: jax.Array) -> jax.Array:
            texts = batch["masked_text"]
            states = module("text_states", texts)
            return module("word_logits", module("fuse", states["tokens"], texts != 0, tokens), states["table"])

        (value, (aux, embeddings)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        tokens = embeddings["image_tokens"]
        return {
            "loss": value,
            "metrics": {name: total / count for name, (total, count) in aux.metrics.items()},
            "gradients": gradients,
            "embeddings": {name: x for name, x in embeddings.items() if name != "keys"},
            "after": objective.after(extra, params, aux.updates, STEP),
            "fusion": module("fuse", embeddings["text_tokens"], embeddings["valid"], tokens),
            "words": words(tokens),
            "scores": objective.prompt_scores(params, batch["image"], batch["text"]),
        }

    return jax.tree.map(np.asarray, run(golden.params(), golden.extra()))


def test_the_three_losses(step: dict[str, Any]) -> None:
    names = {"itc_loss": "loss_ita", "itm_loss": "loss_itm", "mlm_loss": "loss_mlm"}
    for ours, theirs in names.items():
        assert step["metrics"][ours] == pytest.approx(float(OUT[theirs][0]), rel=1e-5), ours
    assert step["loss"] == pytest.approx(sum(float(OUT[theirs][0]) for theirs in names.values()), rel=1e-5)


def test_what_the_losses_are_made_of(step: dict[str, Any]) -> None:
    """Features before and of the averaged model, which moves before they are made; states of texts, images, pairs."""
    pairs = {"image_features": "image_feat", "text_features": "text_feat"}
    pairs |= {f"slow_{ours}": f"{theirs}_m" for ours, theirs in pairs.items()}
    pairs |= {"image_tokens": "image_embeds", "text_tokens": "text_embeds"}
    for ours, theirs in pairs.items():
        np.testing.assert_allclose(step["embeddings"][ours], OUT[theirs], atol=2e-5, err_msg=ours)
    np.testing.assert_allclose(step["fusion"], OUT["fusion_pos"], atol=2e-5)
    np.testing.assert_allclose(step["words"], OUT["mlm_logits"], atol=2e-5)


def test_scores_of_every_image_with_every_text(step: dict[str, Any]) -> None:
    """Those of the pairs, and of the texts with the negatives that the reference drew."""
    logits = OUT["itm_logits"].astype(np.float64)
    expected = logits[:, 1] - np.log(np.exp(logits).sum(axis=1))
    negatives = golden.batch()
    rows = np.arange(4)
    found = [step["scores"][rows, rows], step["scores"][negatives["negative_image"], rows]]
    found.append(step["scores"][rows, negatives["negative_text"]])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5)


def test_the_gradients(step: dict[str, Any]) -> None:
    model = golden.model_config()
    ours = from_params(step["gradients"], golden.FORMAT.rows(model), golden.FORMAT.title)
    theirs = {name.removeprefix("grad."): value for name, value in OUT.items() if name.startswith("grad.")}
    theirs = golden.FORMAT.own(theirs, model)
    assert len(theirs) > 100
    assert theirs.keys() <= ours.keys()
    for name in ours.keys() - theirs.keys():  # a weight that the reference has no gradient of
        assert np.abs(ours[name]).max() < 1e-8, name
    for name, expected in theirs.items():
        scale = max(np.abs(expected).max(), 1e-3)  # the bias of keys has rounding alone for a gradient
        np.testing.assert_allclose(ours[name] / scale, expected / scale, atol=1e-4, rtol=0, err_msg=name)


def test_queues_and_averaged_weights_after_the_step(step: dict[str, Any]) -> None:
    """Four rows from place 20 of 24 on: the pointer is at the start again; the rest of the queue stays bit for bit."""
    tensors = golden.FORMAT.write_extra(step["after"], golden.model_config())
    assert int(tensors["queue_ptr"][0]) == int(OUT["queue_ptr_after"][0]) == 0
    for name in ("image_queue", "text_queue"):
        np.testing.assert_array_equal(tensors[name][:, :20], OUT[f"{name}_after"][:, :20])
        np.testing.assert_allclose(tensors[name][:, 20:], OUT[f"{name}_after"][:, 20:], atol=2e-6)
        assert np.abs(tensors[name][:, 20:] - golden.TENSORS[name][:, 20:]).max() > 0.1
    stored = {name.removeprefix("after."): value for name, value in OUT.items() if name.startswith("after.")}
    assert len(stored) == 4
    for name, value in stored.items():
        np.testing.assert_allclose(tensors[name], value, atol=1e-7, err_msg=name)
        assert np.abs(tensors[name] - golden.TENSORS[name]).max() > 1e-6


def test_the_logits_and_the_weights_of_negatives() -> None:
    extra, scale = golden.extra(), 1 / 0.07
    slow = {name: OUT[f"{name}_feat_m"] for name in ("image", "text")}
    queue = extra["queue"]["image"], extra["queue"]["text"], jnp.zeros((4, 24), bool)
    eye = jnp.eye(4, dtype=bool)
    image, text = (OUT["image_feat"], slow["image"]), (OUT["text_feat"], slow["text"])
    loss, within = queue_contrast(image, text, queue, jnp.float32(scale), same_group(4, 1), eye, jnp.float32(0.4))
    assert float(loss) / 4 == pytest.approx(float(OUT["loss_ita"][0]), rel=1e-5)
    undistilled, _ = queue_contrast(image, text, queue, jnp.float32(scale), same_group(4, 1), eye, None)
    assert abs(float(undistilled - loss)) > 1e-2
    for logits, name in zip(within, ("i2t", "t2i"), strict=True):
        np.testing.assert_allclose(logits, OUT[f"sim_{name}"][:, :4], atol=2e-5)
        other = {"i2t": "text", "t2i": "image"}[name]
        own = OUT[{"i2t": "image_feat", "t2i": "text_feat"}[name]]
        earlier = block_logits(own, extra["queue"][other], jnp.float32(scale))
        np.testing.assert_allclose(earlier, OUT[f"sim_{name}"][:, 4:], atol=2e-5)
        weights = np.where(eye, 0.0, np.asarray(jax.nn.softmax(logits, axis=1)))
        np.testing.assert_allclose(weights, OUT[f"weights_{name}"], atol=1e-5)


def test_targets_by_identity() -> None:
    """The published targets of retrieval, in which all columns of one image share the mass, and its negatives."""
    stored = golden.GOLDEN.settings["retrieval_targets"]
    ids, queue_ids = (np.asarray(stored[name], np.int32).reshape(-1, 1) for name in ("idx", "idx_queue"))
    same = np.concatenate([same_identity(ids, ids), same_identity(ids, queue_ids)], axis=1)
    np.testing.assert_allclose(same / same.sum(axis=1, keepdims=True), stored["sim_targets"], atol=1e-7)
    np.testing.assert_array_equal(same_identity(ids, ids), np.asarray(stored["itm_negative_mask"]))


def test_captions_are_cleaned_as_published() -> None:
    for entry in golden.GOLDEN.settings["pre_caption"]:
        assert clean_caption(entry["raw"], 30) == entry["out"]


def test_positions_for_larger_images() -> None:
    table, expected = golden.GOLDEN.inputs["pos_embed"][0], OUT["pos_embed_6x6"][0]
    form = golden.model_config().image.pos_resize
    np.testing.assert_allclose(resize_grid(table, (4, 4), (6, 6), 1, form), expected, atol=1e-6)
    assert np.abs(resize_grid(table, (4, 4), (6, 6), 1, "antialias") - expected).max() > 1e-4


def test_the_file_comes_back_bit_for_bit() -> None:
    """Import and export of all tensors: model, averaged model, queues."""
    model = golden.model_config()
    tensors = from_params(golden.params(), golden.FORMAT.rows(model), golden.FORMAT.title)
    tensors = {**golden.FORMAT.published(tensors), **golden.FORMAT.write_extra(golden.extra(), model)}
    stored = {name: x for name, x in golden.GOLDEN.weights.items() if not re.search(r"position_ids$", name)}
    assert tensors.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
