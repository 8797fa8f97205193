"""AIMv2's encoder against vectors of its authors' code; its loss against sums by hand, meshes and microbatches."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from vlm_jax.config import load_config
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.aimv2 import Aimv2ModelConfig, MultimodalDecoderConfig, aimv2_encoder
from vlm_jax.models.patches import patchify
from vlm_jax.objectives.aimv2 import Aimv2Config
from vlm_jax.objectives.patch_prediction import Autoregression
from vlm_jax.optim import Optimizer
from vlm_jax.parts import Parts
from vlm_jax.schema import ConfigError, override, validate

MODEL = Aimv2ModelConfig(
    override(aimv2_encoder(32, 2, 4, 48, image_size=8), {"patch_size": 2}),
    MultimodalDecoderConfig(width=32, depth=2, heads=4, mlp_dim=48, vocab_size=320, length=16, pad_id=0),
)
CONFIG = Aimv2Config(model=MODEL)
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
FULL_BATCH = tiny.batch


def ragged(mesh: Any, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Captions of very different lengths: a mean of means would be another number."""
    batch = jax.tree.map(np.array, FULL_BATCH(mesh, rows, seed))
    for row, text in enumerate(batch["text"]):
        text[1 + (7 * row + seed) % 15 :] = 0
    return {key: jax.device_put(value, batch_sharding(mesh)) for key, value in batch.items()}


@pytest.fixture(scope="module")
def params() -> Any:
    return unbox(jax.jit(objective().init)(jax.random.key(0))[0])


def objective(**changes: Any) -> Any:
    return override(CONFIG, changes).build(PreprocessConfig(), jnp.float32)


def images(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 8, 8, 3)).astype(np.float32)


def texts(rows: int = 3) -> np.ndarray:
    return np.array(ragged(tiny.mesh(), rows)["text"])


def test_the_loss_is_the_weighted_sum_of_two_means(params: Any) -> None:
    """By hand: cross-entropy of every word, and normalised patches after the prefix, each against the next."""
    plan = Autoregression().plan_of(jnp.asarray([2, 9, 15]), (4, 4))
    aim, pictures, captions = objective(text_weight=0.7), images(), texts()
    outputs = aim.module.apply({"params": params}, pictures, captions, attention_mask=plan.attention_mask)
    pixels, logits = (np.asarray(outputs[name], np.float64) for name in ("pixels", "logits"))
    patches = np.asarray(patchify(pictures, 2), np.float64)
    patches = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
    counted = [(row, k) for row, length in enumerate((2, 9, 15)) for k in range(length - 1, 15)]
    squares = [np.mean((pixels[row, k] - patches[row, k + 1]) ** 2) for row, k in counted]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = [-log_p[row, t, word] for row, text in enumerate(captions) for t, word in enumerate(text) if word]
    embedded = aim.sums(params, pictures, captions, plan)
    (total, count), aux = aim.pair_loss(params, {}, embedded, jnp.zeros((), jnp.int32))
    assert count == 3
    assert float(total / count) == pytest.approx(0.7 * np.mean(nats) + 0.4 * np.mean(squares), rel=1e-5)
    assert aux.metrics["text_loss"][1] == len(nats)
    assert aux.metrics["pixel_loss"][1] == len(squares) == 14 + 7 + 1


def test_what_each_prediction_depends_on(params: Any) -> None:
    """A word on all patches and on the words before it alone; a patch on no word."""
    plan = Autoregression().plan_of(jnp.asarray([5]), (4, 4))
    aim = objective()

    def outputs(pictures: jax.Array, captions: np.ndarray) -> tuple[jax.Array, jax.Array]:
        named: Any = aim.module.apply({"params": params}, pictures, captions, attention_mask=plan.attention_mask)
        return named["pixels"][0].sum(axis=-1), (named["logits"][0] ** 2).sum(axis=-1)

    captions = np.arange(3, 19, dtype=np.int32)[None]
    run = jax.jit(outputs)
    pixels, logits = run(images(1), captions)
    for place in (0, 6, 15):
        changed = captions.copy()
        changed[0, place] = 200
        other_pixels, other = run(images(1), changed)
        np.testing.assert_array_equal(other_pixels, pixels)
        np.testing.assert_array_equal(np.asarray(other) != np.asarray(logits), np.arange(16) > place)
    jacobian_of_pixels, jacobian_of_logits = jax.jit(jax.jacrev(outputs))(images(1), captions)
    depends = np.abs(patchify(jacobian_of_pixels[:, 0], 2)).sum(axis=-1) > 1e-7
    for patch in np.flatnonzero(plan.predicted[0]):
        np.testing.assert_array_equal(depends[patch], (np.arange(16) <= patch) | (np.arange(16) < 5))
    assert (np.abs(patchify(jacobian_of_logits[:, 0], 2)).sum(axis=-1) > 1e-7).all()


