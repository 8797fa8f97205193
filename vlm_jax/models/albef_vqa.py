"""ALBEF's model for questions about images: the encoders of pairs, and a decoder that writes answers (Li et al. 2021).

The question looks at the image in the fusion encoder; the decoder looks at the question's states in every layer and
writes the answer token by token. The losses on it are `vlm_jax.objectives.albef_vqa`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.mesh import constrain
from vlm_jax.models.albef import PairEncoder, PairEncoderConfig
from vlm_jax.models.attention import KeyValues
from vlm_jax.models.bert import Context, MaskedWordHead, MaskedWordHeadConfig, TextEncoder, TextEncoderConfig
from vlm_jax.models.stochastic import fold_in


@dataclasses.dataclass(frozen=True)
class AlbefVqaModelConfig(PairEncoderConfig):
    """The encoders and the decoder; the defaults are the published ones, the decoder another second half of BERT."""

    decoder: TextEncoderConfig = TextEncoderConfig(depth=6, cross_every=1)  # what writes answers
    words: MaskedWordHeadConfig = MaskedWordHeadConfig()  # what scores its next words

    def problems(self) -> Iterator[tuple[str, str]]:
        """Values that can't be built."""
        yield from super().problems()
        if not self.decoder.cross_every or not self.decoder.depth:
            yield "decoder.cross_every", "= 0, or no layer at all, would see no question; use 1, and depth 1 or more"
        for key in ("vocab_size", "pad_id"):
            own, other = getattr(self.decoder, key), getattr(self.text, key)
            if own != other:
                yield f"decoder.{key}", f"= {own} must equal text.{key} = {other}: one tokenizer serves both"

    def question_flops(self, tokens: int) -> int:
        """Model FLOPs of the states of one question about one image."""
        return self.image.forward_flops(0) + self.text_flops(tokens) + self.fusion_flops(tokens)

    def answer_flops(self, tokens: int, question_tokens: int) -> int:
        """Model FLOPs of the logits of one answer."""
        decoder = self.decoder.stack_flops(tokens, question_tokens, self.fusion.width)
        return decoder + self.words.head_flops(self.decoder, self.decoder.width, tokens)


