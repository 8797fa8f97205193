"""Which words of a text are hidden from a model, and what it loses by not guessing them (Devlin et al. 2019, 3.1)."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class WordMaskConfig:
    """How words are hidden; the defaults are BERT's, for its vocabularies."""

    probability: float = 0.15  # of a token to be chosen
    masked: float = 0.8  # share of the chosen that the mask token replaces
    random: float = 0.1  # share of the chosen that a random token replaces; the rest stays as it is
    mask_id: int = 103  # the mask token, [MASK]
    spared_ids: tuple[int, ...] = (0, 101, 102)  # tokens that are never chosen: [PAD], [CLS], [SEP]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Shares that are none."""
        if not 0 < self.probability < 1:
            yield "probability", f"= {self.probability} must lie in (0, 1)"
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            yield "masked", f"= {self.masked} and random = {self.random} are shares; their sum must not exceed 1"
        if self.mask_id in self.spared_ids:
            yield "spared_ids", f"= {self.spared_ids} holds mask_id too"


def hide_words(
    config: WordMaskConfig, vocab_size: int, ids_BxT: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Chooses tokens and replaces them.

    Args:
        config: the shares.
        vocab_size: random tokens are drawn from it evenly.
        ids_BxT: int32.
        keys: [B] typed keys, one a row.

    Returns:
        (ids int32 [B, T] with replacements, chosen bool [B, T]): the chosen tokens are to be predicted, whatever
        stands in their place.
    """
    shape = ids_BxT.shape[1:]

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        choice, fate, word = jax.random.split(key, 3)
        words = jax.random.randint(word, shape, 0, vocab_size, jnp.int32)
        return jax.random.uniform(choice, shape), jax.random.uniform(fate, shape), words

    choice_BxT, fate_BxT, words_BxT = jax.vmap(draw)(keys)
    spared_BxT = (ids_BxT[:, :, None] == jnp.asarray(config.spared_ids, jnp.int32)[None, None]).any(axis=-1)
    chosen_BxT = (choice_BxT < config.probability) & ~spared_BxT
    hidden_BxT = jnp.where(fate_BxT < config.masked, config.mask_id, words_BxT)
    replaced_BxT = chosen_BxT & (fate_BxT < config.masked + config.random)
    return jnp.where(replaced_BxT, hidden_BxT, ids_BxT), chosen_BxT


def hidden_words_of(
    config: WordMaskConfig, vocab_size: int, batch: Mapping[str, jax.Array], keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `hide_words` of "text", or what the batch says itself: "masked_text" int32 [B, T] and "chosen" bool [B, T]."""
    if "masked_text" in batch:
        return batch["masked_text"], batch["chosen"]
    return hide_words(config, vocab_size, batch["text"], keys)


def distillation_loss(logits_BxTxV: jax.Array, teacher_BxTxV: jax.Array, chosen_BxT: jax.Array) -> jax.Array:
    """-sum p_teacher log p in the chosen places, summed over each row, fp32 [B] (Li et al. 2021, eq. 7)."""
    log_p = jax.nn.log_softmax(logits_BxTxV.astype(jnp.float32), axis=-1)
    p_teacher = jax.nn.softmax(teacher_BxTxV.astype(jnp.float32), axis=-1)
    losses_BxT = -(p_teacher * log_p).sum(axis=-1)
    return jnp.where(chosen_BxT, losses_BxT, 0.0).sum(axis=1)


__all__ = ["WordMaskConfig", "distillation_loss", "hidden_words_of", "hide_words"]
