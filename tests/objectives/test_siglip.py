"""SigLIP as a method: its loss is the definition on its towers' features; limits of the scale; what is refused."""

import math
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.objectives.siglip import SiglipConfig
from vlm_jax.parts import Part
from vlm_jax.schema import ConfigError, override, validate


def siglip(**changes: Any) -> SiglipConfig:
    model = tiny.config().objective.model  # pyright: ignore[reportAttributeAccessIssue]
    start = {"logit_scale_init": math.log(10), "logit_bias_init": -10.0}
    return SiglipConfig(model=override(model, {**start, **changes}))


def test_loss_and_gradient_of_a_step_are_the_definitions() -> None:
    """With the ring on a mesh, in two microbatches, and only scale and bias alive: their gradient is known."""
    parts = (Part("scalars", "logit_.*"), Part("towers", ".*", frozen=True))
    settings = {"objective__loss": "ring", "train__accum_steps": 2, "parts": parts}
    program = tiny.program(tiny.mesh(2, 2, 2), objective=siglip(), **settings)
    _, (metrics, later) = tiny.run_steps(program, 2)
    plain = tiny.program(objective=siglip())
    outputs = jax.jit(plain.objective.outputs)(plain.setup.init().params, tiny.batch(plain.mesh))
    image, text = (np.asarray(outputs[f"{tower}_features"], np.float64) for tower in ("image", "text"))
    scaled, sign = 10.0 * image @ text.T, 2 * np.eye(len(image)) - 1
    d_logits = -sign / (1 + np.exp(sign * (scaled - 10))) / len(image)
    assert metrics["loss"] == pytest.approx(np.logaddexp(0, -sign * (scaled - 10)).sum() / len(image), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(math.hypot(d_logits.sum(), (d_logits * scaled).sum()), rel=1e-5)
    assert (metrics["logit_scale"], metrics["logit_bias"]) == (pytest.approx(10), -10)
    assert later["logit_bias"] > -10  # as long as few pairs are taken for matches


def test_the_scale_is_free_unless_limited() -> None:
    for limit, scale in ((None, 250.0), (100.0, 100.0)):
        objective = tiny.program(objective=siglip(), objective__max_scale=limit).objective
        params = {"image": {}, "logit_scale": np.float32(math.log(250)), "logit_bias": np.float32(-40)}
        kept = objective.constrain(params, {"statistics": None})
        np.testing.assert_allclose(np.exp(kept["logit_scale"]), scale, rtol=1e-5)
        assert kept["logit_bias"] == -40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.logit_bias_init": None}, r"model\.logit_bias_init = None: the sigmoid loss needs a bias"),
        ({"max_scale": 5.0}, r"model\.logit_scale_init = 2\.303 lies outside of .*ln 5 = 1\.609"),
        ({"loss": "chunked"}, "must be one of 'gather', 'ring', 'global'"),
    ],
)
def test_what_can_not_train_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(override(siglip(), changes))
