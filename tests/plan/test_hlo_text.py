"""The reader of HLO text and its counts on programs written by hand: every figure below is computed in the test."""

import pytest

from vlm_jax.plan.collectives import find_collectives
from vlm_jax.plan.hlo import HloError, parse_hlo
from vlm_jax.plan.hlo_cost import executions, total_flops

HEAD = "HloModule test, is_scheduled=true, num_partitions=4\n\n"
ADD = (
    "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
    "  ROOT %s = f32[] add(%x, %y)\n}\n\n"
)
MATMUL = "f32[8,32]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
MATMUL_FLOPS = 2 * 8 * 16 * 32
ENTRY = "ENTRY %main (a: f32[8,16], w: f32[16,32]) -> f32[8,32] {\n  %a = f32[8,16]{1,0} parameter(0)\n"
ENTRY += "  %w = f32[16,32]{1,0} parameter(1)\n"


def flops(text: str) -> int:
    return total_flops(executions(parse_hlo(text)))


def callee(name: str) -> str:
    """A computation that multiplies its two parameters."""
    return (
        f"%{name} (a: f32[8,16], w: f32[16,32]) -> f32[8,32] {{\n  %a = f32[8,16]{{1,0}} parameter(0)\n"
        f"  %w = f32[16,32]{{1,0}} parameter(1)\n  ROOT %d = {MATMUL}\n}}"
    )


def entry(*lines: str) -> str:
    return HEAD + ENTRY + "".join(f"  {line}\n" for line in lines) + "}\n"


def loop(condition: str, body: str, start: str = "constant(0)", config: str = "") -> str:
    """A program whose loop body multiplies once."""
    state = "(s32[], f32[8,16], f32[16,32])"
    return (
        f"{HEAD}%body (p: {state}) -> {state} {{\n  %p = {state} parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%p), index=0\n  %a = f32[8,16]{{1,0}} get-tuple-element(%p), index=1\n"
        f"  %w = f32[16,32]{{1,0}} get-tuple-element(%p), index=2\n  %one = s32[] constant(1)\n"
        f"  %next = s32[] {body}\n  %product = {MATMUL}\n  ROOT %t = {state} tuple(%next, %a, %w)\n}}\n\n"
        f"%condition (q: {state}) -> pred[] {{\n  %q = {state} parameter(0)\n"
        f"  %j = s32[] get-tuple-element(%q), index=0\n  %end = s32[] constant(12)\n  ROOT %more = pred[] {condition}\n"
        f"}}\n\n{ENTRY}  %start = s32[] {start}\n  %state = {state} tuple(%start, %a, %w)\n"
        f"  %loop = {state} while(%state), condition=%condition, body=%body{config}\n  ROOT %out = {MATMUL}\n}}\n"
    )


def test_a_product() -> None:
    assert flops(entry(f"ROOT %d = {MATMUL}")) == MATMUL_FLOPS


@pytest.mark.parametrize(
    ("condition", "body", "start", "times"),
    [
        ("compare(%j, %end), direction=LT", "add(%i, %one)", "constant(0)", 12),
        ("compare(%j, %end), direction=LE", "add(%i, %one)", "constant(2)", 11),
        ("compare(%end, %j), direction=GT", "add(%i, %i)", "constant(1)", 4),
        ("compare(%j, %end), direction=GT", "subtract(%i, %one)", "constant(15)", 3),
        ("compare(%j, %end), direction=NE", "add(%i, %one)", "constant(12)", 0),
    ],
)
def test_a_loop_runs_as_often_as_its_counter_says(condition: str, body: str, start: str, times: int) -> None:
    assert flops(loop(condition, body, start)) == (times + 1) * MATMUL_FLOPS


def test_a_declared_trip_count_is_believed() -> None:
    config = ', backend_config={"known_trip_count":{"n":"7"},"other":"x"}'
    assert flops(loop("compare(%j, %end), direction=LT", "add(%i, %one)", config=config)) == 8 * MATMUL_FLOPS


def test_a_loop_whose_end_depends_on_data_is_an_error() -> None:
    with pytest.raises(HloError, match=r"loop loop .* can't be known"):
        flops(loop("compare(%j, %end), direction=LT", "add(%i, %one)", start="convert(%a)"))