class AlbefVqaModule(PairEncoder):
    """Parameters: `image/...`, `text/...`, `fusion/...`, `decoder/...`, `words/...`.

    Attributes:
        config: the encoders and the decoder.
        dtype: compute dtype; parameters are fp32.
    """

    config: AlbefVqaModelConfig

    def setup(self) -> None:
        """Declares encoders, decoder and head."""
        super().setup()
        self.decoder = TextEncoder(self.config.decoder, self.dtype, causal=True)
        self.words = MaskedWordHead(self.config.words, self.config.decoder, self.dtype)

    def __call__(
        self,
        images: jax.Array,
        texts: jax.Array,
        keys: jax.Array | None = None,
        answers: jax.Array | None = None,
        *,
        intermediates: bool = False,
    ) -> dict[str, jax.Array]:
        """All that the model says of questions and answers to them.

        Args:
            images: normalised float [B, H, W, 3].
            texts: int32 [B, T], the questions.
            keys: [B] typed keys, one a row, or None at evaluation.
            answers: int32 [B, L], one answer each; None: the start token of the question.
            intermediates: whether to return what stands between the encoders' layers.

        Returns:
            "word_logits" [B, L, V], of the token after each of the answer; the encoders' outputs as "image/tokens",
            "text/tokens", "fusion/tokens", ...
        """
        image = self.image(images, fold_in(keys, 0), intermediates=intermediates)
        text = self.text(texts, fold_in(keys, 1), intermediates=intermediates)
        fused = self.fusion(
            text["tokens"], self.valid(texts), image["tokens"], fold_in(keys, 2), intermediates=intermediates
        )
        answers = texts[:, :1] if answers is None else answers
        outputs = {"word_logits": self.word_logits(answers, fused["tokens"], self.valid(texts), fold_in(keys, 3))}
        del text["table"]
        named = {"image": image, "text": text, "fusion": fused}
        return outputs | {f"{part}/{name}": x for part, found in named.items() for name, x in found.items()}

    def question_states(
        self, images: jax.Array, texts: jax.Array, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Normalised float [B, H, W, 3] and int32 [B, T] -> what the decoder looks at, [B, T, D].

        And the statistics of the images for the tower's running ones, where it has some.
        """
        image = self.image_states(images, fold_in(keys, 0))
        states = self.text(texts, fold_in(keys, 1))["tokens"]
        return self.fuse(states, self.valid(texts), image["tokens"], fold_in(keys, 2)), image.get("statistics")

    def word_logits(
        self, answers: jax.Array, states_BxTxD: jax.Array, valid_BxT: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the token after each of an answer.

        Args:
            answers: int32 [B, L], each from its start token on.
            states_BxTxD: of `question_states`.
            valid_BxT: bool, the tokens of the questions that are no padding.
            keys: [B] typed keys, one a row, or None at evaluation.

        Returns:
            [B, L, V] in the compute dtype.
        """
        context = Context(constrain(states_BxTxD, "batch", "length", "embed"), valid_BxT)
        out = self.decoder(answers, keys, context)
        return self.words(out["tokens"], out["table"])

    def answer_likelihoods(self, answers: jax.Array, states_BxTxD: jax.Array, valid_BxT: jax.Array) -> jax.Array:
        """Arguments as of `word_logits` -> log p of each token after the first, fp32 [B, L - 1]; 0 for padding."""
        log_p = jax.nn.log_softmax(self.word_logits(answers, states_BxTxD, valid_BxT)[:, :-1].astype(jnp.float32))
        own = jnp.take_along_axis(log_p, answers[:, 1:, None], axis=-1)[:, :, 0]
        return jnp.where(answers[:, 1:] != self.config.decoder.pad_id, own, 0.0)


class AnswerWriter:
    """The decoder as `vlm_jax.models.generation` calls one, with one question a row.

    Answers are a few tokens long, so all that is written of one is read again for each token: the ids are the cache.

    Args:
        module: the model.
        states_BxTxD: of its `question_states`.
        valid_BxT: bool, the tokens of the questions that are no padding.
    """

    def __init__(self, module: AlbefVqaModule, states_BxTxD: jax.Array, valid_BxT: jax.Array):
        self._module, self._question = module, (states_BxTxD, valid_BxT)

    def apply(self, variables: Any, *arguments: Any, method: str) -> Any:
        """As of a Flax module, `variables` being those of the whole model; the methods are the following."""
        return getattr(self, method)(variables, *arguments)

    def with_keys(self, variables: Any, ids_BxL: jax.Array, *unused: Any) -> tuple[jax.Array, KeyValues]:
        """(scores of the tokens after the last one, fp32 [B, 1, V]; the ids)."""
        del unused  # Nothing is packed, and positions are counted from the start token.
        return self._scores(variables, ids_BxL, jnp.asarray(ids_BxL.shape[1] - 1)), _as_cache(ids_BxL)

    def step(
        self,
        variables: Any,
        ids_Bx1: jax.Array,
        position_B: jax.Array,
        cache: KeyValues,
        slot: jax.Array,
        seen_BxS: jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        """As `with_keys`, of one more token, which will stand at `slot` of the cache."""
        del position_B, seen_BxS  # All rows begin and go on together, and what is ahead is not seen.
        ids_BxS = jax.lax.dynamic_update_slice_in_dim(cache.keys[0, :, :, 0, 0], ids_Bx1, slot, axis=1)
        return self._scores(variables, ids_BxS, slot), _as_cache(ids_Bx1)

    def logits(self, variables: Any, scores_Bx1xV: jax.Array) -> jax.Array:
        """What the others give are scores already."""
        del variables
        return scores_Bx1xV

    def _scores(self, variables: Any, ids_BxL: jax.Array, last: jax.Array) -> jax.Array:
        # A beam search has several rows for a question, beside each other.
        question = (jnp.repeat(x, ids_BxL.shape[0] // x.shape[0], axis=0) for x in self._question)
        logits: Any = self._module.apply(variables, ids_BxL, *question, method="word_logits")
        return jax.lax.dynamic_slice_in_dim(logits, last, 1, axis=1).astype(jnp.float32)


def _as_cache(ids_BxL: jax.Array) -> KeyValues:
    ids_1xBxLx1x1 = ids_BxL[None, :, :, None, None]
    return KeyValues(ids_1xBxLx1x1, ids_1xBxLx1x1)


__all__ = ["AlbefVqaModelConfig", "AlbefVqaModule", "AnswerWriter"]
