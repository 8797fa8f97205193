"""Low-rank adaptation (Hu et al. 2022): next to frozen matrices small ones learn, whose product is added to them.

The adapted linear maps don't know it: whoever calls a model inside `adapted` gets it with the small matrices, under
`lora_a` and `lora_b` beside each kernel. `merged` adds them to the kernels, for generation and for other libraries.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import zeros

from vlm_jax.models.decoder import DecoderBlock, DecoderConfig
from vlm_jax.models.initializers import torch_linear
from vlm_jax.models.linear import Linear
from vlm_jax.models.stochastic import dropout, fold_in
from vlm_jax.models.weights import weight

Target = Literal["query", "key", "value", "out", "gate", "fc1", "fc2"]
TARGETS: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "fc1", "fc2")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which maps of the decoder are adapted, and how; the defaults are LLaVA-1.5's."""

    rank: int = 128  # of the product
    alpha: float = 256.0  # the product counts alpha / rank times
    dropout: float = 0.05  # on what enters the small matrices
    targets: tuple[Target, ...] = TARGETS  # linear maps of a block

    @property
    def scale(self) -> float:
        """Factor on the product."""
        return self.alpha / self.rank

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that adapt nothing."""
        if self.rank < 1:
            yield "rank", f"= {self.rank} must be at least 1"
        if not self.targets:
            yield "targets", "is empty; name linear maps, or set lora to None"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"= {self.dropout} is a probability; it must lie in [0, 1)"

    def forward_flops(self, decoder: DecoderConfig, tokens: int) -> int:
        """Model FLOPs that the small matrices of all blocks add for one row of `tokens`."""
        width, heads = decoder.width, decoder.heads * decoder.head_width
        shared = (decoder.kv_heads or decoder.heads) * decoder.head_width
        ends = {"query": width + heads, "key": width + shared, "value": width + shared, "out": heads + width}
        sizes = sum(ends.get(target, width + decoder.mlp_dim) for target in self.targets)
        return decoder.depth * 2 * tokens * self.rank * sizes


@contextlib.contextmanager
def adapted(config: LoraConfig | None) -> Iterator[None]:
    """In it, the decoder that is called has the small matrices; without a config it is as it is."""
    if config is None:
        yield
        return
    # Keys of the rows for the block that is being traced, the innermost last.
    keys: list[jax.Array | None] = [None]

    def intercept(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, DecoderBlock) and context.method_name == "__call__":
            (index, *_), own = arguments[1], arguments[2]
            keys.append(fold_in(own, index))
            try:
                return call(*arguments, **options)
            finally:
                keys.pop()
        if isinstance(module, Linear) and module.name in config.targets:
            use = 2 + TARGETS.index(module.name)  # 0 and 1 are the block's own
            return call(*arguments, **options) + _product(config, module, arguments[0], fold_in(keys[-1], use))
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        yield


def _product(config: LoraConfig, module: Linear, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """What the small matrices make of the input of a linear map."""
    inputs = x.shape[-module.contracted :]
    into, out = module.names[: module.contracted], module.names[module.contracted :]
    a = weight(module, "lora_a", torch_linear(math.prod(inputs)), (*into, None), (*inputs, config.rank))
    b = weight(module, "lora_b", zeros, (None, *out), (config.rank, *module.features))
    x = dropout(x.astype(module.dtype), config.dropout, keys)
    low = jnp.tensordot(x, a.astype(module.dtype), axes=module.contracted)
    return config.scale * jnp.tensordot(low, b.astype(module.dtype), axes=1)


def merged(params: Any, config: LoraConfig | None) -> Any:
    """A decoder's parameters with the products added to the kernels and without the small matrices."""
    if config is None or not isinstance(params, Mapping):
        return params
    rest = {name: merged(child, config) for name, child in params.items() if not name.startswith("lora_")}
    if "lora_a" in params:
        # The first axis of all three are the layers.
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(params["lora_a"], params["lora_b"])
        rest["kernel"] = rest["kernel"] + config.scale * product
    return rest


__all__ = ["TARGETS", "LoraConfig", "adapted", "merged"]
