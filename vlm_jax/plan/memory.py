"""HBM of a step: the compiler's account of a program that compiled, its complaint about one that did not, and an
estimate from the jaxpr for programs that were not compiled.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core
from jax.sharding import Mesh

from vlm_jax.flops import inner_jaxprs
from vlm_jax.mesh import BATCH_AXES
from vlm_jax.plan.hlo_cost import Execution


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on each device while a step runs.

    Attributes:
        arguments: state and batch.
        outputs: the new state and the metrics.
        aliased: outputs that take the place of donated arguments.
        temporaries: everything in between.
        code: the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> "Memory":
        """The compiler's account (`compiled.memory_analysis()`).

        Temporaries are the peak less what stands beside it. The account has a figure of its own for them, which some
        versions of libtpu exceed by what lies in VMEM and, in programs with loops, by gigabytes: a step for which it
        said 18.45 GiB compiled for a chip that gives 15.75, and its peak, 12.24 GiB, was the size of the heap in the
        compiler's own dump of its buffers.
        """
        stats = compiled.memory_analysis()
        beside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        temporaries = stats.peak_memory_in_bytes - beside
        return cls(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            temporaries if temporaries > 0 else stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """What must fit. The compiler refuses a program by its temporaries alone, so this is compared here."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """One of the largest arrays of a program: bytes on a device, shape there, and where the program made it."""

    bytes: int
    shape: str
    operation: str


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler's complaint.

    Attributes:
        needed: bytes of HBM that it asked for; `temporaries_only` says of what.
        limit: bytes that it had.
        temporaries_only: whether `needed` leaves state and batch out.
        largest: the arrays that it lists, which not every version does.
    """

    needed: int
    limit: int
    temporaries_only: bool
    largest: tuple[LargeArray, ...]


_SIZE = r"([\d.]+[KMGTP]?)B?"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_TEMPORARIES = re.compile(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE)
_ALLOCATION = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$", re.MULTILINE)


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """An error of the compiler as figures; None when it is about something else."""
    short, used = _TEMPORARIES.search(message), _USED.search(message)
    found = used or short
    if found is None:
        return None
    return OutOfMemory(_bytes(found[1]), _bytes(found[2]), used is None, tuple(_allocations(message)))


def _bytes(text: str) -> int:
    unit = _UNITS.get(text[-1])
    return round(float(text[:-1]) * unit) if unit else round(float(text))


def _allocations(message: str) -> Iterator[LargeArray]:
    starts = list(_ALLOCATION.finditer(message))
    ends = [start.start() for start in starts[1:]] + [len(message)]
    for start, end in zip(starts, ends[: len(starts)], strict=True):
        block = message[start.end() : end]
        shape, operation = re.search(r"Shape: (\S+)", block), re.search(r'op_name="([^"]*)"', block)
        yield LargeArray(_bytes(start[1]), shape[1] if shape else "", operation[1] if operation else "")


# Operations that hand an array on without making one.
_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier")


def largest_arrays(found: Iterable[Execution], count: int = 5) -> tuple[LargeArray, ...]:
    """The largest arrays in HBM that a compiled program makes, one of each shape, without padding."""
    by_shape: dict[str, LargeArray] = {}
    for execution in found:
        instruction = execution.instruction
        if execution.fused or instruction.opcode in _VIEWS or instruction.opcode.endswith("-done"):
            continue
        for array in instruction.arrays:
            if array.space == 0:
                by_shape.setdefault(str(array), LargeArray(array.bytes, str(array), instruction.operation))
    return tuple(sorted(by_shape.values(), key=lambda array: -array.bytes)[:count])


def state_bytes(abstract: Any) -> int:
    """Bytes on each device of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(abstract))


def leaf_bytes(leaf: Any) -> int:
    """Bytes on each device of one of them."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize


def saved_activations(jaxpr: jax_core.Jaxpr, rows: int, mesh: Mesh) -> list[LargeArray]:
    """What the stacks of blocks keep for the backward pass, largest first, as the step's jaxpr asks for it.

    An estimate: it knows scans (stacks of blocks) and their rows, and nothing of what the compiler makes of them.

    Args:
        jaxpr: of the step.
        rows: of a microbatch.
        mesh: what the rows lie on.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape], dtype=int))
    found = [_large(aval, shards, source) for aval, source in _stacked(jaxpr, rows)]
    return sorted(found, key=lambda array: -array.bytes)


def _stacked(jaxpr: jax_core.Jaxpr, rows: int) -> Iterator[tuple[Any, str]]:
    """(shape and dtype, name stack) of what the loops of forward passes stack row by row."""
    for equation in jaxpr.eqns:
        parameters = equation.params
        # the loop of a backward pass runs in reverse, and stacks the gradients of weights
        if equation.primitive.name == "scan" and not parameters["reverse"]:
            carried, body = parameters["num_carry"], parameters["jaxpr"].jaxpr
            made_by = {variable: made for made in body.eqns for variable in made.outvars}
            stacked = zip(equation.outvars[carried:], body.outvars[carried:], strict=True)
            for variable, inner in stacked:
                shape = getattr(variable.aval, "shape", ())
                if len(shape) > 1 and rows in shape[1:]:
                    made = made_by.get(inner) if isinstance(inner, jax_core.Var) else None
                    stacks = (each.source_info.name_stack for each in (equation, made) if each is not None)
                    yield variable.aval, "/".join(map(str, stacks))
        for inner in inner_jaxprs(parameters):
            yield from _stacked(inner, rows)


def _large(aval: Any, shards: int, source: str) -> LargeArray:
    size = int(np.prod(aval.shape, dtype=np.int64)) * aval.dtype.itemsize // shards
    return LargeArray(size, f"{aval.dtype}{list(aval.shape)} / {shards}", source)
