"""Schedules of learning rate and weight decay as factors of the peak, functions of step and the run's length alone.

What else changes between the phases of a run (dropped patches) is the method's: `ObjectiveConfig.phases`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.schema import Choice, ConfigError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Choice):
    """Family of schedules; all rise linearly for `warmup_steps` first: (step + 1) / warmup_steps."""

    warmup_steps: int = 0  # steps of linear rise to the peak

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The schedules by name."""
        return {
            "cosine": Cosine,
            "linear": Linear,
            "rsqrt": Rsqrt,
            "constant": Constant,
            "phases": Phases,
            "epoch_cosine": EpochCosine,
        }

    def problems(self) -> Iterator[tuple[str, str]]:
        """Lengths out of range."""
        if self.warmup_steps < 0:
            yield "warmup_steps", f"= {self.warmup_steps} must not be negative"

    def length_problems(self, total: int) -> Iterator[tuple[str, str]]:
        """What doesn't fit a run of `total` steps: (key, sentence)."""
        yield from ()

    def factor(self, step: jax.Array, total: int) -> jax.Array:
        """The factor at `step` () int32 of a run of `total` steps, fp32."""
        step_f = jnp.asarray(step, jnp.float32)
        value = self.after_warmup(step_f, float(total))
        if not self.warmup_steps:
            return value
        return jnp.where(step_f < self.warmup_steps, (step_f + 1) / self.warmup_steps, value)

    def after_warmup(self, step: jax.Array, total: float) -> jax.Array:
        """The factor once the warm-up is over."""
        raise TypeError(f"{type(self).__name__} is a family of schedules; use one of {', '.join(self.kinds())}")

    def _progress(self, step: jax.Array, total: float) -> jax.Array:
        """0 at the end of the warm-up, 1 at the end of the run."""
        return jnp.clip((step - self.warmup_steps) / max(total - self.warmup_steps, 1.0), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Cosine(ScheduleConfig):
    """Half a cosine from the peak to `final` at the last step (Loshchilov & Hutter 2017; CLIP, section 2.5)."""

    final: float = 0.0  # factor at the end

    def after_warmup(self, step: jax.Array, total: float) -> jax.Array:
        """See the class."""
        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * self._progress(step, total)))


@dataclasses.dataclass(frozen=True)
class Linear(ScheduleConfig):
    """A straight line from the peak to `final` at the last step."""

    final: float = 0.0  # factor at the end

    def after_warmup(self, step: jax.Array, total: float) -> jax.Array:
        """See the class."""
        return 1 - (1 - self.final) * self._progress(step, total)


