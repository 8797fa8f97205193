"""Cross-entropy over a large vocabulary, chunk by chunk, so that its logits are never held as a whole.

The logits of a batch of a language model are its largest array by far: 8 rows of 2048 tokens and a vocabulary of
256,000 are 16 GiB in fp32. Here each device goes over its tokens in chunks, and takes the gradient in the same pass:
the loss is a sum, so that its gradient is known up to a factor before anything asks for it, and no product is repeated.
The collectives are this file's own: rows are split over the batch axes of the mesh, the vocabulary over `tensor`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from vlm_jax.mesh import BATCH_AXES
from vlm_jax.models.softmax_attention import MASKED

LOGIT_BYTES = 1 << 28  # of the fp32 logits of a chunk on a device
LEAST_CHUNKS = 4  # of few tokens too, so that what is tested in small is what runs


class TokenLoss(NamedTuple):
    """Sums over the valid tokens of a batch, fp32 scalars.

    Attributes:
        total: of -log p(target) in nats.
        count: valid tokens.
        correct: those whose target has the largest logit; no gradient flows through it.
    """

    total: jax.Array
    count: jax.Array
    correct: jax.Array


class _Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    head: bool


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the arrays lie on the mesh, and how many tokens a chunk has.

    Attributes:
        rows: mesh axes that split the rows.
        length: mesh axis that splits the tokens of a row, or None.
        vocab: mesh axis that splits the vocabulary, or None.
        width: mesh axis over which the gradient of the head is left scattered, or None.
        words: size of the vocabulary, without what fills it up.
        chunk: tokens at a time on a device, or None for as many as `LOGIT_BYTES` allow.
    """

    rows: tuple[str, ...]
    length: str | None
    vocab: str | None
    width: str | None
    words: int
    chunk: int | None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which tokens lie apart."""
        return (*self.rows, self.length) if self.length else self.rows


def vocabulary_cross_entropy(
    hidden_BxTxD: jax.Array,
    head_VxD: jax.Array,
    targets_BxT: jax.Array,
    valid_BxT: jax.Array,
    *,
    weights_BxT: jax.Array | None = None,
    chunk: int | None = None,
) -> TokenLoss:
    """-log softmax(hidden head^T)[target], summed over the valid tokens of the batch.

    Args:
        hidden_BxTxD: states of the tokens, in the compute dtype, in which the products run; softmax and sums are fp32.
        head_VxD: rows of the head, fp32 parameters.
        targets_BxT: int32 ids.
        valid_BxT: bool; other tokens don't count.
        weights_BxT: fp32 factors, not negative, on the tokens' losses alone; no gradient flows to them. None: all 1.
        chunk: tokens at a time on each device, a quarter of them at most; None: as many as keep their logits under
            `LOGIT_BYTES`.
    """
    layout = _layout(hidden_BxTxD, head_VxD, chunk)
    shards = 1 if layout.vocab is None else jax.sharding.get_abstract_mesh().shape[layout.vocab]
    head_VxD = jnp.pad(head_VxD.astype(hidden_BxTxD.dtype), ((0, -head_VxD.shape[0] % shards), (0, 0)))
    factors_BxT = valid_BxT.astype(jnp.float32)
    if weights_BxT is not None:
        factors_BxT = factors_BxT * jax.lax.stop_gradient(weights_BxT)
    sums: Any = _loss(hidden_BxTxD, head_VxD, targets_BxT, factors_BxT, layout)
    return TokenLoss(sums[0], valid_BxT.sum(dtype=jnp.float32), jax.lax.stop_gradient(sums[1]))


def _layout(hidden_BxTxD: jax.Array, head_VxD: jax.Array, chunk: int | None) -> _Layout:
    rows, length, width = hidden_BxTxD.shape
    mesh, words = jax.sharding.get_abstract_mesh(), head_VxD.shape[0]
    sizes = {} if mesh.empty else dict(mesh.shape)
    batch = tuple(axis for axis in BATCH_AXES if axis in sizes)
    batch = batch if rows % math.prod(sizes[axis] for axis in batch) == 0 else ()
    divides = sizes.get("sequence", 1) > 1 and length % sizes["sequence"] == 0
    vocab = "tensor" if sizes.get("tensor", 1) > 1 else None
    scattered = "fsdp" in batch and sizes["fsdp"] > 1 and width % sizes["fsdp"] == 0
    return _Layout(batch, "sequence" if divides else None, vocab, "fsdp" if scattered else None, words, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(
    hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array, factors_BxT: jax.Array, layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses, number of correct tokens)."""
    total, correct, *_ = _on_mesh(hidden_BxTxD, head_VxD, targets_BxT, factors_BxT, layout, _Wanted(False, False))
    return total, correct


