"""A plan as text: what fits, what it costs, what communicates, and what to change when it does not fit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_jax.plan import roofline
from vlm_jax.plan.compile import Phase
from vlm_jax.plan.memory import LargeArray
from vlm_jax.plan.plan import Plan, by_size, grouped, remedies

_NETWORKS = {"ici": "ICI", "dcn": "DCN"}
_SHOWN = 12  # rows of a list before the rest is summed up
_DAY = 86_400


def render(plan: Plan) -> str:
    """The report."""
    return "\n".join(_lines(plan))


def render_shardings(plan: Plan) -> str:
    """Every array of the state and the batch, with its partition and its bytes on a device."""
    lines = ["arrays (bytes on each device)"]
    width = max(len(path) for path, *_ in plan.arrays)
    for path, shape, dtype, how, size in plan.arrays:
        lines.append(f"  {path:{width}s}  {dtype:9s} {shape:24s} {how:28s} {bytes_text(size):>10s}")
    return "\n".join(lines)


def bytes_text(size: float) -> str:
    """Bytes in binary units."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def decimal_text(number: float) -> str:
    """A number with a decimal prefix: `1.50 G`."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} "


def flags_text(overrides: dict[str, str]) -> str:
    """Overrides as they stand on a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _lines(plan: Plan) -> Iterator[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield (
        f"{plan.config.name} on {plan.topology}: {plan.topology.device_count} devices, mesh {mesh}, global batch "
        f"{plan.config.data.batch_size}, {plan.parameters / 1e6:.1f} M parameters"
    )
    if plan.topology.slices > 1:
        across = {"mesh.dcn_data": str(plan.config.mesh.dcn_data), "mesh.dcn_fsdp": str(plan.config.mesh.dcn_fsdp)}
        yield f"  slices: train with {flags_text(across)}"
    for phase in plan.phases:
        if len(plan.phases) > 1:
            yield f"phase from step {phase.first_step}"
        yield from _memory(plan, phase)
        yield from _flops(plan, phase)
        if phase.measured is not None:
            yield from _communication(plan, phase)
            yield from _time(plan, phase)
    yield from _run(plan)
    yield "parameters by part"
    for name, part in plan.parts.items():
        layouts = ", ".join(f"{count / part.parameters:.1%} {how}" for how, count in part.layouts.items())
        yield f"  {name:12s} {part.parameters / 1e6:9.2f} M{' frozen' if part.frozen else ''}: {layouts}"
    compiled = sum(phase.compile_seconds for phase in plan.phases)
    yield f"planned in {plan.seconds:.0f} s, {compiled:.0f} s of them in the compiler"


def _memory(plan: Plan, phase: Phase) -> Iterator[str]:
    needed, limit = plan.hbm(phase), plan.limit
    measured = phase.measured
    least = "at least " if measured is None else ""
    of = f"{bytes_text(needed)} of {bytes_text(limit)} HBM on each device"
    if needed <= limit:
        yield f"memory: fits, {of}, head-room {1 - needed / limit:.1%}"
    else:
        yield f"memory: DOES NOT FIT: {least}{of}, {bytes_text(needed - limit)} too much"
    if measured is not None:
        hbm = measured.hbm
        yield (
            f"  arguments {bytes_text(hbm.arguments)} + temporaries {bytes_text(hbm.temporaries)} + outputs less "
            f"aliased {bytes_text(hbm.outputs - hbm.aliased)} + code {bytes_text(hbm.code)}"
        )
    kept = bytes_text(sum(array.bytes for array in phase.activations))
    yield f"  state {bytes_text(plan.state_bytes)}; kept for the backward pass, by estimate, {kept}"
    if needed > limit:
        largest = measured.largest if measured is not None else phase.refused.largest if phase.refused else ()
        yield "  largest arrays:"
        yield from _arrays(largest or phase.activations)
        yield "  to bring it down:"
        for overrides, why in remedies(plan):
            yield f"    {flags_text(overrides)}  ({why})"


def _arrays(arrays: Sequence[LargeArray]) -> Iterator[str]:
    alike = Counter(arrays)
    for array, count in sorted(alike.items(), key=lambda item: -item[0].bytes * item[1])[:5]:
        times = f"{count} x " if count > 1 else ""
        yield f"    {times + bytes_text(array.bytes):>14s}  {array.shape}  {array.operation}"


def _flops(plan: Plan, phase: Phase) -> Iterator[str]:
    counted = "no count" if phase.counted_flops is None else decimal_text(phase.counted_flops)
    why = f" ({phase.uncounted})" if phase.uncounted else ""
    yield (
        f"FLOPs of a step: model {decimal_text(phase.model_flops)} by formula, {counted} by the jaxpr of loss and "
        f"gradients{why}"
    )
    ratio = plan.flops_ratio(phase)
    if phase.measured is not None and ratio is not None:
        yield (
            f"  compiled {decimal_text(phase.measured.flops * plan.topology.device_count)}, "
            f"{decimal_text(phase.measured.flops)} on each device; model / compiled = {ratio:.3f}"
        )
    if plan.suspect(phase):
        yield "  SUSPECT: fewer FLOPs were compiled than loss and gradients have; part of the program was not counted"


def _communication(plan: Plan, phase: Phase) -> Iterator[str]:
    assert phase.measured is not None
    ratio = phase.measured.wire_bytes / (6 * plan.parameters)
    yield (
        f"communication: each device sends {decimal_text(phase.measured.wire_bytes)}B a step, {ratio:.2f} x (6 bytes "
        "x parameters)"
    )
    for row in grouped(phase.measured):
        how = "asynchronous" if row["asynchronous"] else "synchronous"
        yield (
            f"  {row['kind']:19s} {_NETWORKS[row['network']]}  {how:12s} {row['count']:4d} operations {row['runs']:6d} "
            f"runs {decimal_text(row['wire_bytes']):>9s}B"
        )
    waiting = [each for each in by_size(phase.measured) if not each.asynchronous]
    if waiting:
        yield "  synchronous, which nothing overlaps:"
    for each in waiting[:_SHOWN]:
        kind = f"{each.kind} doing an all-gather" if each.gathers else each.kind
        yield (
            f"    {decimal_text(each.wire_bytes):>9s}B {kind} of {_short(each.operand)} in {each.times} runs: "
            f"{each.operation or each.name}"
        )
    if len(waiting) > _SHOWN:
        rest = sum(each.wire_bytes for each in waiting[_SHOWN:])
        yield f"    {decimal_text(rest):>9s}B in {len(waiting) - _SHOWN} more"


def _short(operand: str) -> str:
    parts = operand.split("], ")
    return operand if len(parts) < 4 else f"{'], '.join(parts[:2])}] and {len(parts) - 2} more"


def _time(plan: Plan, phase: Phase) -> Iterator[str]:
    assert phase.measured is not None
    terms = phase.measured.roofline
    yield (
        f"roofline: {terms.step:.4g} s a step at least: compute {terms.compute:.4g}, HBM {terms.memory:.4g} "
        f"({decimal_text(phase.measured.traffic)}B; weak), interconnect {terms.interconnect:.4g} (synchronous "
        f"{terms.synchronous:.4g}); MFU at most {_percent(plan.mfu(phase))}"
    )
    yield f"  assumes {roofline.ASSUMPTIONS}"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _run(plan: Plan) -> Iterator[str]:
    seconds = plan.run_seconds()
    if seconds is None:
        return
    steps, chips = plan.config.train.steps, plan.topology.chips
    examples = steps * plan.config.data.batch_size
    yield (
        f"run of {steps} steps: {examples / seconds:,.0f} examples/s at most, {seconds / _DAY:.2f} days and "
        f"{seconds / 3600 * chips:,.0f} chip-hours at least"
    )


def table_row(data: dict[str, Any]) -> tuple[str, ...]:
    """A plan's JSON as the cells of one row; the head is `TABLE_HEAD`."""
    if data["compiled_flops"] is None:
        fits = f"no, needs {data['hbm_bytes'] / 2**30:.2f}"
        return (data["config"], data["topology"], str(data["batch_size"]), fits, *["–"] * 6)
    fits = f"{data['hbm_bytes'] / 2**30:.2f}" + ("" if data["fits"] else " (does not fit)")
    return (
        data["config"],
        data["topology"],
        str(data["batch_size"]),
        fits,
        f"{data['headroom']:.0%}",
        f"{data['model_over_compiled_flops']:.3f}",
        f"{data['wire_bytes'] / 1e9:.2f}",
        f"{data['wire_bytes_over_6_params']:.2f}",
        str(len(data["sync_collectives"])),
        f"{data['step_seconds_roofline']:.3f}",
    )


TABLE_HEAD = (
    *("config", "topology", "global batch", "HBM GiB", "head-room", "model / compiled FLOPs", "wire GB"),
    *("wire / 6P", "sync ops", "roofline s"),
)
