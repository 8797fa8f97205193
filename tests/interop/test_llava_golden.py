"""LLaVA-1.5's own code on a small model: what the tower, the projector and the decoder give, loss, gradients, text."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import GoldenVectors
from safetensors.numpy import save_file
from vision_language_rows import expanded_rows

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.interop.adapters import import_part
from vlm_jax.interop.commands import import_weights
from vlm_jax.interop.llava import OriginalLlava
from vlm_jax.interop.tables import from_params, to_params
from vlm_jax.loading import load
from vlm_jax.mesh import unbox
from vlm_jax.models.generation import GenerationConfig
from vlm_jax.objectives.vlm import VlmConfig
from vlm_jax.schema import override

GOLDEN, FORMAT = GoldenVectors("llava_model"), OriginalLlava()
IMAGE_TOKEN = -200
CONFIG = FORMAT.read_config(GOLDEN.weights, GOLDEN.settings, None)
PARAMS = to_params(GOLDEN.weights, FORMAT.rows(CONFIG), FORMAT.shapes(CONFIG), FORMAT.title)
IMAGES = GOLDEN.images("images")
VLM = VlmConfig(model=CONFIG, length=20, tiles=2).build(PreprocessConfig(), jnp.float32)


def batch(side: str) -> dict[str, Any]:
    """One image, two images, and text alone, which takes up an image of the reference's list."""
    names = ("input_ids", "attention_mask", "labels")
    ids, mask, labels = (GOLDEN.inputs[name] for name in names)
    tiles = [IMAGES[:1], IMAGES[1:3], IMAGES[:0]]
    return expanded_rows(ids, mask, labels, IMAGE_TOKEN, CONFIG.tile_tokens, tiles, side)


