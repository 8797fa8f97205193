"""From the features of an image to tokens of a language model's width: what joins a vision tower and a decoder.

Linear maps with an exact GELU between them (Liu et al. 2023, LLaVA; 2024, LLaVA-1.5), neighbouring features joined to
one before a linear map (nanoVLM's and Idefics3's pixel shuffle), and learned queries that look at the features (Alayrac
et al. 2022, section 3.1.1).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.nn.initializers import normal, zeros

from vlm_jax.mesh import constrain
from vlm_jax.models.initializers import INITIALIZERS, Initializer, InitName, torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.mlp import ActivationName
from vlm_jax.models.norms import NORMS
from vlm_jax.models.transformer import Block, TransformerConfig, run_blocks
from vlm_jax.models.weights import weight
from vlm_jax.schema import Choice

LinearInit = Literal["torch", "normal", "zeros"]


@dataclasses.dataclass(frozen=True)
class ProjectorConfig(Choice):
    """Which projector; pick a kind. Its module maps features [B, S, C] of a grid of patches to tokens [B, K, D]."""

    @classmethod
    def kinds(cls) -> Mapping[str, type[Any]]:
        """The projectors by name."""
        return {
            "linear": LinearProjectorConfig,
            "mlp": MlpProjectorConfig,
            "pixel_shuffle": PixelShuffleConfig,
            "resampler": ResamplerConfig,
        }

    def tokens(self, features: int) -> int:
        """K, from S."""
        return features

    def grid_problem(self, grid: tuple[int, int], prefix: int) -> str:
        """Why features of `grid` patches behind `prefix` other tokens can't be read; empty if they can."""
        return ""

    def build(self, grid: tuple[int, int], width: int, dtype: Dtype) -> nn.Module:
        """The module for features of a grid (rows, columns) and tokens of `width` channels."""
        raise TypeError(f"{type(self).__name__} is a family of projectors; pick one of its kinds")

    def forward_flops(self, features: int, channels: int, width: int) -> int:
        """Model FLOPs for one image of S features with C channels, to tokens of `width` channels."""
        raise TypeError(f"{type(self).__name__} is a family of projectors; pick one of its kinds")


@dataclasses.dataclass(frozen=True)
class LinearProjectorConfig(ProjectorConfig):
    """One matrix: LLaVA's first version, PaliGemma."""

    bias: bool = True  # whether it has a bias
    init: LinearInit = "torch"  # start of the weights: PyTorch's of a linear map, a spread of 0.02, or zeros

    @property
    def layers(self) -> int:
        """Number of matrices."""
        return 1

    def build(self, grid: tuple[int, int], width: int, dtype: Dtype) -> nn.Module:
        """See the base."""
        return LinearProjector(self.layers, width, self.bias, self.init, dtype=dtype)

    def forward_flops(self, features: int, channels: int, width: int) -> int:
        """See the base."""
        return 2 * features * width * (channels + (self.layers - 1) * width)


@dataclasses.dataclass(frozen=True)
class MlpProjectorConfig(LinearProjectorConfig):
    """Several matrices with an exact GELU between them; two are LLaVA-1.5's `mlp2x_gelu`."""

    depth: int = 2  # number of matrices; all but the first are square

    @property
    def layers(self) -> int:
        """See the base."""
        return self.depth

    def problems(self) -> Iterator[tuple[str, str]]:
        """No matrix at all."""
        if self.depth < 1:
            yield "depth", f"= {self.depth} must be at least 1"


@dataclasses.dataclass(frozen=True)
class PixelShuffleConfig(ProjectorConfig):
    """Squares of neighbouring features as one of more channels, then a matrix without bias (nanoVLM)."""

    factor: int = 4  # side of a square
    init: LinearInit = "normal"  # see the linear projector

    def problems(self) -> Iterator[tuple[str, str]]:
        """A square of no size."""
        if self.factor < 1:
            yield "factor", f"= {self.factor} must be at least 1"

    def tokens(self, features: int) -> int:
        """See the base."""
        return features // self.factor**2

    def grid_problem(self, grid: tuple[int, int], prefix: int) -> str:
        """See the base."""
        if prefix:
            return "joins patches alone; set features = 'patch'"
        if grid[0] % self.factor or grid[1] % self.factor:
            return f"joins squares of {self.factor}x{self.factor}, which don't divide a grid of {grid[0]}x{grid[1]}"
        return ""

    def build(self, grid: tuple[int, int], width: int, dtype: Dtype) -> nn.Module:
        """See the base."""
        return LinearProjector(1, width, False, self.init, shuffle=(*grid, self.factor), dtype=dtype)

    def forward_flops(self, features: int, channels: int, width: int) -> int:
        """See the base."""
        return 2 * features * channels * width


