"""Which patches a model sees and which it predicts: autoregression in some order, or masked modelling.

AIM's loss and its ablations (El-Nouby et al. 2024, section 4.2 and tables 3 and 5), and AIMv2's part on images. What
is predicted of a patch is the objectives' business.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.losses.pixels import predicted_images
from vlm_jax.mesh import constrain
from vlm_jax.models.vit import ViTConfig
from vlm_jax.objectives.images import pictures
from vlm_jax.schema import Choice

OrderName = Literal["raster", "spiral", "checkerboard", "random"]


class Plan(NamedTuple):
    """What is hidden in a batch.

    Attributes:
        goals: int [N], the patch that the output at each patch predicts.
        predicted: bool [B, N], True for the outputs that count.
        masked: bool [B, N], the patches that the mask token stands for; None: the model sees all.
        attention_mask: bool [B or 1, 1, N, N], True where attention is allowed; None: nothing is masked.
        causal: whether attention is causal in raster order.
    """

    goals: np.ndarray
    predicted: jax.Array
    masked: jax.Array | None = None
    attention_mask: jax.Array | None = None
    causal: bool = False

    def in_place(self, outputs_BxN: jax.Array) -> jax.Array:
        """[B, N, ...] at the patches that predict -> [B, N, ...] at those that are predicted."""
        return outputs_BxN[:, np.argsort(self.goals)]


@dataclasses.dataclass(frozen=True)
class PatchPrediction(Choice):
    """Family of ways to hide patches and to predict them."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The ways by name."""
        return {"autoregressive": Autoregression, "masked": MaskedModelling}

    @property
    def mask_token(self) -> bool:
        """Whether the tower needs a token for masked patches."""
        return False

    def plan(self, keys: jax.Array | None, rows: int, grid: tuple[int, int]) -> Plan:
        """What is hidden in a batch.

        Args:
            keys: [B] typed keys, one a row; None, in evaluation, hides the same in every row, at every step.
            rows: B.
            grid: (rows, columns) of patches.
        """
        raise TypeError(f"{type(self).__name__} is a family; use one of {', '.join(self.kinds())}")


@dataclasses.dataclass(frozen=True)
class Autoregression(PatchPrediction):
    """Each patch from those before it."""

    # what a patch sees: "prefix", besides those before it, all of a prefix of random length, whose patches are not
    # predicted (AIM; it trains attention as it is used downstream); "causal", those before it alone
    attention: Literal["prefix", "causal"] = "prefix"
    order: OrderName = "raster"  # see `patch_order`
    order_seed: int = 0  # of the order "random"

    def plan(self, keys: jax.Array | None, rows: int, grid: tuple[int, int]) -> Plan:
        """See the base; without keys the prefix is half of the patches."""
        if self.attention == "causal":
            return self.plan_of(jnp.ones((rows,), jnp.int32), grid)  # the first patch has nothing before it
        return self.plan_of(prefix_lengths(keys, rows, grid[0] * grid[1]), grid)

    def plan_of(self, lengths_B: jax.Array, grid: tuple[int, int]) -> Plan:
        """The plan for given prefixes: int32 [B], how many patches of each row are not predicted, at least 1."""
        order_N = patch_order(self.order, grid, self.order_seed)
        rank_N = np.argsort(order_N)
        # The output at the last patch of the order has nothing to predict; it is given the first patch, uncounted.
        goals = order_N[(rank_N + 1) % len(rank_N)]
        if self.attention == "prefix":
            mask = prefix_mask(rank_N, lengths_B)
        else:
            mask = None if self.order == "raster" else prefix_mask(rank_N, jnp.ones((1,), jnp.int32))
        after_BxN = jnp.asarray(rank_N + 1)[None, :] >= lengths_B[:, None]
        predicted_BxN = after_BxN & jnp.asarray(rank_N < len(rank_N) - 1)[None, :]
        return Plan(goals, predicted_BxN, attention_mask=mask, causal=mask is None)


