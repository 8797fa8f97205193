"""An ALBEF of a few thousand parameters, and its batches."""

from typing import Any

import jax
import numpy as np
import tiny
from jax.sharding import Mesh

from vlm_jax.assemble import Program, build_program
from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.config import Config, TrainConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.data.text import ALBEF_TOKENIZER
from vlm_jax.losses.masked_words import WordMaskConfig
from vlm_jax.mesh import batch_sharding
from vlm_jax.models.albef import AlbefModelConfig, deit_b16
from vlm_jax.models.bert import TextEncoderConfig, TextStackConfig
from vlm_jax.objectives.albef import AlbefConfig
from vlm_jax.optim import AdamW
from vlm_jax.schedule import Constant
from vlm_jax.schema import override

ROWS, LENGTH, VOCABULARY, QUEUE = 16, 8, 64, 24


def config(**overrides: Any) -> Config:
    """Images of 16 pixels, texts of eight tokens of 64; overrides with `__` for the dot."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    model = AlbefModelConfig(
        image=override(deit_b16(16), {**sizes, "patch_size": 8, "drop_path": 0.2}),
        text=TextEncoderConfig(**sizes, vocab_size=VOCABULARY, positions=LENGTH),
        fusion=TextStackConfig(**sizes | {"width": 24}, cross_every=1),
        embed_dim=8,
    )
    base = Config(
        name="tiny_albef",
        objective=AlbefConfig(
            model=model,
            text_length=LENGTH,
            hidden_words=WordMaskConfig(probability=0.4, mask_id=4, spared_ids=(0, 2)),
            queue=QUEUE,
            positives="image_or_caption",
        ),
        data=DataConfig(
            source=ShapesConfig(image_size=16, count=64),
            batch_size=ROWS,
            augment=None,
            tokenizer=override(ALBEF_TOKENIZER, {"length": LENGTH, "vocab_size": VOCABULARY}),
            threads=1,
        ),
        # As in test_step: with this eps Adam's updates stay proportional to the gradient.
        optimizer=AdamW(learning_rate=0.1, eps=0.01, schedule=Constant()),
        train=TrainConfig(steps=8, log_every=1, dtype="float32"),
        checkpoint=CheckpointConfig(every=4),
    )
    return override(base, {key.replace("__", "."): value for key, value in overrides.items()})


def program(mesh: Mesh | None = None, **overrides: Any) -> Program:
    """The program of `config` on a mesh (default: one device)."""
    return build_program(config(**overrides), mesh or tiny.mesh())


def host_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Coloured squares and random texts of three to eight tokens; rows 0 and 1 are of one image, 2 and 3 share a text.

    Of the batch of the next seed row 5 is of the same image.
    """
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 256, (rows, 2, 2, 3)).astype(np.uint8)
    texts = rng.integers(5, VOCABULARY, (rows, LENGTH)).astype(np.int32)
    texts[:, 0] = 2
    for row in texts:
        row[rng.integers(3, LENGTH + 1) :] = 0
    identity = (1000 * seed + np.arange(2 * rows).reshape(rows, 2)).astype(np.int32)
    squares[1], identity[1, 0] = squares[0], identity[0, 0]
    texts[3], identity[3, 1] = texts[2], identity[2, 1]
    identity[5, 0] = 7
    return {"image": squares.repeat(8, axis=1).repeat(8, axis=2), "text": texts, "identity": identity}


def batch(mesh: Mesh, seed: int = 0) -> dict[str, jax.Array]:
    """`host_batch` on a mesh."""
    return {key: jax.device_put(value, batch_sharding(mesh)) for key, value in host_batch(seed).items()}


def run_steps(program_: Program, count: int = 2) -> tuple[Any, list[dict[str, float]]]:
    """(final state, metrics of each step) of `count` steps on batches 0, 1, ..."""
    history = []
    with jax.set_mesh(program_.mesh):
        state = program_.setup.init()
        for index in range(count):
            state, metrics = program_.step(state, batch(program_.mesh, seed=index))
            history.append({name: float(total) / float(n) for name, (total, n) in metrics.items()})
    return state, history
