"""ALBEF for questions about images: the answers of people, written by a decoder (Li et al. 2021, sections 4 and A).

The loss of a question is that of each of its answers, summed over the answer's tokens, times the share of the people
who gave it; with a share of what an averaged model says in the targets.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vlm_jax.data.images import PreprocessConfig
from vlm_jax.data.pipeline import DataConfig
from vlm_jax.data.question_examples import QuestionExamples
from vlm_jax.data.text import Tokenizer
from vlm_jax.flops import TRAIN_OVER_FORWARD
from vlm_jax.losses.masked_words import distillation_loss
from vlm_jax.losses.tokens import correct_tokens, token_cross_entropy
from vlm_jax.mesh import constrain
from vlm_jax.models.albef_vqa import AlbefVqaModelConfig, AlbefVqaModule, AnswerWriter
from vlm_jax.models.generation import Generated, GenerationConfig, generate
from vlm_jax.models.stochastic import row_keys
from vlm_jax.objectives.base import normalise_images
from vlm_jax.objectives.pairs import PairConfig, PairObjective
from vlm_jax.schema import ConfigError
from vlm_jax.step import Aux, Batch, Ratio

_AVERAGED = ("image", "text", "fusion", "decoder", "words")


@dataclasses.dataclass(frozen=True)
class AlbefVqaConfig(PairConfig):
    """Answers to questions about images."""

    model: AlbefVqaModelConfig = AlbefVqaModelConfig()  # the encoders and the decoder
    answer_length: int = 12  # tokens of an answer, start and end token included (published: of the longest in a batch)
    max_answers: int = 10  # different answers of a question, those that most people gave

    def problems(self) -> Iterator[tuple[str, str]]:
        """Answers that are none, or have no positions."""
        yield from super().problems()
        most = self.model.decoder.positions
        if not 3 <= self.answer_length <= most:
            yield "answer_length", f"= {self.answer_length} must lie in [3, model.decoder.positions = {most}]"
        if self.max_answers < 1:
            yield "max_answers", f"= {self.max_answers} must be at least 1"

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Questions begin with the class token, and answers end with the separator."""
        super().check_tokenizer(tokenizer)
        if tokenizer.pad_id != self.model.text.pad_id:
            raise ConfigError(
                f"config.objective.model.text.pad_id = {self.model.text.pad_id} must be the tokenizer's padding "
                f"{tokenizer.pad_id}"
            )
        if not tokenizer.config.bos or tokenizer.eos_id < 0:
            raise ConfigError(
                "config.data.tokenizer must begin a text with a start token (bos = true) and have an end token, which "
                "ends an answer; use config.data.tokenizer=wordpiece"
            )

    def make_example(self, tokenizer: Tokenizer | None, data: DataConfig) -> QuestionExamples:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Image, question, and what people answered."""
        assert tokenizer is not None, "a method that reads text has a tokenizer"
        return QuestionExamples(
            tokenizer, self.image_size, data.preprocess, data.augment, self.max_answers, self.answer_length
        )

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 [B, H, W, 3], `text` int32 [B, T], `answers` int32 [B, A, L], `weights` fp32 [B, A]."""
        shape = (batch_size, self.max_answers)
        return super().batch_shapes(batch_size) | {
            "answers": jax.ShapeDtypeStruct((*shape, self.answer_length), jnp.int32),
            "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
        }

    def forward_flops(self) -> int:
        """Model FLOPs of one question with its answers, places without an answer included."""
        # The end token has no successor to predict.
        answers = self.max_answers * self.model.answer_flops(self.answer_length - 1, self.text_length)
        return self.model.question_flops(self.text_length) + answers

    def train_flops(self) -> float:
        """Three times the model's forward pass, once the averaged model's."""
        return float((TRAIN_OVER_FORWARD + (self.distillation > 0)) * self.forward_flops())

    def build(self, preprocess: PreprocessConfig, dtype: Dtype) -> "AlbefVqa":
        """See the base."""
        return AlbefVqa(self, preprocess, dtype)