def _forward(
    hidden: Any, head: Any, targets: Any, factors: Any, layout: _Layout
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array | None, jax.Array | None]]:
    # Of a frozen head no gradient is made.
    wanted = _Wanted(hidden.perturbed, head.perturbed)
    arrays = hidden.value, head.value, targets.value, factors.value
    total, correct, *gradients = _on_mesh(*arrays, layout=layout, wanted=wanted)
    d_hidden = gradients.pop(0) if wanted.hidden else None
    d_head = gradients.pop(0) if wanted.head else None
    return (total, correct), (d_hidden, d_head)


def _backward(
    layout: _Layout, saved: tuple[jax.Array | None, jax.Array | None], cotangents: tuple[Any, Any]
) -> tuple[jax.Array | None, jax.Array | None, None, None]:
    factor = cotangents[0]
    if isinstance(factor, SymbolicZero):
        factor = jnp.zeros((), jnp.float32)
    d_hidden, d_head = (None if x is None else x * factor.astype(x.dtype) for x in saved)
    return d_hidden, d_head, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, factors: jax.Array, layout: _Layout, wanted: _Wanted
) -> tuple[jax.Array, ...]:
    """(total, correct), and the gradients of the total that are wanted, from global arrays."""
    local = functools.partial(_on_device, layout=layout, wanted=wanted)
    if jax.sharding.get_abstract_mesh().empty:
        return local(hidden, head, targets, factors)
    tokens = P(layout.rows or None, layout.length)
    states, words = P(*tokens, None), P(layout.vocab, None)
    gradients = (*[states] * wanted.hidden, *[P(layout.vocab, layout.width)] * wanted.head)
    mapped = jax.shard_map(
        local, in_specs=(states, words, tokens, tokens), out_specs=(P(), P(), *gradients), check_vma=False
    )
    return mapped(hidden, head, targets, factors)


