"""Model FLOPs and the peak of a chip, and from the two the model FLOPs utilisation (MFU).

Model FLOPs are those of the matrix products that the model needs: a multiply-add counts as 2, recomputation under
rematerialisation counts as 0, element-wise work counts as 0. It is no estimate of time or memory (`vlm_jax.plan` is).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.extend import core as jax_core

# Dense bf16 FLOP/s by `device_kind`, the vendors' figures (without structured sparsity), for what JAX calls one device:
# a whole chip for TPU v4, v5e, v5p, v6e, but one of a chip's two cores for v2, v3 and 7x.
_PEAK_BF16_FLOPS: dict[str, float] = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

# Names of TPU generations, as in topologies and recipes, by `device_kind`.
_CHIP_NAMES: dict[str, str] = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}

# A backward pass computes, for each product of the forward pass, the gradients of both of its factors.
TRAIN_OVER_FORWARD = 3


class Device(Protocol):
    """The one thing of a `jax.Device` that its peak depends on."""

    @property
    def device_kind(self) -> str:
        """The vendor's name of the chip, as JAX reports it."""
        ...


def peak_flops(device: Device) -> float | None:
    """Dense bf16 FLOP/s of one JAX device, or None for a kind that is not in the table (every CPU among them)."""
    return _PEAK_BF16_FLOPS.get(device.device_kind)


def chip_name(device: Any) -> str:
    """`v5e`, `v6e`, ... of a TPU; the platform ("cpu", "gpu") of any other device."""
    return str(_CHIP_NAMES.get(device.device_kind, device.platform))


def mfu(flops_per_step: float, seconds: float, device_count: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0..1, of a step (PaLM, arXiv:2204.02311, appendix B).

    Args:
        flops_per_step: model FLOPs of one step on the global batch, over all devices.
        seconds: wall time of a step, measured with the device's results waited for.
        device_count: how many devices share the step.
        peak: FLOP/s of one device, or None when unknown, which makes the result None.

    Raises:
        ValueError: no time has passed, or there is no device.
    """
    if seconds <= 0 or device_count <= 0:
        raise ValueError(f"MFU needs a positive time and device count, not {seconds} s on {device_count} devices.")
    return None if peak is None else flops_per_step / (seconds * device_count * peak)


def transformer_flops(width: int, depth: int, mlp_dim: int, tokens: int, gated: bool = False) -> int:
    """Forward FLOPs of a stack of blocks for one sequence: q, k, v, out projections, MLP, scores and weighted sum.

    Attention counts in full for causal towers too, as published tables do. A gated MLP has three products, not two.
    """
    projections = 2 * tokens * (4 * width * width + (3 if gated else 2) * width * mlp_dim)
    attention = 2 * (2 * tokens * tokens * width)
    return depth * (projections + attention)


def cross_attention_flops(width: int, tokens: int, context_tokens: int, context_width: int) -> int:
    """Forward FLOPs of one attention from `tokens` to a context: four projections, scores and weighted sum."""
    queries_and_outputs = 2 * tokens * 2 * width**2
    keys_and_values = 2 * context_tokens * 2 * context_width * width
    return queries_and_outputs + keys_and_values + 2 * 2 * tokens * context_tokens * width


def vit_flops(
    *,
    width: int,
    depth: int,
    mlp_dim: int,
    patches: int,
    patch_size: int,
    embed_dim: int,
    extra_tokens: int = 1,
    kept_patches: int | None = None,
    map_head: bool = False,
    gated: bool = False,
) -> int:
    """Forward FLOPs of a ViT tower for one RGB image: patch embedding, blocks, pooling, projection of one vector.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        mlp_dim: hidden width of the MLP.
        patches: number of patches.
        patch_size: side in pixels.
        embed_dim: width of the joint space; 0 where there is no projection.
        extra_tokens: class token and registers.
        kept_patches: how many of the patches go through the blocks (FLIP); None: all.
        map_head: whether attention by one learned query pools the tokens (SigLIP).
        gated: whether the MLPs have gates.
    """
    tokens = (patches if kept_patches is None else kept_patches) + extra_tokens
    embedding = 2 * patches * 3 * patch_size**2 * width
    pooling = attention_pool_flops(width, tokens, mlp_dim=mlp_dim) if map_head else 0
    return embedding + transformer_flops(width, depth, mlp_dim, tokens, gated) + pooling + 2 * width * embed_dim


def attention_pool_flops(width: int, tokens: int, queries: int = 1, mlp_dim: int = 0) -> int:
    """Forward FLOPs of `queries` learned queries that attend to `tokens`, with an MLP on each where there is one."""
    projections = 2 * (2 * queries + 2 * tokens) * width * width
    return projections + 2 * (2 * queries * tokens * width) + 2 * queries * 2 * width * mlp_dim


def text_flops(*, width: int, depth: int, mlp_dim: int, tokens: int, embed_dim: int, map_head: bool = False) -> int:
    """Forward FLOPs of a text tower for one caption of `tokens` positions; the lookup of embeddings is free."""
    pooling = attention_pool_flops(width, tokens, mlp_dim=mlp_dim) if map_head else 0
    return transformer_flops(width, depth, mlp_dim, tokens) + pooling + 2 * width * embed_dim


def decoder_flops(
    *,
    width: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    vocab_size: int,
    tokens: int,
    gated: bool = True,
) -> int:
    """Forward FLOPs of a language model for one row of `tokens`, with logits at each; embeddings are looked up free.

    Attention counts in full though it is causal, as in `transformer_flops`.

    Args:
        width: of the residual stream.
        depth: number of blocks.
        heads: heads of queries.
        kv_heads: heads of keys and of values.
        head_dim: channels of a head.
        mlp_dim: hidden width of the MLP.
        vocab_size: rows of the head.
        tokens: tokens of the row.
        gated: whether the MLPs have gates.
    """
    projections = (2 * heads + 2 * kv_heads) * head_dim + (3 if gated else 2) * mlp_dim
    attention = 2 * (2 * tokens * tokens * heads * head_dim)
    return depth * (2 * tokens * width * projections + attention) + 2 * tokens * width * vocab_size


def count_dot_flops(function: Callable[..., Any], *arguments: Any, padding: bool = True) -> int:
    """Counts the FLOPs of all matrix products and convolutions of `function` from its jaxpr, without running it.

    The independent check of the closed forms above, and the count for a function that has none. Scans count once an
    iteration, the dearest branch of a `cond` counts, and what a `shard_map` does counts on each of its devices. A
    fused attention kernel hides its products: trace the function with XLA's attention.

    Args:
        function: traced with `jax.make_jaxpr`.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
        padding: whether a convolution's products with its padding count, as in papers; else only those with data.

    Raises:
        ValueError: a `while` loop holds matrix products: how often they run is not known before they run.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr, padding)


