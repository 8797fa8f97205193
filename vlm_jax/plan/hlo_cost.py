"""FLOPs of a compiled program, loops multiplied out, and the list of what runs how often that the other counts use.

XLA's own `cost_analysis` counts the body of every loop once, and is not used.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from vlm_jax.flops import window_meetings
from vlm_jax.plan.hlo import WATCHED, Computation, HloError, Instruction, Module
from vlm_jax.plan.kernels import kernel_flops
from vlm_jax.plan.loops import Known, Scalars, loop_invariants, trip_count

_MATMULS = ("convolution", "dot")
# Operations with products that nothing here counts.
_UNKNOWN_FLOPS = ("ragged-dot", "fft", "cholesky", "triangular-solve")
# Targets of custom calls that move or rearrange data and multiply nothing.
_WITHOUT_FLOPS = frozenset(
    (
        *("AsyncCollectiveStart", "AsyncCollectiveDone", "AllocateBuffer", "CreateBuffer", "ConcatBitcast"),
        *("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "TopK", "PartialReduce", "ApproxTopK"),
        *("MoveToHost", "MoveToDevice", "PinToDevice", "PinToDeviceSram", "Pin", "Unpin", "annotate_device_placement"),
        *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "PadToStatic", "SliceToDynamic"),
        *("X64Combine", "X64SplitLow", "X64SplitHigh", "SliceId", "ZeroCrop"),
    )
)
# Computations that an operation applies to elements and not to whole arrays.
_APPLIED = ("reduce", "reduce-window", "scatter", "select-and-scatter", "sort", "map", "all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction and how often one step runs it.

    Attributes:
        instruction: the operation.
        computation: where it stands.
        times: runs a step.
        fused: whether it runs inside of a fusion, where intermediate results never reach memory.
        concurrent: whether it runs beside the main program, in what an `async-start` calls.
    """

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool
    concurrent: bool


def executions(module: Module) -> list[Execution]:
    """Every instruction that a step runs; of a conditional the branch with the most FLOPs.

    Raises:
        HloError: a loop without a known number of iterations, or products in a computation that nothing runs.
    """
    walk = _Walk(module)
    found = list(walk.run(module.entry, {}, 1, fused=False, concurrent=False))
    for name in set(module.computations) - walk.visited:
        for instruction in module.computations[name].instructions.values():
            if instruction.opcode in WATCHED and instruction.opcode not in ("fusion", "call"):
                raise HloError(
                    f"the {instruction.opcode} {instruction.name} stands in the computation {name}, which nothing "
                    "that was read calls: the HLO text is of an unknown form"
                )
    return found


class _Walk:
    """The call graph from the entry down."""

    def __init__(self, module: Module):
        self.module = module
        self.visited: set[str] = set()

    def run(
        self, computation: Computation, known: Mapping[int, Known], times: int, *, fused: bool, concurrent: bool
    ) -> Iterator[Execution]:
        self.visited.add(computation.name)
        scalars = Scalars(self.module, computation, known)
        for instruction in computation.instructions.values():
            yield Execution(instruction, computation, times, fused, concurrent)
            opcode = instruction.opcode
            callees = [self.module.computation(name, instruction) for name in instruction.called]
            if opcode == "while":
                count = trip_count(self.module, instruction, scalars)
                invariants = {0: loop_invariants(self.module, instruction, scalars)}
                condition, body = callees
                yield from self.run(condition, invariants, times * (count + 1), fused=fused, concurrent=concurrent)
                yield from self.run(body, invariants, times * count, fused=fused, concurrent=concurrent)
            elif opcode == "conditional":
                branches = [list(self.run(callee, {}, times, fused=fused, concurrent=concurrent)) for callee in callees]
                yield from max(branches, key=lambda branch: (total_flops(branch), len(branch)))
            elif opcode in _APPLIED or opcode.removesuffix("-start") in _APPLIED:
                self._check_applied(instruction, callees)
            else:
                arguments = {index: scalars.of(name) for index, name in enumerate(instruction.operands)}
                for callee in callees:
                    yield from self.run(
                        callee,
                        arguments,
                        times,
                        fused=fused or opcode == "fusion",
                        concurrent=concurrent or opcode == "async-start",
                    )

    def _check_applied(self, caller: Instruction, callees: list[Computation]) -> None:
        for callee in callees:
            self.visited.add(callee.name)
            for instruction in callee.instructions.values():
                if instruction.opcode in WATCHED:
                    raise HloError(
                        f"{caller.opcode} {caller.name} applies {callee.name} to its elements, which holds the "
                        f"{instruction.opcode} {instruction.name}; that can't be counted"
                    )


