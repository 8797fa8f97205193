"""The train step against brute force and invariants: mesh shape, microbatches, freezing, bad steps, one compile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vlm_jax.optim import AdamW
from vlm_jax.parts import EVERYTHING, Part
from vlm_jax.schedule import Constant
from vlm_jax.step import Aux, Objective, make_setup, make_train_step

# Adam divides by the gradient's size: where that is zero but for rounding (the bias of the keys), updates would be
# noise of full size. With this eps they stay proportional to the gradient.
SMOOTH = {"optimizer__eps": 0.01, "optimizer__learning_rate": 0.1}
MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, list[dict[str, float]]]:
    return tiny.run_steps(tiny.program(**SMOOTH), 3)


@pytest.mark.parametrize("shape", MESHES)
def test_the_mesh_changes_nothing_but_rounding(shape: tuple[int, int, int], reference: Any) -> None:
    state, history = tiny.run_steps(tiny.program(tiny.mesh(*shape), **SMOOTH), 3)
    for got, want in zip(history, reference[1], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-4)
    tiny.assert_trees_close(state.params, reference[0].params, rtol=5e-4)


def test_weights_and_slots_are_split_as_the_table_says() -> None:
    state, _ = tiny.run_steps(tiny.program(tiny.mesh(2, 2, 2)), 1)
    kernel = state.params["image"]["blocks"]["attn"]["query"]["kernel"]  # [layers, embed, heads, kv]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 2, 8)
    slots = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert slots
    assert all(x.sharding.is_equivalent_to(kernel.sharding, 4) for x in slots)


@pytest.mark.parametrize("form", ["ring", "global"])
def test_every_form_of_the_loss_trains_the_same(form: str, reference: Any) -> None:
    settings = {"objective__loss": form, "train__accum_steps": 2, **SMOOTH}
    state, history = tiny.run_steps(tiny.program(tiny.mesh(4, 2, 1), **settings), 3)
    assert [m["loss"] for m in history] == pytest.approx([m["loss"] for m in reference[1]], rel=1e-5)
    tiny.assert_trees_close(state.params, reference[0].params, rtol=5e-4)


@pytest.mark.parametrize("accum", [2, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)])
def test_gradient_caching_is_exact(accum: int, shape: tuple[int, int, int], reference: Any) -> None:
    """A coupled loss over microbatches has the loss, norm and update of the undivided batch."""
    state, history = tiny.run_steps(tiny.program(tiny.mesh(*shape), train__accum_steps=accum, **SMOOTH), 3)
    for got, want in zip(history, reference[1], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-5)
    tiny.assert_trees_close(state.params, reference[0].params, rtol=5e-4)


def test_randomness_belongs_to_the_row() -> None:
    """Patch dropout and drop path draw the same masks on any mesh and for any number of microbatches."""
    settings = {"objective__model__image__patch_dropout": 0.5, "objective__model__image__drop_path": 0.3, **SMOOTH}
    plain, want = tiny.run_steps(tiny.program(**settings), 2)
    for shape, accum in (((4, 2, 1), 1), ((2, 1, 1), 4)):
        state, got = tiny.run_steps(tiny.program(tiny.mesh(*shape), train__accum_steps=accum, **settings), 2)
        assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in want], rel=1e-5)
        tiny.assert_trees_close(state.params, plain.params, rtol=5e-4)
    _, other_seed = tiny.run_steps(tiny.program(seed=1, **settings), 1)
    assert other_seed[0]["loss"] != want[0]["loss"]


def test_one_compile_for_a_run() -> None:
    program = tiny.program(tiny.mesh(2, 2, 1), train__accum_steps=2, train__ema_decay=0.9)
    tiny.run_steps(program, 4)
    assert program.step._cache_size() == 1  # pyright: ignore


def test_bfloat16_is_near_and_leaves_parameters_and_loss_in_float32(reference: Any) -> None:
    state, history = tiny.run_steps(tiny.program(train__dtype="bfloat16", **SMOOTH), 3)
    assert [m["loss"] for m in history] == pytest.approx([m["loss"] for m in reference[1]], rel=2e-2)
    assert [m["loss"] for m in history] != [m["loss"] for m in reference[1]]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_the_states_buffers_are_donated() -> None:
    program = tiny.program()
    with jax.set_mesh(program.mesh):
        old = program.setup.init()
        program.step(old, tiny.batch(program.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))


def test_clip_gradients_against_a_direct_derivative() -> None:
    """The factory's gradient norm is that of `jax.grad` of plain logits, written here by hand."""
    program = tiny.program()
    batch, objective = tiny.batch(program.mesh), program.objective
    state = program.setup.init()

    def loss(params: Any) -> jax.Array:
        out = objective.outputs(params, batch)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        rows = jax.nn.log_softmax(logits, axis=1).diagonal()
        columns = jax.nn.log_softmax(logits, axis=0).diagonal()
        return -(rows.mean() + columns.mean()) / 2

    value, gradients = jax.value_and_grad(loss)(state.params)
    norm = np.sqrt(sum(float((g.astype(jnp.float32) ** 2).sum()) for g in jax.tree.leaves(gradients)))
    _, (metrics,) = tiny.run_steps(program, 1)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_scale_is_clamped_after_the_step() -> None:
    program = tiny.program(objective__max_scale=14.3, optimizer__learning_rate=0.5)
    state, _ = tiny.run_steps(program, 3)
    assert 0 <= float(state.params["logit_scale"]) <= np.log(14.3) + 1e-6


