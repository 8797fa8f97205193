"""From a config to the parts of a run: mesh, tokenizer, objective, state, step. Training, evaluation and planning
build them here, so that what is planned or evaluated is what is trained.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_jax.checkpoint import read_checkpoint_meta, read_params
from vlm_jax.config import Config, from_json
from vlm_jax.data.captions import captions
from vlm_jax.data.sources import Source
from vlm_jax.data.text import SentencePieceConfig, Tokenizer, WordPieceConfig, build_tokenizer
from vlm_jax.evals.base import Evaluator
from vlm_jax.evals.encoder import MeshEncoder
from vlm_jax.evals.held_out import HeldOut
from vlm_jax.flops import chip_name
from vlm_jax.mesh import batch_sharding, make_mesh, shardings
from vlm_jax.objectives.base import ModelObjective, ObjectiveConfig
from vlm_jax.schema import ConfigError, override
from vlm_jax.step import Setup, StepFunction, make_setup, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config means on a mesh; no array exists yet.

    Attributes:
        config: the resolved config.
        mesh: the devices.
        objective: the method and its model.
        setup: shapes, shardings, parts, optimiser and initial state.
        steps: (first step, jitted train step from there on), one for each phase of the method.
    """

    config: Config
    mesh: Mesh
    objective: ModelObjective
    setup: Setup
    steps: tuple[tuple[int, StepFunction], ...]

    @property
    def methods(self) -> tuple[ObjectiveConfig, ...]:
        """The method of each phase, as `steps`."""
        return tuple(method for _, method in self.config.objective.phases(self.config.train.steps))

    def phase_at(self, index: int) -> int:
        """Which phase makes step `index` of the run."""
        return max(phase for phase, (first, _) in enumerate(self.steps) if index >= first)

    def batch_shapes(self, phase: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a phase's global batch."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in self.methods[phase].batch_shapes(self.config.data.batch_size).items()
        }

    def trace(self, phase: int) -> Any:
        """A phase's step as `jax.stages.Traced`, from shapes alone: what training runs and what is planned."""
        with jax.set_mesh(self.mesh):
            step: Any = self.steps[phase][1]
            return step.trace(self.setup.abstract, self.batch_shapes(phase))

    @property
    def step(self) -> StepFunction:
        """The train step of the first phase."""
        return self.steps[0][1]


def build_program(config: Config, mesh: Mesh | None = None) -> Program:
    """Resolves a config on a mesh (default: its own over all devices); raises `ConfigError` before any compile."""
    if mesh is None:
        config.check_devices(jax.device_count())
        mesh = make_mesh(config.mesh)
    device = mesh.devices.flat[0]
    dtype = config.compute_dtype(device.platform)
    config = config.on_chip(chip_name(device))
    phases = [
        (first, phase.build(config.data.preprocess, dtype))
        for first, phase in config.objective.phases(config.train.steps)
    ]
    objective = phases[0][1]
    setup = make_setup(
        objective,
        config.optimizer,
        config.parts,
        mesh,
        total_steps=config.train.steps,
        seed=config.seed,
        ema=config.train.ema_decay is not None,
    )
    step = functools.partial(
        make_train_step,
        optimizer=setup.optimizer,
        parts=setup.parts,
        mesh=mesh,
        accum_steps=config.train.accum_steps,
        seed=config.seed,
        ema_decay=config.train.ema_decay,
        state_shardings=jax.tree.map(lambda x: x.sharding, setup.abstract),
    )
    return Program(config, mesh, objective, setup, tuple((first, step(phase)) for first, phase in phases))


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's model without the rest of the training state.

    Attributes:
        config: that of the checkpoint, with overrides.
        objective: the method and its model.
        params: nested dict of fp32 arrays; the moving average where the run kept one.
        tokenizer: that of the checkpoint; None for a model without text.
        step: optimiser steps that the parameters have seen.
    """

    config: Config
    objective: ModelObjective
    params: Any
    tokenizer: Tokenizer | None
    step: int


def open_checkpoint(
    path: str | os.PathLike[str], mesh: Mesh | None, overrides: Mapping[str, Any] | None = None
) -> Restored:
    """The model of a checkpoint, built from the config that lies in it.

    Args:
        path: a workdir (its newest checkpoint), a step directory, or an imported checkpoint.
        mesh: where the parameters shall lie, sharded as in training; None: whole on one device.
        overrides: dotted keys to change in the saved config.

    Raises:
        CheckpointError: there is no usable checkpoint.
        ConfigError: the overrides don't fit the saved config.
    """
    meta = read_checkpoint_meta(path)
    config = override(from_json(meta["config"]), overrides or {})
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    objective = config.objective.build(config.data.preprocess, config.compute_dtype(platform))
    placement = None
    if mesh is not None:
        placement = shardings(jax.eval_shape(lambda: objective.init(jax.random.key(0))[0]), mesh)
    params, _ = read_params(path, shardings=placement)
    tokenizer = None if meta["tokenizer"] is None else Tokenizer.from_state(meta["tokenizer"])
    return Restored(config, objective, params, tokenizer, int(meta.get("step", 0)))


def build_run_tokenizer(config: Config, source: Source, saved: Mapping[str, Any] | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint if there is one, else that of the config; checked against the model.

    With `init_from.tokenizer` that of the checkpoint that the parameters come from. None for a method on images alone.
    A SentencePiece model without a path is trained from the captions of the source; it is a pure function of them.
    """
    if not config.objective.reads_text:
        return None
    if saved is None and config.init_from.tokenizer:
        saved = read_checkpoint_meta(config.init_from.path)["tokenizer"]
        if saved is None:
            raise ConfigError(
                f"config.init_from.tokenizer = true, but {config.init_from.path} holds no tokenizer; set it to false"
            )
    if saved is not None:
        tokenizer = Tokenizer.from_state(saved)
    else:
        settings = config.data.tokenizer
        trained_here = isinstance(settings, SentencePieceConfig | WordPieceConfig) and not settings.path
        tokenizer = build_tokenizer(settings, captions(source) if trained_here else None)
    config.objective.check_tokenizer(tokenizer)
    return tokenizer


def build_encoder(
    config: Config, objective: ModelObjective, tokenizer: Tokenizer | None, mesh: Mesh, cache_dir: str
) -> MeshEncoder:
    """The model as evaluations see it."""
    method, dtype = config.objective.without_dropping(), config.compute_dtype(mesh.devices.flat[0].platform)
    plain_views = dataclasses.replace(config.data, augment=None)
    held_out = HeldOut(
        method.build(config.data.preprocess, dtype),
        config.objective.make_example(tokenizer, plain_views),
        lambda source: config.objective.arrange(source, tokenizer, plain_views, cache_dir),
    )
    return MeshEncoder(objective, tokenizer, config.objective.image_size, mesh, config.data.batch_size, held_out)


def build_evaluators(
    config: Config, objective: ModelObjective, tokenizer: Tokenizer | None, mesh: Mesh, cache_dir: str
) -> list[tuple[int, Evaluator]]:
    """(every, evaluator) of each evaluation of the config; `every` = 0: whenever the loop evaluates."""
    encoder = build_encoder(config, objective, tokenizer, mesh, cache_dir)
    return [(entry.every, entry.build(encoder, cache_dir)) for entry in config.evals]


def index_directory(workdir: str) -> str:
    """Where a run keeps the indices of shards whose own folders can't be written."""
    return os.path.join(workdir, "index")
