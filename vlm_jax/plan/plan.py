"""A plan: what training a config on a topology needs and how long it takes at least. `report` prints it."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlm_jax.assemble import Program
from vlm_jax.config import Config
from vlm_jax.flops import mfu, peak_flops
from vlm_jax.mesh import tree_path
from vlm_jax.models.remat import POLICIES
from vlm_jax.plan import memory
from vlm_jax.plan.compile import Measured, Phase, compile_phase, program_on, trace_steps
from vlm_jax.plan.topologies import Topology, abstract_devices
from vlm_jax.schema import leaves

# Policies by what a block keeps for its backward pass, the most first.
REMAT_ORDER = ("none", "dots", "save_qkv_mid", "full")


@dataclasses.dataclass(frozen=True)
class PartShare:
    """A part's parameters and how they lie on the mesh.

    Attributes:
        parameters: how many.
        frozen: whether the optimiser has no slots for them.
        layouts: partition as text -> parameters that lie so.
    """

    parameters: int
    frozen: bool
    layouts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What came of compiling a config for a topology.

    Attributes:
        config: with the slices in its mesh.
        topology: the chips.
        mesh: axis -> size.
        phases: of the method, in order.
        parts: part -> its parameters.
        arrays: (path, shape, dtype, partition, bytes on a device) of every array of the state and the batch.
        state_bytes: of the state on each device.
        peak: bf16 FLOP/s of a device.
        seconds: from config to plan.
    """

    config: Config
    topology: Topology
    mesh: Mapping[str, int]
    phases: tuple[Phase, ...]
    parts: Mapping[str, PartShare]
    arrays: tuple[tuple[str, str, str, str, int], ...]
    state_bytes: int
    peak: float
    seconds: float

    @property
    def limit(self) -> int:
        """Bytes of HBM that the compiler allows a program on each device."""
        return self.topology.chip.hbm_bytes

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether every phase's step does."""
        return all(self.hbm(phase) <= self.limit for phase in self.phases)

    def hbm(self, phase: Phase) -> int:
        """Bytes on each device that a phase's step needs; at least, where the compiler gave up."""
        if phase.measured is not None:
            return phase.measured.hbm.total
        assert phase.refused is not None
        return phase.refused.needed + (self.state_bytes if phase.refused.temporaries_only else 0)

    def mfu(self, phase: Phase) -> float | None:
        """Model FLOPs utilisation if the step took the roofline's time; None where it did not compile."""
        if phase.measured is None:
            return None
        return mfu(phase.model_flops, phase.measured.roofline.step, self.topology.device_count, self.peak)

    def flops_ratio(self, phase: Phase) -> float | None:
        """Model FLOPs over compiled FLOPs; below 1 by what is recomputed. None where it did not compile."""
        if phase.measured is None or not phase.measured.flops:
            return None
        return phase.model_flops / (phase.measured.flops * self.topology.device_count)

    def suspect(self, phase: Phase) -> bool:
        """Whether fewer FLOPs were compiled than loss and gradients have: something was then not counted."""
        if phase.measured is None or phase.counted_flops is None:
            return False
        return phase.measured.flops * self.topology.device_count < 0.99 * phase.counted_flops

    def run_seconds(self) -> float | None:
        """Of the configured run, at the rooflines of its phases; None where one did not compile."""
        total, end = 0.0, self.config.train.steps
        for phase in reversed(self.phases):
            if phase.measured is None:
                return None
            total += (end - phase.first_step) * phase.measured.roofline.step
            end = phase.first_step
        return total

    @property
    def heaviest(self) -> Phase:
        """The phase that needs the most memory: the one that is reported in single figures."""
        return max(self.phases, key=self.hbm)