def test_the_dearest_branch_of_a_conditional_counts() -> None:
    def branch(name: str, products: int) -> str:
        lines = "".join(f"  %d{name}{i} = {MATMUL}\n" for i in range(products - 1))
        return (
            f"%{name} (t: (f32[8,16], f32[16,32])) -> f32[8,32] {{\n  %t = (f32[8,16], f32[16,32]) parameter(0)\n"
            f"  %a = f32[8,16]{{1,0}} get-tuple-element(%t), index=0\n"
            f"  %w = f32[16,32]{{1,0}} get-tuple-element(%t), index=1\n{lines}  ROOT %r = {MATMUL}\n}}\n\n"
        )

    call = "%k = s32[] constant(0)\n  %t = (f32[8,16], f32[16,32]) tuple(%a, %w)\n  ROOT %c = f32[8,32] "
    call += "conditional(%k, %t, %t), branch_computations={%one, %three}"
    text = entry(call).replace("ENTRY", branch("one", 1) + branch("three", 3) + "ENTRY")
    assert flops(text) == 3 * MATMUL_FLOPS


@pytest.mark.parametrize(
    ("operands", "attributes", "out", "expected"),
    [
        # a product of [128, 256] and [256, 512] as the TPU writes it
        (("bf16[128,256]", "bf16[256,512]"), "dim_labels=bf_io->bf", "bf16[128,512]", 2 * 128 * 256 * 512),
        # 3 x 3 over 5 x 5 without padding: 3 x 3 positions
        (
            ("f32[2,5,5,4]", "f32[3,3,4,6]"),
            "window={size=3x3}, dim_labels=b01f_01io->b01f",
            "f32[2,3,3,6]",
            2 * 2 * 4 * 6 * 9 * 9,
        ),
        # the same, padded to 5 x 5 positions: along an axis 3 elements meet data 3 times 5 less the 2 at the edges
        (
            ("f32[2,5,5,4]", "f32[3,3,4,6]"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            "f32[2,5,5,6]",
            2 * 2 * 4 * 6 * 13 * 13,
        ),
        # depthwise: each of 6 channels for itself
        (
            ("f32[1,5,5,6]", "f32[3,3,1,6]"),
            "window={size=3x3}, dim_labels=b01f_01io->b01f, feature_group_count=6",
            "f32[1,3,3,6]",
            2 * 6 * 9 * 9,
        ),
        # [128 x 5, 256] and [256, 4 x 64], the 4 heads as elements of the kernel: all but one meet padding
        (
            ("bf16[128,5,256,1]", "bf16[256,4,64,1]"),
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=b0f1_i1o0->b01f",
            "bf16[128,5,4,64]",
            2 * 128 * 5 * 256 * 4 * 64,
        ),
    ],
)
def test_convolutions(operands: tuple[str, str], attributes: str, out: str, expected: int) -> None:
    assert flops(convolution(operands, attributes, out)) == expected


def convolution(operands: tuple[str, str], attributes: str, out: str) -> str:
    left, right = operands
    return (
        f"{HEAD}ENTRY %main (x: {left}, k: {right}) -> {out} {{\n  %x = {left} parameter(0)\n"
        f"  %k = {right} parameter(1)\n  ROOT %c = {out} convolution(%x, %k), {attributes}\n}}\n"
    )


def test_batched_products_are_convolutions_full_of_holes() -> None:
    """128 x 4 products of [5, 64] and [64, 5], the batch in the window: stride and dilation leave the diagonal."""
    text = convolution(
        ("bf16[128,5,4,64]", "bf16[128,5,4,64]"),
        "window={size=128x4 stride=127x3 lhs_dilate=128x4}, dim_labels=0b1f_0o1i->01bf",
        "f32[128,4,5,5]",
    )
    assert flops(text) == 2 * 128 * 4 * 5 * 64 * 5


def test_line_breaks_in_metadata_lose_nothing() -> None:
    """Pallas writes metadata over several lines, whose closing braces stand at the start of a line."""
    metadata = (
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}\n"\n}}, metadata={op_name="x"}'
    )
    kernel = (
        "%splash_mha_fwd.1 = bf16[2,3,512,64]{3,2,1,0} custom-call(%q, %q, %q), "
        f'custom_call_target="tpu_custom_call", {metadata}, backend_config={{"body":"TUzv"}}'
    )
    text = entry("%q = bf16[2,3,512,64]{3,2,1,0} parameter(2)", kernel, f"ROOT %d = {MATMUL}")
    assert flops(text) == 2 * (2 * 2 * 3 * 512 * 512 * 64) + MATMUL_FLOPS


