"""The chunked cross-entropy against the plain one: values, gradients, meshes, and what it never holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from program_sizes import float32_sizes

from vlm_jax.flops import count_dot_flops
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.losses.vocabulary import vocabulary_cross_entropy
from vlm_jax.mesh import AXES, batch_sharding

ROWS, LENGTH, WIDTH, WORDS = 8, 12, 16, 101  # a vocabulary that divides over nothing


def arrays(rows: int = ROWS) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(WORDS, WIDTH)).astype(np.float32)
    targets = rng.integers(0, WORDS, (rows, LENGTH)).astype(np.int32)
    targets[:, ::3] = np.argmax(hidden @ head.T, axis=-1)[:, ::3]
    valid = rng.random((rows, LENGTH)) < 0.7
    valid[1] = False
    return hidden, head, targets, valid


def plain(hidden: Any, head: Any, targets: Any, valid: Any) -> tuple[jax.Array, jax.Array]:
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)
    return token_cross_entropy(logits, targets, valid)[0].sum(), correct_tokens(logits, targets, valid).sum()


def chunked(hidden: Any, head: Any, targets: Any, valid: Any) -> tuple[jax.Array, jax.Array]:
    loss = vocabulary_cross_entropy(hidden, head, targets, valid, chunk=7)
    return loss.total, loss.correct


def with_gradients(function: Any) -> Any:
    """Of 0.3 times the loss, so that the factor counts."""

    def scaled(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        total, correct = function(*arguments)
        return 0.3 * total, correct

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("shape", [None, (8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (1, 1, 8, 1), (1, 2, 2, 2)])
def test_value_and_gradients_are_those_of_the_whole_logits(shape: tuple[int, int, int, int] | None) -> None:
    """On axes `data`, `fsdp`, `tensor`, `sequence`."""
    data = arrays()
    (want, want_correct), want_gradients = with_gradients(plain)(*data)
    if shape is None:
        (got, correct), gradients = with_gradients(chunked)(*data)
        assert float(vocabulary_cross_entropy(*data).total) == pytest.approx(float(want) / 0.3, rel=1e-6)
    else:
        mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
        rows = [x if i == 1 else jax.device_put(x, batch_sharding(mesh)) for i, x in enumerate(data)]
        with jax.set_mesh(mesh):
            (got, correct), gradients = with_gradients(chunked)(*rows)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert float(correct) == float(want_correct) > 0
    for mine, theirs in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6 * float(np.abs(theirs).max()), rtol=0)


def test_rows_that_do_not_divide_are_computed_whole() -> None:
    data = arrays(rows=3)
    mesh = tiny.mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        total, _ = jax.jit(chunked)(*data)
    assert float(total) == pytest.approx(float(plain(*data)[0]), rel=1e-6)


def test_nothing_valid_is_zero_without_nan() -> None:
    hidden, head, targets, valid = arrays()
    (total, correct), gradients = with_gradients(chunked)(hidden, head, targets, np.zeros_like(valid))
    assert total == correct == 0
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_no_array_of_all_logits_exists_in_fp32() -> None:
    data = arrays()
    largest = max(float32_sizes(jax.make_jaxpr(with_gradients(chunked))(*data).jaxpr))
    assert largest < ROWS * LENGTH * WORDS / 4
    assert max(float32_sizes(jax.make_jaxpr(with_gradients(plain))(*data).jaxpr)) == ROWS * LENGTH * WORDS


def test_of_a_frozen_head_no_gradient_is_made() -> None:
    """By its products: logits, and one for each gradient that is asked for."""
    hidden, head, targets, valid = arrays()
    once = 2 * ROWS * LENGTH * WIDTH * WORDS

    def loss(hidden: Any, head: Any) -> jax.Array:
        return vocabulary_cross_entropy(hidden, head, targets, valid, chunk=8).total

    for asked, products in ((0, 2), (1, 2), ((0, 1), 3)):
        assert count_dot_flops(jax.grad(loss, argnums=asked), hidden, head) == products * once
    assert count_dot_flops(loss, hidden, head) == once
    both = jax.grad(loss, argnums=(0, 1))(hidden, head)
    for asked in (0, 1):
        np.testing.assert_allclose(jax.grad(loss, argnums=asked)(hidden, head), both[asked], atol=1e-6)


def test_in_bfloat16_sums_are_fp32() -> None:
    hidden, head, targets, valid = arrays()
    half = jnp.asarray(hidden, jnp.bfloat16)
    loss = jax.jit(vocabulary_cross_entropy)(half, head, targets, valid)
    whole = plain(np.asarray(half, np.float32), np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32), targets, valid)
    assert loss.total.dtype == jnp.float32
    assert float(loss.total) == pytest.approx(float(whole[0]), rel=1e-5)