@dataclasses.dataclass(frozen=True)
class Rsqrt(ScheduleConfig):
    """Reciprocal square root with a linear cool-down to zero (Zhai et al. 2022, Scaling ViT, section 3.5)."""

    timescale: int = 10_000  # steps after which the factor starts to fall noticeably
    cooldown_steps: int = 0  # last steps of the run, in which the factor falls to zero

    def problems(self) -> Iterator[tuple[str, str]]:
        """Lengths out of range."""
        yield from super().problems()
        if self.timescale < 1:
            yield "timescale", f"= {self.timescale} must be at least 1 step"
        if self.cooldown_steps < 0:
            yield "cooldown_steps", f"= {self.cooldown_steps} must not be negative"

    def after_warmup(self, step: jax.Array, total: float) -> jax.Array:
        """See the class."""
        value = jax.lax.rsqrt(1 + jnp.maximum(step - self.warmup_steps, 0.0) / self.timescale)
        if not self.cooldown_steps:
            return value
        return value * jnp.clip((total - step) / self.cooldown_steps, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Constant(ScheduleConfig):
    """The peak, after the warm-up."""

    cooldown_steps: int = 0  # last steps of the run, in which the factor falls linearly to zero

    def after_warmup(self, step: jax.Array, total: float) -> jax.Array:
        """See the class."""
        if not self.cooldown_steps:
            return jnp.ones_like(step)
        return jnp.clip((total - step) / self.cooldown_steps, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class EpochCosine(ScheduleConfig):
    """Half a cosine from the peak to `final` that moves once an epoch; the warm-up rises in stairs (ALBEF, timm).

    Epoch e of n has the factor final + (1 - final) (1 + cos(pi e / n)) / 2, so that the last one is not quite at
    `final`. In the warm-up, within the first epoch, the factor rises from `warmup_start` by a stair each `warmup_stair`
    steps.
    """

    epoch_steps: int = 1  # steps of an epoch
    final: float = 0.1  # factor where the cosine would end
    warmup_stair: int = 100  # steps of a stair of the warm-up
    warmup_start: float | None = None  # factor where the warm-up begins; None: `final`

    def problems(self) -> Iterator[tuple[str, str]]:
        """Lengths out of range."""
        yield from super().problems()
        for key in ("epoch_steps", "warmup_stair"):
            if getattr(self, key) < 1:
                yield key, f"= {getattr(self, key)} must be at least 1 step"
        if self.warmup_start is not None and not self.warmup_steps:
            yield "warmup_start", f"= {self.warmup_start} has no effect without a warm-up; set warmup_steps"

    def factor(self, step: jax.Array, total: int) -> jax.Array:
        """See the base."""
        step_f = jnp.asarray(step, jnp.float32)
        epochs = max(total / self.epoch_steps, 1.0)
        progress = jnp.clip(jnp.floor(step_f / self.epoch_steps) / epochs, 0.0, 1.0)
        value = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if not self.warmup_steps:
            return value
        climbed = jnp.floor(step_f / self.warmup_stair) * self.warmup_stair / self.warmup_steps
        start = self.final if self.warmup_start is None else self.warmup_start
        return jnp.where(step_f < self.warmup_steps, start + (1 - start) * climbed, value)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run with a schedule of its own."""

    name: str  # stands in messages and in overrides (config.optimizer.schedule.phases.NAME.peak=0.1)
    schedule: ScheduleConfig = Cosine()  # over the steps of this phase, its warm-up included
    steps: int = 0  # length; 0: what the other phases leave of the run
    peak: float = 1.0  # peak of this phase, as a factor on the optimiser's learning rate

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        if self.steps < 0:
            yield "steps", f"= {self.steps} must not be negative; 0 takes what the other phases leave"
        if not 0 < self.peak <= 1:
            yield (
                "peak",
                f"= {self.peak} must lie in (0, 1]; optimizer.learning_rate is the largest of all phases",
            )


@dataclasses.dataclass(frozen=True)
class Phases(ScheduleConfig):
    """Several schedules, one after the other: pre-training, then a tuning with its own warm-up and peak (FLIP)."""

    phases: tuple[Phase, ...] = ()  # in order

    def problems(self) -> Iterator[tuple[str, str]]:
        """Phases that can't be told apart or have no length, and a warm-up beside theirs."""
        names = [phase.name for phase in self.phases]
        if not names:
            yield "phases", "is empty; give the phases, or use one schedule for the whole run"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield "phases", f"has two phases named {name!r}; give each its own name"
        if sum(phase.steps == 0 for phase in self.phases) > 1:
            yield "phases", "has several phases with steps = 0, which takes what is left of the run; only one can"
        if self.warmup_steps:
            yield (
                "warmup_steps",
                f"= {self.warmup_steps} has no effect: every phase has its own; set it to 0",
            )

    def length_problems(self, total: int) -> Iterator[tuple[str, str]]:
        """Phases that don't add up to the run, and what doesn't fit a phase."""
        fixed = sum(phase.steps for phase in self.phases)
        lengths = ", ".join(f"{phase.name} {phase.steps}" for phase in self.phases if phase.steps)
        rest = next((phase.name for phase in self.phases if not phase.steps), None)
        if rest is not None and fixed >= total:
            yield "phases", f"leaves no step for {rest!r}: {lengths} of a run of {total}; shorten them or train longer"
        elif rest is None and fixed != total:
            yield (
                "phases",
                f"takes {fixed} steps ({lengths}) of a run of {total}; set one phase's steps = 0, the rest of the run, "
                "or train.steps to their sum",
            )
        else:
            for _, length, phase in self._spans(total):
                if phase.schedule.warmup_steps >= length:
                    yield (
                        f"phases.{phase.name}.schedule.warmup_steps",
                        f"= {phase.schedule.warmup_steps} must be less than the {length} steps of the phase",
                    )
                for key, sentence in phase.schedule.length_problems(length):
                    yield f"phases.{phase.name}.schedule.{key}", sentence

    def factor(self, step: jax.Array, total: int) -> jax.Array:
        """The factor at `step` of a run of `total` steps: that of the phase it lies in; after the last, its end."""
        for key, sentence in self.length_problems(total):
            raise ConfigError(f"schedule {key} {sentence}")
        value = jnp.zeros(jnp.shape(step), jnp.float32)
        for start, length, phase in self._spans(total):
            value = jnp.where(step >= start, phase.peak * phase.schedule.factor(step - start, length), value)
        return value

    def _spans(self, total: int) -> Iterator[tuple[int, int, Phase]]:
        """(first step, length, phase) of each phase."""
        start, rest = 0, total - sum(phase.steps for phase in self.phases)
        for phase in self.phases:
            length = phase.steps or rest
            yield start, length, phase
            start += length
