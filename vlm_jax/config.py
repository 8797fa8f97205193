"""The config of a run: what it holds, how a file, overrides and a variant make one, and what must agree in it.

A config file is Python with `get_config(variant: str) -> Config`; `--config=configs/x.py:smoke` passes "smoke".
The machinery of typed trees is `vlm_jax.schema`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm_jax import schema
from vlm_jax.checkpoint import CheckpointConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.evals.base import EvalConfig
from vlm_jax.mesh import MeshConfig
from vlm_jax.models.remat import RematName
from vlm_jax.objectives.base import ObjectiveConfig
from vlm_jax.optim import OptimizerConfig
from vlm_jax.parts import EVERYTHING, Part
from vlm_jax.schema import ConfigError, override
from vlm_jax.warm_start import InitFrom


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000  # optimiser steps of the run; the schedule ends with them
    accum_steps: int = 1  # microbatches per step; changes memory and time, not the gradients
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute dtype; auto: bfloat16 on accelerators
    ema_decay: float | None = None  # of a moving average of the parameters, used in evaluation; None keeps none
    max_nonfinite: int = 10  # steps in a row with a loss or gradient that is not finite, after which the run stops
    log_every: int = 50  # steps between lines of metrics
    eval_every: int = 0  # steps between evaluations; 0: only after the last step
    profile_start: int = 0  # step at which a profile for TensorBoard starts
    profile_steps: int = 0  # steps that it covers; 0: none

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key, least in (("steps", 1), ("accum_steps", 1), ("log_every", 1), ("max_nonfinite", 1)):
            if getattr(self, key) < least:
                yield key, f"= {getattr(self, key)} must be at least {least}"
        for key in ("eval_every", "profile_start", "profile_steps"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative"
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            yield "ema_decay", f"= {self.ema_decay} must lie in [0, 1)"


@dataclasses.dataclass(frozen=True)
class ChipPlan:
    """What `remat = "auto"` stands for on a kind of chip: the recipe's own plan there (docs/planning.md)."""

    name: str  # v4, v5e, v5p, v6e, tpu7x; gpu, cpu
    remat: RematName = "full"  # policy of every stack of blocks whose own is "auto"

    def problems(self) -> Iterator[tuple[str, str]]:
        """A plan that leaves open what it is for."""
        if self.remat == "auto":
            yield "remat", "= 'auto' is what this plan explains; name a policy"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. Saved with every checkpoint."""

    name: str  # of the recipe
    objective: ObjectiveConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    seed: int = 0  # of initial weights, data order, augmentation and dropout
    parts: tuple[Part, ...] = EVERYTHING
    mesh: MeshConfig = MeshConfig()
    chips: tuple[ChipPlan, ...] = ()  # what `remat = "auto"` means on each; elsewhere "full", on CPUs "none"
    checkpoint: CheckpointConfig = CheckpointConfig()
    init_from: InitFrom = InitFrom()
    evals: tuple[EvalConfig, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """What must agree between the groups."""
        yield from self.objective.data_problems(self.data)
        for name in ("schedule", "decay_schedule"):
            for key, sentence in getattr(self.optimizer, name).length_problems(self.train.steps):
                yield f"optimizer.{name}.{key}", sentence
        if self.data.batch_size % self.train.accum_steps:
            yield (
                "train.accum_steps",
                f"= {self.train.accum_steps} does not divide config.data.batch_size = {self.data.batch_size}",
            )
        names = [(entry.kind(), entry.name) for entry in self.evals]
        for kind, name in names:
            if names.count((kind, name)) > 1:
                yield "evals", f"has two {kind} evaluations named {name!r}; give each its own name"

    def on_chip(self, chip: str) -> "Config":
        """The config with every `remat = "auto"` resolved for a chip by `vlm_jax.flops.chip_name`."""
        plans = {plan.name: plan.remat for plan in self.chips}
        policy = plans.get(chip, "none" if chip == "cpu" else "full")
        changes = {
            key.removeprefix("config."): policy
            for key, value in schema.leaves(self.objective, "config.objective")
            if key.endswith(".remat") and value == "auto"
        }
        return override(self, changes)

    def check_devices(self, devices: int) -> None:
        """Raises `ConfigError` when batch and mesh don't fit `devices` devices; before anything is compiled."""
        data, fsdp, _, _ = self.mesh.sizes(devices)
        micro = self.data.batch_size // self.train.accum_steps
        if micro % (data * fsdp):
            what = "" if self.train.accum_steps == 1 else f" / config.train.accum_steps = {self.train.accum_steps}"
            step = data * fsdp * self.train.accum_steps
            near = sorted({max(step, self.data.batch_size // step * step), (self.data.batch_size // step + 1) * step})
            raise ConfigError(
                f"config.data.batch_size = {self.data.batch_size}{what} is not divisible by the mesh's data x fsdp = "
                f"{data} x {fsdp}; the nearest that are: {', '.join(map(str, near))}"
            )

    def compute_dtype(self, platform: str | None = None) -> Any:
        """The dtype of activations on a platform ("cpu", "gpu", "tpu"); None: on this machine's devices."""
        if self.train.dtype == "auto":
            return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
        return jnp.dtype(self.train.dtype)


def load_config(reference: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The validated config of `path.py` or `path.py:variant`, with dotted overrides applied.

    Raises:
        ConfigError: no such file, a file that fails or returns no config, or anything that `schema` objects to.
    """
    path, _, variant = reference.partition(":")
    module = config_module(Path(path))
    with _sentences(path):
        made = module.get_config(variant)
    if not isinstance(made, Config):
        raise ConfigError(f"config file {path}: get_config must return a vlm_jax.config.Config, not {made!r:.60}")
    # Through plain data: a file that builds dataclasses by hand is then checked for types like any override.
    config = override(schema.from_dict(Config, schema.to_dict(made)), overrides or {})
    schema.validate(config)
    return config


@contextlib.contextmanager
def _sentences(path: str | Path) -> Iterator[None]:
    """A mistake in a config file's own Python as one sentence with its line."""
    try:
        yield
    except (TypeError, AttributeError, NameError, ImportError, SyntaxError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if Path(f.filename).name == Path(path).name), None)
        where = f"{path}, line {line}" if line else str(path)
        raise ConfigError(f"config file {where}: {type(error).__name__}: {error}") from error


def config_module(path: Path) -> Any:
    """A config file as a module; a recipe that varies another one starts from that one's `get_config()`."""
    if not path.is_file():
        siblings = sorted(p.as_posix() for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist; {path.parent} holds {', '.join(siblings) or 'none'}")
    spec = importlib.util.spec_from_file_location(f"vlm_jax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _sentences(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {path} defines no get_config(variant); see configs/clip_digits.py")
    return module


def variant(config: Config, name: str, variants: Mapping[str, Mapping[str, Any]]) -> Config:
    """`config` itself for the name "", else with the overrides of the named variant.

    Raises:
        ConfigError: an unknown name; lists the known ones.
    """
    if not name:
        return config
    if name not in variants:
        raise ConfigError(f"config {config.name} has no variant {name!r}; it has: {', '.join(variants)}")
    return override(dataclasses.replace(config, name=f"{config.name}_{name}"), variants[name])


def from_json(data: Mapping[str, Any]) -> Config:
    """The config that was saved with a checkpoint."""
    return schema.from_dict(Config, data)


def to_json(config: Config) -> dict[str, Any]:
    """Plain data for a checkpoint; the inverse of `from_json`."""
    return json.loads(json.dumps(schema.to_dict(config)))


# What may change between the starts of one run without making it another run: where and how fast it runs, what it
# reports and keeps. Everything else decides the numbers.
_FREE = (
    "mesh",
    "chips",
    "evals",
    "checkpoint",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.bad_record_budget",
)
_FREE_TRAIN = (
    "train.log_every",
    "train.eval_every",
    "train.profile_start",
    "train.profile_steps",
    "train.max_nonfinite",
    "train.accum_steps",
)
# Wherever they stand: what is recomputed and which form of the same attention runs.
_FREE_ANYWHERE = (".remat", ".scan", ".attention_impl")


def check_same_run(saved: Mapping[str, Any], config: Config, workdir: str) -> None:
    """Raises `ConfigError`, listing every difference, when a workdir belongs to a run of another config.

    Keys that came after the run was begun count as their defaults, with which it was made.
    """
    with contextlib.suppress(ConfigError):  # of keys that are gone, which the comparison then names
        saved = to_json(from_json(saved))
    lines = [line for line in schema.differences(saved, to_json(config)) if not _is_free(line.partition(":")[0])]
    if lines:
        raise ConfigError(
            f"workdir {workdir} belongs to a run of another config; give another --workdir, or the old values "
            "(saved -> now):\n  " + "\n  ".join(lines)
        )


def _is_free(key: str) -> bool:
    free = tuple(f"config.{name}" for name in (*_FREE, *_FREE_TRAIN))
    return key in free or key.startswith(tuple(f"{name}." for name in free)) or key.endswith(_FREE_ANYWHERE)
