"""A compiler in the place of libtpu: plans by rule, for tests of what is planned and what is not."""

from typing import Any

from vlm_jax.config import Config
from vlm_jax.plan.plan import REMAT_ORDER
from vlm_jax.plan.topologies import Topology
from vlm_jax.schema import leaves


class FakeCompiler:
    """Plans whose time falls with what is kept, and that fit from `fitting` on in the order of remat policies."""

    def __init__(self, fitting: str):
        self.fitting, self.compiled = REMAT_ORDER.index(fitting), []

    def make_plan(self, config: Config, topology: Topology, count: bool = True) -> Config:
        self.compiled.append(config)
        return config

    def plan_json(self, config: Config) -> dict[str, Any]:
        policies = [value for key, value in leaves(config.on_chip("v5e").objective) if key.endswith(".remat")]
        level = REMAT_ORDER.index((policies or ["none"])[0])
        fits = level >= self.fitting
        seconds = 1.0 + level + config.train.accum_steps + config.mesh.tensor
        row = dict.fromkeys(("headroom", "model_over_compiled_flops", "wire_bytes_over_6_params", "wire_bytes"), 0.5)
        facts = {"config": "x", "topology": "y", "batch_size": 1, "hbm_bytes": 2**30, "compiled_flops": 1}
        return {**row, **facts, "sync_collectives": [], "fits": fits, "step_seconds_roofline": seconds}