def test_what_follows_a_closing_brace_ends_no_module() -> None:
    call = "ROOT %c = f32[8,32] call(%a, %w), to_apply=%side"
    text = entry(call).replace("ENTRY", f'{callee("side")}, execution_thread="sparsecore"\n\nENTRY')
    assert flops(text) == MATMUL_FLOPS


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['ROOT %c = f32[8,32]{1,0} custom-call(%a, %w), custom_call_target="Surprise"'], "custom call c to Surprise"),
        (['ROOT %k = f32[8,32]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"'], "Pallas kernel k"),
        (["ROOT %c = f32[8,32]{1,0} convolution(%a, %w), dim_labels=b0f_io->bf"], "dim_labels of an unknown form"),
        (["%f = c64[8,16]{1,0} fft(%a), fft_type=FFT", f"ROOT %d = {MATMUL}"], "FLOPs of fft f"),
        (
            ["%d = f32[8,32]{1,0} dot(%a, %w), lhs_contracting_dims={1}", "what is this", "ROOT %e = f32[8] copy(%a)"],
            "no instruction",
        ),
        (["ROOT %d = f32[8,32]{1,0} fusion(%a, %w), kind=kLoop, calls=%lost"], "lost, which the HLO text does not"),
        (["ROOT %d = f9[8,32]{1,0} copy(%a)", "%e = f32[8] copy(%d)"], "f9"),
    ],
)
def test_what_is_unknown_is_an_error(lines: list[str], words: str) -> None:
    def account() -> int:
        module = parse_hlo(entry(*lines))
        sizes = (array.bytes for each in module.entry.instructions.values() for array in each.arrays)
        return total_flops(executions(module)) + sum(sizes)

    with pytest.raises(HloError, match=words):
        account()


def test_a_computation_that_ends_too_early_is_an_error() -> None:
    text = entry("}", f"ROOT %d = {MATMUL}")
    with pytest.raises(HloError, match="stands in no computation"):
        parse_hlo(text)
    hidden = entry(f"ROOT %d = {MATMUL}") + "note f32[8,32] dot(%a, %w)\n"
    with pytest.raises(HloError, match="writes 2 dot operations, of which 1 were read"):
        parse_hlo(hidden)


def test_a_product_that_nothing_calls_is_an_error() -> None:
    with pytest.raises(HloError, match="nothing that was read calls"):
        flops(entry(f"ROOT %d = {MATMUL}").replace("ENTRY", callee("lost") + "\n\nENTRY"))


def collectives(*lines: str) -> list[tuple[str, str, bool, int, int]]:
    module = parse_hlo(entry(*lines).replace("ENTRY", ADD + "ENTRY"))
    found = find_collectives(module, executions(module))
    return [(each.kind, each.network, each.asynchronous, each.times, each.wire_bytes) for each in found]


A = 8 * 16 * 4  # bytes of %a


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,1},{2,3}}", 2),
        ("{}", 4),
        ("[2,2]<=[4]", 2),
        ("[1,4]<=[2,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4),
        ("mesh['data'=2,'fsdp'=2] {'data','fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=2] {'fsdp'}", 2),
        ("mesh['data'=8] {'data':(1)2}", 2),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_2'}", 2),
    ],
)
def test_sizes_of_replica_groups(groups: str, size: int) -> None:
    lines = [
        f"%g = f32[32,16]{{1,0}} all-gather(%a), replica_groups={groups}, dimensions={{0}}",
        f"%r = f32[8,16]{{1,0}} all-reduce(%a), replica_groups={groups}, to_apply=%add",
        f"%s = f32[2,16]{{1,0}} reduce-scatter(%a), replica_groups={groups}, dimensions={{0}}, to_apply=%add",
        f"ROOT %t = f32[8,16]{{1,0}} all-to-all(%a), replica_groups={groups}, dimensions={{0}}",
    ]
    share = A * (size - 1) // size
    assert collectives(*lines) == [
        ("all-gather", "ici", False, 1, A * (size - 1)),
        ("all-reduce", "ici", False, 1, 2 * share),
        ("reduce-scatter", "ici", False, 1, share),
        ("all-to-all", "ici", False, 1, share),
    ]


def test_permutations_and_starts() -> None:
    lines = [
        "%p = (f32[8,16], f32[8,16]) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1},{1,0}}",
        "%d = f32[8,16] collective-permute-done(%p)",
        "%q = f32[8,16] collective-permute(%a), channel_id=2, source_target_pairs={{0,0},{1,1}}",
        "%g = (f32[8,16], f32[32,16]) all-gather-start(%a), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}",
        "ROOT %e = f32[32,16] all-gather-done(%g)",
    ]
    assert collectives(*lines) == [
        ("collective-permute", "ici", True, 1, A),
        ("all-gather", "ici", True, 1, 3 * A),
    ]
    with pytest.raises(HloError, match="bytes on the wire of ragged-all-to-all r are unknown"):
        collectives("ROOT %r = f32[8,16] ragged-all-to-all(%a), replica_groups={}")
    with pytest.raises(HloError, match="unknown replica_groups"):
        collectives("ROOT %r = f32[8,16] all-to-all(%a), replica_groups=ring")


