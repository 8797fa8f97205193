"""Finds plans that fit and are fast: mesh shapes, remat policies, microbatches and dtypes of optimiser slots.

Candidates that can't fit are dropped by a lower bound of their memory, the others are compiled one after the other, the
most promising first. A plan that was made before comes from the cache.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.config import Config
from vlm_jax.mesh import BATCH_AXES
from vlm_jax.models.remat import POLICIES
from vlm_jax.plan import memory
from vlm_jax.plan.cache import PlanCache
from vlm_jax.plan.checks import config_on, sizes_over
from vlm_jax.plan.compile import activations, program_on, trace_steps
from vlm_jax.plan.plan import REMAT_ORDER, make_plan
from vlm_jax.plan.plan import to_json as plan_json
from vlm_jax.plan.report import TABLE_HEAD, flags_text, table_row
from vlm_jax.plan.topologies import Topology
from vlm_jax.schema import ConfigError, leaves, override

# What a policy makes a step compute, over no recomputation: orders candidates, decides nothing.
_RECOMPUTED = {"none": 1.0, "dots": 1.03, "save_qkv_mid": 1.12, "save_qkv_ctx": 1.14, "full": 1.23}
# Rows of a shard below which weights were seen to be gathered by an all-reduce (1024 over 256 chips; not over 16).
_THIN = 8
# The compiler may hold what the jaxpr keeps in fewer bytes, or make some of it again: a bound counts half of it.
_SURELY_KEPT = 0.5
# Part of the memory for what one block needs while it runs, and what counts as the same state.
_WORKING_ROOM, _NEARLY_EQUAL = 0.15, 0.02


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config.

    Attributes:
        mesh: overrides of the mesh.
        remat: policy of every stack.
        accum_steps: microbatches.
        moments: dtype of the optimiser's first moment; None where the optimiser has no choice.
    """

    mesh: tuple[tuple[str, str], ...]
    remat: str
    accum_steps: int
    moments: str | None

    def overrides(self, config: Config) -> dict[str, str]:
        """The overrides that make `config` this, without those that change nothing."""
        keys = {key.removeprefix("config."): value for key, value in leaves(config)}
        changes = {**dict(self.mesh), "train.accum_steps": str(self.accum_steps)}
        changes |= {key: self.remat for key in keys if key.endswith(".remat")}
        changes |= {key: self.moments for key in keys if key.endswith(".mu_dtype") and self.moments is not None}
        return {key: value for key, value in changes.items() if str(keys[key]) != value}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plans: (overrides, plan as JSON) of what was compiled; the best first, what does not fit last.
        tried: candidates in all.
        pruned: of them dropped without compiling, since they can't fit.
        left: of them not compiled, for `--compiles` was reached.
    """

    plans: tuple[tuple[dict[str, str], dict[str, Any]], ...]
    tried: int
    pruned: int
    left: int


def candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    """All ways to run a config on a topology that divide its batch."""
    per_slice = topology.device_count // topology.slices
    keys = [key for key, _ in leaves(config)]
    policies = REMAT_ORDER if any(key.endswith(".remat") for key in keys) else ("none",)
    moments = ("float32", "bfloat16") if any(key.endswith(".mu_dtype") for key in keys) else (None,)
    for mesh, remat, accum, dtype in itertools.product(_meshes(per_slice), policies, (1, 2, 4, 8), moments):
        candidate = Candidate(mesh, remat, accum, dtype)
        try:
            config_on(override(config, candidate.overrides(config)), topology)
        except ConfigError:
            continue  # the batch does not divide
        yield candidate


def _meshes(devices: int) -> Iterator[tuple[tuple[str, str], ...]]:
    """Weights split over all chips, over some, over none; and heads and hidden units in two."""
    fsdp = sorted({size for size in (1, 4, 16, 64, devices) if devices % size == 0}, reverse=True)
    shapes = [(size, 1) for size in fsdp] + ([(devices // 2, 2)] if devices % 2 == 0 and devices > 1 else [])
    for size, tensor in shapes:
        data = devices // (size * tensor)
        yield (
            ("mesh.data", str(data)),
            ("mesh.fsdp", str(size)),
            ("mesh.tensor", str(tensor)),
            ("mesh.sequence", "1"),
        )


def search(config: Config, topology: Topology, cache: PlanCache, compiles: int) -> Found:
    """Tries what `candidates` gives.

    Args:
        config: what would be trained; its other keys stay as they are.
        topology: where.
        cache: of plans made before.
        compiles: how many programs to compile at most; plans from the cache don't count.

    Raises:
        ConfigError: nothing of it can run on the topology.
    """
    config_on(config, topology)  # the sentence for a batch that divides nowhere
    everything = list(candidates(config, topology))
    bounds = _Bounds(config, topology)
    possible = [candidate for candidate in everything if bounds.bytes(candidate) <= topology.chip.hbm_bytes]
    possible.sort(key=lambda each: (not bounds.likely(each), bounds.cost(each), len(each.overrides(config))))
    pruned, left, plans, too_large = len(everything) - len(possible), 0, [], []
    for candidate in possible:
        if any(bounds.needs_no_less(candidate, other) for other in too_large):
            pruned += 1
            continue
        changes = candidate.overrides(config)
        changed = override(config, changes)
        plan = cache.get(changed, topology)
        if plan is None and compiles <= 0:
            left += 1
            continue
        if plan is None:
            compiles -= 1
            print(f"compiling {flags_text(changes) or 'the config as it is'}", file=sys.stderr, flush=True)
            try:
                plan = plan_json(make_plan(changed, topology, count=False))
            except ConfigError as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
                continue
            cache.put(changed, topology, plan)
        if not plan["fits"]:
            too_large.append(candidate)
        plans.append((changes, plan))
    plans.sort(key=lambda entry: (not entry[1]["fits"], entry[1]["step_seconds_roofline"] or math.inf))
    return Found(tuple(plans), len(everything), pruned, left)


class _Bounds:
    """Lower bounds of memory, and a rough order by time; both without compiling."""

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        self._states: dict[Any, int] = {}
        self._activations: dict[Any, int] = {}
        self._parameters: tuple[int, int] | None = None

    def bytes(self, candidate: Candidate) -> int:
        """State, gradients and part of the activations, on each device."""
        return self._state(candidate) + round(_SURELY_KEPT * self._kept(candidate))

    def likely(self, candidate: Candidate) -> bool:
        """Whether it should fit: with all activations, and room to work in."""
        needed = self._state(candidate) + self._kept(candidate)
        return needed <= (1 - _WORKING_ROOM) * self._topology.chip.hbm_bytes

    def needs_no_less(self, candidate: Candidate, other: Candidate) -> bool:
        """Whether it can't fit where `other` did not: it keeps no less, and its state is no smaller to speak of."""
        slack = _NEARLY_EQUAL * self._topology.chip.hbm_bytes
        return self._kept(candidate) >= self._kept(other) and self._state(candidate) >= self._state(other) - slack

    def cost(self, candidate: Candidate) -> float:
        """Seconds of products and of gathering weights, roughly."""
        config, chip = self._config, self._topology.chip
        flops = config.objective.train_flops() * config.data.batch_size / self._topology.device_count
        # gradient caching embeds every microbatch once more
        again = 4 / 3 if candidate.accum_steps > 1 else 1.0
        mesh = {key.removeprefix("mesh."): int(size) for key, size in candidate.mesh}
        weights, width = self._weights(candidate)
        weights = 2 * weights / mesh["tensor"]
        # gathered forward and backward, gradients scattered; the compiler gathers thin shards at twice the bytes
        passes = (2 * candidate.accum_steps + 1) * (2 if width // mesh["fsdp"] < _THIN else 1)
        wire = weights * (passes if mesh["fsdp"] > 1 else 0)
        wire += 2 * weights / mesh["fsdp"] if mesh["data"] * self._topology.slices > 1 else 0
        # the chip's FLOP/s cancel in the order of one chip's candidates: HBM bandwidth x 240 is near all of them
        return again * _RECOMPUTED[candidate.remat] * flops / (240 * chip.hbm_bandwidth) + wire / chip.ici_bandwidth

    def _state(self, candidate: Candidate) -> int:
        key = (candidate.mesh, candidate.moments)
        if key not in self._states:
            program = program_on(self._changed(candidate), self._topology)
            abstract = program.setup.abstract
            live, _ = program.setup.parts.split(abstract.params)
            self._states[key] = memory.state_bytes(abstract) + memory.state_bytes(live)
        return self._states[key]

    def _weights(self, candidate: Candidate) -> tuple[int, int]:
        """(number of parameters, the largest size that `fsdp` splits); the same for every candidate."""
        if self._parameters is None:
            program = program_on(self._changed(candidate), self._topology)
            counts, widths = program.setup.parts.counts(), sizes_over(program, "fsdp")
            self._parameters = sum(counts.values()), max(widths, default=1)
        return self._parameters

    def _kept(self, candidate: Candidate) -> int:
        """Activations on each device."""
        key = (candidate.remat, candidate.accum_steps)
        over = self._topology.slices * math.prod(
            int(size) for axis, size in candidate.mesh if axis.removeprefix("mesh.") in BATCH_AXES
        )
        if key not in self._activations:
            program = program_on(self._changed(candidate), self._topology)
            shards = math.prod(program.mesh.shape[axis] for axis in BATCH_AXES)
            traces = trace_steps(program)
            kept = (sum(array.bytes for array in activations(program, traced)) for traced in traces)
            self._activations[key] = shards * max(kept)
        return self._activations[key] // over

    def _changed(self, candidate: Candidate) -> Config:
        return override(self._config, candidate.overrides(self._config))


def render(found: Found) -> str:
    """The plans as a table, the best first, each with the flags that choose it."""
    lines = [
        f"{found.tried} candidates: {found.pruned} can't fit, {len(found.plans)} planned"
        + (
            f", {found.left} left (--compiles=N tries more; what is planned comes from the cache)" if found.left else ""
        ),
        "  ".join(TABLE_HEAD[3:]),
    ]
    for changes, plan in found.plans:
        lines += ["  ".join(table_row(plan)[3:]), f"    {flags_text(changes) or '(the config as it is)'}"]
    if not any(plan["fits"] for _, plan in found.plans):
        lines.append("none fits; take more chips, or a smaller batch")
    return "\n".join(lines)


def to_json(found: Found) -> dict[str, Any]:
    """The same as plain data."""
    plans: list[Mapping[str, Any]] = [{"overrides": changes, **plan} for changes, plan in found.plans]
    best = next((plan for plan in plans if plan["fits"]), None)
    return {
        "best": best["overrides"] if best else None,
        "candidates": found.tried,
        "pruned": found.pruned,
        "left": found.left,
        "plans": plans,
    }


assert set(REMAT_ORDER) <= set(POLICIES)
