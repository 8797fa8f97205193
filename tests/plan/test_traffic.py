"""Bytes between HBM and core of programs written by hand."""

import pytest

from vlm_jax.plan.hlo import parse_hlo
from vlm_jax.plan.hlo_cost import executions
from vlm_jax.plan.roofline import Roofline
from vlm_jax.plan.traffic import hbm_traffic

FUSIONS = """HloModule test, num_partitions=1

%slice (p: f32[10,64], i: s32[]) -> f32[64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %part = f32[1,64]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%part)
}

%update (q: f32[10,64], u: f32[64], j: s32[]) -> f32[10,64] {
  %q = f32[10,64]{1,0} parameter(0)
  %u = f32[64]{0} parameter(1)
  %j = s32[] parameter(2)
  %y = s32[] constant(0)
  %row = f32[1,64]{1,0} bitcast(%u)
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%q, %row, %j, %y)
}

"""
# One step of a product beside which a gather goes on: the compiler hands the gather's buffers from fusion to fusion.
CARRIED = """%carry (p: f32[10,64], s: f32[3,64], w: f32[12,64]) -> (f32[10,64], f32[3,64], f32[12,64], f32[12,64]) {
  %p = f32[10,64]{1,0} parameter(0)
  %s = f32[3,64]{1,0} parameter(1)
  %w = f32[12,64]{1,0} parameter(2)
  %n = f32[10,64]{1,0} negate(%p)
  %g = f32[12,64]{1,0} all-gather(%s), channel_id=1, replica_groups={}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t = (f32[10,64], f32[3,64], f32[12,64], f32[12,64]) tuple(%n, %s, %w, %g)
}

"""
ENTRY = """ENTRY %main (a: f32[10,64], k: s32[]) -> f32[10,64] {{
  %a = f32[10,64]{{1,0}} parameter(0)
  %k = s32[] parameter(1)
  {line}
}}
"""
WHOLE, ROW = 10 * 64 * 4, 64 * 4


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("ROOT %n = f32[10,64]{1,0} negate(%a)", 2 * WHOLE),
        # a slice that is fetched early reads and writes the slice
        ("ROOT %s = ((f32[10,64]{1,0}), f32[2,64]{1,0}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:64]}", 4 * ROW),
        # a result in VMEM costs HBM nothing
        ("ROOT %n = f32[10,64]{1,0:T(8,128)S(1)} negate(%a)", WHOLE),
        ("ROOT %c = (f32[10,64]{1,0:S(1)}, f32[10,64]{1,0}, u32[]{:S(2)}) copy-start(%a)", WHOLE),
        # a fusion that takes one row reads one row, and the index
        ("ROOT %f = f32[64]{0} fusion(%a, %k), kind=kLoop, calls=%slice", ROW + 4 + ROW),
        ("ROOT %f = f32[64]{0:S(1)} fusion(%a, %k), kind=kLoop, calls=%slice", ROW + 4),
        # a fusion that updates one row in place writes one row
        (
            "%r = f32[64]{0:S(1)} bitcast(%a)\n"
            "  ROOT %f = f32[10,64]{1,0} fusion(%a, %r, %k), kind=kLoop, calls=%update",
            4 + ROW,
        ),
        ("%g = f32[10,64] bitcast(%a)\n  ROOT %t = (f32[10,64], s32[]) tuple(%g, %k)", 0),
    ],
)
def test_what_moves(line: str, moved: int) -> None:
    used = [part for part in ("slice", "update") if f"%{part}" in line]
    text = FUSIONS + ENTRY.format(line=line) if used else "HloModule t\n\n" + ENTRY.format(line=line)
    module = parse_hlo(text)
    assert hbm_traffic(module, executions(module)) == moved


def test_what_a_fusion_only_hands_on_does_not_move() -> None:
    line = (
        "%x = f32[3,64]{1,0} bitcast(%a)\n  %y = f32[12,64]{1,0} bitcast(%a)\n"
        "  ROOT %f = (f32[10,64]{1,0}, f32[3,64]{1,0}, f32[12,64]{1,0}, f32[12,64]{1,0}) fusion(%a, %x, %y), "
        "kind=kOutput, calls=%carry"
    )
    module = parse_hlo("HloModule t, num_partitions=4\n\n" + CARRIED + ENTRY.format(line=line))
    assert hbm_traffic(module, executions(module)) == 2 * WHOLE


def test_synchronous_communication_hides_behind_nothing() -> None:
    assert Roofline(compute=3.0, memory=2.0, asynchronous=1.0, synchronous=0.5).step == 3.5
    assert Roofline(compute=1.0, memory=2.0, asynchronous=4.0, synchronous=0.5).step == 4.5
    assert Roofline(compute=1.0, memory=2.0, asynchronous=4.0, synchronous=0.5).interconnect == 4.5
