"""A caption as a decoder meets it: what begins it, which token follows which, and how one is written.

No network is here: `coca` and `captioner` are the models, `vlm_jax.losses.tokens` is the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.models.stochastic import fold_in


@dataclasses.dataclass(frozen=True)
class CaptionStart:
    """What stands before the first word, from which a decoder predicts it."""

    by: Literal["tokenizer", "model"] = "tokenizer"  # who puts it there; a tokenizer with bos = true does so itself
    id: int = 49406  # its id; without a start token in the vocabulary (by = "model") that of the end token will do

    @property
    def added(self) -> int:
        """Tokens that the model puts before a text."""
        return int(self.by == "model")

    def put_before(self, ids_BxL: jax.Array) -> jax.Array:
        """int32 [B, L] of the tokenizer -> [B, L + added]."""
        return jnp.pad(ids_BxL, ((0, 0), (self.added, 0)), constant_values=self.id)


@dataclasses.dataclass(frozen=True)
class CaptionForm:
    """Rows of captions: their length and the ids that are no words. Taken from a model's config, not part of one."""

    start: CaptionStart
    length: int
    eos_id: int
    pad_id: int

    def inputs(self, ids_BxL: jax.Array) -> jax.Array:
        """Rows of the tokenizer -> what the decoder reads, int32 [B, T - 1]; T counts the tokens with the start."""
        return self.start.put_before(ids_BxL)[:, :-1]

    def targets(self, ids_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of the tokenizer -> (int32, bool) [B, T - 1]: what follows each input, and where that is no padding."""
        targets = self.start.put_before(ids_BxL)[:, 1:]
        return targets, targets != self.pad_id


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    top_k: int = 1  # among how many of the likeliest tokens; 1 takes the likeliest
    temperature: float = 1.0  # above 1 evens the chances out, towards 0 takes the likeliest


LIKELIEST = Sampling()


def write(
    next_logits: Callable[[jax.Array, jax.Array], jax.Array],
    rows: int,
    form: CaptionForm,
    sampling: Sampling = LIKELIEST,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Captions, one token after the other; all positions are computed anew for each (no cache of keys and values).

    Args:
        next_logits: (ids int32 [B, T - 1], position ()) -> [B, V], the logits of what follows that position; T is L
            and the start.
        rows: B.
        form: of the captions; the loop ends when all have ended.
        sampling: how a token is chosen.
        keys: [B] typed keys, one a row; None takes the likeliest token.

    Returns:
        int32 [B, L] as the tokenizer makes them, so that its `decode` gives the text.
    """
    total = form.length + form.start.added
    ids_BxT = jnp.full((rows, total), form.pad_id, jnp.int32).at[:, 0].set(form.start.id)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, ended_B, position = carry
        return (position < total - 1) & ~jnp.all(ended_B)

    def add(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        ids_BxT, ended_B, position = carry
        chosen_B = _choose(next_logits(ids_BxT[:, :-1], position), sampling, fold_in(keys, position))
        chosen_B = jnp.where(ended_B, form.pad_id, chosen_B)
        ids_BxT = jax.lax.dynamic_update_slice_in_dim(ids_BxT, chosen_B[:, None], position + 1, axis=1)
        return ids_BxT, ended_B | (chosen_B == form.eos_id), position + 1

    first = ids_BxT, jnp.zeros((rows,), bool), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(unfinished, add, first)[0][:, form.start.added :]


def generate(
    module: nn.Module,
    params: Any,
    image_tokens: jax.Array,
    form: CaptionForm,
    sampling: Sampling,
    keys: jax.Array | None,
) -> jax.Array:
    """As `write`, by a module with `next_logits(image_tokens, ids, position)`."""

    def next_logits(ids_BxT: jax.Array, position: jax.Array) -> Any:
        return module.apply({"params": params}, image_tokens, ids_BxT, position, method="next_logits")

    return write(next_logits, image_tokens.shape[0], form, sampling, keys)


def _choose(logits_BxV: jax.Array, sampling: Sampling, keys: jax.Array | None) -> jax.Array:
    """int32 [B]."""
    if keys is None or sampling.top_k == 1:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    best_BxK, index_BxK = jax.lax.top_k(logits_BxV, sampling.top_k)
    drawn_B = jax.vmap(jax.random.categorical)(keys, best_BxK / sampling.temperature)
    return jnp.take_along_axis(index_BxK, drawn_B[:, None], axis=1)[:, 0].astype(jnp.int32)


__all__ = ["LIKELIEST", "CaptionForm", "CaptionStart", "Sampling", "generate", "write"]