@dataclasses.dataclass(frozen=True)
class ResamplerConfig(ProjectorConfig, TransformerConfig):
    """Learned queries that look at the features, block after block, then a norm and a matrix."""

    queries: int = 64  # tokens of an image
    width: int = 768  # of the queries
    depth: int = 2  # number of blocks, each an attention to the features and an MLP
    activation: ActivationName = "gelu"  # of the MLPs
    init: InitName = "vit"  # recipe of the initial weights

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from TransformerConfig.problems(self)
        if self.queries < 1:
            yield "queries", f"= {self.queries} must be at least 1"

    def tokens(self, features: int) -> int:
        """See the base."""
        return self.queries

    def build(self, grid: tuple[int, int], width: int, dtype: Dtype) -> nn.Module:
        """See the base."""
        return Resampler(self, width, dtype)

    def forward_flops(self, features: int, channels: int, width: int) -> int:
        """See the base."""
        queries, own = self.queries, self.width
        attention = 2 * own * (2 * queries * own + 2 * features * channels) + 4 * queries * features * own
        mlp = 2 * queries * (3 if self.gated else 2) * own * self.mlp_dim
        return self.depth * (attention + mlp) + 2 * queries * own * width


def pixel_shuffle(x_BxSxC: jax.Array, rows: int, columns: int, factor: int) -> jax.Array:
    """Features of a grid, row by row -> [B, S / factor^2, factor^2 C]: a square's features side by side in its row."""
    batch, _, channels = x_BxSxC.shape
    x = x_BxSxC.reshape(batch, rows // factor, factor, columns // factor, factor, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns // factor**2, factor**2 * channels)


class LinearProjector(nn.Module):
    """Parameters: `fc1`, `fc2`, ...

    Attributes:
        layers: number of matrices.
        width: channels of a token.
        use_bias: whether they have biases.
        init: start of the weights.
        shuffle: (rows, columns, factor) of the squares that are joined before, or None.
        dtype: compute dtype; parameters are fp32.
    """

    layers: int
    width: int
    use_bias: bool
    init: LinearInit
    shuffle: tuple[int, int, int] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxSxC: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[B, S, C] -> [B, K, D]; nothing is random."""
        x = x_BxSxC if self.shuffle is None else pixel_shuffle(x_BxSxC, *self.shuffle)
        x = constrain(x, "batch", "length", "embed")
        for layer in range(self.layers):
            # A matrix and the one behind it share the axis between them; the last of an odd number has no other.
            names = ("mlp", "embed") if layer % 2 else ("embed", "joint" if layer == self.layers - 1 else "mlp")
            kernel, bias = _initial(self.init, x.shape[-1])
            linear = Linear(
                (self.width,), names, kernel, bias, use_bias=self.use_bias, dtype=self.dtype, name=f"fc{layer + 1}"
            )
            x = linear(x if layer == 0 else jax.nn.gelu(x, approximate=False))
            x = constrain(x, "batch", "length", names[1])
        return x


def _initial(init: LinearInit, inputs: int) -> tuple[Initializer, Initializer]:
    """Of kernel and bias."""
    if init == "torch":
        return torch_linear(inputs), torch_linear(inputs)
    return (normal(0.02) if init == "normal" else zeros), zeros


class Resampler(nn.Module):
    """Parameters: `query` [Q, W], `blocks/...`, `ln_post/...`, `fc1/...`.

    Attributes:
        config: sizes.
        width: channels of a token.
        dtype: compute dtype; parameters are fp32.
    """

    config: ResamplerConfig
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxSxC: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[B, S, C] and [B] typed keys (None: nothing random) -> [B, Q, D]."""
        config = self.config
        init = INITIALIZERS[config.init](config.width, config.depth, config.mlp_dim)
        query_QxW = weight(self, "query", init.probe, (None, "embed"), (config.queries, config.width))
        x = jnp.broadcast_to(query_QxW.astype(self.dtype), (x_BxSxC.shape[0], *query_QxW.shape))
        context = constrain(x_BxSxC.astype(self.dtype), "batch", "length", "embed")
        x, _ = run_blocks(config, x, keys, context=context, dtype=self.dtype, block=Block)
        x = NORMS[config.norm](config.norm_eps, name="ln_post")(x)
        out = Linear((self.width,), ("embed", "joint"), init.projection, dtype=self.dtype, name="fc1")
        return constrain(out(x), "batch", "length", "embed")


__all__ = [
    "LinearProjectorConfig",
    "MlpProjectorConfig",
    "PixelShuffleConfig",
    "ProjectorConfig",
    "ResamplerConfig",
    "pixel_shuffle",
]
