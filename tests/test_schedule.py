"""Schedules against closed forms written here, and against optax where it has the same one."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.schedule import Constant, Cosine, Linear, Rsqrt, ScheduleConfig


def factors(schedule: ScheduleConfig, total: int) -> np.ndarray:
    return np.array([schedule.factor(jnp.int32(step), total) for step in range(total + 1)])


def test_cosine_is_open_clips() -> None:
    """open_clip: (step + 1) / warmup, then 0.5 (1 + cos(pi (step - warmup) / (total - warmup)))."""
    warmup, total = 10, 50
    want = [
        (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup)))
        for s in range(total + 1)
    ]
    np.testing.assert_allclose(factors(Cosine(warmup_steps=warmup), total), want, atol=1e-6)


def test_cosine_and_linear_equal_optax_without_warmup() -> None:
    cosine, linear = optax.cosine_decay_schedule(1.0, 40, alpha=0.1), optax.linear_schedule(1.0, 0.2, 40)
    np.testing.assert_allclose(factors(Cosine(final=0.1), 40), [cosine(s) for s in range(41)], atol=1e-6)
    np.testing.assert_allclose(factors(Linear(final=0.2), 40), [linear(s) for s in range(41)], atol=1e-6)


def test_rsqrt_falls_to_zero_in_its_cooldown() -> None:
    got = factors(Rsqrt(warmup_steps=5, timescale=20, cooldown_steps=10), 60)
    assert got[5] == pytest.approx(1.0)
    assert got[25] == pytest.approx(1 / math.sqrt(2))
    assert got[55] == pytest.approx(0.5 / math.sqrt(1 + 50 / 20))
    assert got[60] == 0
    assert np.all(np.diff(got[5:]) < 0)


def test_constant() -> None:
    got = factors(Constant(warmup_steps=4, cooldown_steps=5), 20)
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(got[4:16], 1.0)
    np.testing.assert_allclose(got[16:], [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-6)


def test_warmup_as_long_as_the_run() -> None:
    got = factors(Cosine(warmup_steps=8), 8)
    assert np.all(np.isfinite(got))
    assert got[7] == 1.0
