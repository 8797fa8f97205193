"""Retrieval of an ALBEF in two stages, against its model called with every pair; and its recipes of fine-tuning."""

from pathlib import Path
from typing import Any

import albef_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from retrieval_loops import by_loops

from vlm_jax.assemble import build_run_tokenizer
from vlm_jax.config import load_config
from vlm_jax.data.sources import ShapesConfig
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.retrieval import RetrievalConfig
from vlm_jax.mesh import unbox

CONFIGS = Path(__file__).parents[2] / "configs"
SCENES = ShapesConfig(image_size=16, count=21, max_objects=2, split="test")
LENGTH = 24  # of the longest of their captions, so that no two are equal


def test_it_ranks_by_what_the_model_says_of_pairs() -> None:
    """With everything sharded over eight devices; drawn scenes with one or two captions."""
    sizes = ("objective__text_length", "objective__model__text__positions", "data__tokenizer__length")
    program, source = cases.program(tiny.mesh(2, 2, 2), **dict.fromkeys(sizes, LENGTH)), SCENES.build("")
    objective, tokenizer = program.objective, build_run_tokenizer(program.config, source, None)
    assert tokenizer is not None
    alone = jax.jit(lambda key: unbox(objective.init(key)[0]))(jax.random.key(0))
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), alone, program.setup.abstract.params)
    evaluation = RetrievalConfig("toy", SCENES, captions_per_image=0, pictured=0, rerank=12)
    encoder = MeshEncoder(objective, tokenizer, 16, program.mesh, batch_size=8)
    metrics = evaluation.build(encoder, "").run(params, step=0).metrics
    texts = [(row, text) for row in range(len(source)) for text in source.texts(row)]
    pixels, tokens = np.stack([source[row]["image"] for row in range(len(source))]), tokenizer([t for _, t in texts])
    assert len(np.unique(tokens, axis=0)) == len(tokens)

    @jax.jit
    def all_texts(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = jnp.broadcast_to(image, (len(texts), *image.shape))
        out = objective.outputs(alone, {"image": images, "text": tokens}, intermediates=False)
        return out["matching_logits"], (out["image_features"] * out["text_features"]).sum(axis=-1)

    found = [all_texts(image) for image in pixels]
    scores, cosines = (np.stack([np.asarray(part) for part in parts]) for parts in zip(*found, strict=True))
    expected = by_loops(cosines, scores, np.asarray([row for row, _ in texts]), 12)
    assert {name: metrics[f"retrieval/toy/{name}"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("data", "pairs", "epochs", "candidates"), [("coco", 566_747, 5, 256), ("flickr", 145_000, 10, 128)]
)
def test_the_published_numbers(data: str, pairs: int, epochs: int, candidates: int) -> None:
    config = load_config(f"{CONFIGS}/albef_retrieval_{data}.py")
    objective: Any = config.objective
    evaluation: Any = config.evals[0]
    assert (objective.image_size, objective.text_length, objective.distillation) == (384, 30, 0.4)
    assert (objective.itc_weight, objective.itm_weight, objective.mlm_weight) == (1, 1, 0)
    assert (objective.positives, objective.queue, objective.momentum) == ("image", 65536, 0.995)
    assert (config.data.batch_size, config.data.augment.scale) == (256, (0.5, 1.0))  # pyright: ignore
    assert (evaluation.captions_per_image, evaluation.rerank) == (5, candidates)
    epoch, rates = pairs // 256, config.optimizer
    assert (config.train.steps, objective.distillation_steps) == (epochs * epoch, epoch)
    assert (rates.learning_rate, rates.weight_decay) == (1e-5, 0.02)
    factors = [float(rates.schedule.factor(jnp.int32(step), config.train.steps)) for step in (0, epoch - 1, epoch)]
    assert factors == pytest.approx([1.0, 1.0, 0.1 + 0.45 * (1 + np.cos(np.pi / epochs))])
