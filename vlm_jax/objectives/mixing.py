"""Mixup and CutMix: images of two rows become one, and so do their labels. On the devices, as a part of the step.

The partner of a row is the one half a batch further on, and that one's partner is the row. Gradient accumulation puts
rows j, j + A, j + 2A, ... in microbatch j of A, so a row and its partner are always in the same microbatch, half of it
apart, as long as the number of its rows is even: how the batch is split, or laid over a mesh, changes no pair. (timm
takes the batch in reverse; on shuffled examples both are a random pairing.) The coefficient is one for all rows of a
step, as in timm's mode `batch`, and depends on the step alone.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain
from vlm_jax.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Which mixtures are drawn; one kind a step."""

    # mixup (Zhang et al. 2018): the weight of an image's own pixels is drawn from Beta(mixup, mixup); 0: off
    mixup: float = 0.0
    # CutMix (Yun et al. 2019): a box of the partner, whose share of the area is drawn from Beta(cutmix, cutmix); 0: off
    cutmix: float = 0.0
    # probability of CutMix where both are on
    switch: float = 0.5
    # probability of a step to mix at all
    probability: float = 1.0
    # of the coefficients: they are a function of (this, step)
    seed: int = 0

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and max(self.mixup, self.cutmix) > 0

    def problems(self) -> Iterator[tuple[str, str]]:
        """Numbers out of range."""
        for key in ("mixup", "cutmix"):
            if getattr(self, key) < 0:
                yield key, f"= {getattr(self, key)} must not be negative; 0 switches it off"
        for key in ("switch", "probability"):
            if not 0 <= getattr(self, key) <= 1:
                yield key, f"= {getattr(self, key)} must be a probability in 0..1"


def own_share(config: MixingConfig, step: jax.Array, height: int, width: int) -> jax.Array:
    """fp32 [H, W]: the weight of an image's own pixels at a step, the same for all rows.

    A constant for mixup; for CutMix 0 in the box and 1 around it. The weight of the image's own label is the mean over
    the pixels, so that a box that reaches over the edge counts for what is left of it.
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step), 4)
    mixed = jnp.ones((height, width))
    if config.mixup:
        mixed = jnp.full((height, width), jax.random.beta(keys[0], config.mixup, config.mixup))
    if config.cutmix:
        share = jax.random.beta(keys[1], config.cutmix, config.cutmix)
        rows, columns = jax.random.split(keys[2])
        cut = _outside(rows, share, height)[:, None] | _outside(columns, share, width)[None, :]
        boxed = cut.astype(jnp.float32)
        switch = config.switch if config.mixup else 1.0
        chosen, _ = jax.random.split(keys[3])
        mixed = jnp.where(jax.random.uniform(chosen) < switch, boxed, mixed)
    _, mixing = jax.random.split(keys[3])
    return jnp.where(jax.random.uniform(mixing) < config.probability, mixed, jnp.ones_like(mixed))


def _outside(key: jax.Array, share: jax.Array, size: int) -> jax.Array:
    """bool [size]: the places of one side that don't lie in a box of `1 - share` of the area around a random centre."""
    half = (size * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, size)
    place = jnp.arange(size)
    return (place < centre - half) | (place >= centre + half)


def partners(rows_Bx: jax.Array) -> jax.Array:
    """[B, ...] -> [B, ...]: each row's partner.

    Raises:
        ConfigError: the number of rows is odd.
    """
    rows = rows_Bx.shape[0]
    if rows % 2:
        raise ConfigError(
            f"config.objective.mixing mixes pairs of rows, and a microbatch has {rows}; choose config.data.batch_size "
            "and config.train.accum_steps so that their quotient is even"
        )
    return constrain(jnp.roll(rows_Bx, rows // 2, axis=0), "batch", *[None] * (rows_Bx.ndim - 1))


def mix(own: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
    """`share` of one and the rest of the other; it must have as many axes as they."""
    share = jnp.broadcast_to(share, own.shape)
    return own * share + other * (1.0 - share)


__all__ = ["MixingConfig", "mix", "own_share", "partners"]
