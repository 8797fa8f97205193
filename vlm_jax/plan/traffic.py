"""Bytes between HBM and the core in a step, from the compiled program. The weakest of the planner's figures: no run on
hardware has confirmed it. Good for comparing plans on one chip, not as a promise.
"""

from collections.abc import Sequence

from vlm_jax.plan.collectives import is_continuation
from vlm_jax.plan.hlo import Array, Computation, Instruction, Module
from vlm_jax.plan.hlo_cost import Execution

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "add-dependency"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_traffic(module: Module, found: Sequence[Execution]) -> int:
    """Bytes that a step reads from and writes to HBM on one device.

    Every operation outside of a fusion reads its operands and writes its results, as far as they lie in HBM; of an
    array that is only sliced or updated in part, that part.

    Args:
        module: the program.
        found: its executions.
    """
    return sum(
        execution.times * _moved(module, execution.computation, execution.instruction)
        for execution in found
        if not execution.fused
    )


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if opcode == "fusion":
        callee = module.computation(instruction.called[0], instruction)
        read = sum(
            _read(module, callee, callee.parameters[index], arrays)
            for index, arrays in enumerate(operands)
            if index in callee.parameters
        )
        return read + _written(callee, instruction.arrays)
    if opcode in _SLICES:
        return _in_hbm(operands[0], instruction.arrays[0].bytes) + _sizes(instruction.arrays)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[-1] if opcode == "scatter" else operands[1]
        return _sizes(update) + _in_hbm(instruction.arrays, update[0].bytes)
    if opcode in ("copy-start", "slice-start"):
        # (target, source, context) of a copy, ((source), target, context) of a slice
        target, source = instruction.arrays[opcode == "slice-start"], operands[0]
        return _sizes((target,)) + _in_hbm(source, target.bytes)
    return sum(map(_sizes, operands)) + _sizes(instruction.arrays)


def _sizes(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.space == 0)


def _in_hbm(arrays: Sequence[Array], size: int) -> int:
    """`size` bytes of the first array, if it lies in HBM."""
    return size if arrays and arrays[0].space == 0 else 0


def _read(module: Module, fused: Computation, name: str, arrays: Sequence[Array]) -> int:
    """What a fusion reads of one operand: slices of it, if it only takes slices."""
    whole, sliced = _sizes(arrays), 0
    if not whole:
        return 0
    for user in fused.instructions.values():
        for position, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "tuple" or is_continuation(fused, user):
                continue  # only handed on
            if user.opcode in _SLICES and position == 0:
                sliced += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and position == 0:
                continue  # updated in place
            elif user.opcode in ("fusion", "bitcast"):
                sliced += _read_by(module, fused, user, position, arrays)
            else:
                return whole
    return min(sliced, whole)


def _read_by(module: Module, fused: Computation, user: Instruction, position: int, arrays: Sequence[Array]) -> int:
    if user.opcode == "bitcast":
        return _read(module, fused, user.name, arrays)
    inner = module.computation(user.called[0], user)
    return _read(module, inner, inner.parameters[position], arrays)


def _written(fused: Computation, arrays: Sequence[Array]) -> int:
    """What a fusion writes: of a result that updates an operand in place, the update; of what it hands on, nothing."""
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    if len(names) != len(arrays):
        return _sizes(arrays)
    total = 0
    for name, array in zip(names, arrays, strict=True):
        made = fused.instructions[name]
        while made.opcode == "bitcast":
            made = fused.instructions[made.operands[0]]
        if made.opcode == "parameter" or is_continuation(fused, made):
            continue
        updates = made.opcode == "dynamic-update-slice"
        size = fused.instructions[made.operands[1]].arrays[0].bytes if updates else array.bytes
        total += _in_hbm((array,), size)
    return total