class AlbefVqa(PairObjective):
    """See `AlbefVqaConfig`. `extra` holds "averaged" as the next step uses it."""

    joint_space = False
    config: AlbefVqaConfig
    module: AlbefVqaModule

    def __init__(self, config: AlbefVqaConfig, preprocess: PreprocessConfig, dtype: Dtype):
        averaged = _AVERAGED if config.distillation else ()
        super().__init__(config, AlbefVqaModule(config.model, dtype), preprocess, averaged)

    def loss(self, params: Any, extra: Any, batch: Batch, keys: jax.Array, step: jax.Array) -> tuple[Ratio, Aux]:
        """The sum over rows, counted as rows."""
        answers, weights_R = _flat(batch["answers"]), batch["weights"].reshape(-1)
        targets_RxL, padding = answers[:, 1:], self.config.model.decoder.pad_id
        learned_RxL = (targets_RxL != padding) & (weights_R > 0)[:, None]
        logits, statistics = self._answer_logits(params, batch, keys)
        sums_R, counts_R = token_cross_entropy(logits, targets_RxL, learned_RxL)
        share = jnp.zeros(())
        if "averaged" in extra:
            whole = jax.lax.stop_gradient(params | extra["averaged"])
            taught = jax.lax.stop_gradient(self._answer_logits(whole, batch, row_keys(keys, 2))[0])
            share = self._share(step)
            sums_R = (1 - share) * sums_R + share * distillation_loss(logits, taught, learned_RxL)
        hits_R, rows = correct_tokens(logits, targets_RxL, learned_RxL), jnp.asarray(len(keys), jnp.float32)
        metrics = {
            "token_accuracy": ((weights_R * hits_R).sum(), (weights_R * counts_R).sum()),
            "distillation": (share * rows, rows),
        }
        return ((weights_R * sums_R).sum(), rows), Aux(metrics, {"statistics": statistics})

    def _answer_logits(self, params: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, Any]:
        """Logits of the tokens after the first of all answers, [B A, L - 1, V], those of a row beside each other.

        And the statistics of the image tower.
        """
        states, valid, statistics = self._question(params, batch, row_keys(keys, 0))
        count = batch["answers"].shape[1]
        repeated = (jnp.repeat(x, count, axis=0) for x in (states, valid))
        answer_keys = jnp.stack([row_keys(keys, 3 + place) for place in range(count)], axis=1).reshape(-1)
        return self._call(params, "word_logits", _flat(batch["answers"])[:, :-1], *repeated, answer_keys), statistics

    def _question(self, params: Any, batch: Mapping[str, jax.Array], keys: jax.Array | None) -> tuple[Any, Any, Any]:
        """(states of the questions, their valid tokens, statistics of the image tower)."""
        images = normalise_images(batch["image"], self.preprocess)
        states, statistics = self._call(params, "question_states", images, batch["text"], keys)
        return states, self._call(params, "valid", batch["text"]), statistics

    def after(self, extra: Any, params: Any, updates: Any, step: jax.Array) -> Any:
        """The averaged model moved towards the model as the next step sees both (published: at that step's start)."""
        return extra | ({"averaged": self._averaged(params, extra)[1]} if "averaged" in extra else {})

    def outputs(self, params: Any, batch: Mapping[str, jax.Array], intermediates: bool = True) -> dict[str, jax.Array]:
        """See `AlbefVqaModule`, for the first answer of each row where there are answers."""
        answers = batch["answers"][:, 0] if "answers" in batch else None
        return self._apply(params, batch, None, answers=answers, intermediates=intermediates)

    def image_vectors(self, params: Any, images: jax.Array, which: str) -> jax.Array:
        """See the base; there is no space of embeddings."""
        if which == "embedding":
            raise ConfigError("features = 'embedding' needs a projection, which this model lacks; use 'pooled'")
        return self._apply_images(params, images, "image_states")["pooled"].astype(jnp.float32)

    def answer(
        self, params: Any, batch: Mapping[str, jax.Array], config: GenerationConfig, keys: jax.Array | None = None
    ) -> Generated:
        """What the decoder writes to rows of `image` and `text`; see the base."""
        writer: Any = AnswerWriter(self.module, *self._question(params, batch, None)[:2])
        start_Bx1 = batch["text"][:, :1]
        return generate(writer, params, start_Bx1, jnp.ones(start_Bx1.shape, bool), config, keys=keys)

    def rank_answers(
        self, params: Any, batch: Mapping[str, jax.Array], answers_NxL: jax.Array, k: int, first_twice: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See the base."""
        states, valid, _ = self._question(params, batch, None)
        firsts = self._call(params, "word_logits", batch["text"][:, :1], states, valid)[:, 0]
        first_BxN = jnp.take(jax.nn.log_softmax(firsts.astype(jnp.float32)), answers_NxL[:, 1], axis=1)
        best_BxK, places_BxK = jax.lax.top_k(first_BxN, min(k, len(answers_NxL)))

        def likelihood(places_B: jax.Array) -> jax.Array:
            answers = constrain(jnp.take(answers_NxL, places_B, axis=0), "batch", "length")
            return self._call(params, "answer_likelihoods", answers, states, valid).sum(axis=1)

        scores_BxK = jax.lax.map(likelihood, places_BxK.T).T + (best_BxK if first_twice else 0.0)
        order_BxK = jnp.argsort(scores_BxK, axis=1, descending=True)
        ranked = (jnp.take_along_axis(x, order_BxK, axis=1) for x in (places_BxK, jax.nn.log_softmax(scores_BxK)))
        places, log_p = ranked
        return places.astype(jnp.int32), log_p


def _flat(answers_BxAxL: jax.Array) -> jax.Array:
    return constrain(answers_BxAxL.reshape(-1, answers_BxAxL.shape[-1]), "batch", "length")


__all__ = ["AlbefVqa", "AlbefVqaConfig"]