@pytest.fixture(scope="module")
def right() -> Any:
    """((loss, (outputs, batch)), gradients) of rows filled up on the right."""

    def mean_loss(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        (total, count), aux = VLM.loss(params, {}, rows, None, jnp.int32(0))
        return total / count, (VLM.outputs(params, rows)["logits"], aux)

    return jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(PARAMS, batch("right"))


def test_features_without_the_class_token_from_the_block_before_the_last() -> None:
    def features(params: Any, tiles: Any) -> Any:
        tokens = VLM.tower.apply({"params": params["image"]}, tiles, layer=CONFIG.layer)["tokens"]
        return tokens[:, 1:], VLM.module.apply({"params": params}, tiles[:, None], method="features")

    vision, projected = jax.jit(features)(PARAMS, IMAGES)
    np.testing.assert_allclose(vision, GOLDEN.outputs["vision_features"], atol=2e-5)
    np.testing.assert_allclose(projected, GOLDEN.outputs["image_embeds"], atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_image_features_stand_among_the_words(side: str) -> None:
    rows = batch(side)
    found: Any = VLM.module.apply({"params": PARAMS}, rows["text"], rows["tile_slots"], rows["tiles"], method="inputs")
    mask = GOLDEN.outputs[f"{side}.attention_mask"]
    np.testing.assert_array_equal(rows["segments"] > 0, mask)
    np.testing.assert_array_equal(rows["supervised"], GOLDEN.outputs[f"{side}.labels"] != -100)
    np.testing.assert_allclose(np.asarray(found)[mask], GOLDEN.outputs[f"{side}.embeds"][mask], atol=2e-5)


def test_logits_loss_and_gradients(right: Any) -> None:
    (loss, (logits, aux)), gradients = right
    mask = GOLDEN.outputs["right.attention_mask"]
    np.testing.assert_allclose(np.asarray(logits)[mask], GOLDEN.outputs["right.logits"][mask], atol=2e-5)
    assert float(loss) == pytest.approx(float(GOLDEN.outputs["right.loss"][0]), rel=1e-5)
    named = from_params(gradients, FORMAT.rows(CONFIG), FORMAT.title)
    wanted = {name.removeprefix("grad."): x for name, x in GOLDEN.outputs.items() if name.startswith("grad.")}
    assert {name for name in named if "vision_tower" not in name} == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(named[name], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=name)
    assert aux.metrics["unsupervised_rows"] == (0, 3)


def test_what_is_above_the_chosen_block_has_no_gradient(right: Any) -> None:
    """The reference freezes the whole tower; what doesn't run could not learn."""
    image = right[1]["image"]
    assert VLM.without_gradient == ("image/ln_post/.*",)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(image["ln_post"]))
    for leaf in jax.tree.leaves(image["blocks"]["mlp"]):
        assert not np.any(leaf[-1])
        assert np.any(leaf[-2])


def test_loss_does_not_depend_on_the_side_of_the_padding() -> None:
    (total, count), _ = jax.jit(VLM.loss)(PARAMS, {}, batch("left"), None, jnp.int32(0))
    assert float(total / count) == pytest.approx(float(GOLDEN.outputs["left.loss"][0]), rel=1e-5)


def test_greedy_ids() -> None:
    prompt = GOLDEN.outputs["gen_prompt"]
    nothing = np.full_like(prompt, -100)
    rows = expanded_rows(
        prompt, np.ones(prompt.shape, bool), nothing, IMAGE_TOKEN, CONFIG.tile_tokens, [IMAGES[:1]], "left"
    )
    config = GenerationConfig(max_new_tokens=8)
    found = jax.jit(lambda params, rows: VLM.answer(params, rows, config).ids)(PARAMS, rows)
    # The reference puts the start token before what it writes.
    np.testing.assert_array_equal(found, GOLDEN.outputs["gen_ids"][:, 1:])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the method with small matrices, its parameters), from the files of the base and of PEFT."""
    root, sizes = tmp_path_factory.mktemp("adapted"), GOLDEN.settings["lora"]
    stored = {name.removeprefix("lora."): x for name, x in GOLDEN.inputs.items() if name.startswith("lora.")}
    settings = {"peft_type": "LORA", "r": sizes["r"], "lora_alpha": sizes["alpha"], "lora_dropout": 0.05}
    for name, file, tensors, told in (
        ("base", "model.safetensors", GOLDEN.weights, ("config.json", GOLDEN.settings)),
        ("adapter", "adapter_model.safetensors", stored, ("adapter_config.json", settings)),
    ):
        (root / name).mkdir()
        save_file(tensors, root / name / file)
        (root / name / told[0]).write_text(json.dumps(told[1]))
    import_weights(root / "base", root / "ours", preprocess="clip")
    said = import_part(root / "adapter", root / "both", root / "ours")
    assert "an adapter of rank 4 of query, key, value, out, gate, fc1, fc2 onto" in said
    model = load(root / "both")
    vlm = override(model.config.objective, {"length": 20, "tiles": 2}).build(PreprocessConfig(), jnp.float32)
    return vlm, jax.tree.map(np.asarray, model.params)


def test_small_matrices_beside_the_decoders(adapted: Any) -> None:
    """Logits and loss of PEFT, and the same once they are added to the others."""
    vlm, params = adapted
    rows, mask = batch("right"), GOLDEN.outputs["right.attention_mask"]
    shapes = jax.tree.map(lambda x: x.shape, unbox(jax.eval_shape(vlm.init, jax.random.key(0))[0]))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    plain, merged = vlm.config.model.merged(params)
    assert plain == CONFIG
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    for method, weights in ((vlm, params), (VLM, merged)):
        run = jax.jit(lambda p, m=method: (m.loss(p, {}, rows, None, jnp.int32(0))[0], m.outputs(p, rows)["logits"]))
        (total, count), logits = run(weights)
        np.testing.assert_allclose(np.asarray(logits)[mask], GOLDEN.outputs["lora.right_logits"][mask], atol=2e-5)
        assert float(total / count) == pytest.approx(float(GOLDEN.outputs["lora.loss"][0]), rel=1e-5)


def test_dropout_before_the_small_matrices_follows_the_keys_of_the_rows(adapted: Any) -> None:
    vlm, params = adapted
    rows = batch("right")
    run = jax.jit(lambda keys: vlm.loss(params, {}, rows, keys, jnp.int32(0))[0][0])
    losses = [float(run(jax.random.split(jax.random.key(seed), 3))) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != float(run(None))
