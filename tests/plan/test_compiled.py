"""Counts of programs that libtpu compiles for real topologies, against figures computed by hand; nothing runs.

One process at a time should load libtpu, hence the group.
"""

import json
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.mesh import AXES
from vlm_jax.models.splash import splash_attention
from vlm_jax.plan.__main__ import main
from vlm_jax.plan.compile import Measured, measure
from vlm_jax.plan.topologies import Topology, abstract_devices, parse_topology

pytestmark = pytest.mark.xdist_group("libtpu")
SMALL = parse_topology("v5e:2x2")
SMOKE = ["--config=configs/clip_l14.py:smoke", "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=-1"]


def mesh_of(topology: Topology, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(abstract_devices(topology)).reshape(shape), axes)


def shape(mesh: Mesh, sizes: tuple[int, ...], spec: P, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))


def compiled(function: Callable[..., Any], topology: Topology, *arguments: jax.ShapeDtypeStruct) -> Measured:
    return measure(jax.jit(function).lower(*arguments).compile(), topology)


def test_nested_scans_multiply_out() -> None:
    """5 times 3 products of [256, 256] on each of 4 devices, which share 1024 rows."""
    mesh = mesh_of(SMALL, (4,), ("x",))

    def step(ws: jax.Array, x: jax.Array) -> jax.Array:
        def outer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, ws)[0]

    found = compiled(step, SMALL, shape(mesh, (5, 256, 256), P()), shape(mesh, (1024, 256), P("x")))
    assert found.flops == 5 * 3 * 2 * 256**3
    assert found.collectives == ()
    assert found.roofline.compute == pytest.approx(found.flops / 197e12)


def test_recomputation_counts_and_gradients_of_shared_weights_are_reduced() -> None:
    """6 layers of 2 products: forward, again for the backward pass, and two gradients each."""
    mesh = mesh_of(SMALL, (4,), ("x",))

    def step(ws: jax.Array, x: jax.Array) -> jax.Array:
        block = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None))
        return jax.grad(lambda ws: jnp.sum(jax.lax.scan(block, x, ws)[0] ** 2))(ws)

    found = compiled(step, SMALL, shape(mesh, (6, 2, 256, 256), P()), shape(mesh, (1024, 256), P("x")))
    assert found.flops == 6 * 2 * (1 + 1 + 2) * 2 * 256**3
    assert {each.kind for each in found.collectives} == {"all-reduce"}
    assert found.wire_bytes == 2 * (6 * 2 * 256 * 256 * 4) * 3 // 4


