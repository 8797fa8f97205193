"""The peers of benchmarks/step.py train the model of the config: its size, and its loss on the same weights' scale."""

import json
import math
from pathlib import Path

import command
import jax
import peers
import pytest
import step

from vlm_jax.config import load_config
from vlm_jax.mesh import unbox


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("open_clip", "clip_b32"),
        ("transformers", "clip_b32"),
        ("open_clip", "clip_rn50"),
        ("transformers", "siglip_b16"),
    ],
)
def test_a_peer_has_our_parameters_and_trains(peer: str, name: str) -> None:
    config = load_config(f"configs/{name}.py:smoke", {"data.batch_size": "8"})
    model = peers.build(peer, config)
    ours = jax.eval_shape(
        lambda: unbox(config.objective.build(config.data.preprocess, "float32").init(jax.random.key(0))[0])
    )
    running = ("running_mean", "running_variance")  # buffers there
    leaves = jax.tree_util.tree_flatten_with_path(ours)[0]
    count = sum(math.prod(x.shape) for path, x in leaves if path[-1].key not in running)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    before = [parameter.detach().clone() for parameter in model.parameters()]
    peers.train_steps(peer, model, config, step.random_batch(config), bfloat16=False, compiled=False)(1)
    moved = sum(bool((a != b).any()) for a, b in zip(before, model.parameters(), strict=True))
    assert moved > 0.9 * len(before)


def test_the_two_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command.benchmark(
        "step", "--config=configs/clip_b32.py:smoke", "--config.data.batch_size=8", "--peer=open_clip", "--rounds=1",
        "--steps=1", f"--json={path}",
    )  # fmt: skip
    figures = json.loads(path.read_text())
    ours, theirs = (figures[name]["seconds_per_step"][0] for name in ("vlm_jax", "open_clip"))
    assert figures["ratio"] == pytest.approx(theirs / ours)
