"""LLaVA-1.5 at its published sizes, batch and length lowers on a mesh of fsdp and tensor; nothing is materialised."""

import math
from typing import Any

import command
import jax
import pytest
from jax.extend import core as jax_core

from vlm_jax.assemble import build_program
from vlm_jax.config import load_config

BATCH, LENGTH, WORDS = 128, 2048, 32_000


def bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes_in(jaxpr: jax_core.Jaxpr) -> set[tuple[int, ...]]:
    """Of all that a program makes, inside of its loops and calls too."""
    found: set[tuple[int, ...]] = set()
    for equation in jaxpr.eqns:
        found |= {tuple(variable.aval.shape) for variable in equation.outvars if hasattr(variable.aval, "shape")}
        for inner in jax_core.jaxprs_in_params(equation.params):
            found |= shapes_in(inner)
    return found


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "width"),
    [
        ("llava15_7b_stage2", 7_062_902_784, 32, 4096),
        ("llava15_13b_stage2", 13_350_839_296, 40, 5120),
    ],
)
def test_the_published_step_lowers_on_a_mesh(name: str, parameters: int, layers: int, width: int) -> None:
    changes = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "train.dtype": "bfloat16"}
    changes |= {"objective.model.image.remat": "full", "objective.model.decoder.remat": "full"}
    program = build_program(load_config(str(command.ROOT / f"configs/{name}.py"), changes))
    state, batch = program.setup.abstract, program.batch_shapes(0)
    assert batch["text"].shape == (BATCH, LENGTH) and batch["tiles"].shape == (BATCH, 1, 336, 336, 3)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == parameters
    # Everything large is split over all eight devices, and what is frozen has no slots.
    frozen = sum(x.size for x in jax.tree.leaves(state.params["image"]))
    assert bytes_on_a_device(state.params) < 1.01 * 4 * parameters / 8
    assert bytes_on_a_device(state.opt_state) < 1.01 * 2 * 4 * (parameters - frozen) / 8

    traced = program.trace(0)
    assert "mhlo.num_partitions = 8" in traced.lower().as_text()
    shapes = shapes_in(traced.jaxpr.jaxpr)
    # Between blocks their inputs alone are kept; and the logits of all tokens are never there, nor those of a device.
    assert max(shapes, key=math.prod) == (layers, BATCH, LENGTH, width)
    logits = {shape for shape in shapes if len(shape) == 2 and shape[1] in (WORDS, WORDS // 2)}
    assert logits and max(shape[0] for shape in logits) < BATCH * LENGTH / 4 / 4