def window_meetings(n: int, size: int, positions: int, *, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs (output position, kernel element) of one axis of a convolution that meet data.

    Args:
        n: inputs.
        size: elements of the kernel.
        positions: outputs.
        stride: of the window.
        pad: padding before the first input; negative cuts inputs off.
        holes: distance of two neighbouring inputs (`lhs_dilation`); there is nothing between them.
        spread: distance of two neighbouring elements of the kernel (`rhs_dilation`).
    """
    start = np.arange(positions, dtype=np.int64) * stride - pad
    places = start[:, None] + np.arange(size, dtype=np.int64) * spread
    return int(np.count_nonzero((places >= 0) & (places <= (n - 1) * holes) & (places % holes == 0)))


def _jaxpr_flops(jaxpr: jax_core.Jaxpr, padding: bool) -> int:
    return sum(_equation_flops(equation, padding) for equation in jaxpr.eqns)


def _equation_flops(equation: jax_core.JaxprEqn, padding: bool) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = parameters["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracting)
    if name == "conv_general_dilated":
        return _convolution_flops(equation, padding)
    inner = [_jaxpr_flops(jaxpr, padding) for jaxpr in inner_jaxprs(parameters)]
    if name == "while" and any(inner):
        raise ValueError("A `while` loop with matrix products has no known FLOP count; write it as a `scan`.")
    if name == "cond":
        return max(inner)
    repeats = {"scan": lambda: parameters["length"], "shard_map": lambda: parameters["mesh"].size}
    return sum(inner) * (repeats[name]() if name in repeats else 1)


def _convolution_flops(equation: jax_core.JaxprEqn, padding: bool) -> int:
    parameters = equation.params
    left, kernel, out = (_shape(variable) for variable in (*equation.invars, *equation.outvars))
    left_spec, kernel_spec, out_spec = parameters["dimension_numbers"]
    if padding:
        return 2 * math.prod(out) * math.prod(kernel) // kernel[kernel_spec[0]]
    products = left[left_spec[0]] * left[left_spec[1]] * kernel[kernel_spec[0]]
    products //= parameters["feature_group_count"] * parameters["batch_group_count"]
    for axis, (low, _) in enumerate(parameters["padding"]):
        products *= window_meetings(
            left[left_spec[2 + axis]],
            kernel[kernel_spec[2 + axis]],
            out[out_spec[2 + axis]],
            stride=parameters["window_strides"][axis],
            pad=low,
            holes=parameters["lhs_dilation"][axis],
            spread=parameters["rhs_dilation"][axis],
        )
    return 2 * products


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def inner_jaxprs(parameters: dict[str, Any]) -> Iterator[jax_core.Jaxpr]:
    """The jaxprs that an equation holds in its parameters: bodies of loops, branches, called functions."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jax_core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax_core.Jaxpr):
                yield item
