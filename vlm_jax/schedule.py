"""Learning-rate schedules as factors in [0, 1] of the peak, functions of the step and the run's length alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.schema import Choice


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Choice):
    """Family of schedules; all rise linearly for `warmup_steps` first: (step + 1) / warmup_steps."""

    warmup_steps: int = 0  # steps of linear rise to the peak

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The schedules by name."""
        return {"cosine": Cosine, "linear": Linear, "rsqrt": Rsqrt, "constant": Constant}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Lengths out of range."""
        if self.warmup_steps < 0:
            yield "warmup_steps", f"= {self.warmup_steps} must not be negative"

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