def test_frozen_parts_do_not_move_and_own_no_slots() -> None:
    program = tiny.program(train__ema_decay=0.9)
    rules = (Part("image", "image/.*", frozen=True), Part("rest", ".*"))
    config = program.config
    setup = make_setup(program.objective, config.optimizer, rules, program.mesh, total_steps=8, seed=0, ema=True)
    step = make_train_step(program.objective, setup.optimizer, setup.parts, program.mesh, ema_decay=0.9)
    with jax.set_mesh(program.mesh):
        state = setup.init()
        before = tiny.host(state.params)
        for index in range(2):
            state, _ = step(state, tiny.batch(program.mesh, seed=index))
    tiny.assert_trees_equal(state.params["image"], before["image"])
    assert not np.array_equal(state.params["text"]["token_embed"], before["text"]["token_embed"])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]
    assert paths
    assert not any("'image'" in path for path in paths)


def test_moving_average() -> None:
    program = tiny.program(train__ema_decay=0.75)
    with jax.set_mesh(program.mesh):
        state = program.setup.init()
        average = tiny.host(state.params)
        for index in range(3):
            state, _ = program.step(state, tiny.batch(program.mesh, seed=index))
            average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, tiny.host(state.params))
    tiny.assert_trees_close(state.ema, average, rtol=1e-5)


class Weighted(Objective):
    """A per-example loss with unequal weights and counts: the mean of means would be wrong."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {"w": jnp.array([1.0, -2.0, 0.5])}, {"queue": jnp.zeros((8, 3))}

    def loss(self, params: Any, extra: Any, batch: Any, keys: jax.Array, step: jax.Array) -> Any:
        error = (batch["x"] @ params["w"] - batch["y"]) ** 2
        ratio = jnp.sum(batch["weight"] * error), jnp.sum(batch["weight"])
        return ratio, Aux({"error": (jnp.sum(error), jnp.float32(error.shape[0]))}, {"rows": batch["x"]})

    def after(self, extra: Any, params: Any, updates: Any, step: jax.Array) -> Any:
        return {"queue": updates["rows"]}


def weighted_step(accum: int, optimizer: AdamW) -> tuple[Any, Any]:
    mesh = tiny.mesh(2)
    setup = make_setup(Weighted(), optimizer, EVERYTHING, mesh, total_steps=10, seed=0, ema=False)
    return setup, make_train_step(Weighted(), setup.optimizer, setup.parts, mesh, accum)


def weighted_batch(rows: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    weight = np.array([0, 0, 0, 1, 5, 0, 2, 1], np.float32)
    return {
        "x": jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=rows), jnp.float32),
        "weight": jnp.asarray(weight),
    }


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_sum_and_count_make_accumulation_exact(accum: int) -> None:
    setup, step = weighted_step(accum, AdamW(learning_rate=0.0, schedule=Constant()))
    batch = weighted_batch()
    x, y, weight = (np.asarray(batch[k], np.float64) for k in ("x", "y", "weight"))
    w = np.array([1.0, -2.0, 0.5])
    error = (x @ w - y) ** 2
    gradient = 2 * ((weight * (x @ w - y)) @ x) / weight.sum()
    with jax.set_mesh(tiny.mesh(2)):
        state, metrics = step(setup.init(), batch)
    mean = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert mean["loss"] == pytest.approx((weight * error).sum() / weight.sum(), rel=1e-5)
    assert mean["error"] == pytest.approx(error.mean(), rel=1e-5)
    assert mean["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    np.testing.assert_array_equal(state.extra["queue"], batch["x"])  # in the order of the global batch


@pytest.mark.parametrize("accum", [1, 2])
def test_a_batch_in_which_nothing_counts_is_no_bad_step(accum: int) -> None:
    """Padding alone: gradient 0, no parameter moves, and the step is not taken for one that diverged."""
    setup, step = weighted_step(accum, AdamW(learning_rate=0.1, schedule=Constant()))
    with jax.set_mesh(tiny.mesh(2)):
        state, metrics = step(setup.init(), weighted_batch() | {"weight": jnp.zeros(8)})
    assert [float(x) for x in metrics["loss"]] == [0.0, 1.0]  # a mean of 0 in the log, not of NaN
    assert float(metrics["gradient_norm"][0]) == 0
    assert int(state.nonfinite["total"]) == 0
    np.testing.assert_array_equal(state.params["w"], [1.0, -2.0, 0.5])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_bad_step_changes_nothing_and_the_next_one_counts(poison: float, bad_step: int) -> None:
    setup, step = weighted_step(1, AdamW(learning_rate=0.1, schedule=Constant(warmup_steps=4)))
    bad = weighted_batch() | {"y": weighted_batch()["y"].at[4].set(poison)}
    with jax.set_mesh(tiny.mesh(2)):
        state = setup.init()
        for index in range(4):
            before = tiny.host((state.params, state.opt_state, state.extra))
            state, metrics = step(state, bad if index == bad_step else weighted_batch())
            after = tiny.host((state.params, state.opt_state, state.extra))
            if index == bad_step:
                tiny.assert_trees_equal(before, after)
                assert float(metrics["nonfinite_in_a_row"][0]) == 1
            else:
                assert not np.array_equal(before[0]["w"], after[0]["w"])
                assert float(metrics["nonfinite_in_a_row"][0]) == 0
    assert int(state.nonfinite["total"]) == 1
    assert int(state.step) == 4


def test_a_batch_that_does_not_split_is_an_error() -> None:
    setup, step = weighted_step(3, AdamW())
    with jax.set_mesh(tiny.mesh(2)), pytest.raises(ValueError, match="8 rows doesn't split into 3"):
        step(setup.init(), weighted_batch())
