"""FLIP: patches dropped, then an unmasked phase with its own step and learning rate, in one run that can be resumed."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import vlm_jax
from vlm_jax.config import load_config
from vlm_jax.mesh import batch_sharding, constrain
from vlm_jax.models.stochastic import drop_patches
from vlm_jax.preemption import EXIT_PREEMPTED, StopRequest
from vlm_jax.schedule import Cosine, Phase, Phases
from vlm_jax.schema import ConfigError, validate
from vlm_jax.train import train

STEPS, UNMASKED = 6, 3
SCHEDULE = Phases(
    phases=(
        Phase("masked", Cosine(warmup_steps=1)),
        Phase("unmasked", Cosine(warmup_steps=1), steps=UNMASKED, peak=0.1),
    )
)
FLIP = {
    "objective__model__image__patch_dropout": 0.5,
    "objective__unmasked_steps": UNMASKED,
    "optimizer__schedule": SCHEDULE,
    "train__steps": STEPS,
    "evals": (),
}


def test_the_unmasked_phase_is_the_step_of_a_tower_that_drops_nothing() -> None:
    flip = tiny.program(**FLIP)
    whole = tiny.program(**{**FLIP, "objective__model__image__patch_dropout": 0.0, "objective__unmasked_steps": 0})
    assert [first for first, _ in flip.steps] == [0, STEPS - UNMASKED]
    assert [flip.phase_at(index) for index in range(STEPS)] == [0] * 3 + [1] * 3

    def program_text(step: Any) -> str:
        with jax.set_mesh(flip.mesh):
            return step.lower(flip.setup.abstract, tiny.batch(flip.mesh)).as_text()

    (_, masked), (_, unmasked) = flip.steps
    assert program_text(unmasked) == program_text(whole.step)
    assert program_text(masked) != program_text(whole.step)


class StopAt(StopRequest):
    """A stop request that comes before a chosen step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def now(self, step: int) -> bool:
        return step == self.step


def metrics(workdir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "loss", "learning_rate", "gradient_norm")
    return [{key: line[key] for key in keys} for line in lines if "loss" in line]


def test_a_run_of_both_phases_is_resumed_bit_for_bit_across_their_boundary(tmp_path: Path) -> None:
    config = tiny.config(**FLIP, mesh__data=8)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train(config, str(unbroken)) == 0
    assert train(config, str(broken), stop=StopAt(STEPS - UNMASKED)) == EXIT_PREEMPTED
    assert train(config, str(broken)) == 0
    assert metrics(broken) == metrics(unbroken)
    tiny.assert_trees_equal(vlm_jax.load(broken).params, vlm_jax.load(unbroken).params)
    # half a cosine over two steps after a warm-up of one, in each phase, from 1e-3 and from a tenth of it
    rates = [line["learning_rate"] for line in metrics(unbroken)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 5e-4, 1e-4, 1e-4, 5e-5], rtol=1e-6)


def test_dropping_patches_moves_nothing_between_devices() -> None:
    """Rows are gathered by indices of their own device: a compiler that misses this gathers the whole batch."""
    mesh = tiny.mesh(4, 2)

    def loss(x: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.sum(drop_patches(constrain(x, "batch", "length", "embed"), 0.5, keys) ** 2)

    with jax.set_mesh(mesh):
        rows = jax.device_put(np.ones((16, 10, 8), np.float32), batch_sharding(mesh))
        keys = jax.device_put(jax.random.split(jax.random.key(0), 16), batch_sharding(mesh))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(rows, keys).compile()
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    found = re.findall(rf"= (\S+?)(?:{{\S*}})? ({kinds})(?:-start)?\(", compiled.as_text())
    assert found == [("f32[]", "all-reduce")]  # the loss alone


def test_dropped_patches_save_flops() -> None:
    flip = load_config(f"{Path(__file__).parents[2]}/configs/flip_l16.py").objective
    whole = flip.phases(10**6)[-1][1]
    image, whole_image = (config.model.image.forward_flops(768) for config in (flip, whole))  # pyright: ignore
    # 99 of 197 tokens, of which attention takes a little more than half off, and a whole patch embedding
    assert 0.49 < image / whole_image < 0.51
    assert flip.train_flops() == 3 * (image + flip.model.text.forward_flops(768))  # pyright: ignore


def test_an_unmasked_phase_of_a_tower_that_drops_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unmasked_steps = 2 changes nothing: .* set model\.image\.patch_dropout"):
        validate(tiny.config(objective__unmasked_steps=2))
