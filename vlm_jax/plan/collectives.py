"""The communication of a compiled step: what is sent, how often, over which network, and whether anything overlaps it.

Bytes are what one device sends by ring algorithms, for n devices and an operand of b bytes: all-gather (n - 1) b,
reduce-scatter and all-to-all b (n - 1) / n, all-reduce 2 b (n - 1) / n, a permutation b. A torus sends the same over
more links. Asynchronous means that the compiler split the operation in a start and a done; whether the time in between
suffices is not known here.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from vlm_jax.plan.hlo import Computation, HloError, Instruction, Module
from vlm_jax.plan.hlo_cost import Execution

ICI, DCN = "ici", "dcn"
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_UNKNOWN = ("ragged-all-to-all", "collective-broadcast")
# Transfers between slices, which a program hands to the host.
_BETWEEN_SLICES: Mapping[str, str] = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communicating operation of the step.

    Attributes:
        name: of the instruction.
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        network: `ici` within a slice, `dcn` between slices.
        asynchronous: whether other work can run meanwhile.
        times: runs a step.
        participants: devices (or slices) of a group.
        wire_bytes: what one device sends in a step, all runs together.
        operand: what it is given, as text.
        operation: where the program asked for it: JAX's name stack; for what the compiler merged, that of the first
            array that has one.
        gathers: whether an all-reduce does an all-gather's work, at twice its bytes: each device hands in its shard
            in an array of zeros, as the compiler prefers for small shards.
    """

    name: str
    kind: str
    network: str
    asynchronous: bool
    times: int
    participants: int
    wire_bytes: int
    operand: str
    operation: str
    gathers: bool = False


def find_collectives(module: Module, found: Sequence[Execution]) -> list[Collective]:
    """The collectives of a step.

    Args:
        module: the program.
        found: its executions.

    Raises:
        HloError: one of an unknown kind or form.
    """
    collectives: list[Collective] = []
    started: set[tuple[str, str | None]] = set()
    continued: dict[tuple[str, str | None], Instruction] = {}
    for execution in found:
        instruction = execution.instruction
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode in _UNKNOWN:
            raise HloError(f"the bytes on the wire of {instruction.opcode} {instruction.name} are unknown")
        if instruction.opcode == "send":
            collectives.append(_between_slices(execution))
        if kind not in _KINDS:
            continue
        identity = (kind, instruction.attribute("channel_id"))
        if execution.fused and is_continuation(execution.computation, instruction):
            continued[identity] = instruction
        else:
            started.add(identity)
            collectives.append(_within_slice(module, execution, kind))
    for identity, instruction in continued.items():
        if identity not in started:
            raise HloError(
                f"the {instruction.opcode} {instruction.name} goes on with an operation that was never started; the "
                "HLO text is of an unknown form"
            )
    return [collective for collective in collectives if collective.wire_bytes]


def is_continuation(computation: Computation, instruction: Instruction) -> bool:
    """Whether this stands, in a fusion, for a collective that another fusion started.

    The compiler repeats an asynchronous operation in every fusion that carries it along and in the one that ends it.
    """
    carried = "async_collective_fusion_config" in (instruction.attribute("backend_config") or "")
    return carried and not _starts(computation, instruction)


def _starts(computation: Computation, instruction: Instruction) -> bool:
    return any(
        other.opcode == "custom-call"
        and other.attribute("custom_call_target") == "AsyncCollectiveStart"
        and instruction.name in (_source(computation, name) for name in other.operands)
        for other in computation.instructions.values()
    )