def test_mesh_and_microbatches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "batch", ragged)
    want, history = tiny.run_steps(tiny.program(objective=CONFIG, evals=(), **SMOOTH), 2)
    program = tiny.program(tiny.mesh(2, 2, 2), objective=CONFIG, evals=(), train__accum_steps=4, **SMOOTH)
    state, others = tiny.run_steps(program, 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


def test_the_held_out_loss_is_a_number_with_and_without_keys(params: Any) -> None:
    batch, step = {"image": np.zeros((4, 8, 8, 3), np.uint8), "text": texts(4)}, jnp.zeros((), jnp.int32)
    loss = jax.jit(lambda keys: objective().loss(params, {}, batch, keys, step)[0])
    for keys in (None, jax.random.split(jax.random.key(1), 4)):
        total, count = loss(keys)
        assert count == 4
        assert np.isfinite(total)


def test_prompts_are_scored_by_their_likelihood(params: Any) -> None:
    aim = objective()
    prompts = texts(2)
    scores = jax.jit(aim.prompt_scores)(params, images(), prompts)
    for column, prompt in enumerate(prompts):
        batch = {"image": images(), "text": np.broadcast_to(prompt, (3, 16))}
        log_p = jax.nn.log_softmax(aim.outputs(params, batch, intermediates=False)["caption_logits"])
        by_hand = [sum(log_p[row, t, word] for t, word in enumerate(prompt) if word) for row in range(3)]
        np.testing.assert_allclose(scores[:, column], by_hand, rtol=1e-5)


def test_flops_are_those_of_the_jaxpr() -> None:
    aim = objective()
    shapes = unbox(jax.eval_shape(aim.init, jax.random.key(0))[0])
    inputs = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    counted = count_dot_flops(lambda params, *inputs: aim.module.apply({"params": params}, *inputs), shapes, *inputs)
    assert CONFIG.train_flops() == 3 * counted


def test_weight_decay_follows_the_schedule_alone() -> None:
    """p *= 1 - decay lr_t / lr_peak on what decays, by the recipe's optimiser and parts; gradients are 0."""
    config = load_config(f"{Path(__file__).parents[2]}/configs/aimv2_l14.py")
    leaves = {"image/blocks/mlp/fc1/kernel": 1, "image/pos_embed": 0, "decoder/norm/scale": 0, "decoder/start_token": 0}
    parts = Parts(config.parts, dict.fromkeys(leaves, ("embed",)), dict.fromkeys(leaves, (2,)))
    optimizer = Optimizer(config.optimizer, parts, config.train.steps)
    live = unflatten_dict({path: jnp.ones(2) for path in leaves}, sep="/")
    zeros = jax.tree.map(jnp.zeros_like, live)
    for step, share in ((0, 1 / 12_500), (12_500, 1.0), (config.train.steps, 1e-5 / 1e-3)):
        updates, _ = optimizer.update(zeros, jnp.zeros(()), optimizer.init(live), live, jnp.asarray(step))
        for path, decays in leaves.items():
            np.testing.assert_allclose(flatten_dict(updates, sep="/")[path], -1e-4 * share * decays, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_weight": 0.0, "pixel_weight": 0.0}, r"pixel_weight = 0 and text_weight = 0 leave no loss"),
        ({"pixel_weight": -1.0}, r"pixel_weight = -1\.0 must not be negative"),
        ({"model.image.mask_token": True}, r"model\.image\.mask_token = true, but no patch is ever masked"),
        ({"model.image.class_token": True}, r"model\.image\.class_token and image\.registers are no patches"),
        ({"model.decoder.length": 0}, r"model\.decoder\.length = 0 must be at least 1"),
    ],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(CONFIG, changes))


@pytest.mark.parametrize(
    ("settings", "pad_id", "message"),
    [({}, 1, r"pad_id = 1 must be the tokenizer's 0"), ({"pad": "eos"}, 0, r"pad_id = 0 must be the tokenizer's 1")],
)
def test_padding_is_the_tokenizers(settings: dict[str, Any], pad_id: int, message: str) -> None:
    tokenizer = build_tokenizer(SentencePieceConfig(length=16, vocab_size=320, **settings), ["a few words"] * 9)
    right = override(CONFIG, {"model.decoder.pad_id": 1 - pad_id})
    right.check_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match=message):
        override(CONFIG, {"model.decoder.pad_id": pad_id}).check_tokenizer(tokenizer)
