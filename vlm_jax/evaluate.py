"""Evaluation of parameters: inside training, and alone on a checkpoint (`--mode=eval`)."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vlm_jax.assemble import build_evaluators, index_directory, open_checkpoint
from vlm_jax.checkpoint import read_checkpoint_meta
from vlm_jax.config import Config, from_json
from vlm_jax.evals.base import Evaluator
from vlm_jax.evals.benchmark_json import BenchmarkEntry, write_benchmark
from vlm_jax.mesh import make_mesh
from vlm_jax.metrics import MetricWriter, write_json
from vlm_jax.schema import ConfigError, override, validate


def evaluate(
    evaluators: Sequence[Evaluator],
    params: Any,
    step: int,
    writer: MetricWriter,
    report: Callable[[BenchmarkEntry], None] | None = None,
) -> dict[str, float]:
    """Runs evaluators one after the other; their numbers, pictures and texts go to the writer, entries to `report`.

    Returns:
        The numbers.
    """
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        result = evaluator.run(params, step)
        metrics |= result.metrics
        for name, image in result.images.items():
            writer.image(step, name, image)
        for name, text in result.texts.items():
            writer.text(step, name, text)
        for name, lines in result.predictions.items():
            writer.predictions(step, name, lines)
        if report is not None and result.benchmark is not None:
            report(result.benchmark)
    writer.scalars(step, metrics)
    return metrics


def evaluate_checkpoint(
    checkpoint: str, workdir: str, overrides: dict[str, Any], config: Config | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint by its own config, tokenizer and preprocessing.

    Args:
        checkpoint: a workdir, one of its step directories, or an imported checkpoint.
        workdir: where `eval.json`, `benchmark/*.json`, metrics and pictures go.
        overrides: dotted keys to change in the saved config: `mesh`, `evals`, `data.batch_size`, ...
        config: replaces the evaluations (and nothing else) of the saved config by its own.

    Raises:
        ConfigError: the config names no evaluation, or asks for what the checkpoint's model can't do.
        CheckpointError: no usable checkpoint there.
    """
    if config is not None:
        overrides = {"evals": config.evals} | overrides
    # The mesh is part of what the overrides may change, so it is read before the parameters are.
    saved = override(from_json(read_checkpoint_meta(checkpoint)["config"]), overrides)
    if not saved.evals:
        raise ConfigError("config.evals is empty: there is nothing to evaluate; name evaluations in the config file")
    validate(saved)
    mesh = make_mesh(saved.mesh)
    is_primary = jax.process_index() == 0

    def report(entry: BenchmarkEntry) -> None:
        if is_primary:
            write_benchmark(workdir, entry, saved.name, str(checkpoint))

    with jax.set_mesh(mesh):
        restored = open_checkpoint(checkpoint, mesh, overrides)
        writer = MetricWriter(workdir, is_primary=is_primary)
        evaluators = build_evaluators(saved, restored.objective, restored.tokenizer, mesh, index_directory(workdir))
        metrics = evaluate([evaluator for _, evaluator in evaluators], restored.params, restored.step, writer, report)
        writer.close()
    if is_primary:
        write_json(os.path.join(workdir, "eval.json"), {"step": restored.step, **metrics})
    return metrics