@dataclasses.dataclass(frozen=True)
class MaskedModelling(PatchPrediction):
    """A random share of the patches, replaced by the mask token, from the others (AIM's table 5)."""

    ratio: float = 0.5  # share of the patches that is masked

    def problems(self) -> Iterator[tuple[str, str]]:
        """A share that masks nothing or everything."""
        if not 0 < self.ratio < 1:
            yield "ratio", f"= {self.ratio} is a share of the patches; it must lie in (0, 1)"

    @property
    def mask_token(self) -> bool:
        """Yes."""
        return True

    def plan(self, keys: jax.Array | None, rows: int, grid: tuple[int, int]) -> Plan:
        """See the base; max(1, floor(ratio N)) patches are masked."""
        count = grid[0] * grid[1]
        if keys is None:
            rank_BxN = jnp.broadcast_to(jnp.asarray(patch_order("random", grid, 0)), (rows, count))
        else:
            noise_BxN = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
            rank_BxN = jnp.argsort(jnp.argsort(noise_BxN, axis=1), axis=1)
        masked_BxN = rank_BxN < max(1, int(count * self.ratio))
        return Plan(np.arange(count), masked_BxN, masked=masked_BxN)


def plan_pictures(
    plan: Plan,
    images: jax.Array,
    predicted_BxNxP: jax.Array,
    tower: ViTConfig,
    normalised: bool,
    preprocess: PreprocessConfig,
) -> dict[str, jax.Array]:
    """What `ModelObjective.reconstruct` returns; each patch is predicted with the true ones before it in view.

    Args:
        plan: what was hidden.
        images: normalised float [B, H, W, 3].
        predicted_BxNxP: the model's outputs at every patch.
        tower: of the model.
        normalised: whether each target patch has mean 0 and variance 1.
        preprocess: the normalisation.
    """
    prediction = predicted_images(plan.in_place(predicted_BxNxP), images, tower.patch_size, normalised)
    return pictures(images, prediction, plan.in_place(plan.predicted), tower.grid, preprocess)


def patch_order(name: OrderName, grid: tuple[int, int], seed: int) -> np.ndarray:
    """The patches in the order in which they are predicted, int [N]: numbers in raster order.

    Args:
        name: "raster", row after row; "spiral", from the middle outwards; "checkerboard", the fields of the upper left
            corner's colour before the others, each in raster order; "random", a permutation of the whole run.
        grid: (rows, columns) of patches.
        seed: of "random".
    """
    numbers = np.arange(grid[0] * grid[1]).reshape(grid)
    if name == "spiral":
        inwards = []
        while numbers.size:
            # The left column downwards, then what is left turned so that its lower row becomes the left column.
            inwards.append(numbers[:, 0])
            numbers = np.rot90(numbers[:, 1:], -1)
        return np.concatenate(inwards)[::-1]
    if name == "checkerboard":
        return np.argsort(np.add.outer(np.arange(grid[0]), np.arange(grid[1])).ravel() % 2, kind="stable")
    if name == "random":
        return np.random.default_rng(seed).permutation(numbers.size)
    return numbers.ravel()


def prefix_lengths(keys: jax.Array | None, rows: int, patches: int) -> jax.Array:
    """int32 [B], uniform on 1 to patches - 1 by each row's key; without keys half of the patches."""
    if keys is None:
        return jnp.full((rows,), patches // 2, jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(key, (), 1, patches))(keys)


def prefix_mask(rank_N: np.ndarray, lengths_B: jax.Array) -> jax.Array:
    """Where attention is allowed, bool [B, 1, N, N]: to all of the prefix, and to what stands no later in the order.

    Args:
        rank_N: place of each patch in the order.
        lengths_B: int32, how many patches the prefix of each row has.
    """
    before_1xNxN = jnp.asarray(rank_N[None, :, None] >= rank_N[None, None, :])
    prefix_BxN = jnp.asarray(rank_N)[None, :] < lengths_B[:, None]
    mask_BxNxN = before_1xNxN | prefix_BxN[:, None, :]
    return constrain(mask_BxNxN[:, None], "batch", None, None, None)


__all__ = [
    "Autoregression",
    "MaskedModelling",
    "OrderName",
    "PatchPrediction",
    "Plan",
    "patch_order",
    "plan_pictures",
    "prefix_lengths",
    "prefix_mask",
]
