"""Schedules against closed forms written here, and against optax where it has the same one."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import GoldenVectors

from vlm_jax.config import load_config
from vlm_jax.schedule import Constant, Cosine, EpochCosine, Linear, Phase, Phases, Rsqrt, ScheduleConfig
from vlm_jax.schema import ConfigError


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


# FLIP in small: 30 steps with a warm-up of 5, then 10 at a hundredth of the peak with a warm-up of 4.
FLIP = Phases(
    phases=(Phase("masked", Cosine(warmup_steps=5)), Phase("unmasked", Cosine(warmup_steps=4), steps=10, peak=0.01))
)


def test_phases_against_hand_computed_values() -> None:
    got = factors(FLIP, 40)
    want = {0: 0.2, 4: 1.0, 5: 1.0, 29: 0.5 * (1 + math.cos(math.pi * 24 / 25)), 30: 0.0025, 33: 0.01, 34: 0.01}
    want |= {37: 0.005, 39: 0.005 * (1 + math.cos(math.pi * 5 / 6)), 40: 0.0}
    np.testing.assert_allclose(got[list(want)], list(want.values()), atol=1e-7)


def test_phases_equal_optax_joined_schedules() -> None:
    parts = (Phase("rise", Cosine(final=0.2), steps=12, peak=0.5), Phase("flat", Constant()), Phase("end", Linear(), 8))
    joined = optax.join_schedules(
        [optax.cosine_decay_schedule(0.5, 12, alpha=0.2), optax.constant_schedule(1.0), optax.linear_schedule(1, 0, 8)],
        [12, 22],
    )
    np.testing.assert_allclose(factors(Phases(phases=parts), 30), [joined(s) for s in range(31)], atol=1e-6)
    # a phase of the whole run is that schedule
    np.testing.assert_array_equal(factors(Phases(phases=(Phase("a", Rsqrt(3)),)), 20), factors(Rsqrt(3), 20))


DIGITS = Path(__file__).parent.parent / "configs/clip_digits.py"


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "phases is empty"),
        ((Phase("a"), Phase("a", steps=5)), "two phases named 'a'"),
        ((Phase("a"), Phase("b")), "only one can"),
        ((Phase("a"), Phase("b", steps=100)), "leaves no step for 'a': b 100 of a run of 100"),
        ((Phase("a", steps=60), Phase("b", steps=50)), r"takes 110 steps \(a 60, b 50\) of a run of 100"),
        ((Phase("a", steps=60), Phase("b", steps=30)), "takes 90 steps"),
        ((Phase("a"), Phase("b", Cosine(9), steps=9)), "phases.b.schedule.warmup_steps = 9 must be less than the 9"),
        ((Phase("a", Phases(phases=(Phase("c", steps=7),))),), "phases.a.schedule.phases takes 7 .* a run of 100"),
        ((Phase("a", peak=1.5),), "phases.a.peak = 1.5 must lie in"),
        ((Phase("a", steps=-1),), "phases.a.steps = -1 must not be negative"),
    ],
)
def test_phases_that_do_not_fit_are_refused_with_the_config(phases: tuple[Phase, ...], message: str) -> None:
    overrides: dict[str, Any] = {"train.steps": 100, "optimizer.schedule": Phases(phases=phases)}
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(DIGITS), overrides)
    assert str(error.value).startswith("config.optimizer.schedule.phases")


def test_phases_are_overridden_by_name() -> None:
    overrides = {
        "optimizer.schedule": FLIP,
        "optimizer.schedule.phases.unmasked.peak": "0.5",
        "optimizer.schedule.phases.masked.schedule": "linear",
    }
    masked, unmasked = load_config(str(DIGITS), overrides).optimizer.schedule.phases  # pyright: ignore
    assert (masked.schedule, unmasked.peak) == (Linear(), 0.5)
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps = 3 has no effect"):
        load_config(str(DIGITS), {**overrides, "optimizer.schedule.warmup_steps": 3})


def test_albefs_schedule_is_the_published_one() -> None:
    """Thirty epochs of 9,600 steps with stairs of 100 steps in the first, from the published code's own numbers."""
    published = GoldenVectors("albef").settings["schedule"]
    schedule, epoch = EpochCosine(warmup_steps=2000, epoch_steps=9600), 9600
    points = [(step, lr) for _, step, lr in published["pretrain_warmup_epoch0_iter_lr"]]
    points += [(2050, 1e-4), (250, 1.9e-5)]
    points += [(number * epoch + step, lr) for number, lr in published["pretrain_epoch_lr"] for step in (0, epoch - 1)]
    found = [1e-4 * float(schedule.factor(jnp.int32(step), 30 * epoch)) for step, _ in points]
    assert found == pytest.approx([lr for _, lr in points], rel=1e-5)
