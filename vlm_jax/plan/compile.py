"""Compiles the step that training runs for a topology, from shapes alone, and takes its measure.

The step, mesh and shardings are those of `vlm_jax.assemble.build_program`; nothing is planned that is not trained.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.extend import core as jax_core

from vlm_jax.assemble import Program, build_program
from vlm_jax.config import Config
from vlm_jax.flops import peak_flops
from vlm_jax.mesh import make_mesh
from vlm_jax.model_flops import counted_flops, step_flops
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.plan import memory
from vlm_jax.plan.checks import check_axes, config_on
from vlm_jax.plan.collectives import DCN, Collective, find_collectives
from vlm_jax.plan.hlo import parse_hlo
from vlm_jax.plan.hlo_cost import executions, flops, passes, total_flops
from vlm_jax.plan.roofline import Roofline
from vlm_jax.plan.topologies import Topology, abstract_devices
from vlm_jax.plan.traffic import hbm_traffic


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step that compiled.

    Attributes:
        hbm: bytes on each device.
        flops: of one device, loops multiplied out.
        traffic: bytes between HBM and core on one device.
        collectives: the communication.
        roofline: the shortest time.
        largest: the largest arrays that the program makes.
    """

    hbm: memory.Memory
    flops: int
    traffic: int
    collectives: tuple[Collective, ...]
    roofline: Roofline
    largest: tuple[memory.LargeArray, ...]

    @property
    def wire_bytes(self) -> int:
        """What one device sends in a step."""
        return sum(collective.wire_bytes for collective in self.collectives)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What came of compiling one phase's step.

    Attributes:
        first_step: of the run from which on this step is taken.
        model_flops: of a step on the global batch, by the objective's formula.
        counted_flops: the same from the jaxpr of loss and gradients without rematerialisation; None where it can't be
            counted, with the reason in `uncounted`.
        uncounted: why not.
        compile_seconds: wall time of the compiler.
        compile_cpu_seconds: CPU time of all its threads.
        measured: None when the compiler refused the program.
        refused: the compiler's complaint, or None.
        activations: what the jaxpr keeps for the backward pass, largest first.
    """

    first_step: int
    model_flops: float
    counted_flops: int | None
    uncounted: str
    compile_seconds: float
    compile_cpu_seconds: float
    measured: Measured | None
    refused: memory.OutOfMemory | None
    activations: tuple[memory.LargeArray, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A phase's step before it is compiled.

    Attributes:
        traced: `jax.stages.Traced` of the step.
        phase: its index.
        first_step: of the run.
        objective: the phase's method.
        batch: shapes and shardings of the global batch.
    """

    traced: Any
    phase: int
    first_step: int
    objective: ObjectiveConfig
    batch: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def jaxpr(self) -> jax_core.Jaxpr:
        """Of the step."""
        return self.traced.jaxpr.jaxpr


def program_on(config: Config, topology: Topology) -> Program:
    """The program of a config on a topology's abstract devices; raises `ConfigError` when they don't fit."""
    config = config_on(config, topology)
    return build_program(config, make_mesh(config.mesh, abstract_devices(topology)))


def trace_steps(program: Program) -> list[Traced]:
    """The step of each phase, traced; raises `ConfigError` when a mesh axis splits nothing."""
    traces = []
    for phase, (first, _) in enumerate(program.steps):
        traced, objective = program.trace(phase), program.methods[phase]
        traces.append(Traced(traced, phase, first, objective, program.batch_shapes(phase)))
        check_axes(program, traces[-1].jaxpr)
    return traces


def activations(program: Program, traced: Traced) -> tuple[memory.LargeArray, ...]:
    """What a traced step keeps for its backward pass: an estimate."""
    rows = program.config.data.batch_size // program.config.train.accum_steps
    return tuple(memory.saved_activations(traced.jaxpr, rows, program.mesh))


def compile_phase(
    program: Program, traced: Traced, topology: Topology, count: bool = True, hlo: Path | None = None
) -> Phase:
    """Compiles one traced step.

    Args:
        program: what it belongs to.
        traced: the step.
        topology: what to compile for.
        count: whether to count the model's FLOPs from its jaxpr too.
        hlo: file for the compiled program's text; None writes none.

    Raises:
        HloError: the compiled program can't be accounted for.
        JaxRuntimeError: the compiler failed for another reason than memory.
    """
    config = program.config
    counted, uncounted = counted_flops(program, traced.phase) if count else (None, "not asked for")
    started, cpu_started, measured, refused = time.monotonic(), time.process_time(), None, None
    try:
        with jax.set_mesh(program.mesh):
            compiled = traced.traced.lower().compile()
    except JaxRuntimeError as error:
        refused, compiled = memory.parse_out_of_memory(str(error)), None
        if refused is None:
            raise
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    if compiled is not None:
        if hlo is not None:
            hlo.write_text(compiled.as_text())
        measured = measure(compiled, topology)
    return Phase(
        first_step=traced.first_step,
        # a method with frozen parts that can't be counted is taken to train them
        model_flops=step_flops(program, traced.phase) or traced.objective.train_flops() * config.data.batch_size,
        counted_flops=counted,
        uncounted=uncounted,
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
        measured=measured,
        refused=refused,
        activations=activations(program, traced),
    )


def measure(compiled: Any, topology: Topology) -> Measured:
    """The figures of a compiled program (`jax.stages.Compiled`) on a topology."""
    module = parse_hlo(compiled.as_text())
    found = executions(module)
    collectives = tuple(find_collectives(module, found))
    traffic = hbm_traffic(module, found)
    chip, peak = topology.chip, peak_flops(abstract_devices(topology)[0])
    assert peak is not None, f"{topology.chip_name} is missing in the table of vlm_jax.flops"
    unit_flops = sum(execution.times * flops(execution) * passes(execution.instruction) for execution in found)

    def seconds(asynchronous: bool) -> float:
        return sum(
            each.wire_bytes / (chip.dcn_bandwidth if each.network == DCN else chip.ici_bandwidth)
            for each in collectives
            if each.asynchronous == asynchronous
        )

    roofline = Roofline(unit_flops / peak, traffic / chip.hbm_bandwidth, seconds(True), seconds(False))
    return Measured(
        memory.Memory.of(compiled),
        total_flops(found),
        traffic,
        collectives,
        roofline,
        memory.largest_arrays(found),
    )
