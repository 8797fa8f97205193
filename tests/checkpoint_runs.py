"""States, directories with checkpoints, and ways to damage them, for the tests of checkpoints."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
)

META = {
    "config": {"width": 4, "name": "tiny", "lr": 5e-4},
    "tokenizer": {"kind": "bytes"},
    "preprocess": {"size": 8, "mean": [0.5, 0.25, 0.125]},
}


def make_mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def make_state(devices: int = 8, step: int = 0, ema: bool = False):
    """A state with all that a run has: bf16, scalars, optax's named tuples, empty nodes."""
    rng = np.random.default_rng(step)
    params = {
        "image": {"kernel": rng.normal(size=(16, 4)).astype(np.float32)},
        "text": {"bias": np.ones(8, np.float32)},
    }
    state = {
        "step": np.int32(step),
        "params": params,
        "opt_state": optax.adamw(1e-3, mu_dtype=jnp.bfloat16).init(jax.tree.map(jnp.asarray, params)),
        "extra": {"queue": np.zeros((0, 4), np.float32), "none": {}},
        "ema": jax.tree.map(lambda x: x * 2, params) if ema else {},
    }
    mesh = make_mesh(devices)

    def place(x):
        spec = P("data") if x.ndim and x.size and x.shape[0] % devices == 0 else P()
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def make(tmp_path: Path, **config) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", CheckpointConfig(**{"every": 1, **config}))


def save(checkpointer: Checkpointer, step: int, state=None, **kwargs) -> bool:
    state = make_state(step=step) if state is None else state
    return checkpointer.save(step, state, data_position=step * 32, **{**META, **kwargs})


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def two_steps_in(root: Path) -> Path:
    """A directory with the checkpoints 1 and 2, to be copied and damaged."""
    checkpointer = make(root)
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    return root


def files_of(step_directory: Path) -> list[Path]:
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def data_file(step_directory: Path) -> Path:
    """The file that holds the arrays' bytes."""
    return max((p for p in files_of(step_directory / "state") if "d" in p.parts), key=lambda p: p.stat().st_size)


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(raw))


def damaged_copy(two_steps: Path, tmp_path: Path, name: str) -> Path:
    root = tmp_path / name
    shutil.copytree(two_steps, root)
    return root
