"""Rotary position embeddings (Su et al. 2021): frequencies, stretched to longer contexts or not, and the rotation.

The two halves of a head's channels are the pairs that are turned, as in the released code of Llama and all after it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.mesh import constrain
from vlm_jax.schema import Choice


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, fp32 [B, T, head_dim / 2]; all layers share them."""

    cos: jax.Array
    sin: jax.Array


@dataclasses.dataclass(frozen=True)
class RopeConfig(Choice):
    """Family of frequencies; they agree with transformers' `modeling_rope_utils`."""

    theta: float = 10_000.0  # base: channel pair i of n turns by theta^(-i / n) a token

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The forms by name, which are those of the key `rope_type` in a model's config.json."""
        return {"default": PlainRope, "linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        if self.theta <= 1:
            yield "theta", f"= {self.theta} must be more than 1"
        if vars(self).get("factor", 1.0) < 1:
            yield "factor", f"= {vars(self)['factor']} must be at least 1: it stretches the context"
        if vars(self).get("original_length", 1) < 1:
            yield "original_length", f"= {vars(self)['original_length']} must be at least 1"

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per token of each pair of channels, fp64 [head_dim / 2]."""
        return self.theta ** (-np.arange(0, head_dim, 2) / head_dim)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class PlainRope(RopeConfig):
    """As published."""


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeConfig):
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float = 1.0  # how many times longer than in pre-training a text may be

    def frequencies(self, head_dim: int) -> np.ndarray:
        """See the base."""
        return super().frequencies(head_dim) / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeConfig):
    """Llama 3.1: slow pairs are divided by `factor`, fast ones stay, those between are mixed."""

    factor: float = 8.0  # how many times longer than in pre-training a text may be
    low_freq_factor: float = 1.0  # pairs that turn fewer times in the original length are slow
    high_freq_factor: float = 4.0  # pairs that turn more often are fast
    original_length: int = 8192  # tokens of a text in pre-training

    def problems(self) -> Iterator[tuple[str, str]]:
        """Bounds in the wrong order."""
        yield from super().problems()
        if self.high_freq_factor <= self.low_freq_factor:
            yield "high_freq_factor", f"= {self.high_freq_factor} must exceed low_freq_factor = {self.low_freq_factor}"

    def frequencies(self, head_dim: int) -> np.ndarray:
        """See the base."""
        plain = super().frequencies(head_dim)
        turns = self.original_length * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclasses.dataclass(frozen=True)
class YarnRope(RopeConfig):
    """YaRN (Peng et al. 2023): slow pairs divided by `factor`, fast ones kept, a ramp over the pairs between."""

    factor: float = 4.0  # how many times longer than in pre-training a text may be
    original_length: int = 32_768  # tokens of a text in pre-training
    beta_fast: float = 32.0  # pairs that turn more often in the original length stay
    beta_slow: float = 1.0  # pairs that turn fewer times are divided

    def problems(self) -> Iterator[tuple[str, str]]:
        """Bounds in the wrong order."""
        yield from super().problems()
        if self.beta_fast <= self.beta_slow:
            yield "beta_fast", f"= {self.beta_fast} must exceed beta_slow = {self.beta_slow}"

    @property
    def amplitude(self) -> float:
        """The root of the temperature of attention (paper, eq. 22)."""
        return 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """See the base."""
        plain = super().frequencies(head_dim)
        low = max(math.floor(self._pair(self.beta_fast, head_dim)), 0)
        high = min(math.ceil(self._pair(self.beta_slow, head_dim)), head_dim - 1)
        ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
        divided = np.clip(ramp, 0.0, 1.0)
        return (1 - divided) * plain + divided * plain / self.factor

    def _pair(self, turns: float, head_dim: int) -> float:
        """Which pair turns so often in the original length."""
        return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def rotary(rope: RopeConfig, head_dim: int, positions_BxT: jax.Array) -> Rotary:
    """The angles of tokens at int32 positions."""
    frequencies_F = jnp.asarray(rope.frequencies(head_dim), jnp.float32)
    angles_BxTxF = positions_BxT.astype(jnp.float32)[:, :, None] * frequencies_F[None, None, :]
    angles_BxTxF = constrain(angles_BxTxF, "batch", "length", None)
    return Rotary(jnp.cos(angles_BxTxF) * rope.amplitude, jnp.sin(angles_BxTxF) * rope.amplitude)


def rotate(x_BxTxHxD: jax.Array, angles: Rotary) -> jax.Array:
    """Turns queries or keys by their tokens' angles; in fp32, the result in the dtype of `x`."""
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    cos, sin = (jnp.broadcast_to(part[:, :, None, :], first.shape) for part in angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxHxD.dtype)


__all__ = ["LinearRope", "Llama3Rope", "PlainRope", "RopeConfig", "Rotary", "YarnRope", "rotary", "rotate"]