def test_an_asynchronous_operation_that_fusions_carry_along_counts_once() -> None:
    gather = "f32[32,16] all-gather(%p), channel_id=9, replica_groups={}, dimensions={0}, "
    gather += 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'

    def fusion(name: str, root: str) -> str:
        return (
            f"%{name} (p: f32[8,16]) -> f32[32,16] {{\n  %p = f32[8,16] parameter(0)\n  %g_{name} = {gather}\n"
            f"  ROOT %r_{name} = f32[32,16] {root}\n}}\n\n"
        )

    starts = fusion("begin", 'custom-call(%g_begin), custom_call_target="AsyncCollectiveStart"')
    others = fusion("carry", "copy(%g_carry)") + fusion(
        "end", 'custom-call(%p, %g_end), custom_call_target="AsyncCollectiveDone"'
    )
    calls = [f"%f_{n} = f32[32,16] fusion(%a), kind=kCustom, calls=%{n}" for n in ("begin", "carry", "end")]
    module = parse_hlo(entry(*calls, f"ROOT %d = {MATMUL}").replace("ENTRY", starts + others + "ENTRY"))
    found = find_collectives(module, executions(module))
    assert [(each.kind, each.asynchronous, each.wire_bytes) for each in found] == [("all-gather", True, 3 * A)]

    orphans = parse_hlo(entry(*calls[1:], f"ROOT %d = {MATMUL}").replace("ENTRY", others + "ENTRY"))
    with pytest.raises(HloError, match="never started"):
        find_collectives(orphans, executions(orphans))


def test_an_all_reduce_of_which_each_keeps_its_slice_is_a_reduce_scatter() -> None:
    fused = (
        f"{ADD}%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {{\n  %p = f32[8,16] parameter(0)\n  %z = s32[] "
        "constant(0)\n  %r = f32[8,16] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add\n  ROOT %s = "
        "f32[2,16] dynamic-slice(%r, %z, %z), dynamic_slice_sizes={2,16}\n}\n\n"
    )
    text = entry("ROOT %f = f32[2,16] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1").replace(
        "ENTRY", fused + "ENTRY"
    )
    module = parse_hlo(text)
    (found,) = find_collectives(module, executions(module))
    assert (found.kind, found.wire_bytes) == ("reduce-scatter", A * 3 // 4)


def test_an_all_reduce_of_shards_in_zeros_is_called_a_gather() -> None:
    lines = [
        "%z = s32[] constant(0)",
        "%zeros = f32[32,16]{1,0} broadcast(%z), dimensions={}",
        "%padded = f32[32,16]{1,0} dynamic-update-slice(%zeros, %a, %z, %z)",
        "%g = f32[32,16]{1,0} all-reduce(%padded), replica_groups={}, to_apply=%add",
        "%r = f32[8,16]{1,0} all-reduce(%a), replica_groups={}, to_apply=%add",
        'ROOT %use = f32[32,16]{1,0} negate(%g), metadata={op_name="jit(step)/blocks/mlp" stack_frame_id=3}',
    ]
    module = parse_hlo(entry(*lines).replace("ENTRY", ADD + "ENTRY"))
    gather, reduce = find_collectives(module, executions(module))
    assert (gather.gathers, gather.operation, gather.wire_bytes) == (True, "jit(step)/blocks/mlp", 2 * 4 * A * 3 // 4)
    assert (reduce.gathers, reduce.operation) == (False, "")


def test_transfers_between_slices() -> None:
    def send(name: str, kind: str, target: str) -> str:
        attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
        return (
            f"%{name} = (f32[8,16], u32[], token[]) send(%a, %token), channel_id=1, is_host_transfer=true, "
            f"frontend_attributes={{{attributes}}}"
        )

    slices = '"{1,2}x{0:3}"'
    lines = [
        "%token = token[] after-all()",
        send("g", "ALL_GATHER", slices),
        send("r", "ALL_REDUCE", '"{0:3}x{0:3}"'),
        send("s", "REDUCE_SCATTER", slices),
        send("p", "ONE_TO_ONE", "{{100000->200000},{200000->100000}}"),
        f"ROOT %d = {MATMUL}",
    ]
    assert collectives(*lines) == [
        ("all-gather", "dcn", True, 1, A),
        ("all-reduce", "dcn", True, 1, 2 * A * 3 // 4),
        ("reduce-scatter", "dcn", True, 1, A // 2),
        ("collective-permute", "dcn", True, 1, A),
    ]
    with pytest.raises(HloError, match="no known transfer between slices"):
        collectives(lines[0], send("x", "TELEPATHY", slices), lines[-1])
