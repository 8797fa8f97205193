"""In bf16 no activation is fp32 but those of norms, attention's logits, the pixels before the first map, and losses."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import tiny

from vlm_jax.assemble import build_program
from vlm_jax.config import Config, load_config

ROWS = 56  # divides no other axis
IN_FP32 = re.compile(r"/(ln(_\w+)?|\w*norm\d?|attn(/BTHD,BSHD->BHTS)?)$")
# These only pass on what others made; what they hold is walked through.
WRAPPERS = ("scan", "jit", "custom_vjp_call", "custom_jvp_call", "checkpoint", "remat2")


def equations(jaxpr: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(where in the model it stands, equation) of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        place = f"{path}/{equation.source_info.name_stack}".rstrip("/")
        yield place, equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, place)


def activations_in_fp32(config: Config) -> list[str]:
    """Where the step of a config makes an fp32 array of a value for each token and channel, inside of the model."""
    jaxpr = build_program(config, tiny.mesh()).trace(0).jaxpr.jaxpr
    found = []
    for place, equation in equations(jaxpr):
        for out in equation.outvars:
            aval: Any = out.aval
            large = ROWS in aval.shape and math.prod(aval.shape) >= ROWS * 5 * 16
            inside = re.search(r"jvp\(\w", place) is not None and equation.primitive.name not in WRAPPERS
            if large and inside and aval.dtype == jax.numpy.float32:
                found.append(f"{place}: {equation.primitive.name} {aval.shape}")
    return found


@pytest.mark.parametrize("name", ["clip", "mae_b16", "aim_600m"])
def test_only_norms_and_attention_s_logits_are_fp32(name: str) -> None:
    changes = {"train.dtype": "bfloat16", "data.batch_size": str(ROWS)}
    config = (
        tiny.config(train__dtype="bfloat16", data__batch_size=ROWS)
        if name == "clip"
        else load_config(f"configs/{name}.py:smoke", changes)
    )
    places = activations_in_fp32(config)
    assert any("norm" in place or "ln_" in place for place in places)  # or nothing was looked at
    assert not [place for place in places if not IN_FP32.search(place.split(":")[0])]


def test_a_step_in_fp32_is_found_out() -> None:
    places = activations_in_fp32(tiny.config(train__dtype="float32", data__batch_size=ROWS))
    assert [place for place in places if "/mlp" in place]
