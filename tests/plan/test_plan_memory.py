"""Figures of memory: the compiler's two kinds of complaint, and what a jaxpr keeps for its backward pass."""

import jax
import jax.numpy as jnp
import tiny

from vlm_jax.plan.memory import parse_out_of_memory, saved_activations

LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.47G of \
15.75G hbm. Exceeded hbm capacity by 1.72G.

Total hbm usage >= 17.72G:
    reserved        258.00M
    program          17.47G

  Largest program allocations in hbm:

  1. Size: 12.34G
     Operator: op_name="jit(step)/jvp(TwoTower)/image/while" source_file="step.py" source_line=3
     Shape: bf16[24,128,257,4096]{3,1,2,0:T(8,128)(2,1)}
     Unpadded size: 12.00G
     XLA label: %while.129 = (s32[], bf16[24]) while(%tuple.644)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0K
     Shape: f32[128,1024]{1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================
"""


def test_a_complaint_with_its_allocations() -> None:
    found = parse_out_of_memory(LISTED)
    assert found is not None
    assert (found.needed, found.limit, found.temporaries_only) == (round(17.47 * 2**30), round(15.75 * 2**30), False)
    assert [(array.bytes, array.operation) for array in found.largest] == [
        (round(12.34 * 2**30), "jit(step)/jvp(TwoTower)/image/while"),
        (512 * 2**10, ""),
    ]
    assert found.largest[0].shape.startswith("bf16[24,128,257,4096]")


def test_a_complaint_of_one_line() -> None:
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.25G) exceeds "
    )
    found = parse_out_of_memory(text + "available HBM (15.75G).")
    assert found is not None
    assert (found.needed, found.limit, found.temporaries_only) == (round(18.25 * 2**30), round(15.75 * 2**30), True)
    assert parse_out_of_memory("INTERNAL: something else") is None


def test_what_a_stack_of_blocks_keeps() -> None:
    """Of y = sin(x w), 5 layers, 8 rows in 4 shards: x and the sine's derivative, or with remat x alone."""

    def step(ws: jax.Array, x: jax.Array, remat: bool) -> jax.Array:
        def block(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(x @ w), None

        body = jax.checkpoint(block) if remat else block
        return jax.grad(lambda ws: jnp.sum(jax.lax.scan(body, x, ws)[0]))(ws)

    mesh, one = tiny.mesh(2, 2), 5 * 8 * 16 * 4 // 4
    for remat, expected in ((False, [one, one]), (True, [one])):
        jaxpr = jax.make_jaxpr(lambda w, x, remat=remat: step(w, x, remat))(jnp.zeros((5, 16, 16)), jnp.zeros((8, 16)))
        assert [array.bytes for array in saved_activations(jaxpr.jaxpr, 8, mesh)] == expected
