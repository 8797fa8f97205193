"""Model FLOPs of a step: the method's formula, less what frozen parts save. Training and planner take them here.

A formula stands for training everything. What a frozen part saves depends on where it lies: a tower at the bottom is
only run forward, one in the middle still passes a gradient on. The jaxpr of loss and gradients knows.
"""

from collections.abc import Mapping
from typing import Any

import jax

from vlm_jax.assemble import Program
from vlm_jax.flops import count_dot_flops
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.parts import merge
from vlm_jax.schema import leaves, override

# Recomputation is no model FLOP, and what a fused kernel multiplies is invisible in a jaxpr.
_PLAIN: Mapping[str, str] = {".remat": "none", ".attention_impl": "xla"}
# Rows for the share that is left with frozen parts: few, so that a coupled loss weighs as little as in the formula.
_ROWS = 8


def step_flops(program: Program, phase: int) -> float | None:
    """Model FLOPs of one step of a phase on the global batch; None where frozen parts leave them unknown.

    Call it outside of `jax.set_mesh`: the mesh need not divide the few rows that are counted.
    """
    method = program.methods[phase]
    share = 1.0
    if program.setup.parts.frozen:
        try:
            share = _counted(program, method, _ROWS, frozen=True) / _counted(program, method, _ROWS, frozen=False)
        except ValueError:
            return None
    return method.train_flops() * program.config.data.batch_size * share


def counted_flops(program: Program, phase: int) -> tuple[int | None, str]:
    """(FLOPs of loss and gradients on the global batch, counted in their jaxpr; why they can't be).

    Without what convolutions multiply with their padding, which compilers leave out.
    """
    try:
        return _counted(program, program.methods[phase], program.config.data.batch_size, frozen=True, padding=False), ""
    except ValueError as error:
        return None, str(error)


def _counted(program: Program, method: ObjectiveConfig, rows: int, *, frozen: bool, padding: bool = True) -> int:
    """FLOPs of loss and gradients on `rows` rows: of the live parameters, or with `frozen` false of all."""
    config = program.config
    changes = {
        key.removeprefix("config."): value
        for key, _ in leaves(method)
        for suffix, value in _PLAIN.items()
        if key.endswith(suffix)
    }
    dtype = config.compute_dtype(program.mesh.devices.flat[0].platform)
    built = override(method, changes).build(config.data.preprocess, dtype)
    state, batch = program.setup.abstract, method.batch_shapes(rows)
    params = _without_shardings(state.params)
    live, fixed = program.setup.parts.split(params) if frozen else (params, jax.tree.map(lambda _: None, params))
    extra, step = _without_shardings(state.extra), jax.ShapeDtypeStruct((), state.step.dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def loss(live: Any, extra: Any, batch: Any, keys: Any, step: Any, fixed: Any) -> Any:
        return built.loss(merge(live, fixed), extra, batch, keys, step)[0][0]

    return count_dot_flops(jax.grad(loss), live, extra, batch, keys, step, fixed, padding=padding)


def _without_shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


__all__ = ["counted_flops", "step_flops"]