def total_flops(found: list[Execution]) -> int:
    """FLOPs of all matrix products, convolutions and known kernels of a step, on one device."""
    return sum(execution.times * flops(execution) for execution in found)


def flops(execution: Execution) -> int:
    """FLOPs of one run of one instruction; a fusion's are those of the instructions in it.

    Raises:
        HloError: an operation whose FLOPs are unknown.
    """
    instruction, computation = execution.instruction, execution.computation
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].arrays[0].dims
        contracted = math.prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2 * math.prod(instruction.arrays[0].dims) * contracted
    if instruction.opcode == "custom-call":
        target = instruction.required("custom_call_target")
        if target == "tpu_custom_call":
            return kernel_flops(instruction, computation.operand_arrays(instruction))
        if target not in _WITHOUT_FLOPS:
            raise HloError(
                f"the custom call {instruction.name} to {target} ({instruction.operation}) has unknown FLOPs; if it "
                "multiplies no matrices add it to hlo_cost.py"
            )
    if instruction.opcode in _UNKNOWN_FLOPS:
        raise HloError(f"the FLOPs of {instruction.opcode} {instruction.name} ({instruction.operation}) are unknown")
    return 0


def passes(instruction: Instruction) -> int:
    """How often the matrix unit runs over a product: bf16 once; fp32 to a higher precision 3 or 6 times."""
    precision = instruction.attribute("operand_precision") or ""
    return 6 if "highest" in precision else 3 if "high" in precision else 1


_LABELS = re.compile(r"([\w?]+)_([\w?]+)->([\w?]+)")


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """2 x multiply-adds that meet data: TPU programs write batched products as convolutions full of padding."""
    left, kernel = (computation.instructions[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    labels = _LABELS.fullmatch(instruction.required("dim_labels"))
    if labels is None or [len(dims) for dims in (left, kernel, out)] != [len(part) for part in labels.groups()]:
        raise HloError(f"the convolution {instruction.name} has dim_labels of an unknown form")
    left_labels, kernel_labels, out_labels = labels.groups()
    groups, batch_groups = (
        int(instruction.attribute(key) or 1) for key in ("feature_group_count", "batch_group_count")
    )
    fmas = left[left_labels.index("f")] // groups * kernel[kernel_labels.index("o")]
    fmas *= left[left_labels.index("b")] // batch_groups
    spatial = sorted(label for label in out_labels if label.isdigit())
    window = _window(instruction.attribute("window") or "", len(spatial))
    for label, sizes in zip(spatial, window, strict=True):
        n, size, positions = left[left_labels.index(label)], sizes["size"], out[out_labels.index(label)]
        if kernel[kernel_labels.index(label)] != size:
            raise HloError(f"the window of the convolution {instruction.name} is not its kernel's size")
        fmas *= window_meetings(
            n,
            size,
            positions,
            stride=sizes["stride"],
            pad=sizes["pad"],
            holes=sizes["lhs_dilate"],
            spread=sizes["rhs_dilate"],
        )
    return 2 * fmas


def _window(text: str, rank: int) -> list[dict[str, int]]:
    """Per spatial axis: size, stride, low padding, dilations."""
    fields = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", text)}
    defaults = {"size": 1, "stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}
    window = [
        {key: int(fields[key][axis]) if key in fields else value for key, value in defaults.items()}
        for axis in range(rank)
    ]
    for axis, sizes in enumerate(window):
        sizes["pad"] = int(fields["pad"][axis].split("_")[0]) if "pad" in fields else 0
    return window
