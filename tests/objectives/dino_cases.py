"""A DINOv2 of a few thousand parameters, and its batches."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import tiny
from jax.sharding import Mesh

from vlm_jax.assemble import Program, build_program
from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig
from vlm_jax.data.multi_crop import MultiCropConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import DigitsConfig
from vlm_jax.evals.knn import KnnConfig
from vlm_jax.mesh import batch_sharding, tree_path
from vlm_jax.models.dino import DinoModelConfig, PrototypeHeadConfig
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.dino import DinoConfig
from vlm_jax.optim import AdamW
from vlm_jax.parts import Part
from vlm_jax.schedule import Cosine
from vlm_jax.schema import override

ROWS = 16


def config(**overrides: Any) -> Config:
    """DINOv2 on digits: global views of 16 pixels, three local ones of 8; overrides with `__` for the dot."""
    image = ViTConfig(
        image_size=16, patch_size=4, width=32, depth=2, heads=4, mlp_dim=64, norm_eps=1e-6, layer_scale_init=1.0,
        activation="gelu", pos_resize="bicubic_offset", mask_token=True, pre_norm=False, patch_bias=True, init="mae",
    )  # fmt: skip
    head = PrototypeHeadConfig(hidden=24, bottleneck=8, prototypes=32)
    base = Config(
        name="tiny_dino",
        objective=DinoConfig(
            model=DinoModelConfig(image, dino_head=head, ibot_head=head),
            views=MultiCropConfig(local_views=3, local_size=8),
            teacher_temperature_steps=4,
        ),
        data=DataConfig(source=DigitsConfig(), batch_size=ROWS, augment=None, threads=1),
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.04, schedule=Cosine(warmup_steps=2)),
        parts=(Part("last", ".*_head/last/.*"), Part("rest", ".*")),
        train=TrainConfig(steps=8, log_every=1, dtype="float32"),
        checkpoint=CheckpointConfig(every=4),
        evals=(KnnConfig("digits", DigitsConfig(split="test"), train_source=DigitsConfig(split="train"), limit=60),),
    )
    return override(base, {key.replace("__", "."): value for key, value in overrides.items()})


def program(mesh: Mesh | None = None, **overrides: Any) -> Program:
    """The program of `config` on a mesh (default: one device)."""
    return build_program(config(**overrides), mesh or tiny.mesh())


def batch(mesh: Mesh, seed: int = 0) -> dict[str, jax.Array]:
    """Views of random coloured squares, far from each other, and masked patches of one global view of each row."""
    rng = np.random.default_rng(seed)
    shapes = config().objective.batch_shapes(ROWS)
    host = {}
    for name in ("global_views", "local_views"):
        rows, views, side, _, channels = shapes[name].shape
        squares = rng.integers(0, 256, (rows, views, 2, 2, channels)).astype(np.uint8)
        host[name] = squares.repeat(side // 2, axis=2).repeat(side // 2, axis=3)
    masked = np.full(shapes["masked"].shape, -1, np.int32)
    for row in masked:
        count = rng.integers(1, len(row) + 1)
        row[:count] = 16 * rng.integers(2) + np.sort(rng.permutation(16)[:count])
    host["masked"] = masked
    return {key: jax.device_put(value, batch_sharding(mesh)) for key, value in host.items()}


def first_state(program_: Program) -> Any:
    """The initial state with heads of wider spread: at these widths 0.02 leaves points that are mostly rounding."""
    state = program_.setup.init()

    def wider(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf * 10 if re.search(r"_head/fc./kernel$", tree_path(path)) else leaf

    params = jax.tree_util.tree_map_with_path(wider, state.params)
    return dataclasses.replace(state, params=params, extra=program_.objective.begin(state.extra, params))


def run_steps(program_: Program, count: int = 1) -> tuple[Any, list[dict[str, float]]]:
    """(final state, metrics of each step) of `count` steps on batches 0, 1, ..."""
    history = []
    with jax.set_mesh(program_.mesh):
        state = first_state(program_)
        for index in range(count):
            state, metrics = program_.step(state, batch(program_.mesh, seed=index))
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return state, history