def make_plan(config: Config, topology: Topology, count: bool = True, hlo: Path | None = None) -> Plan:
    """Compiles every phase of a config for a topology.

    Args:
        config: what would be trained.
        topology: where.
        count: whether to count model FLOPs from the jaxpr too, which takes seconds.
        hlo: file for the text of the compiled program, of the last phase if there are several.

    Raises:
        ConfigError: they don't fit each other; before anything is compiled.
        HloError: the compiled program can't be accounted for.
    """
    started = time.monotonic()
    program = program_on(config, topology)
    traces = trace_steps(program)
    phases = tuple(compile_phase(program, traced, topology, count, hlo) for traced in traces)
    peak = peak_flops(abstract_devices(topology)[0])
    assert peak is not None, f"{topology.chip_name} is missing in the table of vlm_jax.flops"
    return Plan(
        config=program.config,
        topology=topology,
        mesh=dict(program.mesh.shape),
        phases=phases,
        parts=_part_shares(program),
        arrays=(*_array_rows("state", program.setup.abstract), *_array_rows("batch", traces[0].batch)),
        state_bytes=memory.state_bytes(program.setup.abstract),
        peak=peak,
        seconds=time.monotonic() - started,
    )


def _array_rows(name: str, tree: Any) -> Iterator[tuple[str, str, str, str, int]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield f"{name}/{tree_path(path)}", str(list(leaf.shape)), str(leaf.dtype), layout(leaf), memory.leaf_bytes(leaf)


def layout(leaf: Any) -> str:
    """The partition of an array as text: `fsdp on axis 0`, `replicated`."""
    split = []
    for axis, entry in enumerate(leaf.sharding.spec):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        names = tuple(name for name in names if leaf.sharding.mesh.shape[name] > 1)
        split += [f"{' x '.join(names)} on axis {axis}"] if names else []
    return ", ".join(split) or "replicated"


def _part_shares(program: Program) -> dict[str, PartShare]:
    parts, shares = program.setup.parts, {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(program.setup.abstract.params)[0]:
        part = parts.part_of[tree_path(path)]
        total, frozen, layouts = shares.get(part.name, (0, part.frozen, {}))
        size = int(np.prod(leaf.shape, dtype=np.int64))
        # which axis of the array is split does not matter here
        key = " and ".join(sorted(entry.partition(" on axis ")[0] for entry in layout(leaf).split(", ")))
        shares[part.name] = (total + size, frozen, {**layouts, key: layouts.get(key, 0) + size})
    return {name: PartShare(*share) for name, share in shares.items()}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; figures of memory, FLOPs and bytes are those of one device, `model_flops` of a step."""
    phase = plan.heaviest
    data: dict[str, Any] = {
        "config": plan.config.name,
        "topology": str(plan.topology),
        "devices": plan.topology.device_count,
        "devices_per_chip": plan.topology.chip.devices_per_chip,
        "mesh": dict(plan.mesh),
        "batch_size": plan.config.data.batch_size,
        "fits": plan.fits,
        "params": plan.parameters,
        "params_by_part": {name: part.parameters for name, part in plan.parts.items()},
        "state_bytes": plan.state_bytes,
        "hbm_limit_bytes": plan.limit,
        "run_seconds_roofline": plan.run_seconds(),
        "compile_seconds": sum(each.compile_seconds for each in plan.phases),
        "compile_cpu_seconds": sum(each.compile_cpu_seconds for each in plan.phases),
        **_phase_json(plan, phase),
    }
    if len(plan.phases) > 1:
        data["phases"] = [{"first_step": each.first_step, **_phase_json(plan, each)} for each in plan.phases]
    return data


def _phase_json(plan: Plan, phase: Phase) -> dict[str, Any]:
    needed = plan.hbm(phase)
    data: dict[str, Any] = {
        "hbm_bytes": needed,
        "headroom": 1 - needed / plan.limit,
        "model_flops": phase.model_flops,
        "model_flops_counted": phase.counted_flops,
        "estimated_activation_bytes": sum(array.bytes for array in phase.activations),
    }
    measured = phase.measured
    if measured is None:
        return data | dict.fromkeys(_MEASURED_KEYS) | {"out_of_memory": _refused_json(phase)}
    roofline = measured.roofline
    return data | {
        "hbm_breakdown": dataclasses.asdict(measured.hbm),
        "compiled_flops": measured.flops,
        "model_over_compiled_flops": plan.flops_ratio(phase),
        "suspect": plan.suspect(phase),
        "wire_bytes": measured.wire_bytes,
        "wire_bytes_over_6_params": measured.wire_bytes / (6 * plan.parameters),
        "collectives": grouped(measured),
        "sync_collectives": [dataclasses.asdict(each) for each in by_size(measured) if not each.asynchronous],
        "hbm_traffic_bytes": measured.traffic,
        "step_seconds_roofline": roofline.step,
        "roofline_seconds": {**dataclasses.asdict(roofline), "interconnect": roofline.interconnect},
        "mfu_roofline": plan.mfu(phase),
        "examples_per_second_roofline": plan.config.data.batch_size / roofline.step,
        "largest_arrays": [dataclasses.asdict(array) for array in measured.largest],
    }


_MEASURED_KEYS = (
    *("compiled_flops", "model_over_compiled_flops", "wire_bytes", "collectives", "sync_collectives"),
    *("step_seconds_roofline", "mfu_roofline"),
)


def _refused_json(phase: Phase) -> dict[str, Any]:
    assert phase.refused is not None
    return dataclasses.asdict(phase.refused)


def by_size(measured: Measured) -> list[Any]:
    """The collectives, those with most bytes first."""
    return sorted(measured.collectives, key=lambda each: -each.wire_bytes)


def grouped(measured: Measured) -> list[dict[str, Any]]:
    """One row for each kind, network and synchrony: operations in the program, runs a step, bytes a device sends."""
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for each in measured.collectives:
        row = rows.setdefault(
            (each.kind, each.network, each.asynchronous),
            {"kind": each.kind, "network": each.network, "asynchronous": each.asynchronous}
            | {"count": 0, "runs": 0, "wire_bytes": 0},
        )
        row["count"] += 1
        row["runs"] += each.times
        row["wire_bytes"] += each.wire_bytes
    return sorted(rows.values(), key=lambda row: -row["wire_bytes"])


def remedies(plan: Plan) -> list[tuple[dict[str, str], str]]:
    """(overrides, why) that bring memory down, the cheapest in time first."""
    config, options = plan.config, []
    keys = {key.removeprefix("config."): value for key, value in leaves(config)}
    replicated = plan.mesh["data"] > 1 and plan.mesh["fsdp"] == 1
    if replicated:
        options.append(
            ({"mesh.data": "1", "mesh.fsdp": "-1"}, "splits weights, gradients and optimiser over the chips")
        )
    moments = {key: "bfloat16" for key, value in keys.items() if key.endswith("mu_dtype") and value == "float32"}
    if moments:
        options.append((moments, "halves the optimiser's first moment"))
    kept = {key: value for key, value in keys.items() if key.endswith(".remat") and value in POLICIES}
    for policy in ("save_qkv_mid", "full"):
        changes = {key: policy for key, value in kept.items() if _saves_more(value, policy)}
        if changes:
            options.append((changes, "keeps fewer activations for the backward pass, and recomputes them"))
    steps, shards = config.train.accum_steps, plan.mesh["data"] * plan.mesh["fsdp"]
    rows = config.data.batch_size // shards
    finer = next((n for n in range(steps + 1, rows + 1) if rows % n == 0), None)
    if finer is not None:
        options.append(({"train.accum_steps": str(finer)}, "takes the batch in microbatches: the same gradients"))
    return options


def _saves_more(policy: str, other: str) -> bool:
    return policy in REMAT_ORDER and REMAT_ORDER.index(policy) < REMAT_ORDER.index(other)