def _on_device(
    hidden_bxtxD: jax.Array,
    head_vxD: jax.Array,
    targets_bxt: jax.Array,
    factors_bxt: jax.Array,
    *,
    layout: _Layout,
    wanted: _Wanted,
) -> tuple[jax.Array, ...]:
    """One device's tokens against its part of the vocabulary."""
    count = targets_bxt.size
    chunk = min(layout.chunk or max(128, LOGIT_BYTES // (4 * head_vxD.shape[0])), -(-count // LEAST_CHUNKS))
    chunks = -(-count // chunk)

    def in_chunks(x: jax.Array, *shape: int) -> jax.Array:
        flat = x.reshape(count, *shape)
        return jnp.pad(flat, [(0, chunks * chunk - count)] + [(0, 0)] * len(shape)).reshape(chunks, chunk, *shape)

    width = hidden_bxtxD.shape[-1]
    inputs = in_chunks(hidden_bxtxD, width), in_chunks(targets_bxt), in_chunks(factors_bxt)
    zero = jnp.zeros((), jnp.float32)
    first = (zero, zero, jnp.zeros(head_vxD.shape, jnp.float32)) if wanted.head else (zero, zero)

    def body(carry: tuple[jax.Array, ...], step: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], Any]:
        hidden_cxD, targets_c, factors_c = step
        losses_c, correct_c, d_logits_cxv = _chunk(hidden_cxD, head_vxD, targets_c, factors_c, layout)
        sums = (carry[0] + losses_c.sum(), carry[1] + correct_c.sum(dtype=jnp.float32))
        d_logits_cxv, d_hidden_cxD = d_logits_cxv.astype(hidden_cxD.dtype), None
        if wanted.head:
            d_head_vxD = jnp.einsum("cv,cD->vD", d_logits_cxv, hidden_cxD, preferred_element_type=jnp.float32)
            sums = (*sums, carry[2] + d_head_vxD)
        if wanted.hidden:
            d_hidden_cxD = jnp.einsum("cv,vD->cD", d_logits_cxv, head_vxD, preferred_element_type=jnp.float32)
            d_hidden_cxD = _sum_over(d_hidden_cxD.astype(hidden_cxD.dtype), layout.vocab)
        return sums, d_hidden_cxD

    carry, d_hidden = jax.lax.scan(body, first, inputs)
    results = [_sum_over(x, layout.token_axes) for x in carry[:2]]
    if wanted.hidden:
        results.append(d_hidden.reshape(chunks * chunk, width)[:count].reshape(hidden_bxtxD.shape))
    if wanted.head:
        results.append(_head_gradient(carry[2], layout).astype(head_vxD.dtype))
    return tuple(results)


def _chunk(
    hidden_cxD: jax.Array, head_vxD: jax.Array, targets_c: jax.Array, factors_c: jax.Array, layout: _Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses and hits of a chunk's tokens, both 0 where the factor is, and the gradient of the losses by the logits."""
    logits_cxv = jnp.einsum("cD,vD->cv", hidden_cxD, head_vxD, preferred_element_type=jnp.float32)
    size = head_vxD.shape[0]
    start = 0 if layout.vocab is None else jax.lax.axis_index(layout.vocab) * size
    word_1xv = start + jnp.arange(size, dtype=jnp.int32)[None, :]
    logits_cxv = jnp.where(word_1xv < layout.words, logits_cxv, MASKED)
    maximum_c = logits_cxv.max(axis=1)
    maximum_c = maximum_c if layout.vocab is None else jax.lax.pmax(maximum_c, layout.vocab)
    powers_cxv = jnp.exp(logits_cxv - maximum_c[:, None])
    sum_c = _sum_over(powers_cxv.sum(axis=1), layout.vocab)
    target_cxv = word_1xv == targets_c[:, None]
    own_c = _sum_over(jnp.where(target_cxv, logits_cxv, 0.0).sum(axis=1), layout.vocab)
    # `where` and not the factor alone: 0 * inf is nan.
    counts_c = factors_c > 0
    losses_c = jnp.where(counts_c, factors_c * (jnp.log(sum_c) + maximum_c - own_c), 0.0)
    d_logits_cxv = jnp.where(counts_c[:, None], factors_c[:, None] * (powers_cxv / sum_c[:, None] - target_cxv), 0.0)
    return losses_c, counts_c & (own_c >= maximum_c), d_logits_cxv


def _head_gradient(d_head_vxD: jax.Array, layout: _Layout) -> jax.Array:
    """Summed over all tokens once, after the last chunk; scattered over the axis that the head's width lies on."""
    axes = tuple(axis for axis in layout.token_axes if axis != layout.width)
    if layout.width is not None:
        d_head_vxD = jax.lax.psum_scatter(d_head_vxD, layout.width, scatter_dimension=1, tiled=True)
    return _sum_over(d_head_vxD, axes)


def _sum_over(x: jax.Array, axes: str | tuple[str, ...] | None) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


__all__ = ["TokenLoss", "vocabulary_cross_entropy"]
