"""Small things that several tests train: a CLIP of a few thousand parameters, its batches, and meshes of any shape."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.assemble import Program, build_program
from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.data.text import SentencePieceConfig
from vlm_jax.evals.zero_shot import ZeroShotConfig
from vlm_jax.mesh import AXES, batch_sharding
from vlm_jax.models.text import TextConfig
from vlm_jax.models.two_tower import TwoTowerConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.clip import ClipConfig
from vlm_jax.optim import AdamW
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor virtual devices."""
    count = data * fsdp * tensor
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor, 1), AXES, axis_types=types, devices=jax.devices()[:count])


def config(**overrides: Any) -> Config:
    """CLIP on digits at 8 pixels; overrides are dotted keys with `__` for the dot."""
    model = TwoTowerConfig(
        image=ViTConfig(image_size=8, patch_size=4, width=32, depth=2, heads=4, mlp_dim=64),
        text=TextConfig(vocab_size=320, length=16, width=32, depth=2, heads=4, mlp_dim=64, pool="first_eos", eos_id=1),
        embed_dim=16,
    )
    base = Config(
        name="tiny",
        objective=ClipConfig(model=model),
        data=DataConfig(
            source=DigitsConfig(),
            batch_size=16,
            tokenizer=SentencePieceConfig(length=16, vocab_size=320),
            threads=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1, schedule=Cosine(warmup_steps=2)),
        train=TrainConfig(steps=8, log_every=1, dtype="float32"),
        checkpoint=CheckpointConfig(every=4),
        evals=(ZeroShotConfig("digits", DigitsConfig(split="test"), templates=("digits",), limit=60),),
    )
    return override(base, {key.replace("__", "."): value for key, value in overrides.items()})


def program(mesh_: Mesh | None = None, **overrides: Any) -> Program:
    """The program of `config` on a mesh (default: one device)."""
    return build_program(config(**overrides), mesh_ or mesh())


def batch(mesh_: Mesh, rows: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Random images and texts that end with the end token."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(3, 320, (rows, 16)).astype(np.int32)
    texts[:, -1] = 1
    host = {"image": rng.integers(0, 256, (rows, 8, 8, 3)).astype(np.uint8), "text": texts}
    return {key: jax.device_put(value, batch_sharding(mesh_)) for key, value in host.items()}


def run_steps(program_: Program, count: int = 1, rows: int = 16) -> tuple[Any, list[dict[str, float]]]:
    """(final state, metrics of each step) of `count` steps on batches 0, 1, ..."""
    history = []
    with jax.set_mesh(program_.mesh):
        state = program_.setup.init()
        for index in range(count):
            state, metrics = program_.step(state, batch(program_.mesh, rows, seed=index))
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return state, history


def host(tree: Any) -> Any:
    """Arrays as numpy."""
    return jax.tree.map(np.asarray, tree)


def assert_trees_equal(a: Any, b: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def assert_trees_close(a: Any, b: Any, rtol: float) -> None:
    """Relative to the largest value of each leaf, or to 0.01: leaves without a gradient hold rounding alone."""
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(host(a))[0], jax.tree.leaves(host(b)), strict=True):
        scale = max(float(np.abs(x).max()), 1e-2)
        np.testing.assert_allclose(x / scale, y / scale, atol=rtol, rtol=0, err_msg=jax.tree_util.keystr(path))
