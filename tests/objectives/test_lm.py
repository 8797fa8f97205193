"""Language pre-training: its loss by hand, meshes, microbatches, packed rows, and what it refuses."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from program_sizes import float32_sizes

from vlm_jax.config import load_config
from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.text import SentencePieceConfig, build_tokenizer
from vlm_jax.data.text_rows import TextRows
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.flops import count_dot_flops
from vlm_jax.mesh import batch_sharding, unbox
from vlm_jax.models.decoder import DecoderConfig
from vlm_jax.models.language_model import LanguageModelConfig
from vlm_jax.objectives.lm import LmConfig, next_tokens
from vlm_jax.schema import ConfigError, override, validate

LENGTH = 16
DECODER = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48, vocab_size=320)
CONFIG = LmConfig(model=LanguageModelConfig(DECODER), length=LENGTH)
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}


def rows(mesh: Any, count: int = 16, seed: int = 0, prefix: bool = False) -> dict[str, jax.Array]:
    """Documents of very different lengths, in rows that are full or not: a mean of means would be another number."""
    rng = np.random.default_rng(seed)
    host = {name: np.zeros((count, LENGTH), np.int32) for name in ("tokens", "segments", "positions")}
    host["prefix"] = np.zeros((count, LENGTH), bool)
    for row in range(count):
        place, number = 0, 1
        while place < LENGTH - row % 5:
            length = min(int(rng.integers(1, 9)), LENGTH - place)
            span = slice(place, place + length)
            host["tokens"][row, span] = rng.integers(3, 320, length)
            host["segments"][row, span], host["positions"][row, span] = number, np.arange(length)
            host["prefix"][row, place : place + length // 2] = True
            place, number = place + length, number + 1
    if not prefix:
        del host["prefix"]
    return {name: jax.device_put(value, batch_sharding(mesh)) for name, value in host.items()}


@pytest.fixture(scope="module")
def params() -> Any:
    return unbox(jax.jit(objective().init)(jax.random.key(0))[0])


def objective(**changes: Any) -> Any:
    return override(CONFIG, changes).build(PreprocessConfig(), jnp.float32)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_loss_is_the_mean_over_tokens_that_follow_in_a_document(params: Any, prefix: bool) -> None:
    batch = rows(tiny.mesh(), 4, prefix=prefix)
    lm = objective(prefix=prefix)
    (total, count), aux = jax.jit(lm.loss)(params, {}, batch, None, jnp.int32(0))
    logits = np.asarray(jax.jit(lm.outputs)(params, batch)["logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    host = jax.tree.map(np.asarray, batch)
    segments, given = host["segments"], host.get("prefix", np.zeros((4, LENGTH), bool))
    counted = [
        (row, t)
        for row in range(4)
        for t in range(LENGTH - 1)
        if segments[row, t] == segments[row, t + 1] > 0 and not given[row, t + 1]
    ]
    nats = [-log_p[row, t, host["tokens"][row, t + 1]] for row, t in counted]
    hits = [log_p[row, t].argmax() == host["tokens"][row, t + 1] for row, t in counted]
    assert count == len(counted) > 10
    assert float(total / count) == pytest.approx(np.mean(nats), rel=1e-5)
    assert aux.metrics["token_accuracy"] == (sum(hits), len(counted))
    assert aux.metrics["predicted"][1] == 4 * LENGTH


def test_the_next_token_ends_with_the_row() -> None:
    """The first token is no successor of the last, though both are of document 1."""
    ids, segments = np.arange(4)[None].astype(np.int32), np.ones((1, 4), np.int32)
    targets, valid = next_tokens(ids, segments)
    np.testing.assert_array_equal(targets[:, :3], [[1, 2, 3]])
    np.testing.assert_array_equal(valid, [[True, True, True, False]])


@pytest.fixture(scope="module")
def reference() -> Any:
    """(state, metrics) of two steps on one device."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tiny, "batch", rows)
    try:
        return tiny.run_steps(tiny.program(objective=CONFIG, evals=(), **SMOOTH), 2)
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("shape", "accum"),
    [
        ((2, 2, 2), 4),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_mesh_and_microbatches_change_nothing(
    monkeypatch: pytest.MonkeyPatch, reference: Any, shape: tuple[int, int, int], accum: int
) -> None:
    monkeypatch.setattr(tiny, "batch", rows)
    want, history = reference
    program = tiny.program(tiny.mesh(*shape), objective=CONFIG, evals=(), train__accum_steps=accum, **SMOOTH)
    state, others = tiny.run_steps(program, 2)
    for got, expected in zip(others, history, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    tiny.assert_trees_close(state.params, want.params, rtol=5e-4)


def test_the_held_out_loss_leaves_rows_out_on_a_mesh(params: Any) -> None:
    """Rows that are padding don't count; those that do add up as in one batch."""
    mesh = tiny.mesh(2, 2, 2)
    batch = rows(mesh, 8)
    mask = np.arange(8) < 5
    host = jax.tree.map(np.asarray, batch)
    (want, count), _ = objective().loss(params, {}, {name: x[mask] for name, x in host.items()}, None, jnp.int32(0))
    marks = {"mask": mask, "index": np.arange(8, dtype=np.int32)}
    held_out = HeldOut(objective(), TextRows(LENGTH, 0, True, False))
    assert held_out.possible
    with jax.set_mesh(mesh):
        marked = batch | {name: jax.device_put(x, batch_sharding(mesh)) for name, x in marks.items()}
        total, found = held_out.loss(params, [marked], 0)
    assert found == count
    assert total == pytest.approx(float(want), rel=1e-5)


def test_the_step_never_holds_all_logits_in_fp32(params: Any) -> None:
    lm, batch = objective(), rows(tiny.mesh(), 8)
    gradient = jax.grad(lambda params: lm.loss(params, {}, batch, None, jnp.int32(0))[0][0])
    assert max(float32_sizes(jax.make_jaxpr(gradient)(params).jaxpr)) < 8 * LENGTH * 320 / 2


def test_flops_are_those_of_the_jaxpr() -> None:
    lm = objective()
    shapes = unbox(jax.eval_shape(lm.init, jax.random.key(0))[0])
    batch = CONFIG.batch_shapes(1)
    loss = lambda params, batch: lm.loss(params, {}, batch, None, jnp.int32(0))[0][0]  # noqa: E731
    forward = count_dot_flops(loss, shapes, batch)
    assert CONFIG.train_flops() == 3 * forward
    # The chunked loss takes its gradient at once and repeats no product: the step's products are just those.
    assert count_dot_flops(jax.grad(loss), shapes, batch) == 3 * forward


def test_published_recipe() -> None:
    """2 T tokens in steps of a million, constant and then linear to zero over the last fifth (config of SmolLM2)."""
    config = load_config(f"{Path(__file__).parents[2]}/configs/lm_135m.py")
    assert isinstance(config.objective, LmConfig)
    assert config.data.batch_size * config.objective.length == 2**20
    assert config.train.steps == 2_000_000
    factors = [
        float(config.optimizer.schedule.factor(jnp.asarray(step), config.train.steps))
        for step in (0, 2000, 1_600_000, 1_800_000, 1_999_999)
    ]
    np.testing.assert_allclose(factors, [1 / 2000, 1, 1, 0.5, 1 / 400_000], rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"length": 1}, r"length = 1 leaves nothing to predict"), ({"prefix": True, "isolate": False}, r"needs isolate")],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(CONFIG, changes))


def test_a_vocabulary_that_is_too_small_is_refused_and_added_tokens_help() -> None:
    tokenizer = build_tokenizer(SentencePieceConfig(length=16, vocab_size=320), ["a few words"] * 9)
    small = override(CONFIG, {"model.decoder.vocab_size": tokenizer.vocab_size - 4})
    with pytest.raises(ConfigError, match=r"vocab_size = \d+ with extra_tokens = 0 is smaller than"):
        small.check_tokenizer(tokenizer)
    override(small, {"model.decoder.extra_tokens": 4}).check_tokenizer(tokenizer)