def _source(computation: Computation, name: str) -> str:
    """The instruction that made a value, before it was only viewed in another way."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("bitcast", "copy", "reshape"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction.name


def _within_slice(module: Module, execution: Execution, kind: str) -> Collective:
    instruction, computation = execution.instruction, execution.computation
    operands = computation.operand_arrays(instruction)
    size = sum(array.bytes for array in operands)
    if kind == "collective-permute":
        participants, wire = 2, size * _busiest_sender(instruction)
    else:
        participants = _group_size(instruction, module.device_count)
        if kind == "all-reduce" and execution.fused and _scatters(computation):
            kind = "reduce-scatter"
        wire = _ring_bytes(kind, size, participants)
    return Collective(
        name=instruction.name,
        kind=kind,
        network=ICI,
        asynchronous=instruction.opcode.endswith("-start") or execution.concurrent or _starts(computation, instruction),
        times=execution.times,
        participants=participants,
        wire_bytes=execution.times * wire,
        operand=", ".join(map(str, operands)),
        operation=_operation(computation, instruction),
        gathers=kind == "all-reduce" and _gathers(computation, instruction),
    )


def _operation(computation: Computation, instruction: Instruction) -> str:
    """The name stack of an instruction, or else of what it reads, or else of what reads its results."""
    everything = computation.instructions.values()
    sources = [computation.instructions[name] for name in instruction.operands]
    views = {instruction.name} | {
        each.name for each in everything if each.opcode == "get-tuple-element" and instruction.name in each.operands
    }
    users = [each for each in everything if views.intersection(each.operands)]
    return next((each.operation for each in (instruction, *sources, *users) if each.operation), "")


def _gathers(computation: Computation, instruction: Instruction) -> bool:
    padded = total = 0
    for name in instruction.operands:
        size = sum(array.bytes for array in computation.instructions[name].arrays)
        source = computation.instructions[_source(computation, name)]
        padded += size if source.opcode == "dynamic-update-slice" else 0
        total += size
    return 2 * padded > total


def _ring_bytes(kind: str, operand_bytes: int, n: int) -> int:
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    return round(operand_bytes * factor)


def _scatters(computation: Computation) -> bool:
    """Whether a fusion is the compiler's reduce-scatter: an all-reduce of which each device keeps its slice."""
    return computation.name.startswith("all-reduce-scatter")


def _busiest_sender(instruction: Instruction) -> int:
    pairs = re.findall(r"\{(\d+),\s*(\d+)\}", instruction.required("source_target_pairs"))
    senders = [source for source, target in pairs if source != target]
    return max(map(senders.count, set(senders)), default=0)


# `mesh['data'=2,'fsdp'=4], device_ids=([2,4]T(1,0)) {'fsdp'}`: a mesh, maybe the order of its devices, and axes of it.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'?([\w.\-]+)'?(?:=|:\(\d+\))(\d+)")


def _group_size(instruction: Instruction, device_count: int) -> int:
    """Devices that exchange data with each other: the size of a replica group."""
    text, mesh = instruction.required("replica_groups"), _MESH.search(instruction.tail)
    if mesh:
        sizes = {name: int(size) for name, size in _MESH_AXIS.findall(mesh[1])}
        axes = [axis.strip() for axis in mesh[2].split(",") if axis.strip()]
        try:
            return math.prod(_axis_size(axis, sizes) for axis in axes)
        except KeyError as error:
            raise HloError(f"the {instruction.opcode} {instruction.name} has unknown replica_groups {text}") from error
    iota = re.match(r"\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota[2])
    groups = [group for group in re.findall(r"\{([\d, ]*)\}", text) if group.strip()]
    if not groups and not text.strip("{} "):
        return device_count  # no groups: all devices
    if not groups:
        raise HloError(f"the {instruction.opcode} {instruction.name} has unknown replica_groups {text}")
    return max(len(group.split(",")) for group in groups)


def _axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    """Of `'name'`, or of the part `'name':(before)size` of an axis."""
    name, _, part = axis.partition(":")
    return int(part.partition(")")[2]) if part else sizes[name.strip("'")]


def _between_slices(execution: Execution) -> Collective:
    """A transfer to other slices, which the program hands to its host."""
    instruction = execution.instruction
    transfer = instruction.attribute("_xla_megascale_transfer_type")
    if transfer is None or transfer not in _BETWEEN_SLICES:
        raise HloError(f"the send {instruction.name} is no known transfer between slices (its type: {transfer})")
    kind, target = _BETWEEN_SLICES[transfer], instruction.required("_xla_megascale_target")
    array = execution.computation.instructions[instruction.operands[0]].arrays[0]
    if kind == "collective-permute":
        slices, wire = 2, array.bytes
    else:
        slices = _count(target.partition("x")[0])
        wire = _ring_bytes(kind, array.bytes, slices)
    return Collective(
        name=instruction.name,
        kind=kind,
        network=DCN,
        asynchronous=True,
        times=execution.times,
        participants=slices,
        wire_bytes=execution.times * wire,
        operand=str(array),
        operation=instruction.operation or instruction.attribute("_xla_host_transfer_rendezvous") or "",
    )


def _count(text: str) -> int:
    """How many numbers `{1,2}` or `{0:3}` or a mixture names."""
    total = 0
    for part in text.strip("{} ").split(","):
        first, colon, last = part.partition(":")
        total += int(last) - int(first) + 1 if colon else 1
    return total