def test_collectives_of_one_slice() -> None:
    mesh, block = mesh_of(SMALL, (4,), ("x",)), 1024 * 512 * 4

    def local(x: jax.Array) -> tuple[jax.Array, ...]:
        whole = jax.lax.all_gather(x, "x", tiled=True)
        return (
            jax.lax.psum(x, "x"),
            whole,
            jax.lax.psum_scatter(whole, "x", tiled=True),
            jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]),
            jax.lax.all_to_all(whole, "x", 0, 0, tiled=True),
        )

    outs = (P(), P("x"), P("x"), P("x"), P("x"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=outs, check_vma=False)
    found = compiled(mapped, SMALL, shape(mesh, (4096, 512), P("x")))
    assert {each.kind: each.wire_bytes for each in found.collectives} == {
        "all-reduce": 2 * block * 3 // 4,
        "all-gather": 3 * block,
        "reduce-scatter": 4 * block * 3 // 4,
        "collective-permute": block,
        "all-to-all": 4 * block * 3 // 4,
    }
    assert {each.kind for each in found.collectives if each.asynchronous} == {"collective-permute"}
    assert found.flops == 0
    assert found.roofline.interconnect == pytest.approx(found.wire_bytes / 200e9)


def test_collectives_between_slices_are_told_apart() -> None:
    """Over all devices of two slices: scattered in the slice, summed between slices, gathered in the slice."""
    two = parse_topology("v5e:2x2", slices=2)
    mesh, block = mesh_of(two, (2, 4), ("d", "x")), 512 * 512 * 4

    def local(x: jax.Array) -> tuple[jax.Array, ...]:
        return jax.lax.psum(x, ("d", "x")), jax.lax.all_gather(x, "d", tiled=True)

    outs, spec = (P(), P("x")), P(("d", "x"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=outs, check_vma=False)
    found = compiled(mapped, two, shape(mesh, (4096, 512), spec))
    assert sorted((each.network, each.kind, each.wire_bytes) for each in found.collectives) == [
        ("dcn", "all-gather", block),
        ("dcn", "all-reduce", 2 * (block // 4) // 2),
        ("ici", "all-gather", block * 3 // 4),
        ("ici", "reduce-scatter", block * 3 // 4),
    ]


def test_splash_attention_counts_its_products() -> None:
    """2 rows of 2 heads on each device; 2 products forward, 3 + 4 backward."""
    mesh = mesh_of(SMALL, (4, 1, 1, 1), AXES)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = splash_attention(q, k, v, key_mask_BxS=None, causal=False, interpret=False)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh):
        x = shape(mesh, (8, 512, 2, 64), P("data"), jnp.bfloat16)
        found = compiled(jax.grad(loss, argnums=(0, 1, 2)), SMALL, x, x, x)
    assert found.flops == (2 + 3 + 4) * 2 * (2 * 2 * 512 * 512 * 64)


def test_the_step_that_training_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without recomputation the compiled program multiplies what loss and gradients multiply, to the last FLOP."""
    file = tmp_path / "plan.json"
    assert main([*SMOKE, f"--json={file}", "--shardings"]) == 0
    printed, plan = capsys.readouterr().out, json.loads(file.read_text())
    assert plan["fits"]
    assert plan["compiled_flops"] * 4 == plan["model_flops_counted"]
    assert plan["model_flops"] == pytest.approx(plan["model_flops_counted"], rel=0.02)
    assert plan["params"] == sum(plan["params_by_part"].values())
    assert plan["hbm_limit_bytes"] == round(15.75 * 2**30)
    parts = plan["hbm_breakdown"]
    assert plan["hbm_bytes"] == (
        parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"] + parts["code"]
    )
    # the state is donated: all of it but padding comes back in its own place
    assert parts["aliased"] >= plan["state_bytes"]
    assert plan["wire_bytes"] == sum(row["wire_bytes"] for row in plan["collectives"])
    waiting = sum(row["count"] for row in plan["collectives"] if not row["asynchronous"])
    assert len(plan["sync_collectives"]) == waiting > 0
    assert 0 < plan["mfu_roofline"] <= 1
    assert plan["step_seconds_roofline"] > 0 < plan["compile_seconds"]
    assert "memory: fits" in printed
    assert "state/params/image/blocks/mlp/fc1/kernel" in printed
    assert "fsdp on axis 1" in printed


def test_a_step_that_does_not_fit_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler's words are its own; it would take minutes to say them of a real step."""

    def refuse(self: jax.stages.Lowered) -> None:
        raise JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.25G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    file = tmp_path / "plan.json"
    assert main([*SMOKE, f"--json={file}"]) == 0
    printed, plan = capsys.readouterr().out, json.loads(file.read_text())
    assert not plan["fits"]
    # the complaint leaves the state out
    assert plan["hbm_bytes"] == round(18.25 * 2**30) + plan["state_bytes"]
    assert plan["compiled_flops"] is None
    assert "DOES NOT FIT: at least 18.25 GiB of 15.75 GiB HBM on each device, 2.50 GiB too much" in printed
    assert "--config.objective.model.image.remat=full --config.objective.model.text.remat=full" in printed
    assert "--config.train.accum_steps=2" in printed
    # what the text tower's blocks keep of 32 tokens of width 64, in 2 layers, 8 of the 32 rows on each device
    assert "128.00 KiB  float32[2, 32, 32, 64] / 4  jvp(TwoTower)/text/blocks" in printed


def test_a_step_for_chips_that_are_elsewhere_can_be_written(tmp_path: Path) -> None:
    """Its facts are those of the topology: one process per host of it, and the compiler that made it."""
    file = tmp_path / "step"
    flags = ["--config=configs/clip_l14.py:smoke", "--topology=v5e:4x4", f"--compiled={file}"]
    assert main(flags) == 0
    with zipfile.ZipFile(file) as saved:
        facts, payload = json.loads(saved.read("0/facts.json")), saved.read("0/step")
    assert facts["processes"] == 4
    assert facts["devices"].startswith("16 x TPU v5 lite")
    assert facts["platform"] == f"tpu libtpu {version('libtpu')}"
    assert len(payload) > 10_000
